"""The optimizer of a run: what SFTConfig asks for, or what was handed to the trainer."""

import ast
from collections.abc import Callable, Mapping
from typing import Any

import optax

from unsloth_jax import lora, optim
from unsloth_jax.dims import Params
from unsloth_jax.directions import TABLES
from workflows.sft_config import SFTConfig


def rates(a: SFTConfig, trainable: Params) -> optim.Groups:
    """Parameter groups of a config. Raises ValueError for a rate that nothing would learn at."""
    pairs, whole = lora.parts(trainable)
    tables = [p for p in whole if p.rpartition(".")[0].rpartition(".")[2] in TABLES]
    if a.embedding_learning_rate is not None and not tables:
        raise ValueError(
            f"embedding_learning_rate={a.embedding_learning_rate}, but neither embed_tokens nor "
            "lm_head is trained: name them in get_peft_model's target_modules"
        )
    if a.loraplus_lr_ratio is not None and not pairs:
        raise ValueError(
            f"loraplus_lr_ratio={a.loraplus_lr_ratio} is a ratio of adapters' rates, but the model "
            "has no adapters"
        )
    own = a.embedding_learning_rate
    return optim.by_path(
        loraplus=1.0 if a.loraplus_lr_ratio is None else a.loraplus_lr_ratio,
        embedding=1.0 if own is None else own / a.learning_rate,
    )


def optimizer(
    a: SFTConfig, total: int, trainable: Params, given: tuple[Any, Any] = (None, None)
) -> tuple[optax.GradientTransformation, Callable]:
    """(the steps, the learning rate of each), for a run of `total` steps."""
    made, rate = given
    if made is not None and rate is None and a.follows:
        raise ValueError(
            f"lr_scheduler_type={a.lr_scheduler_type!r} sets the rate of the config's optimizer; "
            "one that is handed over holds its own"
        )
    rate = a.schedule(a.warmup(total), total) if rate is None else rate
    if made is None:
        made = optim.make(
            a.optim, rate, weight_decay=a.weight_decay, max_grad_norm=a.max_grad_norm or 0.0,
            b1=a.adam_beta1, b2=a.adam_beta2, eps=a.adam_epsilon, options=arguments(a.optim_args),
            groups=rates(a, trainable),
        )  # fmt: skip
    return made, rate


def handed(given: Any) -> tuple[Any, Any]:
    """A trainer's `optimizers`: an optax transformation and a schedule, or None for either.

    The transformation holds its own rate and clipping; the schedule is what is logged. Raises
    TypeError for other things, such as torch's.
    """
    if given is None:
        return None, None
    fine = isinstance(given, tuple) and len(given) == 2
    made, rate = given if fine else (None, None)
    fine = fine and (made is None or isinstance(made, optax.GradientTransformation))
    if not fine or not (rate is None or callable(rate)):
        raise TypeError(
            "optimizers must be (an optax.GradientTransformation or None, a function of the step "
            f"or None), got {given!r:.80}"
        )
    return made, rate


def arguments(given: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """`optim_args` as a dictionary: "momentum=0.9,nesterov=True", or a mapping.

    Raises ValueError for a part that is no name=value.
    """
    if not isinstance(given, str):
        return dict(given or {})
    found = {}
    for part in filter(None, (part.strip() for part in given.split(","))):
        name, equals, value = (side.strip() for side in part.partition("="))
        if not (name and equals and value):
            raise ValueError(f"optim_args: expected name=value parts, got {part!r} in {given!r}")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
