"""Tokens added to a model and its tokenizer."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
from transformers import PreTrainedTokenizerBase

from unsloth_jax.lora import trained
from workflows.keywords import neutral, ranged, say, typed

if TYPE_CHECKING:
    from workflows.model import Model

SEED = 3407


def resize(model: "Model", count: int, how: str = "mean") -> None:
    """Gives the model a vocabulary of `count`; see `lora.trained.resize`.

    Raises ValueError where the model has adapters: they come after.
    """
    typed("resize_token_embeddings", {"new_num_tokens": count}, {"new_num_tokens": int})
    ranged("resize_token_embeddings", {"new_num_tokens": count}, {"new_num_tokens": (1, None)})
    if model.adapters is not None:
        raise ValueError(
            "the vocabulary is resized before get_peft_model: the model has adapters already"
        )
    model.params = trained.resize(model.params, count, jax.random.key(SEED), how)
    model.config = dataclasses.replace(model.config, vocab=count)


def add_new_tokens(
    model: "Model",
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: Sequence[str] = (),
    method: str = "mean",
    interpolation: float = 0.5,
) -> None:
    """Adds tokens to the tokenizer itself and to the model, before get_peft_model.

    As in Unsloth the vocabulary then has as many rows as the tokenizer tokens, new ones near the
    mean of the others; get_peft_model trains both tables whole. Tokens that are there are left.
    """
    neutral("add_new_tokens", "method", method, ("mean",))
    neutral("add_new_tokens", "interpolation", interpolation, (0.5,))
    if isinstance(new_tokens, str) or not all(isinstance(t, str) and t for t in new_tokens):
        raise TypeError(f"new_tokens must be a list of texts, got {new_tokens!r}")
    if model.adapters is not None:
        raise ValueError("add_new_tokens comes before get_peft_model: the model has adapters")
    known = tokenizer.get_vocab()
    there = [token for token in new_tokens if token in known]
    if there:
        say(f"add_new_tokens: the tokenizer has {there} already")
    fresh = [*dict.fromkeys(token for token in new_tokens if token not in known)]
    if not fresh:
        return
    before = len(tokenizer)
    tokenizer.add_tokens(fresh)
    # Rows past the tokenizer's tokens were never trained: their numbers go to the new tokens.
    if before < model.config.vocab:
        resize(model, before)
    resize(model, len(tokenizer))


def config_of(fields: dict[str, Any], count: int) -> dict[str, Any]:
    """config.json's fields for a vocabulary of `count`."""
    return fields if fields.get("vocab_size", count) == count else fields | {"vocab_size": count}
