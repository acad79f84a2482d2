"""Charts: what is drawn is read back from the SVG and compared with the values; averages against plain loops."""

from __future__ import annotations

import itertools
import math
import random
import re
import xml.etree.ElementTree as ElementTree

import pytest

from masters.charts import Axis, Chart, Curve, Line, draw, linear_axis, log_axis, number, safe, smooth, usual_range, window


def _parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def _points(path: str) -> list[tuple[float, float]]:
    numbers = [float(n) for n in re.findall(r"-?\d+", path)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _scale(root: ElementTree.Element, kind: str, side: str) -> tuple[float, float, float, float]:
    """Two labelled ticks of an axis as a reader sees them: (percent, value) of the first and of the last."""
    found = [
        ("".join(t.itertext()).replace("step ", "").replace("−", "-"), t.get(side, "")) for t in root.findall("text") if kind in t.get("class", "").split()
    ]
    (first, a), (last, b) = found[0], found[-1]
    return float(a.rstrip("%")), float(first), float(b.rstrip("%")), float(last)


def _chart(curve: Curve, y: Axis | None = None, line: Line | None = None) -> Chart:
    return Chart("c", "a chart", (line or Line(curve),), linear_axis([0, max(curve.steps)], 4, whole=False, least=1), y or linear_axis(curve.values))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.7612, 0.8213), (-0.04, 0.09), (6.0561, 6.0612), (1e-7, 3e-7), (0.0, 30_000.0), (-5.0, -4.0)])
def test_a_linear_axis_holds_its_values_between_few_even_round_ticks(low: float, high: float) -> None:
    axis = linear_axis([high, low, (low + high) / 2])
    gaps = [b - a for a, b in itertools.pairwise(axis.ticks)]
    assert axis.low <= low < high <= axis.high
    assert 3 <= len(axis.ticks) <= 7
    assert max(gaps) == pytest.approx(min(gaps))
    assert f"{gaps[0]:.3e}"[:5] in ("1.000", "2.000", "5.000")


def test_an_axis_of_one_value_still_has_an_extent() -> None:
    for value in (0.0, 0.779, 1.0, 12.0, -3.0):
        axis = linear_axis([value])
        assert axis.low <= value <= axis.high
        assert axis.low < axis.high
    assert log_axis([1.0]).low < log_axis([1.0]).high


@pytest.mark.parametrize("values", [[0.03, 256.0], [0.9, 1.1], [1e-6, 3.0], [5.0, 5.0]])
def test_a_log_axis_is_even_in_ratios(values: list[float]) -> None:
    axis = log_axis(values)
    assert axis.low <= min(values) <= max(values) <= axis.high
    assert 1 <= len(axis.ticks) <= 6
    middle = math.sqrt(axis.low * axis.high)
    assert axis.at(middle) == pytest.approx(0.5)


def test_the_line_drawn_is_the_values_read_off_against_the_labels() -> None:
    rng = random.Random(0)
    curve = Curve("loss", list(range(0, 30, 2)), [rng.uniform(-0.3, 2.0) for _ in range(15)])
    root = _parse(draw(_chart(curve)))
    drawn = _points(root.findall("svg/path")[0].get("d", ""))
    y0, v0, y1, v1 = _scale(root, "y", "y")
    x0, s0, x1, s1 = _scale(root, "x", "x")
    read = [(s0 + (x / 10 - x0) / (x1 - x0) * (s1 - s0), v0 + (y / 10 - y0) / (y1 - y0) * (v1 - v0)) for x, y in drawn]
    assert len(read) == 15
    for (step, value), want_step, want in zip(read, curve.steps, curve.values, strict=True):
        assert step == pytest.approx(want_step, abs=0.03)
        assert value == pytest.approx(want, abs=0.004)


def test_stairs_hold_a_value_until_the_next() -> None:
    curve = Curve("mask", [0, 1, 2, 3, 4, 5], [0.2, 0.2, 0.1, 0.1, 0.0, 0.0])
    path = _parse(draw(_chart(curve, linear_axis([0, 0.2]), Line(curve, stairs=True)))).findall("svg/path")[0].get("d", "")
    assert path == "M0 0H400V500H800V1000H1000V1000"


def test_the_moving_average_is_that_of_a_plain_loop_with_weights() -> None:
    rng = random.Random(1)
    values, weights = [rng.random() for _ in range(203)], [rng.randint(1, 9) for _ in range(203)]
    half = window(203) // 2
    found = smooth(Curve("c", list(range(203)), values, weights), Axis(0, 1, (0, 1)))
    for i, average in enumerate(found):
        span = range(max(0, i - half), min(203, i + half + 1))
        want = sum(values[j] * weights[j] for j in span) / sum(weights[j] for j in span)
        assert average == pytest.approx(want, rel=1e-9)


def test_the_average_is_geometric_on_a_log_axis_and_a_spike_counts_as_the_edge() -> None:
    values = [1.0, 100.0] * 100
    assert smooth(Curve("c", list(range(200)), values), Axis(0.1, 1000, (1,), log=True))[100] == pytest.approx(10, rel=0.3)
    spiked = [0.5] * 100 + [1e6] + [0.5] * 100
    assert max(smooth(Curve("c", list(range(201)), spiked), Axis(0, 1, (0, 1)))) == pytest.approx(0.5 + 0.5 / window(201))


def test_a_usual_range_leaves_out_spikes_and_nothing_of_a_calm_curve() -> None:
    calm = [math.sin(i / 9) for i in range(400)]
    assert usual_range(calm) == (min(calm), max(calm))
    assert usual_range([*calm, 256.0, -80.0]) == (min(calm), max(calm))
    assert usual_range([0.3, 0.9]) == (0.3, 0.9)


def test_a_long_line_is_thinned_and_keeps_its_spike() -> None:
    values = [0.5] * 50_000
    values[31_234] = 1.0
    svg = draw(_chart(Curve("c", list(range(50_000)), values), linear_axis([0, 1])))
    points = _points(_parse(svg).findall("svg/path[@class='faint r0']")[0].get("d", ""))
    assert len(points) < 1000
    assert (625, 0) in points
    assert len(svg) < 40_000


def test_readings_say_every_value_of_a_short_curve_and_the_last_stands_without_a_pointer() -> None:
    curve = Curve("loss", [0, 1, 2], [0.5, 0.25, 0.125])
    root = _parse(draw(_chart(curve)))
    texts = ["".join(t.itertext()) for t in root.findall("g[@class='readings']/g/text")]
    assert texts == ["step 00.5", "step 10.25", "step 20.125"]
    assert "".join(root.findall("g[@class='last']/text")[0].itertext()) == "step 20.125"
    edges = [(float(r.get("x", "").rstrip("%")), float(r.get("width", "").rstrip("%"))) for r in root.findall("g[@class='readings']/g/rect")]
    assert [x + width for x, width in edges] == [25, 75, 100]  # the strips touch, with each step inside its own


def test_last_values_of_different_steps_claim_none() -> None:
    lines = (Line(Curve("total", [0, 1, 2], [0.5, 0.25, 0.125])), Line(Curve("part", [0], [0.75]), "dashed"))
    root = _parse(draw(Chart("c", "norms", lines, linear_axis([0, 3], whole=False), linear_axis([0, 1]))))
    assert "".join(root.findall("g[@class='last']/text")[0].itertext()) == "last—0.125- -0.75"


def test_names_at_the_ends_keep_clear_of_each_other() -> None:
    lines = tuple(Line(Curve(f"run {i}", [0, 10], [0.5, 0.8 + i / 1000]), run=i, label=True) for i in range(6))
    root = _parse(draw(Chart("c", "runs", lines, linear_axis([0, 10], whole=False), linear_axis([0.5, 0.81]))))
    names = {"".join(t.itertext()): float(t.get("y", "").rstrip("%")) for t in root.findall("svg[@class='ends']/text")}
    heights = sorted(names.values())
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 7.4
    assert max(heights) <= 100
    assert names["run 5 0.805"] < names["run 0 0.8"]  # the better one higher


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (0.00733, "0.00733"),
        (0.81249, "0.812"),
        (-1.5, "−1.5"),
        (999.6, "1000"),
        (1234.0, "1234"),
        (12_345, "12.3k"),
        (2.5e6, "2.5e+06"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_safe_text_is_escaped_cleaned_and_cut() -> None:
    assert safe("<b>\"&'") == "&lt;b&gt;&quot;&amp;&#x27;"
    assert safe("a\x00b\ud800c\r\nd") == "a�b�c\nd"
    assert safe("word " * 100, 20) == "word word word word …"
