"""CPOTrainer with the names of TRL, where it stands in trl.experimental.cpo, and Unsloth."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from workflows import preference_objective
from workflows.model import Model
from workflows.objective import Objective
from workflows.preference_config import CPOConfig
from workflows.preference_trainer import PreferenceTrainer


class CPOTrainer(PreferenceTrainer):
    """Trains a model's adapters by CPO, or by SimPO (loss_type="simpo", cpo_alpha=0).

    Args:
        model: a model with adapters.
        args: a CPOConfig; its own settings may be given here too.
        train_dataset, eval_dataset: rows as DPOTrainer takes them.
        processing_class, tokenizer: by default the model's own.
        callbacks: objects with methods named as transformers' TrainerCallback has them.
    """

    config = CPOConfig

    def __init__(
        self,
        model: Model,
        args: CPOConfig | None = None,
        train_dataset: Iterable | str | Path | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Sequence[Any] | None = None,
        tokenizer: Any = None,
        **other: Any,
    ):
        given = dict(args=args, train_dataset=train_dataset, eval_dataset=eval_dataset)
        given |= dict(processing_class=processing_class, tokenizer=tokenizer, callbacks=callbacks)
        super().__init__(model, given, other)

    def _objective(self) -> Objective:
        names = ("loss_type", "beta", "label_smoothing", "cpo_alpha", "simpo_gamma")
        return preference_objective.cpo({name: getattr(self.args, name) for name in names})
