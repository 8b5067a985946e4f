"""A run's record and page, kept up to date while it goes: run.json and report.html."""

import datetime
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from time import monotonic
from typing import Any

import jax

from bridge import export
from unsloth_jax.plan import Plan
from workflows import report
from workflows.keywords import say
from workflows.row_lengths import lengths, prompts

EVERY = 20.0  # seconds between two pages, at least
SHARE = 100  # times what a page took pass before the next one: a hundredth of the run at most
PACKAGES = (
    "unsloth-jax", "jax", "jaxlib", "flax", "optax", "transformers", "tokenizers", "datasets",
    "numpy",
)  # fmt: skip


class Page:
    """A context around a run's steps: it is called with every row of the log.

    A page that can't be written (a full disk) is said once and stops nothing.
    """

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], total: int, kept: int, at: Callable[[], int]
    ):
        """`kept` steps of the folder's own log are continued; `at` gives the steps done by now."""
        self.folder, self.at, self.kept, self.total = folder, at, kept, total
        self.record: dict[str, Any] = {**facts, "total": total}
        self.written, self.cost = monotonic(), 0.0

    def __enter__(self) -> "Page":
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self.began = monotonic()
        earlier = report.record(self.folder).get("starts", []) if self.kept else []
        for start in earlier:
            if start["state"] == "running":
                start |= {"state": "stopped", "why": "it ended without a word"}
        self.start = {"at": now, "from": self.kept, "state": "running", "why": ""}
        self.record["starts"] = [*earlier, self.start]
        self.write()
        return self

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Writes the page again, unless that was done a moment ago."""
        if monotonic() - self.written >= max(EVERY, SHARE * self.cost):
            self.write()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        self.start |= self._ending(kind, error)
        self.write()

    def _ending(self, kind: type | None, error: BaseException | None) -> dict[str, str]:
        if kind is None:
            whole = self.at() >= self.total
            return {"state": "done" if whole else "stopped", "why": ""}
        if issubclass(kind, KeyboardInterrupt | SystemExit):
            return {"state": "stopped", "why": f"{kind.__name__} {error}".strip()}
        return {"state": "error", "why": f"{kind.__name__}: {error}"}

    def write(self) -> None:
        """Writes run.json and report.html, each at once or not at all."""
        began = monotonic()
        self.start |= {"step": self.at(), "seconds": round(began - self.began, 1)}
        try:
            text = json.dumps(self.record, indent=1, default=str) + "\n"
            report.replace(self.folder / report.RECORD, text)
            report.write(self.folder)
        except OSError as error:
            say(f"{self.folder / report.PAGE} can't be written: {error}; training goes on")
        self.written = monotonic()
        self.cost = self.written - began


def facts(trainer: Any, batches: Any, plans: Sequence[Plan] = ()) -> dict[str, Any]:
    """What stands before the first step: model, settings, data, versions, the memory plan."""
    a, m, found = trainer.args, trainer.model, lengths(batches)
    # On a CPU the log's memory is the whole process', of which a plan knows the arrays alone.
    there = plans and jax.default_backend() != "cpu"
    plan = {"total": plans[-1].total, "source": plans[-1].source} if there else None
    settings = {f.name: getattr(a, f.name) for f in fields(a)}
    return {
        "trainer": type(trainer).__name__,
        "loss": trainer.objective.name,
        "model": {
            "name": m.name,
            "family": m.family.__name__.rpartition(".")[2],
            "dtype": str(m.dtype),
            "stored as": {"nf4": "NF4"}.get(m.stored, m.stored or str(m.dtype)),
            "max_seq_length": m.max_seq_length,
            "chat template sha256": export.text_hash(_template(trainer.tokenizer)),
        },
        "adapters": None if m.peft is None else _plain(m.peft),
        "settings": settings,
        "defaults": {f.name: f.default for f in fields(a)},
        "data": None if found is None else found._asdict(),
        "prompts": None if callable(trainer.rows) else prompts(trainer.rows, trainer.length),
        "plan": plan,
        "evaluation": {name: len(rows) for name, rows in trainer.eval_rows.items()},
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "versions": {"python": platform.python_version(), **export.versions(PACKAGES)},
    }


def _template(tokenizer: Any) -> str | None:
    found = getattr(tokenizer, "chat_template", None)
    return found if isinstance(found, str) else None


def _plain(settings: Any) -> dict[str, Any]:
    """A PEFT configuration's fields as they are read by a person."""
    given = settings._asdict() if hasattr(settings, "_asdict") else vars(settings)
    return {name: value for name, value in given.items() if value not in (None, {}, ())}
