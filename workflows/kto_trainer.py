"""KTOTrainer with the names of TRL and Unsloth."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from workflows import preference_objective
from workflows.facts import digest
from workflows.keywords import say
from workflows.model import Model
from workflows.objective import Objective
from workflows.pair_batches import JudgedBatches
from workflows.pairs import Judged, judged
from workflows.preference_config import KTOConfig
from workflows.preference_trainer import PreferenceTrainer, refuse_reference
from workflows.reference import Reference

MOST = 4 / 3  # of the two kinds' weighted numbers (KTO's paper, equation 8)


class KTOTrainer(PreferenceTrainer):
    """Trains a model's adapters by KTO; the reference is the model as it stands here.

    Args:
        model: a model with adapters.
        ref_model: None; see `workflows.reference`.
        args: a KTOConfig; its own settings may be given here too.
        train_dataset, eval_dataset: rows with prompt, completion and label, or pairs as DPOTrainer
            takes them, which are taken apart.
        processing_class, tokenizer: by default the model's own.
        callbacks: objects with methods named as transformers' TrainerCallback has them.

    Raises ValueError where all labels are the same.
    """

    config = KTOConfig

    def __init__(
        self,
        model: Model,
        ref_model: Any = None,
        args: KTOConfig | None = None,
        train_dataset: Iterable | str | Path | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Sequence[Any] | None = None,
        tokenizer: Any = None,
        **other: Any,
    ):
        refuse_reference("KTOTrainer", ref_model)
        data = train_dataset, eval_dataset
        super().__init__(model, args, *data, processing_class, callbacks, tokenizer, **other)
        a = self.args
        balance(self.rows, a.desirable_weight, a.undesirable_weight)
        if a.train_sampling_strategy == "sequential":
            say_unmixed(self.rows, a.per_device_train_batch_size * a.gradient_accumulation_steps)

    def _objective(self) -> Objective:
        self.reference = Reference(self.model)
        names = ("loss_type", "beta", "desirable_weight", "undesirable_weight")
        settings = {name: getattr(self.args, name) for name in names}
        return preference_objective.kto(self.reference, settings)

    def _rows(self, dataset: Any) -> list[Judged]:
        how = self.args.cut(self.length), self.model.config.vocab
        return judged(dataset, self.tokenizer, *how)

    def _made(
        self, rows: Sequence[Any], batch: int, accumulation: int, packing: bool, seed: int | None
    ) -> JudgedBatches:
        turned = self.args.loss_type == "kto"
        size = 2 * batch if turned else batch
        seed = None if self.args.train_sampling_strategy == "sequential" else seed
        return JudgedBatches(rows, size, accumulation, self.length, False, seed, turned)

    @property
    def train_dataset(self) -> list[dict[str, Any]]:
        """The rows that are trained on, as token ids by TRL's names."""
        found = []
        for row, desirable in self.rows:
            at = row.mask.index(1)
            ids = {"prompt_ids": row.tokens[:at], "completion_ids": row.tokens[at:]}
            found.append(ids | {"label": desirable})
        return found

    def _digest(self, rows: Sequence[Judged]) -> str:
        return digest(rows)


def balance(
    rows: Sequence[Judged], desirable_weight: float | int, undesirable_weight: float | int
) -> None:
    """Says which weights suit the data where these don't, as TRL does.

    Raises ValueError where all labels are the same.
    """
    good = sum(row.desirable for row in rows)
    bad = len(rows) - good
    if not good or not bad:
        raise ValueError(
            f"all {len(rows)} labels are {bool(good)}: KTO learns from answers of both kinds; add "
            f"rows with label {not good}, or take SFTTrainer for answers that are all as wanted"
        )
    share = desirable_weight * good / max(undesirable_weight * bad, 1e-30)
    if good != bad and not 0.995 <= share <= MOST * 1.005:
        least, other = bad * undesirable_weight / good, good * desirable_weight / bad
        say(
            f"{good} desirable and {bad} undesirable rows: take desirable_weight from {least:.2f} "
            f"to {MOST * least:.2f}, or undesirable_weight from {other / MOST:.2f} to {other:.2f}"
        )


def say_unmixed(rows: Sequence[Judged], size: int) -> None:
    """Says where most steps of `size` rows, in their order, have answers of one kind only."""
    steps = [{row.desirable for row in rows[at : at + size]} for at in range(0, len(rows), size)]
    alike = sum(len(kinds) == 1 for kinds in steps)
    if size > 1 and 2 * alike > len(steps):
        say(
            f"{alike} of {len(steps)} steps have answers of one kind only, since rows come in "
            "their order: train_sampling_strategy='random' mixes them"
        )
