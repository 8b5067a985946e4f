"""Supervised fine-tuning: the loop from token rows to adapters."""

import hashlib
import itertools
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge.checkpoint import Checkpoints
from unsloth_jax import data, decoder, lora, losses, plan, remat, train, tree
from unsloth_jax.data import Row
from unsloth_jax.dims import Batch, Params, Total
from unsloth_jax.leaves import Hosted
from workflows import machine
from workflows.generate import Stopwatch
from workflows.streams import Streamed

LOSS = "sft/1"  # names the loss a checkpoint was trained with
Log = Callable[[dict[str, Any]], None]


def loss(
    model: ModuleType,
    c: Any,
    scale: float,
    memory: remat.Memory = remat.PLAIN,
    documents: int | None = None,
) -> train.LossFn:
    """Cross entropy of the supervised tokens under base plus adapters.

    `memory` and `documents` are those of `decoder.forward`.
    """

    def fn(adapters: Params, frozen: Params, b: Batch) -> Total:
        params = lora.attach(frozen, adapters, scale)
        hidden = decoder.forward(
            model, c, params, b.tokens, b.positions, b.segments, memory, documents, b.embedded
        )
        head = model.head(c, params)
        logps = losses.token_logprobs(hidden, head, b.targets, memory.chunk, b.weights)
        return losses.sft(logps, b.weights)

    return fn


@dataclass(frozen=True)
class Batches:
    """Optimizer-step batches of an epoch's rows: [accumulation, batch, length] arrays.

    Packed rows fill bins of `length` tokens; else each row stands alone, padded to the longest of
    its step. A last, partial step is filled up with empty rows, which count nothing.
    """

    rows: Sequence[Row]
    batch: int
    accumulation: int
    length: int
    packing: bool
    seed: int | None  # None leaves rows in their order

    def bins(self, epoch: int) -> list[list[Row]]:
        rows = self.rows
        if self.seed is not None:
            rows = data.shuffled(rows, self.seed, epoch)
        return list(data.packed(rows, self.length)) if self.packing else [[row] for row in rows]

    @property
    def widest(self) -> int:
        """The most tokens that a row of a batch has, padding included."""
        return self.length if self.packing else data.bucket(self.rows, self.length)

    def steps(self, epoch: int) -> int:
        """Optimizer steps in one epoch."""
        return math.ceil(len(self.bins(epoch)) / (self.batch * self.accumulation))

    def documents(self, steps: int) -> int:
        """The most rows that share a bin in the first `steps` optimizer steps."""
        if not self.packing:
            return 1
        most, epoch = 1, 0
        while steps > 0:
            most = max(most, *map(len, self.bins(epoch)))
            steps -= self.steps(epoch)
            epoch += 1
        return most

    def epoch(self, epoch: int) -> Iterator[Batch]:
        bins = self.bins(epoch)
        size = self.batch * self.accumulation
        for at in range(0, len(bins), size):
            group = bins[at : at + size]
            width = self.length
            if not self.packing:
                width = data.bucket(itertools.chain.from_iterable(group), self.length)
            micro = [group[i : i + self.batch] for i in range(0, size, self.batch)]
            yield data.stacked([data.collate(m, self.batch, width) for m in micro])

    def forever(self, skip: int = 0) -> Iterator[tuple[float, Batch]]:
        """(epochs done after the step, batch), the first `skip` steps left out."""
        for epoch in itertools.count():
            count = self.steps(epoch)
            if skip >= count:
                skip -= count
                continue
            for n, batch in enumerate(self.epoch(epoch), start=1):
                if n > skip:
                    yield epoch + n / count, batch
            skip = 0


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
    losses: list[float] = field(default_factory=list)  # one a step taken here
    saved: int | None = None  # the step of the last checkpoint

    def __call__(self) -> train.State:
        """Takes the steps that are left; raises FloatingPointError where a loss is not finite."""
        done, clock, seen, moved, logged = int(self.state.step), Stopwatch(), 0, False, 0
        coming = map(self._ready, itertools.islice(self.batches.forever(done), self.total - done))
        ready = next(coming, None)
        while ready is not None:
            epoch, tokens, batch = ready
            rate = float(self.rate(jnp.asarray(done)))
            report = self._step(batch)
            # Made while the device works: what the report holds is waited for below.
            ready = next(coming, None)
            done, seen = done + 1, seen + tokens
            self._finite(report, done, batch)
            self.losses.append(float(report.loss))
            if rate > 0 and not moved:
                _moved(self.state.trainable)
                moved = True
            if done % self.log_every == 0 or done == self.total:
                mean = float(np.mean(self.losses[logged:]))
                self.log(_row(done, epoch, rate, mean, report, seen, clock()))
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

    def _ready(self, coming: tuple[float, Batch]) -> tuple[float, int, Batch]:
        """(epoch, tokens that are no padding, the batch on its way to the device)."""
        epoch, batch = coming
        tokens = int((batch.segments > 0).sum())
        return epoch, tokens, jax.device_put(embedded(self.frozen, batch))

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


def hosted(params: Params) -> Params:
    """The tree with its embedding table in host memory, where a head of its own stays behind.

    A tied or quantized table is needed on the device: then the tree as it is.
    """
    path, leaf = plan.table(params)
    if isinstance(leaf, Hosted) or not plan.hostable(params):
        return params
    return tree.unflatten(tree.flatten(params) | {path: Hosted(np.asarray(leaf))})


def embedded(params: Params, batch: Batch) -> Batch:
    """The batch with its tokens' embeddings, where their table is in host memory."""
    _, leaf = plan.table(params)
    return batch._replace(embedded=leaf.rows(batch.tokens)) if isinstance(leaf, Hosted) else batch


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


def _row(done, epoch, rate, loss, report, seen, seconds) -> dict[str, Any]:
    return {
        "step": done,
        "epoch": round(epoch, 4),
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": float(report.grad_norm),
        "supervised_tokens": int(report.tokens),
        "tokens_per_s": round(seen / seconds, 1),
        "seconds": round(seconds, 3),
        "memory_gib": round(machine.peak() / 2**30, 3),
    }


def _moved(trainable: Params) -> None:
    """After the first step with a learning rate, every `b` has left zero (`a` waits for `b`)."""
    still = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree.leaves_with_path(trainable)
        if "'b'" in jax.tree_util.keystr(path) and not np.asarray(leaf).any()
    ]
    if still:
        raise RuntimeError(
            f"the first step changed nothing in {still}: these adapters get no gradient"
        )
