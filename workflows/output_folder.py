"""The folder of a run: what is continued there, and what must not be mixed with it."""

import itertools
import tempfile
from pathlib import Path
from typing import Any

from bridge.checkpoint import FULL, Checkpoints
from workflows.keywords import say, typed, written

RESUME = bool | str | None


def continued(folder: Path, resume: Any) -> Path | None:
    """The absolute path of what is continued; None starts anew.

    True is the run's own `folder`, a text another one. Raises TypeError or ValueError where it is
    no path, or where `folder` is a file.
    """
    typed("train", {"resume_from_checkpoint": resume}, {"resume_from_checkpoint": RESUME})
    if folder.is_file():
        raise ValueError(f"output_dir={str(folder)!r} is a file, expected a folder")
    if resume is None or resume is False:
        return None
    if resume is not True:
        written("train", {"resume_from_checkpoint": resume}, ["resume_from_checkpoint"])
    return (folder if resume is True else Path(resume)).absolute()


def check_writable(folder: Path) -> None:
    """Raises OSError where nothing can be written to output_dir; leaves no trace there."""
    try:
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        tempfile.TemporaryDirectory(prefix=".unsloth_jax-", dir=there).cleanup()
    except OSError as error:
        if error.errno in FULL:  # which no run ends by
            return
        what = f"output_dir={str(folder)!r} can't be written: {error.strerror}; choose another"
        raise OSError(error.errno, what) from error


def owns(folder: Path, source: Path | None) -> bool:
    """Whether what is continued lies in the run's own `folder`."""
    if source is None:
        return False
    inside = source.parent if source.name.startswith("checkpoint_") else source
    return inside == folder.absolute()


def set_aside(folder: Path, done: int) -> None:
    """Renames checkpoints later than `done`, where the folder's own run goes on, and says so."""
    later = [step for step in Checkpoints(folder).steps() if step > done]
    for step in later:
        name = f"superseded_{step}"
        numbered = (f"{name}.{n}" for n in itertools.count(1))
        free = next(n for n in itertools.chain([name], numbered) if not (folder / n).exists())
        (folder / f"checkpoint_{step}").rename(folder / free)
    if later:
        say(
            f"{folder} goes on from step {done}: what came after it, checkpoints {later}, is now "
            "named superseded_ and the step"
        )


def refuse_to_mix(folder: Path, done: int) -> None:
    """Raises FileExistsError where a folder holds later checkpoints than a run's start, `done`.

    The log beside them is theirs, so that a run which writes only a log is refused too.
    """
    if not folder.is_dir():
        return
    latest = Checkpoints(folder).latest() or 0
    if latest > done:
        raise FileExistsError(
            f"{folder} holds checkpoint {latest} of an earlier run: continue it with "
            "resume_from_checkpoint=True, or choose another output_dir"
        )
