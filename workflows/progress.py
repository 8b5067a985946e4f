"""A run as a person sees it: a progress bar in a terminal, lines elsewhere, a JSON line a step."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 20  # printed in all where there is no terminal


def bar(total: int, file: Path | None, done: int = 0):
    """A context that gives `show(row)`: draws the row of one log step and appends it to `file`.

    Of what `file` holds, rows up to step `done` stay: those of the run that is continued.
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
            drawn.update(task, completed=row["step"], line=_line(row))
            write(row)

        yield show


@contextmanager
def _plain(total: int, rows: AbstractContextManager) -> Iterator[Callable[[dict[str, Any]], None]]:
    every = max(1, total // LINES)
    with rows as write:

        def show(row: dict[str, Any]) -> None:
            if row["step"] == 1 or row["step"] % every == 0 or row["step"] == total:
                print(f"step {row['step']:>5}/{total}  {_line(row)}", flush=True)
            write(row)

        yield show


def adapters(before: str, after: str) -> None:
    """Prints the hashes of the adapters around a run."""
    print(f"adapters sha256 {before} before, {after} after", flush=True)


def _line(row: dict[str, Any]) -> str:
    return (
        f"loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}  "
        f"{row['tokens_per_s']:,.0f} tok/s  {row['memory_gib']:.2f} GiB"
    )


@contextmanager
def _appended(file: Path | None, done: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    if file is None:
        yield lambda row: None
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text(encoding="utf-8").splitlines() if done and file.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= done]
    with open(file, "w", encoding="utf-8") as out:
        out.writelines(line + "\n" for line in kept)
        yield lambda row: (out.write(json.dumps(row) + "\n"), out.flush())
