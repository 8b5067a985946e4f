"""ORPOTrainer with the names of TRL, where it stands in trl.experimental.orpo, and Unsloth."""

from workflows import preference_objective
from workflows.objective import Objective
from workflows.preference_config import ORPOConfig
from workflows.preference_trainer import PreferenceTrainer


class ORPOTrainer(PreferenceTrainer):
    """Trains a model's adapters by ORPO, which needs no reference.

    Args:
        model: a model with adapters.
        args: an ORPOConfig; its own settings may be given here too.
        train_dataset, eval_dataset: rows as DPOTrainer takes them.
        processing_class, tokenizer: by default the model's own.
        callbacks: objects with methods named as transformers' TrainerCallback has them.
    """

    config = ORPOConfig

    def _objective(self) -> Objective:
        return preference_objective.orpo(self.args.beta)
