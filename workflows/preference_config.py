"""DPOConfig, ORPOConfig, CPOConfig and KTOConfig: SFTConfig's loop, TRL 1.16's own settings."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from unsloth_jax import preference
from workflows.keywords import say
from workflows.pairs import Cut
from workflows.preference_objective import SFT
from workflows.sft_config import CHOICES, CONFIG_IGNORED, CONFIG_LATER, RANGES, SFTConfig

# SFTConfig's settings of rows that are no answers to a prompt.
ABSENT = (
    "packing", "eval_packing", "dataset_text_field", "completion_only_loss",
    "assistant_only_loss", "truncation", "label_smoothing_factor", "neftune_noise_alpha",
    "eos_token", "pad_token", "chat_template_path", "packing_strategy", "group_by_length",
    "pad_to_multiple_of",
)  # fmt: skip
LOSS = "loss_type"
ENCODERS = "it is of encoder-decoder models"
NO_SYNC = "the reference stays as it is"
IGNORED = CONFIG_IGNORED | {
    "label_pad_token_id": "masks say what is learnt",
    "padding_value": "padding counts nothing",
    "f_alpha_divergence_coef": "f_divergence_type 'alpha_divergence' alone reads it",
    "discopop_tau": "loss_type 'discopop' alone reads it",
    "ref_model_mixup_alpha": NO_SYNC,
    "ref_model_sync_steps": NO_SYNC,
    "precompute_ref_batch_size": "per_device_train_batch_size decides",
    "use_logits_to_keep": "no logits are kept",
}
LATER = CONFIG_LATER | {
    "packing": (False, None),
    "eval_packing": (False, None),
    "packing_strategy": ("bfd", None),
    "group_by_length": (False, None),
    "label_smoothing_factor": (0, None),
    "neftune_noise_alpha": (None, 0),
    "eos_token": (None,),
    "pad_token": (None,),
    "chat_template_path": (None,),
    "disable_dropout": (True,),
    "trust_remote_code": (False,),
    "router_aux_loss_coef": (None, 0.0),
    "pad_to_multiple_of": (None, "auto"),
    "ld_alpha": (None,),
    "f_divergence_type": ("reverse_kl",),
    "use_weighting": (False,),
    "sync_ref_model": (False,),
    "use_liger_kernel": (False,),
    "use_liger_loss": (False, None),
    "generate_during_eval": (False,),
    "is_encoder_decoder": (None, False),
    "ref_model_init_kwargs": (None, {}),
    "model_adapter_name": (None,),
    "ref_adapter_name": (None,),
    "force_use_ref_model": (False,),
    "base_model_attribute_name": ("model",),
    "tools": (None,),
}
POSITIVE = 1e-9


@dataclass(init=False)
class PreferenceConfig(SFTConfig):
    """What the preference trainers' configs share; those of the loop are SFTConfig's.

    Args:
        max_length: tokens of prompt and answer; what is longer is cut, and said. None takes the
            model's, and refuses longer rows.
        max_prompt_length: of a longer prompt its last tokens stay; None keeps all.
        beta: how much deviation from the reference costs; ORPO's weight of the odds ratio.
        train_sampling_strategy: "random", or "sequential" in the data set's order.
    """

    max_length: int | None = 1024
    max_prompt_length: int | None = None
    beta: float = 0.1
    train_sampling_strategy: str = "random"

    absent: ClassVar[tuple[str, ...]] = ABSENT
    ignored: ClassVar[Mapping[str, str]] = IGNORED
    later: ClassVar[Mapping[str, tuple]] = LATER
    choices: ClassVar[Mapping[str, Iterable]] = {
        name: known for name, known in CHOICES.items() if name != LOSS
    } | {"train_sampling_strategy": ("random", "sequential")}
    ranges: ClassVar[Mapping[str, tuple]] = RANGES | {
        "beta": (POSITIVE, None), "max_prompt_length": (1, None),
    }  # fmt: skip

    def cut(self, length: int) -> Cut:
        """How rows become at most `length` tokens."""
        return Cut(length, prompt=self.max_prompt_length, refuse=self._whole_rows)

    def _check_loss(self) -> None:
        """Each trainer's config has a loss of its own."""

    @property
    def _whole_rows(self) -> bool:
        return self.max_length is None and self.max_seq_length is None


@dataclass(init=False)
class DPOConfig(PreferenceConfig):
    """How to train with DPO; defaults of the loop are Unsloth's, of the loss TRL's.

    Args:
        loss_type: one of TRL's losses or a list of them, "sft" (the chosen answers' cross entropy)
            among them.
        loss_weights: a weight for each; by default 1.
        label_smoothing: the share of pairs that are the wrong way round; of "sigmoid" it makes
            conservative DPO.
        rpo_alpha: adds "sft" with this weight, as TRL once did.
        reference_free: every answer is as likely under the reference.
        precompute_ref_log_probs: the reference's log-probabilities of all rows when the trainer is
            made, instead of one step ahead.
        truncation_mode: "keep_start", or "keep_end" of rows that are too long.
        max_completion_length: tokens of an answer; None keeps all.
    """

    loss_type: str | list | tuple = ("sigmoid",)
    loss_weights: list | tuple | None = None
    label_smoothing: float = 0.0
    rpo_alpha: float | None = None
    reference_free: bool = False
    precompute_ref_log_probs: bool = False
    truncation_mode: str = "keep_start"
    max_completion_length: int | None = None

    choices: ClassVar[Mapping[str, Iterable]] = PreferenceConfig.choices | {
        "truncation_mode": ("keep_start", "keep_end")
    }
    ranges: ClassVar[Mapping[str, tuple]] = PreferenceConfig.ranges | {
        "max_completion_length": (1, None), "rpo_alpha": (0, None),
    }  # fmt: skip

    def cut(self, length: int) -> Cut:
        keep_end = self.truncation_mode == "keep_end"
        more = dict(keep_end=keep_end, completion=self.max_completion_length)
        return super().cut(length)._replace(**more)

    @property
    def weighted(self) -> list[tuple[str, float]]:
        """Each loss with its weight."""
        names = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        weights = [1.0] * len(names) if self.loss_weights is None else list(self.loss_weights)
        if not names or len(weights) != len(names):
            raise ValueError(
                f"DPOConfig: loss_weights={self.loss_weights} for loss_type={self.loss_type}; "
                "expected at least one type, and a weight for each"
            )
        more = [] if self.rpo_alpha is None else [(SFT, float(self.rpo_alpha))]
        return [*zip(names, map(float, weights), strict=True), *more]

    def _check_loss(self) -> None:
        names = [name for name, _ in self.weighted]
        smooth = [name for name in names if name in preference.SMOOTHED]
        for name in names:
            # Smoothing is of those that have it; where none has, it is a mistake.
            smoothing = self.label_smoothing if name in smooth or not smooth else 0.0
            if name != SFT or smoothing:
                known = [*preference.DPO, SFT]
                preference.check("DPO", name, known, smoothing)


@dataclass(init=False)
class ORPOConfig(PreferenceConfig):
    """How to train with ORPO, which needs no reference; `beta` is the paper's lambda."""

    absent: ClassVar[tuple[str, ...]] = (*ABSENT, LOSS)
    ignored: ClassVar[Mapping[str, str]] = IGNORED | {"max_completion_length": ENCODERS}


@dataclass(init=False)
class CPOConfig(PreferenceConfig):
    """How to train with CPO, or SimPO: loss_type="simpo" and cpo_alpha=0.

    Args:
        loss_type: "sigmoid", "hinge", "ipo" or "simpo".
        cpo_alpha: the weight of the chosen answers' cross entropy.
        simpo_gamma: the margin that "simpo" wants.
        label_smoothing: the share of pairs that are the wrong way round.
    """

    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    cpo_alpha: float = 1.0
    simpo_gamma: float = 0.5

    ignored: ClassVar[Mapping[str, str]] = IGNORED | {"max_completion_length": ENCODERS}
    later: ClassVar[Mapping[str, tuple]] = LATER | {"alpha": (0.0,)}

    def _check_loss(self) -> None:
        preference.check("CPO", self.loss_type, preference.CPO, self.label_smoothing)


@dataclass(init=False)
class KTOConfig(PreferenceConfig):
    """How to train with KTO.

    Args:
        loss_type: "kto", or "apo_zero_unpaired", which estimates no KL.
        desirable_weight, undesirable_weight: of the two kinds of answers.
    """

    loss_type: str = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    train_sampling_strategy: str = "sequential"

    ignored: ClassVar[Mapping[str, str]] = IGNORED | {
        "precompute_ref_log_probs": "they are found one step ahead",
        "max_completion_length": ENCODERS,
    }
    ranges: ClassVar[Mapping[str, tuple]] = PreferenceConfig.ranges | {
        "desirable_weight": (0, None), "undesirable_weight": (0, None),
    }  # fmt: skip

    def _check_loss(self) -> None:
        preference.check("KTO", self.loss_type, preference.KTO, 0.0)
        if self.loss_type == "kto" and (
            self.per_device_train_batch_size * self.gradient_accumulation_steps < 2
        ):
            raise ValueError(
                "KTOConfig: a step of one row has no answer of another prompt to estimate the KL "
                "from; raise per_device_train_batch_size or gradient_accumulation_steps, or take "
                "loss_type='apo_zero_unpaired'"
            )


def replaced(where: str, args: PreferenceConfig, old: Mapping[str, Any]) -> PreferenceConfig:
    """A copy of the config in which a trainer's own keywords stand; None leaves the config's.

    Raises TypeError and ValueError as the config does, and says which setting was replaced.
    """
    own, plain = copy.copy(args), type(args)()
    for name, value in old.items():
        if value is None:
            continue
        if getattr(own, name) not in (getattr(plain, name), value):
            say(
                f"{where}({name}={value!r}) replaces {type(args).__name__}'s {getattr(own, name)!r}"
            )
        setattr(own, name, value)
    own._check()
    return own


def own_names(config: type[PreferenceConfig]) -> tuple[str, ...]:
    """Settings that a preference config has beside SFTConfig's, and `max_length`."""
    shared = {f.name for f in fields(SFTConfig)} - {"max_length", LOSS} | {*config.absent}
    return tuple(f.name for f in fields(config) if f.name not in shared)
