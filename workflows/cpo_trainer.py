"""CPOTrainer with the names of TRL, where it stands in trl.experimental.cpo, and Unsloth."""

from workflows import preference_objective
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

    def _objective(self) -> Objective:
        names = ("loss_type", "beta", "label_smoothing", "cpo_alpha", "simpo_gamma")
        return preference_objective.cpo({name: getattr(self.args, name) for name in names})
