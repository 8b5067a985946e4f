"""Callbacks of a training run: transformers' events, state and control, without its trainer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

EVENTS = (
    "on_init_end", "on_train_begin", "on_epoch_begin", "on_step_begin", "on_step_end", "on_log",
    "on_evaluate", "on_save", "on_epoch_end", "on_train_end",
)  # fmt: skip
# Events of transformers that have no place here: an optimizer step is one program.
INNER = (
    "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_prediction_step",
    "on_predict", "on_push_begin",
)  # fmt: skip
UNHEARD = {
    "should_epoch_stop": "should_training_stop ends it",
    "should_log": "SFTConfig's logging_steps decides",
}


@dataclass
class State:
    """Where a run stands, in the names of transformers' TrainerState."""

    epoch: float = 0.0
    global_step: int = 0
    max_steps: int = 0
    num_train_epochs: int = 0
    logging_steps: int = 1
    train_batch_size: int = 1
    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False


@dataclass
class Control:
    """What a callback asks for by setting a field to True."""

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False


@dataclass
class Callbacks:
    """Calls each callback's method of an event with what transformers hands over."""

    members: Sequence[Any]
    args: Any
    state: State
    control: Control = field(default_factory=Control)
    beside: dict[str, Any] = field(default_factory=dict)  # model, processing_class, ...

    def __call__(self, event: str, **more: Any) -> Control:
        """Raises ValueError where a callback asks for what a run can't do.

        And TypeError where one returns something else than its control.
        """
        for member in self.members:
            method = getattr(member, event, None)
            if method is None:
                continue
            answer = method(self.args, self.state, self.control, **self.beside, **more)
            if answer is not None and answer is not self.control:
                raise TypeError(
                    f"callback {type(member).__name__}.{event} returned "
                    f"{type(answer).__name__}, expected the control it was given, or nothing"
                )
        for name, remedy in UNHEARD.items():
            if getattr(self.control, name):
                raise ValueError(f"a callback set {name}, which a run here can't do; {remedy}")
        return self.control

    def exported(self) -> dict[str, list[dict[str, Any]]]:
        """Attributes that callbacks want kept in a checkpoint, by class and in order.

        They are those that transformers' `state` method names (ExportableState).
        """
        kept: dict[str, list] = {}
        for member in self.members:
            if callable(getattr(member, "state", None)):
                name = type(member).__name__
                kept.setdefault(name, []).append(member.state().get("attributes", {}))
        return kept

    def take_up(self, kept: dict[str, list[dict[str, Any]]]) -> None:
        """Gives callbacks the attributes that `exported` found."""
        left = {name: list(of) for name, of in kept.items()}
        for member in self.members:
            of = left.get(type(member).__name__)
            for name, value in (of.pop(0) if of else {}).items():
                setattr(member, name, value)


def checked(given: Sequence[Any] | None) -> list[Any]:
    """Callback objects of objects and classes, as transformers takes them.

    Raises TypeError for something without an event, ValueError for one that needs an inner event.
    """
    if given is None:
        return []
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"callbacks must be a list of callbacks, got {type(given).__name__}")
    out = [one() if isinstance(one, type) else one for one in given]
    for one in out:
        has = [name for name in EVENTS if callable(getattr(one, name, None))]
        if not has:
            raise TypeError(
                f"callback {type(one).__name__} has no method of an event; known: {list(EVENTS)}"
            )
        asks = [name for name in INNER if _own(one, name)]
        if asks:
            raise ValueError(
                f"callback {type(one).__name__} listens to {asks}, which a run here has not; "
                f"known: {list(EVENTS)}"
            )
    return out


def _own(callback: Any, name: str) -> bool:
    """Whether a method is more than transformers' empty one."""
    method = getattr(type(callback), name, None)
    return method is not None and not method.__qualname__.startswith("TrainerCallback.")
