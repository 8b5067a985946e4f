"""The parts of a run's page, each from the run's record and log to HTML; all text is escaped."""

import math
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from workflows import charts
from workflows.charts import Curve, Mark, Point, Rule, Scale, number

Row = Mapping[str, Any]
Record = Mapping[str, Any]

# Of a step's row: what is charted by hand, and what is none of the eye's business.
STEP = {
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "speed",
    "memory_gib": "memory, the peak so far",
    "supervised_tokens": "supervised tokens of the last step",
}
UNITS = {"tokens_per_s": "tokens/s", "memory_gib": "GiB"}
NOISY = ("grad_norm", "tokens_per_s", "supervised_tokens")
ASIDE = ("step", "epoch", "loss", "seconds", "samples", "sampled_completions")
COUNTS = ("_supervised_tokens", "_runtime", "_samples_per_second")
MORE = 16  # charts of other numbers in the log, at most
PROMPTS, TIMES, LETTERS = 12, 12, 1500  # of samples that are shown
COLORS = 6


def last(record: Record) -> dict[str, Any]:
    """The run's last start; {} where there is no record."""
    return (record.get("starts") or [{}])[-1]


def heading(name: str, record: Record, rows: Sequence[Row]) -> str:
    """The model, how the run stands, and its main figures."""
    start, done = last(record), max((row["step"] for row in rows), default=0)
    done = max(done, start.get("step") or 0)
    total, state = record.get("total"), start.get("state", "unknown")
    said = "done" if state == "done" else f"{state} at step {done:,}"
    said += f" of {total:,}" if total and state != "done" else ""
    why = f'<p class="why">{escape(start["why"])}</p>' if start.get("why") else ""
    when = escape(str(start["at"]).replace("T", " ")) if "at" in start else ""
    shown = os.path.basename(name.rstrip("/")) if os.path.isabs(name) else name
    told = [record.get("trainer"), record.get("device"), when and f"started {when}"]
    return (
        f'<header><h1>{escape(shown)}</h1><p><span class="state {escape(state)}">{escape(said)}'
        f'</span> <span class="soft">{" · ".join(filter(None, told))}</span></p>{why}'
        f'<dl class="tiles">{"".join(_tiles(record, rows, done))}</dl></header>'
    )


def _tiles(record: Record, rows: Sequence[Row], done: int) -> Iterable[str]:
    trained = [row for row in rows if finite(row.get("loss"))]
    earned = points_of(trained, "reward")
    if earned:
        end = charts.smoothed(earned)[-1][1]
        yield tile("reward", number(end), f"smoothed, from {number(earned[0][1])}")
    elif trained:
        end = charts.smoothed([(row["step"], row["loss"]) for row in trained])[-1][1]
        first = trained[0]
        yield tile("loss", number(end), f"smoothed, from {number(first['loss'])}")
    best = _best(record, rows)
    if best is not None:
        name, (step, value) = best
        yield tile(f"best {name}", number(value), f"at step {step:,}")
    total = record.get("total")
    epoch = next((row["epoch"] for row in reversed(rows) if finite(row.get("epoch"))), None)
    yield tile(
        "steps", f"{done:,}" + (f" of {total:,}" if total else ""),
        "" if epoch is None else f"{number(epoch)} epochs",
    )  # fmt: skip
    seconds = sum(start.get("seconds") or 0 for start in record.get("starts", []))
    inside = sum(row["seconds"] for row in trained if finite(row.get("seconds")))
    if seconds or inside:
        each = f"{number(inside / done)} s a step" if done and inside else ""
        yield tile("time", duration(seconds or inside), each)
    speeds = [row["tokens_per_s"] for row in trained if finite(row.get("tokens_per_s"))]
    if speeds:
        yield tile("speed", f"{statistics.median(speeds):,.0f} tok/s", "median")
    peaks = [row["memory_gib"] for row in trained if finite(row.get("memory_gib"))]
    if peaks:
        plan = record.get("plan")
        yield tile("memory", f"{max(peaks):.2f} GiB", plan and f"plan {_gib(plan):.2f} GiB")


def tile(name: str, value: str, small: str | None = "") -> str:
    more = f"<small>{escape(small)}</small>" if small else ""
    return f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{more}</dd></div>"


def _gib(plan: Mapping[str, Any]) -> float:
    return plan["total"] / 2**30


def duration(seconds: float | int) -> str:
    """ "1 h 02 min", "3 min 07 s" or "4.2 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
    )


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def points_of(rows: Iterable[Row], name: str) -> list[Point]:
    """The finite points of a number in the log."""
    return [(row["step"], row[name]) for row in rows if finite(row.get(name))]


def evaluations(record: Record, rows: Sequence[Row]) -> dict[str, dict[str, list[Point]]]:
    """metric -> evaluation set -> points; the one set of a run without names is "eval"."""
    sets = sorted((record.get("evaluation") or {}), key=len, reverse=True)
    held_out = [row for row in rows if "loss" not in row]
    names = dict.fromkeys(name for row in held_out for name in row if name.startswith("eval_"))
    found: dict[str, dict[str, list[Point]]] = defaultdict(dict)
    for name in names:
        points = points_of(held_out, name)
        if points and not name.endswith(COUNTS):
            metric, of = _of_set(name.removeprefix("eval_"), sets)
            found[metric][of] = points
    return found


def _of_set(name: str, sets: Sequence[str]) -> tuple[str, str]:
    """(metric, evaluation set) of a name such as "short_loss"."""
    own = next((s for s in sets if s and name.startswith(f"{s}_")), None)
    if own is not None:
        return name.removeprefix(f"{own}_"), own
    for metric in ("loss", "perplexity"):
        if name.endswith(f"_{metric}") and "" not in sets:
            return metric, name.removesuffix(f"_{metric}")
    return name, "eval"


def _best(record: Record, rows: Sequence[Row]) -> tuple[str, Point] | None:
    """The name and the point of the best evaluation, by the metric that the run chose."""
    found = evaluations(record, rows)
    settings = record.get("settings") or {}
    plain = "reward" if "reward" in found else "loss"
    wanted = str(settings.get("metric_for_best_model") or plain).removeprefix("eval_")
    metric, of = _of_set(wanted, list(record.get("evaluation") or {}))
    if metric not in found:
        return None
    sets = found[metric]
    of = of if of in sets else next(iter(sets))
    name = f"{of} {metric}" if len(sets) > 1 else f"evaluation {metric}"
    return name, _extreme(sets[of], metric, settings)


def _extreme(points: Sequence[Point], metric: str, settings: Mapping[str, Any]) -> Point:
    greater = settings.get("greater_is_better") and metric not in ("loss", "perplexity")
    greater = greater or metric.startswith("reward")
    return (max if greater else min)(points, key=lambda point: point[1])


def curves(record: Record, rows: Sequence[Row]) -> str:
    """Loss first, over the whole width, then everything else that the log counts."""
    if not rows:
        return '<p class="soft">No step has been logged yet.</p>'
    trained = [row for row in rows if "loss" in row]
    steps = across(rows)
    held_out = evaluations(record, rows)
    settings = record.get("settings") or {}
    draw = lambda metric, sets, more=(): charts.chart(
        "loss" if more else f"evaluation {metric}",
        [*more, *held_out_curves(sets, metric, settings)],
        marks=best_marks(sets, metric, settings), steps=steps, floor=0.0,
    )  # fmt: skip
    loss = draw("loss", held_out.pop("loss", {}), raw_and_smooth("training", trained, "loss"))
    small = [draw(metric, sets) for metric, sets in held_out.items()]
    others = sorted({name for row in trained for name in row} - {*STEP, *ASIDE})[:MORE]
    small += [counted(name, trained, steps, record) for name in [*STEP, *others]]
    return (
        f'<h2>Curves</h2><div class="wide">{loss}</div><div class="charts">{"".join(small)}</div>'
    )


def across(rows: Sequence[Row]) -> Scale:
    """The steps of a chart."""
    every = [row["step"] for row in rows]
    first, end = min(every), max(every)
    steps = Scale(0 if first * 10 <= end or first <= 1 else first, end)
    return steps if steps.high > steps.low else Scale(steps.low - 1, steps.high + 1)


def held_out_curves(sets: Mapping[str, list[Point]], metric: str, settings: Record) -> list[Curve]:
    """A curve an evaluation set."""
    named = lambda name, best: f"{name}, best {number(best[1])} at step {best[0]:,}"
    return [
        Curve(named(name, _extreme(points, metric, settings)), points, n % COLORS, "dots")
        for n, (name, points) in enumerate(sets.items(), start=1)
    ]


def best_marks(sets: Mapping[str, list[Point]], metric: str, settings: Record) -> list[Mark]:
    """A ring a set; words beside it only where one stands alone."""
    found = [_extreme(points, metric, settings) for points in sets.values()]
    text = lambda best: f"best {number(best[1])}" if len(found) == 1 else ""
    return [Mark(text(best), best, n % COLORS) for n, best in enumerate(found, start=1)]


def raw_and_smooth(name: str, rows: Sequence[Row], key: str) -> list[Curve]:
    """A number's curve, faint, with its smoothed one."""
    points = points_of(rows, key)
    if len(points) < 5:
        return [Curve(name, points)]
    return [
        Curve(name, points, 0, "faint"),
        Curve("smoothed", charts.smoothed(points)),
    ]


def counted(name: str, rows: Sequence[Row], steps: Scale, record: Record) -> str:
    """The chart of one number of the steps."""
    known = name in STEP
    points = points_of(rows, name)
    lines = [Curve(STEP.get(name, name), points)]
    if name in NOISY or not known:
        lines = raw_and_smooth("each step", rows, name)
    plan = record.get("plan") if name == "memory_gib" else None
    rules = [Rule(f"plan {_gib(plan):.2f} GiB", _gib(plan))] if plan else []
    floor = 0.0 if known else None
    title, unit = STEP.get(name, name), UNITS.get(name, "")
    if name == "memory_gib" and record.get("backend") == "cpu":
        title = "memory of the process, the peak so far"
    return charts.chart(title, lines, unit=unit, steps=steps, rules=rules, floor=floor)


def samples(rows: Sequence[Row]) -> str:
    """What the model answered: each prompt once, its completions by step."""
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for row in rows:
        for sample in row.get("samples") or []:
            found[str(sample["prompt"])].append((row["step"], str(sample["completion"])))
    if not found:
        return ""
    cards = []
    for prompt, answers in list(found.items())[:PROMPTS]:
        lines = "".join(
            f'<li><small>step {step:,}</small><div class="text">{cut(text)}</div></li>'
            for step, text in _spread(answers, TIMES)
        )
        cards.append(
            f'<article><div class="text prompt">{cut(prompt)}</div><ol>{lines}</ol></article>'
        )
    left = len(found) - len(cards)
    more = f'<p class="soft">{left} more prompts stand in metrics.jsonl.</p>' if left > 0 else ""
    return f'<h2>Samples</h2><div class="samples">{"".join(cards)}{more}</div>'


def _spread(answers: Sequence[tuple[int, str]], most: int) -> list[tuple[int, str]]:
    """The first, the last, and others evenly between."""
    if len(answers) <= most:
        return list(answers)
    return [answers[round(n * (len(answers) - 1) / (most - 1))] for n in range(most)]


def cut(text: str, most: int = LETTERS) -> str:
    """A text as HTML, its end left out where it is long."""
    left = len(text) - most
    more = f' <span class="soft">({left:,} more letters)</span>' if left > 0 else ""
    return escape(text[:most]) + more


def data(record: Record) -> str:
    """The rows' lengths and totals."""
    found, held_out = record.get("data"), record.get("evaluation") or {}
    table = [(f"evaluation rows{name and f', {name}'}", f"{n:,}") for name, n in held_out.items()]
    if found is None:
        known = "<p>The rows are streamed: their lengths are not known beforehand.</p>"
        return f"<h2>Data</h2>{known if not table else two_columns(table)}"
    limit = Rule(f"max length {found['limit']:,}", found["limit"])
    drawn = charts.bars(
        "rows by length", found["edges"], found["counts"], unit="tokens", rule=limit
    )
    density = "packing density" if found["packing"] else "tokens in padded rows"
    table = [
        ("rows", f"{found['rows']:,}"),
        ("tokens", f"{found['tokens']:,}"),
        ("supervised", f"{found['supervised']:,} ({found['supervised'] / found['tokens']:.1%})"),
        ("tokens a row", f"{found['shortest']:,} to {found['longest']:,}, "
         f"median {number(found['median'])}"),
        (density, f"{found['density']:.1%}"),
        *table,
    ]  # fmt: skip
    return f'<h2>Data</h2><div class="two">{drawn}<div>{two_columns(table)}</div></div>'


def settings(record: Record) -> str:
    """The configuration, what differs from the defaults first, and what it ran on."""
    given, plain = record.get("settings") or {}, record.get("defaults") or {}
    if not given:
        return ""
    changed = [name for name in given if given[name] != plain.get(name)]
    head = "".join(f'<th scope="col">{name}</th>' for name in ("setting", "value", "default"))
    line = lambda n: (
        f"<tr><th>{escape(n)}</th><td>{_value(given[n])}</td><td>{_value(plain.get(n))}</td></tr>"
    )
    rest = [(name, given[name]) for name in given if name not in changed]
    model = [(f"adapters: {k}", v) for k, v in (record.get("adapters") or {}).items()]
    versions = {"device": record.get("device", ""), **(record.get("versions") or {})}
    return (
        "<h2>Configuration</h2>"
        f'<table class="changed"><tr>{head}</tr>{"".join(map(line, changed))}</table>'
        f"<details><summary>{len(rest)} at their defaults</summary>{two_columns(rest)}</details>"
        '<div class="two"><div><h2>Model</h2>'
        f"{two_columns([*(record.get('model') or {}).items(), *model])}</div>"
        f"<div><h2>Versions</h2>{two_columns(versions.items())}</div></div>"
    )


def _value(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(x, str | int | float) for x in value):
        return escape(", ".join(map(str, value)))
    return escape(str(value))


def two_columns(rows: Iterable[tuple[str, Any]]) -> str:
    """Names and values as a table."""
    lines = (f"<tr><th>{escape(str(k))}</th><td>{_value(v)}</td></tr>" for k, v in rows)
    return f"<table>{''.join(lines)}</table>"


def starts(record: Record, earlier: Sequence[str]) -> str:
    """Each time the run was started or resumed, and the pages of earlier runs in the folder."""
    known = record.get("starts") or []
    lines = [
        (
            str(s["at"]).replace("T", " "),
            f"steps {s['from'] + 1:,} to {s.get('step') or 0:,}, {s['state']}, "
            f"{duration(s.get('seconds') or 0)} {s['why']}",
        )
        for s in known
    ]
    out = f"<h2>Starts</h2>{two_columns(lines)}" if len(known) > 1 else ""
    links = (f'<a href="{escape(name)}">{escape(name)}</a>' for name in earlier)
    return out + (f"<p>Earlier runs in this folder: {', '.join(links)}</p>" if earlier else "")
