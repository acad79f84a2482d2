"""A check's report as a page that opens from disk: verdicts, figures, where the time goes, and the questions that were answered wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..charts import Chart, Curve, Line, draw, linear_axis
from ..files import write_text
from ..page import Example, Table, draw_table, gallery, whole_page
from ..samples import Sample
from .check import CheckReport
from .latency import Sustained
from .report import budget_rows, figure_rows, stage_rows, summary

FAILURES = 48  # shown, those with the lowest scores first
PERCENTILES = (*range(0, 100, 5), 99)  # the slowest hundredth would flatten all others


def write_page(path: Path, report: CheckReport, samples: Sequence[Sample]) -> None:
    """Write the page of a report about `samples`, the questions that it was made with. Raises ImageError where an image can't be read any more."""
    verdict = f' class="{"pass" if report.passed else "fail"}"' if report.gates else ""
    sections = {
        "Verdict": f"<p{verdict}>{summary(report)}</p>" + (draw_table(_budget(report)) if report.gates else ""),
        "Figures": draw_table(Table("Measured", ("what", "measured"), tuple(figure_rows(report)), f"On {report.device}")),
        "Speed": draw_table(Table("Stages of an answer, ms", ("stage", "p50", "p90", "n"), tuple(stage_rows(report.latency)))) + _charts(report),
        "Failures": _failures(report, samples),
    }
    write_text(path, whole_page(f"Check of {report.bundle}", {name: body for name, body in sections.items() if body}))


def _budget(report: CheckReport) -> Table:
    return Table("Budget", ("what", "measured", "limit", "verdict"), tuple(budget_rows(report)))


def _charts(report: CheckReport) -> str:
    times = [("First token", report.latency.first_tokens), ("Each token after the first", report.latency.decode_steps)]
    drawn = [
        _metric(f"{name}, ms", "How many percent of all came within a time.", _percentiles(name, values), "p", i)
        for i, (name, values) in enumerate(times)
        if len(values) > 1
    ]
    if report.sustained and len(report.sustained.totals) > 1:
        note = f"One question over and over for {report.sustained.seconds:.0f} s: a device that heats up climbs."
        drawn.append(_metric("Whole answer, ms", note, _answers(report.sustained), "second", len(drawn)))
    return f'<div class="metrics alone" style="--runs:1">{"".join(drawn)}</div>'


def _metric(title: str, note: str, curve: Curve, unit: str, place: int) -> str:
    x, y = linear_axis(curve.steps, whole=False), linear_axis([0.0, *curve.values])
    chart = draw(Chart(f"check{place}", f"{title}, by {unit}", (Line(curve),), x, y, unit=unit))
    return f'<section class="metric"><h3>{title}</h3><p class="note">{note}</p><div class="panels"><figure class="r0">{chart}</figure></div></section>'


def _percentiles(name: str, values: Sequence[float]) -> Curve:
    return Curve(name, PERCENTILES, np.percentile(values, PERCENTILES).tolist())


def _answers(sustained: Sustained) -> Curve:
    return Curve("answer", sustained.ends, sustained.totals)


def _failures(report: CheckReport, samples: Sequence[Sample]) -> str:
    """The questions without a full score, worst first."""
    by_id = {sample.id: sample for sample in samples}
    wrong = sorted((answer for answer in report.accuracy.answers if answer.score < 1), key=lambda answer: answer.score)
    if not wrong:
        return "<p>Every question has the full score.</p>"
    shown = [
        Example(sample.images[0], sample.prompt, " / ".join(sample.answers), {report.bundle: (answer.text, False)})
        for answer in wrong[:FAILURES]
        if (sample := by_id[answer.id]).images
    ]
    more = f", the first {len(shown)} with an image" if len(shown) < len(wrong) else ""
    return f"<p>{len(wrong)} of {len(report.accuracy.answers)} questions{more}.</p>{gallery(shown)}"
