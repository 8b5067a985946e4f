"""A run as a person sees it: a progress bar in a terminal, lines elsewhere, a JSON line a step."""

import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bridge.checkpoint import FULL
from workflows.keywords import say

LINES = 20  # printed in all where there is no terminal
BESIDE = ("run.json", "report.html")  # what tells of a run, next to its log
# What is shown of an evaluation by reward; all stands in the file.
REWARDS = re.compile("_(reward|rewards/.*/mean|completions/mean_length|clipped_ratio)$")
COUNTS = ("_supervised_tokens", "_pairs", "_answers", "_runtime", "_samples_per_second")


def bar(total: int, file: Path | None, done: int = 0):
    """A context that gives `show(row)`: draws the row of one log step and appends it to `file`.

    Of what `file` holds, rows up to step `done` stay: those of the run that is continued. At 0 a
    file of an earlier run is moved aside. Raises ValueError where a continued file is no log.
    """
    write = _appended(file, done)
    return _terminal(total, write) if sys.stdout.isatty() else _plain(total, write)


@contextmanager
def _terminal(
    total: int, rows: AbstractContextManager
) -> Iterator[Callable[[dict[str, Any]], None]]:
    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[line]}"), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console()) as drawn, rows as write:
        task = drawn.add_task("training", total=total, line="compiling")

        def show(row: dict[str, Any]) -> None:
            if "loss" not in row:
                said = f"step {row['step']}  {_beside(row)}"
                drawn.console.print(said, markup=False, highlight=False)
            else:
                drawn.update(task, completed=row["step"], line=_line(row))
            write(row)

        yield show


@contextmanager
def _plain(total: int, rows: AbstractContextManager) -> Iterator[Callable[[dict[str, Any]], None]]:
    every = max(1, total // LINES)
    with rows as write:

        def show(row: dict[str, Any]) -> None:
            if "loss" not in row:
                print(f"step {row['step']:>5}/{total}  {_beside(row)}", flush=True)
            elif row["step"] == 1 or row["step"] % every == 0 or row["step"] == total:
                print(f"step {row['step']:>5}/{total}  {_line(row)}", flush=True)
            write(row)

        yield show


def adapters(before: str, after: str) -> None:
    """Prints the hashes of the adapters around a run."""
    print(f"adapters sha256 {before} before, {after} after", flush=True)


def _line(row: dict[str, Any]) -> str:
    reward = row.get("reward")
    earned = "" if reward is None else f"reward {reward:.4f}  "
    return (
        f"{earned}loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}  "
        f"{row['tokens_per_s']:,.0f} tok/s  {row['memory_gib']:.2f} GiB"
    )


def _beside(row: dict[str, Any]) -> str:
    """Samples, or an evaluation's losses and user's metrics; times and counts stay in the file."""
    if "samples" in row:
        return "\n".join(f"{s['prompt']!r} -> {s['completion']!r}" for s in row["samples"])
    left = ("step", "epoch")
    shown = {k: v for k, v in row.items() if k not in left and not k.endswith(COUNTS)}
    if any(REWARDS.search(name) for name in shown):
        shown = {k: v for k, v in shown.items() if REWARDS.search(k)}
    return "  ".join(f"{name} {value:.4f}" for name, value in shown.items())


def rows(file: Path | None, done: int) -> list[dict[str, Any]]:
    """Rows up to step `done` of a log that is continued. Raises ValueError where it is none."""
    there = done and file is not None and file.exists()
    return [json.loads(line) for line in _kept(file, done)] if there else []


@contextmanager
def _appended(file: Path | None, done: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    if file is None:
        yield lambda row: None
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = _kept(file, done) if done and file.exists() else []
    if not done and file.exists() and file.stat().st_size:
        _move_aside(file)
    with open(file, "wb", buffering=0) as out:
        write = _Lines(out)
        write(kept)
        yield lambda row: write([json.dumps(row)])
        write([])


class _Lines:
    """Appends whole lines to a file; what finds no room on the disk waits for the next time."""

    def __init__(self, out: FileIO):
        self._out, self._waiting = out, ""

    def __call__(self, lines: Sequence[str]) -> None:
        self._waiting += "".join(line + "\n" for line in lines)
        data, end = self._waiting.encode(), self._out.tell()
        try:
            written = self._out.write(data)
        except OSError as error:
            if error.errno not in FULL:
                raise
            written = 0
            say(f"no room for the log: {error}. Its lines wait, training goes on")
        if written == len(data):
            self._waiting = ""
        else:
            self._out.truncate(end)
            self._out.seek(end)


def _kept(file: Path, done: int) -> list[str]:
    """The lines of steps up to `done`; a last one that was cut short is none."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        whole = lines if not lines or lines[-1].endswith("}") else lines[:-1]
        return [line for line in whole if json.loads(line)["step"] <= done]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not the log of a run, a JSON object with a step on each line: {error}; "
            "move it away or choose another output_dir"
        ) from error


def _move_aside(file: Path) -> None:
    """Renames a log to the first free name of `metrics.1.jsonl`, `metrics.2.jsonl` and so on.

    The record and the page of its run take the same number.
    """
    numbered = lambda path, n: path.with_name(f"{path.stem}.{n}{path.suffix}")
    beside = [path for name in BESIDE if (path := file.with_name(name)).exists()]
    moved = [file, *beside]
    free = next(n for n in itertools.count(1) if not any(numbered(p, n).exists() for p in moved))
    for path in moved:
        path.rename(numbered(path, free))
    say(f"the log of an earlier run in {file.parent} is now {numbered(file, free).name}")
