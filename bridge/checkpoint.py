"""Training checkpoints: the step's state and where the data stands, through Orbax.

One is written to `checkpoint_N.partial`, flushed to the disk and only then given its name, so that
a folder named `checkpoint_N` is whole whatever ends the process or the machine.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, or what a user may have of it
NAME = re.compile(r"checkpoint_(\d+)")
LEFTOVERS = ("checkpoint_*.partial*", "checkpoint_*.orbax-checkpoint-tmp*")
FILES = "files.json"  # sizes and hashes of all other files of a checkpoint
SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")  # in what TensorStore says


class Damaged(ValueError):
    """A checkpoint that lacks a file, or whose files are not as they were written."""


class Restored(NamedTuple):
    """A state as it was, and what was written beside it."""

    state: Any
    facts: dict[str, Any]
    notes: dict[str, Any]
    best: Any  # arrays, or None


class Checkpoints:
    """A folder of checkpoints by step number, written while the steps go on.

    `keep` newest ones stay. At most one is being written; `save` waits for the one before.
    """

    def __init__(self, folder: Path, keep: int | None = None):
        self.folder, self._keep = Path(folder).absolute(), keep
        self._writing: _Writing | None = None

    def save(
        self,
        step: int,
        state: Any,
        facts: dict[str, Any],
        *,
        notes: Mapping[str, Any] | None = None,
        best: Any = None,
    ) -> None:
        """Copies a state to the host and returns; a thread writes it.

        `facts` and `notes` must be JSON; `best` is a tree of arrays kept beside the state, or None.
        Raises what the save before failed with, ValueError where the step has a checkpoint.
        """
        self.wait()
        if step in self.steps():
            raise ValueError(f"{self._path(step)} exists already")
        items = {"facts": ocp.args.JsonSave(json.loads(json.dumps(facts)))}
        items["notes"] = ocp.args.JsonSave(json.loads(json.dumps(dict(notes or {}))))
        items["state"] = ocp.args.StandardSave(_on_host(state))
        if best is not None:
            items["best"] = ocp.args.StandardSave(_on_host(best))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        path = self._path(step)
        self._writing = _Writing(path, lambda: self._write(path, items))

    def wait(self) -> None:
        """Until nothing is being written; raises what the last save failed with.

        OSError with the system's error number, RuntimeError for anything else, the path in both.
        """
        writing = self._writing
        if writing is not None:
            writing.join()
            self._writing = None
            writing.judge()

    def poll(self) -> None:
        """Raises what a save failed with, as `wait`, but waits for none."""
        if self._writing is not None and not self._writing.is_alive():
            self.wait()

    close = wait

    def steps(self) -> list[int]:
        """The steps of complete checkpoints, in order."""
        if not self.folder.is_dir():
            return []
        found = (NAME.fullmatch(p.name) for p in self.folder.iterdir() if p.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        return max(self.steps(), default=None)

    def restore(self, like: Any, step: int | None = None, best: Any = None) -> Restored:
        """One checkpoint, in the structure of `like`; its best arrays in that of `best`.

        Waits for what is being written. Raises ValueError where there is none or its arrays don't
        fit, Damaged where its files are not as they were written.
        """
        self.wait()
        path = self._path(self._chosen(step))
        reading = _orbax()
        with _whole(path):
            _check_files(path)
            held = reading.metadata(path).item_metadata
            trees = {"state": _shapes(like)}
            if "best" in held and best is not None:
                trees["best"] = _shapes(best)
            lost = [name for name in trees if held[name] is None]
            if lost:
                raise OSError(f"the table of arrays of {lost} is missing")
        for name, wanted in trees.items():
            _fits({k: tuple(v.shape) for k, v in held[name].items()}, wanted)
        args = {name: ocp.args.StandardRestore(wanted) for name, wanted in trees.items()}
        args |= {name: ocp.args.JsonRestore() for name in ("facts", "notes") if name in held}
        with _whole(path):
            got = reading.restore(path, args=ocp.args.Composite(**args))
        reading.close()
        notes = got["notes"] if "notes" in args else {}
        arrays = _filled(best, got["best"]) if "best" in trees else None
        return Restored(_filled(like, got["state"]), got["facts"], notes, arrays)

    def _chosen(self, step: int | None) -> int:
        there = self.steps()
        chosen = max(there, default=None) if step is None else step
        if chosen not in there:
            what = "no checkpoint" if step is None else f"no checkpoint {step}; it holds {there}"
            raise ValueError(f"{self.folder} holds {what}")
        return chosen

    def _path(self, step: int) -> Path:
        return self.folder / f"checkpoint_{step}"

    def _write(self, path: Path, items: dict[str, Any]) -> None:
        """One checkpoint, whole or not at all; then those that are too many go."""
        partial = path.with_name(f"{path.name}.partial")
        with _unlogged():
            try:
                _room(path, items)
                with _orbax() as writing:
                    writing.save(partial, args=ocp.args.Composite(**items))
                (partial / FILES).write_text(json.dumps(_files(partial)), encoding="utf-8")
                _flush(partial)
                partial.rename(path)
                _flushed(self.folder)
            finally:
                if not path.is_dir():
                    _removed(self.folder, f"{partial.name}*")
        for step in self.steps()[: -self._keep] if self._keep else []:
            # What is half removed must not bear the name of a whole one.
            gone = self._path(step).rename(self.folder / f"checkpoint_{step}.partial")
            shutil.rmtree(gone)

    def _sweep(self) -> None:
        """Removes what writers that were killed have left."""
        for left in (p for pattern in LEFTOVERS for p in self.folder.glob(pattern)):
            shutil.rmtree(left)


class _Writing(threading.Thread):
    """One checkpoint on its way to the disk; a daemon, so that a process may leave without it."""

    def __init__(self, path: Path, write: Callable[[], None]):
        super().__init__(name=f"write {path.name}", daemon=True)
        self.path, self.write, self.error = path, write, None
        self.start()

    def run(self) -> None:
        with self:
            self.write()

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> bool:
        self.error = error  # whatever it is: `judge` raises it in the run's own thread
        return True

    def judge(self) -> None:
        """Raises what the write failed with, named by its path."""
        error, what = self.error, f"the checkpoint {self.path} was not written"
        if error is None:
            return
        found = SYSTEM_ERROR.search(str(error))
        number = error.errno if isinstance(error, OSError) else found and int(found[1])
        if number:
            raise OSError(number, f"{what}: {os.strerror(number)}") from error
        raise RuntimeError(f"{what}: {error}") from error


def _orbax() -> ocp.Checkpointer:
    arrays, table = ocp.StandardCheckpointHandler, ocp.JsonCheckpointHandler
    handlers = dict(state=arrays(), best=arrays(), facts=table(), notes=table())
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keeps Orbax from logging an error's trace: the error is raised to the run, which says it."""
    log, unheard = logging.getLogger("absl"), lambda record: "orbax" not in record.pathname
    log.addFilter(unheard)
    try:
        yield
    finally:
        log.removeFilter(unheard)


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Names the checkpoint in what Orbax says of a file that is missing or broken."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise Damaged(f"{path} is damaged or incomplete: {error}") from error


def _files(folder: Path) -> dict[str, list[Any]]:
    """[size, sha256] of each file by its path below the folder."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != FILES):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = [path.stat().st_size, digest]
    return found


def _check_files(folder: Path) -> None:
    """Raises OSError for a file that is not as `_files` found it; older checkpoints have no list.

    Orbax would notice only some of it, and while its other reads go on.
    """
    if not (folder / FILES).exists():
        return
    written = json.loads((folder / FILES).read_text(encoding="utf-8"))
    for name, (size, _) in written.items():
        path = folder / name
        if not path.is_file():
            raise OSError(f"{name} is missing")
        if path.stat().st_size != size:
            raise OSError(f"{name} has {path.stat().st_size} bytes, {size} were written")
    found = _files(folder)
    changed = [name for name, facts in written.items() if found[name] != facts]
    if changed:
        raise OSError(f"{changed} hold other bytes than were written")


def _named(state: Any) -> dict[str, jax.Array]:
    """Leaves by their place in the tree, so that a checkpoint needs no Python classes."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}


def _on_host(state: Any) -> dict[str, np.ndarray]:
    """Copies in host memory: on a CPU a view would keep the next step from donating the buffer."""
    got = jax.device_get(_named(state))
    return {name: np.array(leaf, copy=True) for name, leaf in got.items()}


def _shapes(like: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return {k: jax.ShapeDtypeStruct(np.shape(v), v.dtype) for k, v in _named(like).items()}


def _filled(like: Any, named: dict[str, np.ndarray]) -> Any:
    """The arrays in their places, on the device and donatable."""
    leaves = [jnp.array(named[name], copy=True) for name in _named(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _fits(held: dict[str, tuple], wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
    wrong = [f"missing {k}" for k in sorted(set(wanted) - set(held))]
    wrong += [f"unexpected {k}" for k in sorted(set(held) - set(wanted))]
    wrong += [
        f"{k} is {held[k]}, expected {wanted[k].shape}"
        for k in held
        if k in wanted and held[k] != wanted[k].shape
    ]
    if wrong:
        raise ValueError("the checkpoint does not fit this run:\n  " + "\n  ".join(wrong[:20]))


def _room(path: Path, items: dict[str, Any]) -> None:
    """Raises OSError before anything is written where the disk has no room for the arrays."""
    trees = (args.item for args in items.values() if isinstance(args, ocp.args.StandardSave))
    needed = sum(x.nbytes for tree in trees for x in tree.values())
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed} bytes are needed, {free} are free")


def _removed(folder: Path, pattern: str) -> None:
    """Removes half-written folders until none comes back: Orbax' threads may still be writing."""
    quiet = 0
    for _ in range(40):
        found = list(folder.glob(pattern))
        for left in found:
            shutil.rmtree(left, ignore_errors=True)
        quiet = 0 if found else quiet + 1
        if quiet == 3:
            break
        time.sleep(0.02)


def _flush(folder: Path) -> None:
    """Everything in a folder, and the folder, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        _flushed(path)


def _flushed(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
