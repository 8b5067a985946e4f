"""The folder of a run: what is continued there, and what must not be mixed with it."""

from pathlib import Path
from typing import Any

from bridge.checkpoint import Checkpoints
from workflows.keywords import typed, written

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
