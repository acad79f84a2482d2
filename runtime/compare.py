"""`masters check --compare A.json B.json`: what changed between two reports, with intervals, and whether the two can be compared at all."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bootstrap import Interval, median_ratio, paired_difference
from ..errors import DataError
from .report import number, table


@dataclass(frozen=True)
class Change:
    """One figure of two reports. `interval` is of the difference (`kind` 'difference') or of B / A ('ratio'); None where single values were compared."""

    what: str
    a: float | None
    b: float | None
    kind: str
    interval: Interval | None = None

    @property
    def verdict(self) -> str:
        """'changed' where the interval leaves no doubt, 'no clear change' where it does, and nothing without one."""
        if self.interval is None:
            return ""
        still = 0.0 if self.kind == "difference" else 1.0
        return "no clear change" if self.interval.low <= still <= self.interval.high else "changed"


@dataclass(frozen=True)
class Comparison:
    """Two reports beside each other; `differing` names what else differs between them than the bundle."""

    names: tuple[str, str]
    changes: tuple[Change, ...]
    differing: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        changes = [dataclasses.asdict(change) | {"verdict": change.verdict} for change in self.changes]
        return {"a": self.names[0], "b": self.names[1], "differing": self.differing, "changes": changes}


def compare(first: Path, second: Path) -> Comparison:
    """Compare two reports that `masters check --json` wrote: accuracy by question, times by their medians. Raises DataError for anything else."""
    a, b = _read(first), _read(second)
    try:
        changes = [_accuracy(a, b), *_times(a, b), *_single(a, b)]
        return Comparison((_name(a), _name(b)), tuple(changes), tuple(_differing(a, b)))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{first} and {second} are not two check reports of one version ({error!r}); write both with masters check --json") from None


def comparison_text(found: Comparison) -> str:
    """The comparison, for a terminal."""
    rows = []
    for change in found.changes:
        interval = "" if change.interval is None else f"{change.interval.mean:.3f} [{change.interval.low:.3f}, {change.interval.high:.3f}]"
        rows.append((change.what, number(change.a), number(change.b), change.kind if interval else "", interval, change.verdict))
    lines = [f"A: {found.names[0]}", f"B: {found.names[1]}", *(f"Not alike: {what}" for what in found.differing)]
    return "\n".join(lines) + "\n\n" + table(("what", "A", "B", "B against A", "95% interval", "verdict"), rows)


def _read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"can't read the report {path} ({str(error)[:120]}); expected what masters check --json printed") from None
    if not isinstance(report, dict) or "accuracy" not in report:
        raise DataError(f"{path} is no check report; expected what masters check --json printed")
    return report


def _name(report: dict[str, Any]) -> str:
    return f"{report['bundle']} ({report['target']}, {report['provider']}, {report['threads']} threads)"


def _differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Whatever makes a difference in speed or accuracy doubtful, in words."""
    seen: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("processor", lambda report: report["device"]["cpu"]),
        ("cores", lambda report: report["device"]["cores"]),
        ("system", lambda report: report["device"]["system"]),
        ("threads", lambda report: report["threads"]),
        ("provider", lambda report: report["provider"]),
        *((f"version of {name}", lambda report, name=name: report["device"]["libraries"].get(name)) for name in sorted(a["device"]["libraries"])),
    ]
    found = [f"{what} ({look(a)} and {look(b)})" for what, look in seen if look(a) != look(b)]
    questions = [{answer["id"] for answer in report["accuracy"]["answers"]} for report in (a, b)]
    if questions[0] != questions[1]:
        found.append(f"questions ({len(questions[0])} and {len(questions[1])}, {len(questions[0] & questions[1])} of them in both, which alone are compared)")
    return found


def _accuracy(a: dict[str, Any], b: dict[str, Any]) -> Change:
    """On the questions that both answered."""
    ours, theirs = ({answer["id"]: answer["score"] for answer in report["accuracy"]["answers"]} for report in (b, a))
    common = [name for name in theirs if name in ours]
    if not common:
        raise DataError("the two reports have no question in common; expected checks over the same file of questions")
    scores = [[found[name] for name in common] for found in (theirs, ours)]
    means = [sum(found) / len(found) for found in scores]
    return Change(f"accuracy, {len(common)} questions", means[0], means[1], "difference", paired_difference(scores[1], scores[0]))


def _times(a: dict[str, Any], b: dict[str, Any]) -> list[Change]:
    found = []
    for what, key in (("first token, ms, median", "first_tokens"), ("decode per token, ms, median", "decode_steps")):
        theirs, ours = a["latency"][key], b["latency"][key]
        if theirs and ours:
            interval = median_ratio(ours, theirs)
            found.append(Change(what, statistics.median(theirs), statistics.median(ours), "ratio", interval))
    return found


def _single(a: dict[str, Any], b: dict[str, Any]) -> list[Change]:
    """Figures that were measured once, or whose single values were not kept."""
    looks: list[tuple[str, Callable[[dict[str, Any]], float | None]]] = [
        ("bundle, MB", lambda report: report["bundle_mb"]),
        ("peak memory of a process, MB", lambda report: report["cold_start"] and report["cold_start"]["peak_rss_mb"]),
        ("cold start, ms", lambda report: report["cold_start"] and report["cold_start"]["first_token"]),
        ("energy an answer, J", lambda report: report["latency"]["joules"]),
    ]
    return [Change(what, look(a), look(b), "difference") for what, look in looks]
