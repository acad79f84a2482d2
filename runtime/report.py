"""A check's report as a person reads it: where it ran, the figures, the stages of an answer, the verdicts."""

from __future__ import annotations

from collections.abc import Sequence

from .check import CheckReport
from .latency import Latency, Spread


def report_text(report: CheckReport) -> str:
    """The whole report, for a terminal."""
    head = [
        f"{report.bundle} ({report.target}) on provider '{report.provider}', {report.threads} threads",
        str(report.device),
        *(f"{part}: {', '.join(f'{nodes} nodes on {name}' for name, nodes in found.items())}" for part, found in report.placement.items() if len(found) > 1),
    ]
    parts = ["\n".join(head), table(("what", "measured"), figure_rows(report)), table(("stage, ms", "p50", "p90", "n"), stage_rows(report.latency))]
    if report.gates:
        parts += [table(("budget", "measured", "limit", "verdict"), budget_rows(report)), summary(report)]
    return "\n\n".join(parts)


def summary(report: CheckReport) -> str:
    """One sentence: whether the limits hold."""
    missed = sum(gate.verdict != "pass" for gate in report.gates)
    if not report.gates:
        return "no limits were set"
    return f"{missed} of {len(report.gates)} limits missed" if missed else f"all {len(report.gates)} limits hold"


def budget_rows(report: CheckReport) -> list[tuple[str, ...]]:
    """Every limit with what was measured and the verdict."""
    return [(gate.what, number(gate.measured), number(gate.budget), gate.verdict) for gate in report.gates]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first is set to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]) for line in lines)


def number(value: float | None) -> str:
    """Three decimals below 10, one below 1,000, none above."""
    if value is None:
        return "not measured"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def figure_rows(report: CheckReport) -> list[tuple[str, ...]]:
    """What was measured, with its value, a row each."""
    accuracy, cold = report.accuracy, report.cold_start
    rows: list[tuple[str, ...]] = [(f"accuracy, {accuracy.mean.count} questions, 95% interval", str(accuracy.mean))]
    if accuracy.reference and accuracy.difference:
        rows += [("accuracy of the stored PyTorch answers", str(accuracy.reference)), ("difference, paired", str(accuracy.difference))]
    rows += [("bundle, MB", number(report.bundle_mb)), ("peak memory of the checking process, MB", number(report.peak_rss_mb))]
    if cold:
        rows += [
            (f"cold start: process start to first token, ms, median of {cold.runs}", number(cold.first_token)),
            ("of it loading and verifying the bundle, ms", number(cold.load)),
            ("peak memory of that process, MB", number(cold.peak_rss_mb)),
        ]
    else:
        rows.append(("cold start", "not measured"))
    if (sustained := report.sustained) is not None:
        speed = f"{number(sustained.steady)} ({sustained.steady / sustained.burst:.2f} times the first tenth's)"
        rows.append((f"answers a second in the last tenth of {sustained.seconds:.0f} s", speed))
    rows.append(("energy an answer, whole processor, J", number(report.latency.joules)))
    return rows


def stage_rows(latency: Latency) -> list[tuple[str, ...]]:
    """The stages of an answer with median, 90th percentile and count."""
    stages: list[tuple[str, Spread | None]] = [
        ("image preprocess", latency.image_preprocess),
        ("image encode", latency.image_encode),
        ("prefill", latency.prefill),
        ("first token", latency.first_token),
        ("decode per token", latency.decode),
        ("whole answer", latency.total),
    ]
    return [(name, number(s.p50), number(s.p90), str(s.count)) if s else (name, "not measured", "not measured", "0") for name, s in stages]
