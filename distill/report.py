"""report.html: what one or several distillation runs did, as a single page that opens from disk anywhere (page.py)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..charts import MARKERS, SMOOTHED_FROM, Axis, Chart, Curve, Line, draw, linear_axis, log_axis, number, safe, usual_range, window
from ..errors import RunError
from ..files import read_json, write_text
from ..page import Example, Table, draw_table, gallery, whole_page

COLOURS = 8  # of runs, in the page's style; charts tell runs apart by shape and name as well


@dataclass(frozen=True)
class Part:
    """One line of a metric: a key of the rows, divided by the key `per` where given. A line that is 0 throughout says nothing, unless `zero`."""

    key: str
    name: str
    style: str = "solid"
    per: str = ""
    zero: bool = False


@dataclass(frozen=True)
class Metric:
    """One row of charts, a chart a run; `shared` runs have one vertical axis."""

    key: str
    title: str
    note: str
    parts: tuple[Part, ...]
    shared: bool = True
    beside: str = ""  # what to know of several runs' charts
    log: bool = False
    stairs: bool = False
    reference: float | None = None


METRICS = (
    Metric(
        "loss",
        "Loss",
        "What each step minimised.",
        (Part("loss", "loss"), Part("loss_distill", "distillation part", "dashed")),
        shared=False,
        beside="Every chart has its own scale, as losses of different objectives can’t be compared.",
    ),
    Metric(
        "rewards",
        "Rewards",
        "Means over a step’s answers, before they become advantages; dotted, the reward that the student expects: if it chose among each question’s answers by "
        "its own probabilities. The answers were made before, so their own means do not rise.",
        (Part("reward_accuracy", "accuracy", zero=True), Part("reward_distillation", "distillation", "dashed"), Part("reward_expected", "expected", "dotted")),
    ),
    Metric(
        "outranks",
        "Right ranked above wrong",
        "Of all pairs of a right and a wrong answer to one question, the share in which the right one got the higher reward. "
        "At 0.5, the dotted line, a reward is a coin’s toss.",
        (
            Part("right_outranks_total", "total reward", per="pairs"),
            Part("right_outranks_distillation", "distillation reward", "dashed", per="pairs"),
        ),
        reference=0.5,
    ),
    Metric("mask", "Mask ratio", "Share of the teacher’s weights set to zero, layer by layer.", (Part("ratio", "mask ratio"),), stairs=True),
    Metric(
        "norms",
        "Gradient norm",
        "Before clipping, on a logarithmic scale (averages are geometric). The two parts are measured every few steps.",
        (Part("grad_norm", "total"), Part("grad_norm_distill", "distillation", "dashed"), Part("grad_norm_policy", "policy", "dotted")),
        log=True,
    ),
    Metric("kl", "Distance from the starting point", "KL divergence from the student before training, in nats a token.", (Part("kl", "KL"),)),
    Metric("divergence", "Divergence from the teacher", "Mean over the answers’ tokens, in nats.", (Part("divergence", "divergence"),)),
    Metric(
        "spread",
        "Groups without a difference",
        "Share of questions whose answers all got the same reward: they teach nothing about which is better.",
        (Part("zero_spread", "share of groups", zero=True),),
    ),
    Metric("length", "Length of answers", "Mean number of tokens of the answers that a step learns from.", (Part("response_tokens", "tokens"),)),
    Metric("entropy", "Entropy", "How undecided the student is about the next token of an answer, in nats.", (Part("entropy", "entropy"),)),
)


@dataclass(frozen=True)
class Run:
    """A run's rows apart by kind, its place among the page's runs, and the steps at which its teacher's mask changes."""

    name: str
    place: int
    steps: list[dict]
    evaluations: list[dict]

    @property
    def colour(self) -> int:
        return self.place % COLOURS

    @property
    def marks(self) -> tuple[float, ...]:
        pairs = zip(self.steps, self.steps[1:], strict=False)
        return tuple(float(b["step"]) for a, b in pairs if (a.get("stage"), a.get("ratio")) != (b.get("stage"), b.get("ratio")))


def read_run(folder: Path) -> list[dict]:
    """The rows of a run folder's metrics.jsonl, in order; a last line that is still being written is left out.

    Raises RunError, naming the place, where there is none or a line is damaged.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise RunError(f"no metrics.jsonl in {folder}; expected a run folder that 'masters distill' has trained in")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    rows = []
    for place, line in enumerate(lines, start=1):
        if place == len(lines) and not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int) or row.get("kind") not in ("step", "evaluation", "finding"):
            raise RunError(f"{path} line {place} is {line.strip()[:60]!r}; expected an object with 'kind' and 'step': remove that line, or the run folder")
        rows.append(row)
    return rows


def write_report(path: Path, title: str, runs: Mapping[str, Path], tables: Sequence[Table], sentences: Sequence[str], examples: Sequence[Example]) -> None:
    """Write the page: `sentences` of summary, `tables`, the curves of `runs` (name -> run folder), and `examples` with every model's answer.

    Each part may be empty. Raises RunError or ImageError where a run's metrics or an image can't be read; nothing is written then.
    """
    read = [_run(name, place, read_run(folder)) for place, (name, folder) in enumerate(runs.items())]
    sections = {
        "Summary": "".join(f"<p>{safe(sentence)}</p>" for sentence in sentences),
        "Findings": _findings(runs) if runs else "",
        "Results": "".join(draw_table(table) for table in tables),
        "Training": _training(read) if read else "",
        "Answers": gallery(examples) if examples else "",
    }
    write_text(path, whole_page(title, {name: body for name, body in sections.items() if body}))


def found_in(run: Path) -> str:
    """What was found in a run folder, in one line."""
    found = [f"{name} ({place})" for name, place, _, _ in _troubles(run)]
    return f"FOUND: {', '.join(found)}; see report.html" if found else "none of the known failures was found"


def _findings(runs: Mapping[str, Path]) -> str:
    """What the watchers found in the runs, and what judge.json holds against their judges."""
    rows = tuple((name, *trouble) for name, folder in runs.items() for trouble in _troubles(folder))
    if not rows:
        return (
            "<p>None of the known failures was found: oscillation, collapse, reward without accuracy, nothing to reinforce, no gain, a judge to distrust.</p>"
        )
    note = "A finding is told when it first shows; docs/watching.md and docs/judges.md say how to read them."
    return draw_table(Table("What went wrong", ("Run", "Finding", "Where", "What shows it", "What to change"), rows, note))


def _troubles(run: Path) -> list[tuple[str, str, str, str]]:
    """Each finding's name, place, figure and advice."""
    path = run / "judge.json"
    flags = read_json(path).get("flags", []) if path.is_file() else []
    found = [(f"judge: {flag['name']}", "judge.json", flag["figure"], flag["advice"]) for flag in flags]
    return found + [(row["name"], f"step {row['step']:,}", row["said"], row["advice"]) for row in read_run(run) if row["kind"] == "finding"]


# Training


def _run(name: str, place: int, rows: Sequence[dict]) -> Run:
    return Run(name, place, [row for row in rows if row["kind"] == "step"], [row for row in rows if row["kind"] == "evaluation"])


def _training(runs: Sequence[Run]) -> str:
    parts = [draw_table(_overview(runs)), _validation(runs)]
    drawn = [_metric(metric, runs) for metric in METRICS]
    shape = "alone" if len(runs) == 1 else "beside"
    parts.append(f'{_reading_help(runs)}<div class="metrics {shape}" style="--runs:{min(4, len(runs))}">{"".join(drawn)}</div>')
    return "".join(parts)


def _overview(runs: Sequence[Run]) -> Table:
    """The runs in numbers, which is also what the chart of validation accuracy shows, in words."""
    rows = []
    for run in runs:
        curve = _evaluated(run)
        found = curve.values
        before = f"{found[0]:.3f}" if found and curve.steps[0] == 0 else "–"
        accuracy = (before, *(f"{value:.3f}" for value in (found[-1], max(found)))) if found else ("–",) * 3
        seconds = sum(row.get("seconds", 0.0) for row in run.steps)
        ranked = (_ranked(run, "right_outranks_distillation"), _ranked(run, "right_outranks_total"))
        rows.append((run.name, f"{len(run.steps):,}", f"{sum(row.get('questions', 0) for row in run.steps):,}", _duration(seconds), *accuracy, *ranked))
    columns = ("Run", "Steps", "Questions", "Training time", "Accuracy before", "After", "Best", "Right above wrong: distillation reward", "total reward")
    note = "Right above wrong: of all pairs of a right and a wrong answer to one question, the share in which the right one got the higher reward."
    return Table("Runs and their validation accuracy", columns, tuple(rows), note)


def _ranked(run: Run, key: str) -> str:
    """A reward's share of pairs over the whole run; – where it was not in use or there was no pair."""
    pairs = sum(row.get("pairs", 0) for row in run.steps)
    higher = sum(row.get(key, 0) for row in run.steps)
    in_use = key == "right_outranks_total" or any(row.get("reward_distillation") for row in run.steps)
    return f"{higher / pairs:.0%}" if pairs and in_use else "–"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _evaluated(run: Run) -> Curve:
    """Validation accuracy over the number of steps done: the row of step -1 is from before the first."""
    rows = [row for row in run.evaluations if _known(row.get("validation_accuracy"))]
    return Curve(run.name, [row["step"] + 1 for row in rows], [row["validation_accuracy"] for row in rows])


def _validation(runs: Sequence[Run]) -> str:
    curves = [(run, curve) for run in runs if (curve := _evaluated(run)).values]
    if not curves:
        return '<p class="note">No evaluation yet.</p>'
    lines = tuple(Line(curve, "solid", run.colour, label=True) for run, curve in curves)
    starts = {curve.values[0] for _, curve in curves if curve.steps[0] == 0}
    before = starts.pop() if len(starts) == 1 and all(curve.steps[0] == 0 for _, curve in curves) else None
    y = linear_axis([v for _, curve in curves for v in curve.values])
    chart = Chart("validation", "Validation accuracy of every run over steps", lines, _step_axis(runs, 8), y, reference=before)
    note = "Share of validation questions answered right."
    note += " The dotted line is the student before training." if before is not None else ""
    return f'<div class="validation"><h3>Validation accuracy</h3><p class="note">{note}</p><figure>{draw(chart)}</figure></div>'


def _step_axis(runs: Sequence[Run], count: int) -> Axis:
    last = max([row["step"] + 1 for run in runs for row in (*run.steps, *run.evaluations)], default=1)
    return linear_axis([0, max(1, last)], count, whole=False, least=1)


def _reading_help(runs: Sequence[Run]) -> str:
    longest = max(len(run.steps) for run in runs)
    smoothed = f" Strong lines are moving averages over {window(longest)} steps, faint ones single steps." if longest >= SMOOTHED_FROM else ""
    marks = " At a vertical hairline the teacher’s mask changes." if any(run.marks for run in runs) else ""
    figures = " The figures above a chart are the last ones, or those of the step under the pointer."
    return f'<p class="note">All charts run over steps.{smoothed}{marks}{figures}</p>'


def _metric(metric: Metric, runs: Sequence[Run]) -> str:
    """A heading, what the lines mean, and a chart for every run that has values."""
    found = {run.place: [(part, curve) for part in metric.parts if (curve := _curve(run, part, metric.log)).values] for run in runs}
    if not any(found.values()):
        return ""
    common = _value_axis(metric, [curve for lines in found.values() for _, curve in lines])
    panels = [_panel(metric, run, found[run.place], _step_axis(runs, 4), common, named=len(runs) > 1) for run in runs]
    used = [part for part in metric.parts if any(part == p for lines in found.values() for p, _ in lines)]
    keys = "".join(f'<li><svg aria-hidden="true" width="28" height="8"><path class="{p.style}" d="M1 4H27"/></svg>{p.name}</li>' for p in used)
    legend = f'<ul class="legend" aria-label="Lines">{keys}</ul>' if len(used) > 1 else ""
    note = f"{metric.note} {metric.beside}".strip() if len(runs) > 1 else metric.note
    return f'<section class="metric"><h3>{metric.title}</h3><p class="note">{note}</p>{legend}<div class="panels">{"".join(panels)}</div></section>'


def _curve(run: Run, part: Part, positive: bool) -> Curve:
    """The values of one key over a run's steps, without steps that lack it, and empty where it is 0 throughout and so was not in use."""
    rows = [row for row in run.steps if _known(row.get(part.key)) and (not part.per or row.get(part.per))]
    points = [(row["step"], row[part.key] / row[part.per], row[part.per]) if part.per else (row["step"], row[part.key], 1) for row in rows]
    if positive:  # a logarithmic scale has no place for others
        points = [point for point in points if point[1] > 0]
    if not points or not (part.zero or any(value for _, value, _ in points)):
        return Curve(part.name, [], [])
    steps, values, weights = (list(column) for column in zip(*points, strict=True))
    return Curve(part.name, steps, values, weights)


def _known(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _value_axis(metric: Metric, curves: Sequence[Curve]) -> Axis:
    values = [value for curve in curves for value in curve.values]
    if metric.log:
        return log_axis(values)
    if metric.stairs:
        return linear_axis([0, *values])
    # Each line's own range, or a calm line would lose its ends to a wild one's.
    return linear_axis([end for curve in curves for end in usual_range(curve.values)])


def _panel(metric: Metric, run: Run, lines: Sequence[tuple[Part, Curve]], x: Axis, common: Axis, named: bool) -> str:
    sign = f'<svg class="r{run.colour}" aria-hidden="true" width="12" height="12" viewBox="-7 -7 14 14"><use href="#m{run.colour % len(MARKERS)}"/></svg>'
    head = f"<figcaption>{sign}{safe(run.name)}</figcaption>" if named else ""
    if not lines:
        return f'<figure class="none">{head}<p class="note">not part of this run</p></figure>'
    y = common if metric.shared else _value_axis(metric, [curve for _, curve in lines])
    drawn = tuple(Line(curve, part.style, run.colour, metric.stairs) for part, curve in lines)
    chart = Chart(f"{metric.key}-{run.place}", f"{metric.title}, {run.name}", drawn, x, y, () if metric.stairs else run.marks, metric.reference)
    return f"<figure>{head}{draw(chart)}{_outside([curve for _, curve in lines], y)}</figure>"


def _outside(curves: Sequence[Curve], y: Axis) -> str:
    """A note of values that the axis leaves out."""
    values = [value for curve in curves for value in y.outside(curve.values)]
    if not values:
        return ""
    span = f"{number(min(values))} to {number(max(values))}" if len(values) > 1 else number(values[0])
    return f'<p class="note outside">{len(values)} {"value" if len(values) == 1 else "values"} beyond the chart (averaged as its edge): {span}</p>'
