"""Writes the table of docs/performance.md from the figures in docs/performance/*.json.

python -m workflows.bench.performance
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from workflows.bench import rows
from workflows.marked import between

DOCS = Path(__file__).parents[2] / "docs"
START = "<!-- table: python -m workflows.bench.performance -->"
END = "<!-- end of table -->"
COLUMNS = "figure ours other unit ratio must aim limit met memory".split()
OPERATIONS = ["operation", "ours, us", "other, us", "floor, us", "times as fast"]


def figures(folder: Path) -> list[rows.Row]:
    """The rows of every JSON list in a folder; raises ValueError for one that breaks the schema."""
    found = []
    for path in sorted(folder.glob("*.json")):
        for row in json.loads(path.read_text()):
            rows.check(row)
            found.append(row)
    return found


def printed(row: rows.Row) -> rows.Row:
    """A row as the table prints it."""
    mark = {"peak_gib": "*" if row.get("peak_compiled") else "", "other_peak_gib": ""}
    memory = [
        f"{row[peak]:.2f}{mark[peak]} + {row.get(pinned) or 0:.2f}"
        for peak, pinned in (("peak_gib", "pinned_gib"), ("other_peak_gib", "other_pinned_gib"))
        if row.get(peak) is not None
    ]
    met = {True: "yes", False: "no", None: ""}
    aim = " (aim too)" if rows.met(row, "aim") else ""
    said = row.get("missed") or met[rows.met(row, "must")] + aim
    return row | {"figure": row["name"], "met": said, "memory": " / ".join(memory)}


def operation(row: rows.Row) -> rows.Row:
    """A row of `workflows.bench.kernels` as the table of operations prints it."""
    ours, other = row["ours_us"], row.get("other_us")
    faster = None if other is None else other / ours
    return dict(zip(OPERATIONS, (row["name"], ours, other, row["floor_us"], faster), strict=True))


def text(found: Sequence[rows.Row]) -> str:
    """The tables, and under them where and when each figure was measured."""
    if not found:
        return "Nothing is measured yet."
    timed = [row for row in found if "ours_us" in row]
    others = [row for row in found if "ours_us" not in row or row["must"] is not None]
    tables = [rows.table([printed(row) for row in others], COLUMNS)]
    if timed:
        head = (
            "Operations, beside what XLA makes of the same (for a product with few rows, cuBLAS):"
        )
        tables += [head, rows.table([operation(row) for row in timed], OPERATIONS)]
    places: dict[tuple[str, str, str], None] = {}
    for row in found:
        places[row["device"], row["date"], row["command"]] = None
    said = "\n".join(f"- {device}, {date}: `{command}`" for device, date, command in places)
    return "\n\n".join([*tables, "Measured by", said])


def put(page: str, table: str) -> str:
    """The page with the table between the two markers; raises ValueError where they are not."""
    return between(page, START, END, f"\n\n{table}\n\n")


def main(line: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--docs", type=Path, default=DOCS)
    a = p.parse_args(line)
    page, table = a.docs / "performance.md", text(figures(a.docs / "performance"))
    page.write_text(put(page.read_text(), table))
    print(table)


if __name__ == "__main__":
    main()
