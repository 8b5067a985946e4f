"""Curves as SVG: what is drawn of many points, round values at the axes, what is left out."""

import math

import pytest

from workflows import charts
from workflows.charts import Curve, Mark, Rule, Scale
from workflows.row_lengths import histogram

STEPS = Scale(0, 100)


def test_a_thinned_curve_keeps_both_ends_and_every_spike():
    points = [(n, math.sin(n / 300)) for n in range(5000)]
    points[777], points[2345] = (777, 50.0), (2345, -50.0)
    kept = charts.thinned(points, 400)
    assert len(kept) <= 400 and kept == sorted(kept)
    assert {(777, 50.0), (2345, -50.0)} <= set(kept)
    assert kept[0][0] < 100 and kept[-1][0] > 4_900
    assert charts.thinned(points[:300], 400) == points[:300]


def test_a_smoothed_curve_is_the_mean_around_each_point():
    points = [(n, float(n % 2)) for n in range(9)]
    assert [y for _, y in charts.smoothed(points)][4] == pytest.approx(2 / 5)
    straight = [(n, 3.0 * n) for n in range(100)]
    assert charts.smoothed(straight)[50] == pytest.approx(straight[50])
    assert charts.smoothed([]) == [] and charts.smoothed([(1, 2.0)]) == [(1, 2.0)]


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 2.1e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
        (-3, 61, [0, 20, 40, 60]),
        (5, 5, []),
    ],
)
def test_ticks_are_round_values_inside(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (12345.6, "12,346"), (0.12345, "0.1235"), (2e-5, "2e-5"), (-1.5e-4, "-1.5e-4"),
     (3, "3"), (2.5e9, "2.5e9")],
)  # fmt: skip
def test_a_number_is_written_in_few_letters(value, text):
    assert charts.number(value) == text


def test_what_is_no_number_is_not_drawn():
    points = [(1, math.nan), (2, 1.0), (3, math.inf), (4, 2.0)]
    drawn = charts.chart("loss", [Curve("a", points)], steps=STEPS)
    assert "nan" not in drawn and "inf" not in drawn
    assert drawn.count(",") - drawn.count(", ") == 2  # the two points that are left
    assert charts.chart("loss", [Curve("a", points[:1])], steps=STEPS) == ""


def test_a_constant_curve_has_an_axis():
    drawn = charts.chart("memory", [Curve("a", [(1, 2.0), (2, 2.0)])], steps=STEPS)
    assert "polyline" in drawn and "nan" not in drawn


def test_a_rule_above_the_curve_is_inside_the_chart():
    rule = Rule("plan", 9.0)
    drawn = charts.chart("memory", [Curve("a", [(1, 2.0), (2, 3.0)])], steps=STEPS, rules=[rule])
    assert float(drawn.split('data-ends="')[1].split('"')[0].split()[-1]) > 9


def test_names_and_marks_are_escaped():
    curve, mark = Curve("<i>x</i>", [(1, 2.0)]), Mark("<b>&", (1, 2.0))
    drawn = charts.chart("<u>", [curve, curve], steps=STEPS, marks=[mark], unit="<s>")
    assert not any(tag in drawn for tag in ("<i>", "<u>", "<s>", "<b>&<"))
    assert "&lt;i&gt;x" in drawn


def test_each_length_is_counted_once():
    sizes = [1, 1, 5, 24, 47, 48, 100]
    edges, counts = histogram(sizes)
    assert sum(counts) == len(sizes) and len(counts) <= 24 and edges[-1] > 100
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        assert count == sum(low <= size < high for size in sizes)
    assert histogram([0])[1] == [1]
