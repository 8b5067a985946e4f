"""A run as one page that needs nothing else: curves, samples, data, settings, versions.

    python -m workflows.report OUTPUT_DIR

makes OUTPUT_DIR/report.html again from metrics.jsonl and run.json there, as a run does by itself.
"""

import argparse
import html
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workflows import report_parts as parts
from workflows import report_rewards
from workflows.page_style import CSS, SCRIPT

METRICS, RECORD, PAGE = "metrics.jsonl", "run.json", "report.html"
AGAIN = 20  # seconds after which a browser reads the page of a running run again
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

Row = dict[str, Any]


def write(folder: Path) -> Path:
    """Writes the folder's page at once or not at all; gives its path."""
    numbers = lambda path: [int(n) for n in path.name.split(".") if n.isdigit()]
    earlier = sorted(folder.glob("report.*.html"), key=numbers)
    text = page(record(folder), rows(folder), [path.name for path in earlier])
    replace(folder / PAGE, text)
    return folder / PAGE


def replace(file: Path, text: str) -> None:
    """Writes a file beside its place, then gives it its name."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def record(folder: Path) -> dict[str, Any]:
    """What run.json holds, {} where there is none. Raises ValueError where it is no record."""
    file = folder / RECORD
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds {type(found).__name__}, expected a run's record")
    return found


def rows(folder: Path) -> list[Row]:
    """The log's rows in order; a last one that is cut short is left out.

    Raises ValueError naming the file and the line that is no row with a step.
    """
    file = folder / METRICS
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    if lines and not lines[-1].endswith("}"):
        lines.pop()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number} is no row of a log: {error!r}") from error
        found.append(row | {"step": int(step)})
    return found


def page(record: Mapping[str, Any], rows: Sequence[Row], earlier: Sequence[str] = ()) -> str:
    """The whole page; parts for which there is nothing are left out."""
    name = record.get("model", {}).get("name") or "a training run"
    running = parts.last(record).get("state") == "running"
    rewarded = report_rewards.there(record, rows)
    again = f'<meta http-equiv="refresh" content="{AGAIN}">' if running else ""
    body = [
        parts.heading(name, record, rows),
        (report_rewards if rewarded else parts).curves(record, rows),
        report_rewards.completions(rows),
        parts.samples(rows),
        (report_rewards if rewarded else parts).data(record),
        parts.settings(record),
        parts.starts(record, earlier),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">{again}'
        f"<title>{html.escape(name)}: training</title><style>{CSS}</style></head>\n"
        f"<body><main>{''.join(body)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def main(line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m workflows.report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="a run's output_dir")
    folder = parser.parse_args(line).folder
    if not (folder / METRICS).exists():
        parser.error(f"no {METRICS} in {str(folder)!r}: that is no run's output_dir")
    try:
        print(write(folder))
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
