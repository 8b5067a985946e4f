"""Training checkpoints: the step's state and where the data stands, through Orbax."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp


class Restored(NamedTuple):
    """A state as it was, and what was written beside it."""

    state: Any
    facts: dict[str, Any]


class Checkpoints:
    """A folder of checkpoints by step number; Orbax renames each into place when it is whole."""

    def __init__(self, folder: Path, keep: int | None = None):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, step_prefix="checkpoint"
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "facts": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            Path(folder).absolute(), options=options, item_handlers=handlers
        )

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Writes one checkpoint; `facts` must be JSON."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_named(state)),
            facts=ocp.args.JsonSave(json.loads(json.dumps(facts))),
        )
        self._manager.save(step, args=args)
        self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        return self._manager.latest_step()

    def restore(self, like: Any, step: int | None = None) -> Restored:
        """The state of one checkpoint in the structure of `like`.

        Raises ValueError where there is none, it lacks a file, or its arrays don't fit `like`.
        """
        step = self.latest() if step is None else step
        if step is None or step not in self._manager.all_steps():
            there = list(self._manager.all_steps())
            what = "no checkpoint" if step is None else f"no checkpoint {step}; it holds {there}"
            raise ValueError(f"{self._manager.directory} holds {what}")
        named = _named(like)
        abstract = {k: jax.ShapeDtypeStruct(np.shape(v), v.dtype) for k, v in named.items()}
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), facts=ocp.args.JsonRestore()
        )
        _fits(self._shapes(step), {k: v.shape for k, v in abstract.items()})
        with self._whole(step):
            got = self._manager.restore(step, args=args)
        leaves = [got["state"][name] for name in named]
        return Restored(jax.tree.unflatten(jax.tree.structure(like), leaves), got["facts"])

    def _shapes(self, step: int) -> dict[str, tuple]:
        with self._whole(step):
            held = self._manager.item_metadata(step)["state"]
            if held is None:
                raise ValueError("its table of arrays is missing")
            return {name: tuple(array.shape) for name, array in held.items()}

    @contextmanager
    def _whole(self, step: int) -> Iterator[None]:
        """Names the checkpoint in what Orbax says of a file that is missing or broken."""
        try:
            yield
        except (OSError, ValueError) as error:
            where = f"{self._manager.directory}/checkpoint_{step}"
            raise ValueError(f"{where} is damaged or incomplete: {error}") from error

    def close(self) -> None:
        self._manager.close()


def _named(state: Any) -> dict[str, jax.Array]:
    """Leaves by their place in the tree, so that a checkpoint needs no Python classes."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}


def _fits(held: dict[str, tuple], wanted: dict[str, tuple]) -> None:
    wrong = [f"missing {k}" for k in sorted(set(wanted) - set(held))]
    wrong += [f"unexpected {k}" for k in sorted(set(held) - set(wanted))]
    wrong += [
        f"{k} is {held[k]}, expected {wanted[k]}"
        for k in held
        if k in wanted and held[k] != wanted[k]
    ]
    if wrong:
        raise ValueError("the checkpoint does not fit this run:\n  " + "\n  ".join(wrong[:20]))
