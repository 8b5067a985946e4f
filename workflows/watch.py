"""What happens between the steps of a run: evaluations, callbacks, the best adapters kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unsloth_jax.dims import Params
from unsloth_jax.following import Plateau
from workflows import evaluate, samples
from workflows.callbacks import Callbacks
from workflows.evaluate import Best
from workflows.keywords import say
from workflows.model import Model
from workflows.run import Run
from workflows.sft_config import SFTConfig

Metrics = dict[str, float]


@dataclass
class Watch:
    """One run's; `run` is set once it is made, since each needs the other."""

    args: SFTConfig
    model: Model
    calls: Callbacks
    total: int
    evaluated: Callable[[Params], Metrics] | None  # None where there is nothing to evaluate on
    log: Callable[[dict[str, Any]], None]
    run: Run | None = None
    best: Best | None = None
    measured: int | None = None  # the step of the last evaluation
    sampled: Callable[[], list[dict[str, str]]] | None = None  # None where nothing is asked

    def begin(self) -> None:
        """Before the first step; where training goes on, before the next."""
        step, epoch = int(self.run.state.step), self.calls.state.epoch
        self._stand(step, epoch)
        self.calls("on_train_begin")
        at_start = step == 0 and self.args.eval_on_start and self.evaluated
        # A signal may have come before the evaluation of the step that was saved.
        if at_start or (step > 0 and self.measured != step and self._due(step, epoch)):
            self.measure()
        self.calls("on_epoch_begin")
        self.calls("on_step_begin")

    def logged(self, row: dict[str, Any]) -> None:
        """A step's row: into the log, then to the callbacks."""
        self._stand(row["step"], row["epoch"])
        self.log(row)
        self.calls("on_log", logs=row)

    def after(self, step: int, epoch: float) -> bool:
        """Whether the run ends with this step."""
        self._stand(step, epoch)
        whole = epoch == int(epoch)
        control = self.calls("on_step_end")
        if whole:
            control = self.calls("on_epoch_end")
        if self._due(step, epoch) or (control.should_evaluate and self.evaluated):
            self.measure()
        self._sample(step, epoch)
        if control.should_save and self.run.saving:
            self.run.save()
        control = self.calls.control
        control.should_evaluate = control.should_save = False
        if control.should_training_stop or step == self.total:
            return control.should_training_stop
        if whole:
            self.calls("on_epoch_begin")
        self.calls("on_step_begin")
        return False

    def saved(self) -> None:
        """A checkpoint has been written, or is on its way to the disk."""
        self.calls("on_save")

    def measure(self) -> Metrics:
        """Evaluates the adapters as they are and keeps them if they are the best."""
        state, adapters = self.calls.state, self.run.state.trainable
        found = self.evaluated(adapters)
        self.measured = state.global_step
        self.log({"step": state.global_step, "epoch": round(state.epoch, 4), **found})
        name = self.args.metric_for_best_model
        self.calls("on_evaluate", metrics=found)
        if name is not None:
            metric, step = evaluate.chosen(found, name), state.global_step
            if step:  # transformers' rates do not see an evaluation before the first step
                self.run.see(metric)
            greater = self.args.greater_is_better
            self.best = evaluate.better(self.best, metric, step, adapters, greater)
            state.best_metric, state.best_global_step = self.best.metric, self.best.step
        return found

    def notes(self) -> tuple[dict[str, Any], Params | None]:
        """What a checkpoint keeps of all this: JSON, and the best adapters."""
        best = self.best and {"metric": self.best.metric, "step": self.best.step}
        kept = {"measured": self.measured, "best": best, "callbacks": self.calls.exported()}
        kept["rate"] = self.run.rate.state() if isinstance(self.run.rate, Plateau) else None
        return kept, self.best and self.best.adapters

    def go_on(self, notes: dict[str, Any], best: Params | None) -> None:
        """Takes up what a checkpoint has kept by `notes`."""
        state = self.calls.state
        state.epoch = self.run.epoch = notes.get("epoch", 0.0)
        self.run.unlogged, self.measured = notes.get("unlogged", []), notes.get("measured")
        if notes.get("best"):
            self.best = Best(**notes["best"], adapters=best)
            state.best_metric, state.best_global_step = self.best.metric, self.best.step
        self.calls.take_up(notes.get("callbacks", {}))
        if isinstance(self.run.rate, Plateau):
            self.run.rate.take_up(notes["rate"])

    def end(self) -> None:
        """After the last step; the model takes the best adapters where that was asked for."""
        self.calls("on_train_end")
        if self.args.load_best_model_at_end and self.best is not None:
            self.model.adapters = self.best.adapters
            name = self.args.metric_for_best_model
            say(f"the adapters are those of step {self.best.step}, {name} {self.best.metric:.4f}")

    def _sample(self, step: int, epoch: float) -> None:
        every = samples.interval(self.args.sample_steps, self.args.eval_steps, self.total)
        if self.sampled and (step % every == 0 or step == self.total):
            self.log({"step": step, "epoch": round(epoch, 4), "samples": self.sampled()})

    def _stand(self, step: int, epoch: float) -> None:
        # A callback may ask the model for an answer; the step before donated what it had.
        self.model.adapters = self.run.state.trainable
        self.calls.state.global_step, self.calls.state.epoch = step, epoch

    def _due(self, step: int, epoch: float) -> bool:
        if self.evaluated is None:
            return False
        every = evaluate.interval(self.args.eval_steps, self.total)
        return evaluate.due(self.args.eval_strategy, every, step, epoch)
