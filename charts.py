"""Line charts as inline SVG, for a page that brings the colours: the same drawing serves light and dark, a desk and a phone.

The outer <svg> is the plot's area, with positions in percent, so that text keeps its size at any width; labels stand outside it, in the
padding that the page leaves. Lines lie in an inner <svg> that stretches both ways (0..1000) while its strokes do not. Every chart says
its numbers in a <desc> too, and shows those under the pointer without a script.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

MARKERS = ("M0-5A5 5 0 1 1 0 5A5 5 0 1 1 0-5z", "M-4.4-4.4h8.8v8.8h-8.8z", "M0-5.6 5.6 4.4H-5.6z", "M0-6 6 0 0 6-6 0z")
KEYS = {"solid": "—", "dashed": "- -", "dotted": "···"}
SMOOTHED_FROM = 40  # values; fewer are drawn as they are
DOTTED_UP_TO = 20  # values; so few get a dot each
MOST_BUCKETS = 300  # of a line; a longer one keeps the lowest and the highest value of each bucket
MOST_READINGS = 40  # strips under the pointer


@dataclass(frozen=True)
class Curve:
    """Values over steps, both of one length and finite; `weights`, where given, say how much each counts in a moving average."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    weights: Sequence[float] = ()


@dataclass(frozen=True)
class Line:
    """A curve and how it is drawn: 'solid', 'dashed' or 'dotted', in the colour of run `run`; `stairs` holds a value until the next."""

    curve: Curve
    style: str = "solid"
    run: int = 0
    stairs: bool = False
    label: bool = False  # marked by the run's shape at every value, and named at its right end


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high` with labelled `ticks`."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """The place of a value, 0 at the low end and 1 at the high end; beyond them outside."""
        return float(self.places([value])[0])

    def places(self, values: Sequence[float]) -> np.ndarray:
        """`at` of many values."""
        found = np.asarray(values, float)
        if self.log:
            return np.log(found / self.low) / math.log(self.high / self.low)
        return (found - self.low) / (self.high - self.low)

    def outside(self, values: Sequence[float]) -> list[float]:
        """Those of `values` that lie beyond an end; an end itself does not, however it was rounded."""
        return [value for value, place in zip(values, self.places(values), strict=True) if not -1e-9 <= place <= 1 + 1e-9]

    def values(self, places: np.ndarray) -> np.ndarray:
        """The values at places: the inverse of `places`."""
        return self.low * (self.high / self.low) ** places if self.log else self.low + places * (self.high - self.low)


@dataclass(frozen=True)
class Chart:
    """One chart. `name` is its accessible name, `unit` what its horizontal axis counts, `marks` are steps with a vertical hairline, `reference` a level with
    a dashed one."""

    identity: str
    name: str
    lines: tuple[Line, ...]
    x: Axis
    y: Axis
    marks: tuple[float, ...] = ()
    reference: float | None = None
    unit: str = "step"


def safe(text: str, longest: int | None = None) -> str:
    """Text for a page: escaped, without control characters and halves of surrogate pairs, cut where it is longer than `longest`."""
    clean = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "�", text.replace("\r\n", "\n"))
    if longest and len(clean) > longest:
        clean = clean[:longest].rstrip() + " …"
    return escape(clean)


def number(value: float) -> str:
    """A value to three digits, thousands as k: 0.0123, 1.5, 12k."""
    if 9999.5 <= abs(value) < 999_500:
        return f"{value / 1000:.3g}k".replace("-", "−")
    # + 0.0 makes a negative zero an ordinary one.
    return (f"{value:.0f}" if 999.5 <= abs(value) < 9999.5 else f"{value + 0.0:.3g}").replace("-", "−")


def linear_axis(values: Sequence[float], count: int = 5, whole: bool = True, least: float = 0.0) -> Axis:
    """An axis over `values` with up to `count` round intervals, none under `least`; with `whole` it ends on ticks, else on the values themselves."""
    low, high = min(values), max(values)
    if low == high:
        low, high = min(0.0, low), max(1.0, high)
    rough = max(least, (high - low) / count)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(m for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
    # 1e-9: an end that rounding put just beside a tick is on it.
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(float(f"{i * step:.12g}") for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks) if whole else Axis(low, high, tuple(t for t in ticks if low <= t <= high))


def log_axis(values: Sequence[float]) -> Axis:
    """A logarithmic axis over `values` > 0, which ends on 1, 2 or 5 times a power of ten and has at most six ticks."""
    decades = range(math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 2)
    round_ones = [float(f"{m}e{decade}") for decade in decades for m in (1, 2, 5)]
    low = max(r for r in round_ones if r <= min(values))
    high = min(r for r in round_ones if r >= max(values) and r > low)
    inside = [r for r in round_ones if low <= r <= high]
    powers = [r for r in inside if f"{r:e}".startswith("1.0")]
    ticks = inside if len(inside) <= 6 else powers[:: math.ceil(len(powers) / 6)]
    return Axis(low, high, tuple(ticks), log=True)


def usual_range(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest of `values` without the few that would flatten all others: those far outside the middle 96%."""
    found = np.asarray(values, float)
    low, high = np.quantile(found, [0.02, 0.98])
    reach = 2 * (high - low)
    kept = found[(found >= low - reach) & (found <= high + reach)]
    return float(kept.min()), float(kept.max())


def window(count: int) -> int:
    """The values in a moving average of a curve of `count`: an odd number, a 25th of it or at least 5."""
    return max(5, count // 25) | 1


def smooth(curve: Curve, y: Axis) -> list[float]:
    """The curve's moving average, centred and narrower towards both ends.

    It is taken along the axis: on a logarithmic one it is geometric, and a value beyond an end counts as that end, lest one spike raise a plateau.
    """
    n = len(curve.values)
    places = np.clip(y.places(curve.values), 0, 1)
    weights = np.asarray(curve.weights or np.ones(n), float)
    middle, half = np.arange(n), window(n) // 2
    start, end = np.maximum(middle - half, 0), np.minimum(middle + half + 1, n)
    sums = [np.concatenate([[0.0], np.cumsum(x)]) for x in (weights * places, weights)]
    return y.values((sums[0][end] - sums[0][start]) / (sums[1][end] - sums[1][start])).tolist()


def markers() -> str:
    """The shapes that charts refer to by their ids, m0 …: once in a page."""
    shapes = "".join(f'<path id="m{i}" d="{shape}"/>' for i, shape in enumerate(MARKERS))
    return f'<svg class="hidden" aria-hidden="true" width="0" height="0"><defs>{shapes}</defs></svg>'


def draw(chart: Chart) -> str:
    """The chart as an <svg> element."""
    grid, labels = _horizontals(chart), _steps(chart)
    marks = "".join(f'<line class="mark" x1="{(p := _percent(chart.x.at(m)))}" x2="{p}" y1="0" y2="100%"/>' for m in chart.marks)
    strong = [smooth(line.curve, chart.y) if _smoothed(line) else line.curve.values for line in chart.lines]
    paths = "".join(_paths(line, values, chart) for line, values in zip(chart.lines, strong, strict=True))
    # Two percent more on every side, or a line along an edge would lose half its width.
    stretched = f'<svg viewBox="-20 -20 1040 1040" preserveAspectRatio="none" x="-2%" y="-2%" width="104%" height="104%">{paths}</svg>'
    dots = "".join(_dots(line, chart) for line in chart.lines)
    ends = _end_labels(chart)
    return (
        f'<svg class="chart" role="img" aria-label="{safe(chart.name)}" aria-describedby="{chart.identity}-text">'
        f'<desc id="{chart.identity}-text">{safe(_words(chart, strong))}</desc>{grid}{labels}{marks}{stretched}{dots}{ends}{_readings(chart, strong)}</svg>'
    )


def _words(chart: Chart, strong: Sequence[Sequence[float]]) -> str:
    """The chart in words: of each line the first and last value, the range, and the moving average at the end."""
    parts = []
    for line, values in zip(chart.lines, strong, strict=True):
        curve = line.curve
        first, last = (f"{number(curve.values[i])} at {chart.unit} {curve.steps[i]:,.0f}" for i in (0, -1))
        if len(curve.values) == 1:
            parts.append(f"{curve.name}: {first}.")
            continue
        average = f", moving average at the end {number(values[-1])}" if _smoothed(line) else ""
        spread = f"between {number(min(curve.values))} and {number(max(curve.values))}"
        parts.append(f"{curve.name}: {len(curve.values)} values {spread}, first {first}, last {last}{average}.")
    return " ".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def _tick_labels(axis: Axis) -> list[str]:
    """The ticks' numbers, on a linear axis written alike: all with as many decimals as the one that needs most, or all in thousands."""
    if axis.log:
        return [number(tick) for tick in axis.ticks]
    if max(map(abs, axis.ticks), default=0) >= 10_000:
        return [f"{tick / 1000:.4g}k" if tick else "0" for tick in axis.ticks]
    exact = [f"{tick:.9f}".rstrip("0") for tick in axis.ticks]
    decimals = max((len(label.partition(".")[2]) for label in exact), default=0)
    return [f"{tick:.{decimals}f}".replace("-", "−") for tick in axis.ticks]


def _horizontals(chart: Chart) -> str:
    lines = []
    for tick, label in zip(chart.y.ticks, _tick_labels(chart.y), strict=True):
        y = _percent(1 - chart.y.at(tick))
        lines.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/><text class="y" x="0" y="{y}" dx="-10" dy=".33em">{label}</text>')
    if chart.reference is not None and chart.y.low <= chart.reference <= chart.y.high:
        level = _percent(1 - chart.y.at(chart.reference))
        lines.append(f'<line class="reference" x1="0" x2="100%" y1="{level}" y2="{level}"/>')
    return "".join(lines)


def _steps(chart: Chart) -> str:
    """Labels under the horizontal axis: the first says what it counts, every second one can go where there is little room."""
    found = []
    for i, (tick, label) in enumerate(zip(chart.x.ticks, _tick_labels(chart.x), strict=True)):
        place = chart.x.at(tick)
        side = "start" if place < 0.03 else "end" if place > 0.97 else "middle"
        unit = f'<tspan class="unit">{safe(chart.unit)} </tspan>' if i == 0 else ""
        found.append(f'<text class="x{" spare" if i % 2 else ""}" text-anchor="{side}" x="{_percent(place)}" y="100%" dy="1.6em">{unit}{label}</text>')
    return "".join(found)


def _paths(line: Line, values: Sequence[float], chart: Chart) -> str:
    """A faint line through all values and a strong one through their moving average, or through the few values themselves."""
    curve = line.curve
    strong = f'<path class="{line.style} r{line.run}" d="{_path(curve.steps, values, chart, line.stairs)}"/>'
    if not _smoothed(line):
        return strong
    return f'<path class="faint r{line.run}" d="{_path(curve.steps, curve.values, chart)}"/>{strong}'


def _smoothed(line: Line) -> bool:
    return not (line.stairs or line.label) and len(line.curve.values) >= SMOOTHED_FROM


def _path(steps: Sequence[float], values: Sequence[float], chart: Chart, stairs: bool = False) -> str:
    chosen = _bucketed(values)
    across = 1000 * chart.x.places([steps[i] for i in chosen])
    # Far outside is as good as further: what the drawing cuts off needs no digits.
    down = 1000 - 1000 * np.clip(chart.y.places([values[i] for i in chosen]), -9, 9)
    points = [(f"{x:.0f}", f"{y:.0f}") for x, y in zip(across, down, strict=True)]
    (x, y), rest = points[0], points[1:]
    if stairs:
        kept = [b for a, b in zip(points, rest, strict=False) if a[1] != b[1] or b is rest[-1]]
        return f"M{x} {y}" + "".join(f"H{x}V{y}" for x, y in kept)
    return f"M{x} {y}" + ("L" + " ".join(f"{x} {y}" for x, y in rest) if rest else "h0")


def _bucketed(values: Sequence[float]) -> list[int]:
    """The indices of a line's points to draw, at most two a bucket, its lowest and highest: a spike survives where an average would hide it."""
    n = len(values)
    if n <= 2 * MOST_BUCKETS:
        return list(range(n))
    size = math.ceil(n / MOST_BUCKETS)
    kept = {0, n - 1}
    for start in range(0, n, size):
        bucket = np.asarray(values[start : start + size])
        kept |= {start + int(bucket.argmin()), start + int(bucket.argmax())}
    return sorted(kept)


def _dots(line: Line, chart: Chart) -> str:
    curve = line.curve
    if line.stairs or (len(curve.values) > DOTTED_UP_TO and not line.label):
        return ""
    beyond = set(chart.y.outside(curve.values))
    points = [(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if v not in beyond]
    places = [(_percent(chart.x.at(step)), _percent(1 - chart.y.at(value))) for step, value in points]
    if line.label:
        return "".join(f'<use class="marker r{line.run}" href="#m{line.run % len(MARKERS)}" x="{x}" y="{y}"/>' for x, y in places)
    return "".join(f'<circle class="dot {line.style} r{line.run}" cx="{x}" cy="{y}" r="2.2"/>' for x, y in places)


def _end_labels(chart: Chart) -> str:
    """Names and last values to the right of the plot, at their lines' ends as far as they leave each other room."""
    named = [line for line in chart.lines if line.label]
    if not named:
        return ""
    heights = _apart([1 - chart.y.at(line.curve.values[-1]) for line in named], 0.075)
    labels = []
    for line, height in zip(named, heights, strict=True):
        end, y = _percent(1 - chart.y.at(line.curve.values[-1])), _percent(height)
        name = _short(line.curve.name)
        labels.append(
            f'<line class="lead" x1="9" x2="24" y1="{end}" y2="{y}"/>'
            f'<text class="name" x="30" y="{y}" dy=".33em">{safe(name)} <tspan class="value">{number(line.curve.values[-1])}</tspan></text>'
        )
    return f'<svg class="ends" x="100%" width="10" height="100%">{"".join(labels)}</svg>'


def _short(name: str) -> str:
    """A name that fits beside the plot: of a long one both ends, as runs of one series differ at the end."""
    return name if len(name) <= 14 else f"{name[:6].rstrip()}…{name[-7:].lstrip()}"


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved as little as a downward and an upward sweep do, so that any two are `gap` apart."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    for above, below in itertools.pairwise(order):
        placed[below] = max(placed[below], placed[above] + gap)
    floor = max(1.0, gap * (len(order) - 1))
    for i in reversed(order):
        placed[i], floor = min(placed[i], floor), min(placed[i], floor) - gap
    return placed


def _readings(chart: Chart, strong: Sequence[Sequence[float]]) -> str:
    """Strips that show the values at their step while the pointer is on them, and those of the last step otherwise."""
    steps = _reading_steps([line.curve for line in chart.lines])
    places = [chart.x.at(step) for step in steps]
    edges = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(places)), 1.0]
    shown = [dict(zip(line.curve.steps, values, strict=True)) for line, values in zip(chart.lines, strong, strict=True)]
    strips = []
    for step, place, left, right in zip(steps, places, edges[:-1], edges[1:], strict=True):
        rule = f'<line x1="{_percent(place)}" x2="{_percent(place)}" y1="0" y2="100%"/>'
        area = f'<rect x="{_percent(left)}" width="{_percent(max(0, right - left))}" y="0" height="100%"/>'
        strips.append(f"<g>{area}{rule}{_reading(chart, step, shown)}</g>")
    if any(line.label for line in chart.lines):  # their last values stand at their ends
        return f'<g class="readings">{"".join(strips)}</g>'
    last = [{steps[-1]: there[line.curve.steps[-1]]} for line, there in zip(chart.lines, shown, strict=True)]
    # A part that is measured now and then may have its last value at an earlier step.
    when = "" if all(line.curve.steps[-1] == steps[-1] for line in chart.lines) else "last"
    return f'<g class="readings">{"".join(strips)}</g><g class="last">{_reading(chart, steps[-1], last, when)}</g>'


def _reading(chart: Chart, step: float, shown: Sequence[dict[float, float]], when: str = "") -> str:
    """One line of text: the step, or `when` instead, and of each line that has a value there a key, where there are several, and the value."""
    values = []
    for line, there in zip(chart.lines, shown, strict=True):
        if step in there:
            key = line.curve.name if line.label else KEYS[line.style] if len(chart.lines) > 1 else ""
            named = f'<tspan class="key" dx=".8em">{safe(key)}</tspan>' if key else ""
            values.append(f'{named}<tspan class="value{f" r{line.run}" if line.label else ""}" dx="{".3em" if key else ".8em"}">{number(there[step])}</tspan>')
    return f'<text class="reading" x="0" y="0" dy="-1.3em"><tspan class="step">{when or f"{safe(chart.unit)} {step:,.0f}"}</tspan>{"".join(values)}</text>'


def _reading_steps(curves: Sequence[Curve]) -> list[float]:
    """Steps to show values at: some spread over the longest curve, and all of a curve that has few."""
    longest = max((curve.steps for curve in curves), key=len)
    spread = {longest[i] for i in np.linspace(0, len(longest) - 1, min(MOST_READINGS, len(longest))).round().astype(int)}
    return sorted(spread.union(*(curve.steps for curve in curves if len(curve.steps) <= MOST_READINGS)))
