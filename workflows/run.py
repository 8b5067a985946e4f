"""The loop of a training run, and a run that goes on from a checkpoint."""

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge.checkpoint import FULL, Checkpoints, Damaged, Restored
from bridge.export import versions
from unsloth_jax import following, train
from unsloth_jax.dims import Batch, Params, Total
from workflows import machine, moving, output_folder
from workflows.batching import Steps
from workflows.evaluate import means
from workflows.generate import Stopwatch
from workflows.interrupts import Interrupts, uninterrupted
from workflows.keywords import say
from workflows.objective import SFT, Objective, embedded

Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Saving:
    """When checkpoints are written, where, and what is in them beside the state.

    `facts` must be those of the run that goes on from one; `notes` is what else is known then:
    JSON, and the best adapters or None.
    """

    checkpoints: Checkpoints
    every: int | None  # steps; None where only a callback asks for one
    facts: dict[str, Any]
    notes: Callable[[], tuple[dict[str, Any], Params | None]] = lambda: ({}, None)


@dataclass
class Run:
    """One training run: its state is finite and whole after every step, whatever ends it.

    As a context it answers Ctrl-C and SIGTERM, writes a checkpoint where they end the run, and
    leaves when the last one is on the disk; a second signal leaves at once.
    """

    step: Callable
    state: train.State
    frozen: Params
    batches: Steps
    rate: Callable
    total: int
    log: Log = lambda row: None
    log_every: int = 1
    saving: Saving | None = None
    find: Callable[[Params, Params, Batch], str] | None = None  # where a step is not finite
    after: Callable[[int, float], bool] = lambda step, epoch: False  # True ends the run
    on_save: Callable[[], None] = lambda: None
    objective: Objective = SFT
    losses: list[float] = field(default_factory=list)  # one a step taken here
    metrics: list[dict[str, Total]] = field(default_factory=list)  # of the steps since a log
    unlogged: list[float] = field(default_factory=list)  # losses since the last logged row
    epoch: float = 0.0
    interrupts: Interrupts = field(default_factory=Interrupts)

    def __post_init__(self) -> None:
        self.saved = self.began = int(self.state.step)  # `saved` needs no checkpoint any more

    def __enter__(self) -> "Run":
        self.interrupts.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            asked = self.interrupts.asked is not None and kind is not None
            if self.saving and not self.interrupts.twice:
                ended = asked and issubclass(kind, KeyboardInterrupt | SystemExit)
                if ended and self.saving.every is not None:
                    self.save()
                self._written(failing=kind is not None)
            if asked:
                self._say_where()
        finally:
            self.interrupts.__exit__()
        if kind is None:
            self.interrupts.check()

    def __call__(self) -> train.State:
        """Takes the steps that are left; raises FloatingPointError where a loss is not finite."""
        done, clock, seen, moved = int(self.state.step), Stopwatch(), 0, False
        left = itertools.islice(self.batches.forever(done), self.total - done)
        coming = (self._ready(step, *found) for step, found in enumerate(left, start=done + 1))
        ready = next(coming, None)
        while ready is not None:
            self.epoch, tokens, batch = ready
            with jax.default_device(jax.devices("cpu")[0]):
                rate = float(self.rate(jnp.asarray(done)))  # no dispatch of its own on the device
            marks = moving.marks(self.state.trainable) if rate > 0 and not moved else None
            report = self._step(batch)
            # Made while the device works: what the report holds is waited for below.
            ready = next(coming, None)
            done, seen = done + 1, seen + tokens
            self._finite(report, done, batch)
            self.losses.append(float(report.loss))
            self.unlogged.append(self.losses[-1])
            self.metrics.append(jax.device_get(report.metrics))
            resting = self.objective.rests and float(report.grad_norm) == 0
            if marks is not None and not resting:
                moving.check(marks, self.state.trainable)
                moved = True
            if done % self.log_every == 0 or done == self.total:
                mean = float(np.mean(self.unlogged))
                counts = self.objective.counts
                row = _row(done, self.epoch, rate, mean, report, seen, clock(), counts)
                self.log(row | means(self.metrics))
                clock, seen = Stopwatch(), 0
                self.unlogged.clear()
                self.metrics.clear()
            watched = Stopwatch()
            with self.interrupts.open():
                stop = self.after(done, self.epoch)
            self._noticed()
            clock.pause(watched())
            if self._due(done, stop):
                self.save()
            if stop:
                break
        return self.state

    def see(self, metric: float) -> None:
        """Shows a metric to a rate that follows it; the next step takes what becomes of it."""
        if isinstance(self.rate, following.Plateau):
            self.rate.see(metric)
            opt = following.held(self.state.opt, self.rate.rate)
            self.state = self.state.replace(opt=opt)

    def save(self) -> None:
        """Starts a checkpoint of the state as it is, unless this step has one.

        Waits for the one before; raises what that failed with, a full disk aside.
        """
        done = int(self.state.step)
        if done == self.saved:
            return
        self._noticed(wait=True)
        where = self.saving.checkpoints
        if self.saved == self.began:
            output_folder.refuse_to_mix(where.folder, self.began)
        notes, best = self.saving.notes()
        notes |= {"epoch": self.epoch, "unlogged": self.unlogged, "versions": versions()}
        where.save(done, self.state, self.saving.facts, notes=notes, best=best)
        self.saved = done
        self.on_save()

    def _due(self, done: int, stop: bool) -> bool:
        every = self.saving and self.saving.every
        return bool(every) and (stop or done % every == 0 or done == self.total)

    def _noticed(self, wait: bool = False) -> None:
        """Says that a checkpoint found no room, which leaves the one before; raises any other."""
        if self.saving is None:
            return
        where = self.saving.checkpoints
        try:
            where.wait() if wait else where.poll()
        except OSError as error:
            if error.errno not in FULL:
                raise
            say(f"{error}. Training goes on; the last whole checkpoint is {where.latest()}")

    def _written(self, failing: bool) -> None:
        """Waits for the last checkpoint; what it failed with is said beside another error."""
        try:
            self.saving.checkpoints.wait()
        except (OSError, RuntimeError) as error:
            self.saved = None
            if not failing:
                raise
            say(str(error))

    def _say_where(self) -> None:
        """One line on what is left of a run that a signal has ended."""
        done, kept = int(self.state.step), "no checkpoint was written"
        there = self.saving and not self.interrupts.twice
        if there and self.saved == done == self.saving.checkpoints.latest():
            kept = f"its newest checkpoint is in {self.saving.checkpoints.folder}"
        say(f"stopped after step {done}: the model has its adapters, {kept}")

    def _ready(self, step: int, epoch: float, batch: Batch) -> tuple[float, int, Batch]:
        """(epoch, tokens that are no padding, the batch on its way to the device)."""
        tokens = int((batch.segments > 0).sum())
        ready = self.objective.ready(step, batch)
        return epoch, tokens, jax.device_put(embedded(self.frozen, ready))

    def _finite(self, report: train.Report, step: int, batch: Batch) -> None:
        if bool(report.finite):
            return
        where = "" if self.find is None else self.find(self.state.trainable, self.frozen, batch)
        raise FloatingPointError(
            f"step {step}: loss {float(report.loss)} with gradient norm {float(report.grad_norm)} "
            f"is not finite{where and ': '}{where}. The adapters are kept as they were before "
            "it. Lower learning_rate or max_grad_norm"
        )

    def _step(self, batch: Batch) -> train.Report:
        with uninterrupted():
            self.state, report = self.step(self.state, self.frozen, batch)
        return report


def resumed(folder: Path, fresh: train.State, facts: dict[str, Any]) -> Restored:
    """A folder's newest checkpoint, or the checkpoint that is `folder` itself.

    Raises ValueError where there is none, or where it belongs to a run with other `facts`.
    """
    step = None
    if folder.name.startswith("checkpoint_"):
        number = folder.name.removeprefix("checkpoint_")
        if not number.isdigit():
            raise ValueError(
                f"{folder.name!r} names no checkpoint; expected checkpoint_ and a step"
            )
        folder, step = folder.parent, int(number)
    if not folder.is_dir():
        raise ValueError(f"no folder {folder} to resume from")
    checkpoints = Checkpoints(folder)
    try:
        found = checkpoints.restore(fresh, step, fresh.trainable)
    except Damaged as error:
        raise Damaged(f"{error}. {_older(checkpoints, fresh, step)}") from error
    was = found.facts.get
    differing = {k: (was(k), v) for k, v in facts.items() if was(k) != v}
    if differing:
        raise ValueError(
            f"the checkpoint in {folder} belongs to another run, which differs in (its value, "
            f"this run's): {differing}"
        )
    ours, theirs = versions(), found.notes.get("versions", {})
    changed = {name: (v, ours.get(name)) for name, v in theirs.items() if ours.get(name) != v}
    if changed:
        say(f"the checkpoint was written by other versions, now another sum may differ: {changed}")
    return found


def _older(checkpoints: Checkpoints, fresh: train.State, damaged: int | None) -> str:
    """What to go on from where one checkpoint, or the newest, is damaged."""
    newest = checkpoints.latest() if damaged is None else damaged
    for step in reversed([s for s in checkpoints.steps() if s < newest]):
        try:
            checkpoints.restore(fresh, step, fresh.trainable)
        except ValueError:
            continue
        path = str(checkpoints.folder / f"checkpoint_{step}")
        return f"The newest whole one before it: trainer.train(resume_from_checkpoint={path!r})"
    return "No older one there is whole: start anew, in another output_dir"


def short_hash(trainable: Params) -> str:
    """The first 12 hex digits of the sha256 of all leaves' bytes."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(trainable):
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()[:12]


def _row(done, epoch, rate, loss, report, seen, seconds, counts) -> dict[str, Any]:
    return {
        "step": done,
        "epoch": round(epoch, 4),
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": float(report.grad_norm),
        counts: int(report.tokens),
        "tokens_per_s": round(seen / seconds, 1),
        "seconds": round(seconds, 3),
        "memory_gib": round(machine.peak() / 2**30, 3),
    }
