"""Curves and bars as pieces of a page: SVG that stretches to any width, its labels plain text."""

import html
import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

Number = float | int
Point = tuple[Number, Number]

WIDE = 1000.0  # both sides of a drawing, in its own units
MOST = 500  # points of a curve that are drawn
TICKS = 5


class Curve(NamedTuple):
    """One line of a chart; colors are numbers of the page's palette."""

    name: str
    points: Sequence[Point]
    color: int = 0
    style: Literal["line", "faint", "dots"] = "line"


class Band(NamedTuple):
    """A filled stretch of a chart: (step, its lower end, its upper end)."""

    name: str
    points: Sequence[tuple[Number, Number, Number]]
    color: int = 0


class Rule(NamedTuple):
    """A dashed line across a chart at a value of one axis, with what it means."""

    name: str
    at: Number


class Mark(NamedTuple):
    """A point with a few words beside it."""

    text: str
    at: Point
    color: int = 0


class Scale(NamedTuple):
    """The values at an axis' two ends."""

    low: Number
    high: Number

    def place(self, value: Number) -> float:
        """0 to WIDE, where the axis holds the value."""
        return WIDE * (value - self.low) / (self.high - self.low)

    def percent(self, value: Number) -> str:
        return f"{self.place(value) * 100 / WIDE:.2f}%"


def finite(points: Sequence[Point]) -> list[Point]:
    """The points that a drawing can hold."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thinned(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """At most `most` of the points, in order: of each stretch its lowest and its highest."""
    if len(points) <= most:
        return list(points)
    stretches, out = max(1, most // 2), []
    for n in range(stretches):
        part = points[n * len(points) // stretches : (n + 1) * len(points) // stretches]
        low, high = (f(part, key=lambda point: point[1]) for f in (min, max))
        out += sorted({low, high})
    return out


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean over a twentieth of the points (5 at least) around each, fewer at both ends."""
    half = max(2, len(points) // 40)
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    out = []
    for n, (x, _) in enumerate(points):
        low, high = max(0, n - half), min(len(points), n + half + 1)
        out.append((x, (sums[high] - sums[low]) / (high - low)))
    return out


def ticks(low: Number, high: Number, count: int = TICKS) -> list[float]:
    """About `count` round values from `low` to `high`: multiples of 1, 2 or 5 times a power of 10.

    None where the two are equal.
    """
    if not high > low:
        return []
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def number(value: Number) -> str:
    """A number in few letters: 12,345 and 0.1235 and 2e-5."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}".replace("e+0", "e")
    if abs(value) < 1e-3:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:.4g}"


def span(values: Sequence[Number], floor: Number | None = None) -> Scale:
    """An axis that holds all values with some air; `floor` is held too where that is near."""
    low, high = min(values), max(values)
    if floor is not None and low - floor < high - low:
        low = min(low, floor)
    air = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    under = low if low == floor else low - air
    return Scale(under, high + air)


def chart(
    title: str,
    curves: Sequence[Curve],
    *,
    steps: Scale,
    unit: str = "",
    rules: Sequence[Rule] = (),
    marks: Sequence[Mark] = (),
    floor: Number | None = None,
    bands: Sequence[Band] = (),
) -> str:
    """Curves over steps as HTML; "" where there is no finite point. Rules lie at values."""
    drawn = [c._replace(points=finite(c.points)) for c in curves]
    drawn = [c for c in drawn if c.points]
    if not drawn:
        return ""
    filled = [b._replace(points=[p for p in b.points if all(map(math.isfinite, p))]) for b in bands]
    filled = [b for b in filled if len(b.points) > 1]
    values = [y for c in drawn for _, y in c.points] + [rule.at for rule in rules]
    values += [y for b in filled for _, *ends in b.points for y in ends]
    up = span(values, floor)
    inside = _grid(ticks(*up), up) + "".join(_rule(up.place(rule.at)) for rule in rules)
    inside += "".join(_band(b, steps, up) for b in filled)
    inside += "".join(_curve(c, steps, up) for c in drawn)
    around = _labels(steps, up) + "".join(_mark(mark, steps, up) for mark in marks)
    around += "".join(
        f'<span class="rule" style="bottom:{up.percent(rule.at)}">{html.escape(rule.name)}</span>'
        for rule in rules
    )
    keys = _legend([*drawn, *filled]) if len(drawn) + len(filled) > 1 else ""
    ends = " ".join(f"{end:.9g}" for end in (*steps, *up))
    return _figure(title, unit, keys, f' data-ends="{ends}"', inside, around)


def bars(
    title: str, edges: Sequence[Number], counts: Sequence[int], *, unit: str = "", rule: Rule
) -> str:
    """A histogram as HTML: counts between each two edges, a rule across at a length."""
    across, up = Scale(0, max(edges[-1], rule.at) * 1.04), Scale(0, max(counts) * 1.08)
    places = [across.place(edge) for edge in edges]
    boxes = [
        f'<rect x="{left:.1f}" y="{WIDE - up.place(count):.1f}" width="{right - left:.1f}" '
        f'height="{up.place(count):.1f}"><title>{_range(low, high)}: {count:,} rows</title></rect>'
        for left, right, low, high, count in zip(
            places, places[1:], edges, edges[1:], counts, strict=False
        )
    ]
    at = across.place(rule.at)
    line = f'<path class="across" d="M{at:.1f} 0V{WIDE:.0f}"/>'
    name = html.escape(rule.name)
    words = (
        f'<span class="limit" style="right:calc(100% - {across.percent(rule.at)})">{name}</span>'
    )
    inside = _grid(ticks(*up), up) + f'<g class="bars">{"".join(boxes)}</g>' + line
    return _figure(title, unit, "", "", inside, _labels(across, up) + words)


def _range(low: Number, high: Number) -> str:
    return f"{low:,.0f} to {high - 1:,.0f} tokens"


def _figure(title: str, unit: str, keys: str, data: str, inside: str, around: str) -> str:
    small = f" <small>{html.escape(unit)}</small>" if unit else ""
    return (
        f"<figure><figcaption>{html.escape(title)}{small}</figcaption>{keys}"
        f'<div class="plot"{data}><svg viewBox="0 0 {WIDE:.0f} {WIDE:.0f}" '
        f'preserveAspectRatio="none" role="img" aria-label="{html.escape(title)}">{inside}</svg>'
        f"{around}</div></figure>"
    )


def _grid(values: Sequence[Number], up: Scale) -> str:
    lines = "".join(f"M0 {WIDE - up.place(v):.1f}H{WIDE:.0f}" for v in values)
    return f'<path class="grid" d="{lines}"/>'


def _rule(place: Number) -> str:
    return f'<path class="across" d="M0 {WIDE - place:.1f}H{WIDE:.0f}"/>'


def _curve(curve: Curve, steps: Scale, up: Scale) -> str:
    at = [f"{steps.place(x):.1f},{WIDE - up.place(y):.1f}" for x, y in thinned(curve.points)]
    name = html.escape(curve.name)
    line = (
        f'<polyline class="{curve.style} c{curve.color}" data-name="{name}" '
        f'points="{" ".join(at)}"/>'
    )
    if curve.style == "line" and len(at) > 1:
        return line
    # A line of no length with round ends: a dot that no stretching makes an ellipse.
    lonely = at if curve.style == "dots" or len(at) == 1 else []
    return line + f'<path class="dot c{curve.color}" d="{"".join(f"M{p}h0" for p in lonely)}"/>'


def _band(band: Band, steps: Scale, up: Scale) -> str:
    low = thinned([(x, y) for x, y, _ in band.points])
    high = thinned([(x, y) for x, _, y in band.points])
    around = [*low, *reversed(high)]
    at = "L".join(f"{steps.place(x):.1f} {WIDE - up.place(y):.1f}" for x, y in around)
    return f'<path class="band c{band.color}" d="M{at}Z"/>'


def _labels(across: Scale, up: Scale) -> str:
    place = lambda kind, side, at, text: f'<span class="{kind}" style="{side}:{at}">{text}</span>'
    values = ticks(*up)
    texts = [number(v) for v in values]
    if len(set(texts)) < len(texts):
        texts = [f"{v:.9g}" for v in values]
    beside = [place("y", "bottom", up.percent(v), t) for v, t in zip(values, texts, strict=True)]
    whole = [v for v in ticks(*across) if v == int(v)]
    return "".join(beside + [place("x", "left", across.percent(v), number(v)) for v in whole])


def _mark(mark: Mark, steps: Scale, up: Scale) -> str:
    x, y = mark.at
    side = " left" if steps.place(x) > WIDE / 2 else ""
    return (
        f'<span class="mark c{mark.color}{side}" style="left:{steps.percent(x)};'
        f'bottom:{up.percent(y)}"><b>{html.escape(mark.text)}</b></span>'
    )


def _legend(curves: Sequence[Curve | Band]) -> str:
    style = lambda c: c.style if isinstance(c, Curve) else "band"
    keys = (f'<li class="{style(c)} c{c.color}">{html.escape(c.name)}</li>' for c in curves)
    return f'<ul class="legend">{"".join(keys)}</ul>'
