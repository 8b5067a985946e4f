"""Answers to a few prompts while a run goes on: greedy, with the adapters as they are then."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from bridge import tokenizer as text
from unsloth_jax import tree
from unsloth_jax.leaves import Hosted
from unsloth_jax.sample import Sampling
from workflows import evaluate
from workflows.model import Model

SHARE = 0.1  # of a run: how often samples are drawn where nothing says
Sample = dict[str, str]  # "prompt", "completion"


def sampler(model: Model, prompts: Sequence[Any], limit: int) -> Callable[[], list[Sample]]:
    """fn() -> one sample a prompt, of at most `limit` tokens, from the model's adapters.

    A text stands as it is; messages go through the model's chat template. All prompts are one
    batch, which compiles once, and weights are read as they are stored, so that the run keeps its
    memory. Raises ValueError for a prompt that leaves no room.
    """
    rows = [_ids(model, prompt) for prompt in prompts]
    for i, row in enumerate(rows):
        if not 0 < len(row) <= model.max_seq_length - limit:
            raise ValueError(
                f"sample_prompts[{i}] has {len(row)} tokens, expected 1 to "
                f"{model.max_seq_length - limit}: max_seq_length less sample_max_new_tokens"
            )
    greedy = dict(max_new_tokens=limit, sampling=Sampling(temperature=0.0), weights="stored")

    def draw() -> list[Sample]:
        with _table_on_device(model):
            answers = model.answers(rows, **greedy)
        bodies = [a.tokens[:-1] if a.stopped else a.tokens for a in answers]
        pairs = zip(prompts, bodies, strict=True)
        return [{"prompt": shown(p), "completion": model.tokenizer.decode(b)} for p, b in pairs]

    return draw


def _ids(model: Model, prompt: Any) -> list[int]:
    return text.ids(model.tokenizer, prompt, add_generation_prompt=not isinstance(prompt, str))


def shown(prompt: Any) -> str:
    """A prompt as a person reads it: of messages the last one's text."""
    last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return last if isinstance(last, str) else str(last)


def interval(steps: int | float | None, eval_steps: int | float | None, total: int) -> int:
    """Steps between samples: those given, else between evaluations, else a tenth of the run."""
    return evaluate.interval(steps or eval_steps or SHARE, total)


def checked(prompts: Any) -> None:
    """Raises TypeError where a prompt is neither a text nor messages, ValueError for an empty one.

    None, no prompts, is fine.
    """
    for i, prompt in enumerate(prompts or []):
        talk = isinstance(prompt, list | tuple) and all(
            isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt
        )
        if not isinstance(prompt, str) and not talk:
            raise TypeError(
                f"SFTConfig: sample_prompts[{i}] must be a text or a list of messages with role "
                f"and content, got {prompt!r:.80}"
            )
        if not prompt:
            raise ValueError(f"SFTConfig: sample_prompts[{i}] is empty")


@contextmanager
def _table_on_device(model: Model) -> Iterator[None]:
    """Inside, an embedding table that a run keeps in host memory is on the device too."""
    held = model.params
    placed = lambda _, leaf: jax.device_put(leaf.table) if isinstance(leaf, Hosted) else leaf
    model.params = tree.map_paths(placed, held)
    try:
        yield
    finally:
        model.params = held
