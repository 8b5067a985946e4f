"""Rows of results: the schema, where they were measured, JSON files and tables.

A figure is one line of docs/performance.md and lies in a JSON list; a measurement is what a script
saw, one JSON object a line, so that a script that was stopped goes on where it was.
"""

import datetime
import json
import math
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

Row = dict[str, Any]

KEYS = tuple("name ours other ratio limit must aim better unit command device date".split())
BETTER = ("higher", "lower")
PACKAGES = tuple("jax jaxlib jax-triton triton torch unsloth unsloth_zoo bitsandbytes vllm".split())


def figure(
    name: str,
    ours: float | int | None,
    unit: str,
    *,
    other: float | int | None = None,
    limit: float | int | None = None,
    must: float | int | None = None,
    aim: float | int | None = None,
    better: str = "higher",
    absolute: bool = False,
    **more: Any,
) -> Row:
    """A row of the schema, with where and when; `more` may hold any other key, or replace one.

    `ratio` is ours / other in speeds and bytes alike, None where the figure is `absolute` or has no
    other side: must and aim are then compared with `ours`. Raises ValueError for another `better`.
    """
    if better not in BETTER:
        raise ValueError(f"better must be one of {BETTER}, got {better!r}")
    ratio = None
    if not absolute and ours is not None and other:
        ratio = ours / other
    row = dict(name=name, ours=ours, other=other, ratio=ratio, limit=limit, must=must, aim=aim)
    return row | dict(better=better, unit=unit) | facts() | more


def facts() -> Row:
    """Command, device, date and versions of this process. Starts JAX's backend if JAX is loaded."""
    return {
        "command": command(),
        "device": device(),
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
    }


def command() -> str:
    """The line that started this process, as one would type it at the repository's root."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else None
    start = ["python", "-m", module] if module else ["python", _relative(sys.argv[0])]
    return shlex.join([*start, *sys.argv[1:]])


def _relative(path: str) -> str:
    full, here = Path(path).resolve(), Path.cwd()
    return str(full.relative_to(here)) if full.is_relative_to(here) else full.name


def device() -> str:
    """The accelerator's name by the framework that this process has loaded."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        return sys.modules["torch"].cuda.get_device_name()
    if "jax" in sys.modules:
        return sys.modules["jax"].devices()[0].device_kind
    return "cpu"


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Version of each of the packages that is installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def met(row: Mapping[str, Any], column: str) -> bool | None:
    """Whether a row reaches its "must" or "aim"; None where it has none or was not measured.

    A row that says in `missed` why nothing measured counts does not.
    """
    if row.get("missed"):
        return False
    measured = row["ours"] if row["ratio"] is None else row["ratio"]
    asked = row[column]
    if measured is None or asked is None:
        return None
    return measured >= asked if row["better"] == "higher" else measured <= asked


def check(row: Mapping[str, Any]) -> None:
    """Raises ValueError where a row lacks a key of the schema or a number is not finite."""
    missing = [key for key in KEYS if key not in row]
    if missing:
        raise ValueError(f"row {row.get('name')!r} lacks {missing}; a row has {list(KEYS)}")
    if row["better"] not in BETTER:
        raise ValueError(f"row {row['name']!r}: better is {row['better']!r}, known are {BETTER}")
    numbers = {k: row[k] for k in ("ours", "other", "ratio", "limit", "must", "aim")}
    wrong = {k: v for k, v in numbers.items() if v is not None and not math.isfinite(v)}
    if wrong:
        raise ValueError(f"row {row['name']!r} has numbers that are not finite: {wrong}")


def append(path: Path, measurement: Mapping[str, Any]) -> None:
    """Adds one measurement as a line of `path`, on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(measurement) + "\n")


def read(path: Path) -> list[Row]:
    """The measurements of a file of JSON lines, [] where it isn't there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def find(measurements: Iterable[Row], key: Mapping[str, Any]) -> Row | None:
    """The last measurement that has all of `key`'s values."""
    hits = [m for m in measurements if all(k in m and m[k] == v for k, v in key.items())]
    return hits[-1] if hits else None


def write(path: Path, figures: Sequence[Row]) -> None:
    """Puts figures into the JSON list at `path`; one of the same name is replaced in its place.

    Raises ValueError for a row that breaks the schema.
    """
    for row in figures:
        check(row)
    old = json.loads(path.read_text()) if path.exists() else []
    merged = {row["name"]: row for row in old} | {row["name"]: row for row in figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(merged.values()), indent=2) + "\n")


def number(value: Any) -> str:
    """Four significant digits, thousands with commas; "" for None."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{round(value):,}"
    return f"{value:.4g}"


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as a Markdown table whose columns are aligned as plain text too."""
    cells = [[number(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells), 3) for i, c in enumerate(columns)]
    numeric = [all(not isinstance(row.get(c), str) for row in rows) for c in columns]

    def line(values: Iterable[str]) -> str:
        pad = lambda v, w, right: v.rjust(w) if right else v.ljust(w)
        inner = " | ".join(map(pad, values, widths, numeric))
        return f"| {inner} |"

    rule = ["-" * (w - right) + ":" * right for w, right in zip(widths, numeric, strict=True)]
    return "\n".join([line(columns), line(rule), *map(line, cells)])
