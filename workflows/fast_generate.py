"""`fast_generate` with Unsloth's call shape and vLLM's names of what comes back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bridge import peft_adapter
from bridge import tokenizer as text
from unsloth_jax import lora
from unsloth_jax.dims import Params
from workflows import rollout
from workflows.keywords import settle
from workflows.sampling_params import SamplingParams

LIVE = "live"  # the model's own adapters, as they are
IGNORED = {"use_tqdm": "there is no progress bar", "priority": "prompts stand in their order"}
USED = ("prompts", "sampling_params", "lora_request", "slots", "seed", "weights")


class CompletionOutput(NamedTuple):
    """One completion."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[float]  # tempered, before penalty and filters
    finish_reason: str  # "stop" or "length"
    stop_reason: int | str | None


class RequestOutput(NamedTuple):
    """A prompt's completions."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class LoRARequest(NamedTuple):
    """Adapters of a PEFT folder, for `fast_generate`."""

    name: str
    adapters: Params
    scale: float


def load_lora(model: Any, folder: str | Path) -> LoRARequest:
    """A PEFT folder's adapters, which stand in the model's place in one call of `fast_generate`.

    Raises ValueError where they don't fit the model's base.
    """
    if model.initial is not None:
        raise ValueError(
            f"load_lora({str(folder)!r}): this model's base was changed by init_lora_weights="
            f"{model.peft.start!r}; load the folder with FastLanguageModel.from_pretrained"
        )
    adapters, s = peft_adapter.load(folder, model.params)
    return LoRARequest(str(folder), adapters, lora.scaling(s.alpha, s.rank, s.rslora))


def fast_generate(
    model: Any,
    prompts: Any,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    lora_request: LoRARequest | str | None = LIVE,
    *,
    slots: int = rollout.SLOTS,
    seed: int = 3407,
    weights: str = "auto",
    **other: Any,
) -> list[RequestOutput]:
    """Each prompt's completions, in order; see `Model.fast_generate`."""
    settle("fast_generate", other, USED, IGNORED, {})
    whole = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
    if whole and isinstance(whole[0], int):
        whole = [whole]
    asked = [_ids(model, n, prompt) for n, prompt in enumerate(whole)]
    settings = SamplingParams() if sampling_params is None else sampling_params
    found = rollout.run(
        model.family, model.config, _params(model, lora_request), [ids for _, ids in asked],
        settings, stop_ids=model.stop_ids(), seed=seed, slots=slots, weights=weights,
        decode=model.tokenizer.decode,
    )  # fmt: skip
    each = [settings] * len(asked) if isinstance(settings, SamplingParams) else settings
    return [
        RequestOutput(said, ids, [_output(model, n, one, how) for n, one in enumerate(group)])
        for (said, ids), group, how in zip(asked, found.completions, each, strict=True)
    ]


def _ids(model: Any, n: int, prompt: Any) -> tuple[str | None, list[int]]:
    """A prompt's text, where there is one, and its token ids."""
    if isinstance(prompt, str):
        return prompt, text.ids(model.tokenizer, prompt)
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else prompt
    if isinstance(ids, Sequence) and all(isinstance(i, int) for i in ids):
        return None, list(ids)
    raise ValueError(
        f"fast_generate: prompt {n} must be text, token ids or {{'prompt_token_ids': ids}}, got "
        f"{prompt!r:.80}"
    )


def _params(model: Any, request: LoRARequest | str | None) -> Params:
    if request == LIVE:
        return model.adapted()
    if isinstance(request, LoRARequest):
        return lora.attach(model.params, request.adapters, request.scale)
    if request is not None:
        raise ValueError(
            f"fast_generate: lora_request must be what load_lora gave, or None for the base alone, "
            f"got {request!r:.80}"
        )
    if model.initial is not None or model.adapters and lora.parts(model.adapters)[1]:
        raise ValueError(
            "fast_generate: lora_request=None asks for the base alone, but this model's base was "
            "changed: weights are trained whole, or adapters began as a part of it"
        )
    return model.params


def _output(
    model: Any, n: int, one: rollout.Completion, settings: SamplingParams
) -> CompletionOutput:
    said = model.tokenizer.decode(one.tokens, skip_special_tokens=True)
    if one.stop_reason in settings.stops:
        said = said[: said.index(one.stop_reason)]  # as vLLM leaves it out
    return CompletionOutput(
        n, said, one.tokens, sum(one.logprobs), one.logprobs, one.finish_reason, one.stop_reason
    )
