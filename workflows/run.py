"""The loop of a training run, and a run that goes on from a checkpoint."""

import hashlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge.checkpoint import Checkpoints
from unsloth_jax import train
from unsloth_jax.dims import Batch, Params, Total
from workflows import machine, moving
from workflows.batching import Batches
from workflows.evaluate import means
from workflows.generate import Stopwatch
from workflows.objective import SFT, Objective, embedded
from workflows.streams import Streamed

Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Saving:
    """When checkpoints are written, and where."""

    checkpoints: Checkpoints
    every: int
    facts: dict[str, Any]


@dataclass
class Run:
    """One training run: its state is finite and whole after every step, whatever ends it."""

    step: Callable
    state: train.State
    frozen: Params
    batches: Batches | Streamed
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
    saved: int | None = None  # the step of the last checkpoint

    def __call__(self) -> train.State:
        """Takes the steps that are left; raises FloatingPointError where a loss is not finite."""
        done, clock, seen, moved, logged = int(self.state.step), Stopwatch(), 0, False, 0
        left = itertools.islice(self.batches.forever(done), self.total - done)
        coming = (self._ready(step, *found) for step, found in enumerate(left, start=done + 1))
        ready = next(coming, None)
        while ready is not None:
            epoch, tokens, batch = ready
            rate = float(self.rate(jnp.asarray(done)))
            marks = moving.marks(self.state.trainable) if rate > 0 and not moved else None
            report = self._step(batch)
            # Made while the device works: what the report holds is waited for below.
            ready = next(coming, None)
            done, seen = done + 1, seen + tokens
            self._finite(report, done, batch)
            self.losses.append(float(report.loss))
            self.metrics.append(jax.device_get(report.metrics))
            if marks is not None:
                moving.check(marks, self.state.trainable)
                moved = True
            if done % self.log_every == 0 or done == self.total:
                mean = float(np.mean(self.losses[logged:]))
                row = _row(done, epoch, rate, mean, report, seen, clock(), self.objective.counts)
                self.log(row | means(self.metrics))
                self.metrics.clear()
                clock, seen, logged = Stopwatch(), 0, len(self.losses)
            watched = Stopwatch()
            stop = self.after(done, epoch)
            clock.pause(watched())
            if self.saving and (stop or done % self.saving.every == 0 or done == self.total):
                self.save()
            if stop:
                break
        return self.state

    def save(self) -> None:
        """Writes a checkpoint of the state as it is, unless this step has one."""
        done = int(self.state.step)
        if done != self.saved:
            self.saving.checkpoints.save(done, self.state, self.saving.facts)
            self.saved = done
            self.on_save()

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


def resumed(folder: Path, fresh: train.State, facts: dict[str, Any]) -> train.State:
    """The state of a folder's newest checkpoint, or of the checkpoint that is `folder` itself.

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
    found = checkpoints.restore(fresh, step)
    checkpoints.close()
    was = found.facts.get
    differing = {k: (was(k), v) for k, v in facts.items() if was(k) != v}
    if differing:
        raise ValueError(
            f"the checkpoint in {folder} belongs to another run, which differs in (its value, "
            f"this run's): {differing}"
        )
    return found.state


def short_hash(trainable: Params) -> str:
    """The first 12 hex digits of the sha256 of all leaves' bytes."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(trainable):
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()[:12]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the block ends: a step donates the old state to the new one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[tuple] = []
    before = signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught and callable(before):
            before(*caught[0])


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
