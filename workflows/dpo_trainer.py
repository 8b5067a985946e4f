"""DPOTrainer with the names of TRL and Unsloth."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from workflows import preference_objective
from workflows.model import Model
from workflows.objective import Objective
from workflows.preference_config import DPOConfig
from workflows.preference_trainer import PreferenceTrainer, referred, refuse_reference
from workflows.reference import Reference


class DPOTrainer(PreferenceTrainer):
    """Trains a model's adapters by DPO; the reference is the model as it stands here.

    Args:
        model: a model with adapters.
        ref_model: None; see `workflows.reference`.
        args: a DPOConfig; its own settings may be given here too, as in Unsloth's notebooks.
        train_dataset: rows with prompt, chosen and rejected, texts or messages, or with chosen and
            rejected that begin with the same prompt; see SFTTrainer for where they may come from.
        eval_dataset: rows of the same kinds, or several such data sets by name.
        processing_class, tokenizer: by default the model's own.
        callbacks: objects with methods named as transformers' TrainerCallback has them.
    """

    config = DPOConfig

    def __init__(
        self,
        model: Model,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        train_dataset: Iterable | str | Path | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Sequence[Any] | None = None,
        tokenizer: Any = None,
        **other: Any,
    ):
        refuse_reference("DPOTrainer", ref_model)
        data = train_dataset, eval_dataset
        super().__init__(model, args, *data, processing_class, callbacks, tokenizer, **other)
        if self.args.precompute_ref_log_probs and self.reference is not None:
            self.rows = self._referred(self.rows)
            self.eval_rows = {name: self._referred(some) for name, some in self.eval_rows.items()}

    def _objective(self) -> Objective:
        a = self.args
        self.reference = None if a.reference_free else Reference(self.model)
        return preference_objective.dpo(self.reference, a.weighted, a.beta, a.label_smoothing)

    def _referred(self, rows: list) -> list:
        size = self.args.per_device_train_batch_size
        return referred(rows, self._made(rows, size, 1, False, None), self.reference)


def PatchDPOTrainer() -> None:
    """Nothing: Unsloth's notebooks call it before they import the trainer."""


def PatchKTOTrainer() -> None:
    """Nothing, as PatchDPOTrainer."""
