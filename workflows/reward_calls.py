"""One batch of completions and the calls that score it."""

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

OWN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
NOT_PASSED = ("prompt", "completion", "completion_ids")  # columns that have keywords of their own
SHOWN = 300  # characters of a completion in a message


class Batch(NamedTuple):
    """N completions with everything repeated to N."""

    prompts: list
    completions: list
    completion_ids: list[list[int]]
    columns: dict[str, list]
    trainer_state: Any

    def keywords(self, logs: "Logs", rows: slice = slice(None)) -> dict[str, Any]:
        """Fresh lists each time: functions run side by side and may sort theirs."""
        return {
            "prompts": self.prompts[rows],
            "completions": self.completions[rows],
            "completion_ids": self.completion_ids[rows],
            "trainer_state": self.trainer_state,
            "log_extra": logs.log_extra,
            "log_metric": logs.log_metric,
        } | {name: values[rows] for name, values in self.columns.items()}


class Logs:
    """What one function logged."""

    def __init__(self) -> None:
        self.extra: dict[str, list] = {}
        self.metrics: dict[str, list[float]] = {}

    def log_extra(self, column: str, values: Iterable) -> None:
        self.extra.setdefault(column, []).extend(values)

    def log_metric(self, name: str, value: Any) -> None:
        self.metrics.setdefault(name, []).append(float(value))


class Call:
    """A call under way; once `done` is set it has a value or an error.

    As a context it keeps any error for the thread that waits, which raises it.
    """

    def __init__(self, function: Callable, keywords: dict[str, Any]) -> None:
        self.function, self.keywords = function, keywords
        self.value: Any = None
        self.error: BaseException | None = None
        self.done = threading.Event()
        self.cancel: Callable[[], Any] = lambda: None  # a thread can't be stopped

    def __enter__(self) -> "Call":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self.error = error
        self.done.set()
        return True

    def here(self) -> None:
        with self:
            value = self.function(**self.keywords)
            # What a generator computes belongs to the call.
            self.value = list(value) if isinstance(value, Iterator) else value

    async def awaited(self) -> None:
        with self:
            self.value = await self.function(**self.keywords)


def batch_of(rows: Sequence, completions: Sequence, ids: Sequence, state: Any) -> Batch:
    if not rows or not completions or len(completions) % len(rows):
        raise ValueError(f"{len(completions)} completions are no whole groups of {len(rows)} rows")
    if len(ids) != len(completions):
        raise ValueError(f"{len(ids)} completion_ids for {len(completions)} completions")
    for i, row in enumerate(rows):
        if "prompt" not in row or set(row) != set(rows[0]):
            raise ValueError(
                f"row {i} has columns {sorted(row)}, expected 'prompt' and those of row 0, "
                f"{sorted(rows[0])}"
            )
    repeated = [row for row in rows for _ in range(len(completions) // len(rows))]
    return Batch(
        [row["prompt"] for row in repeated],
        list(completions),
        [[int(token) for token in one] for one in ids],
        {name: [row[name] for row in repeated] for name in rows[0] if name not in NOT_PASSED},
        state,
    )


def text(completion: Any) -> str:
    """A completion's text: itself, or its first message's content; TypeError for anything else."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and len(completion) == 0:
        return ""
    first = completion[0] if isinstance(completion, Sequence) else None
    content = first.get("content") if isinstance(first, Mapping) else None
    if not isinstance(content, str):
        raise TypeError(f"a completion is a string or messages with text, got {completion!r:.200}")
    return content


def cut(completion: Any) -> str:
    """A completion for a message."""
    whole = repr(completion)
    return whole if len(whole) <= SHOWN else f"{whole[:SHOWN]}... ({len(whole)} characters)"


def asked(function: Callable) -> tuple[set[str] | None, set[str]]:
    """Keywords that a function takes (None: all) and those that it can't do without."""
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = {p.name for p in named if p.default is p.empty}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None, needed
    return {p.name for p in named}, needed


def is_async(function: Any) -> bool:
    of_class = type(function).__call__
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(of_class)


def forever(loop: asyncio.AbstractEventLoop) -> None:
    """Runs a loop until it is stopped, and then what its cancelled tasks do at their end."""
    loop.run_forever()
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left))
    loop.close()
