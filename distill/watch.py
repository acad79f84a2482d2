"""Watchers: the known ways in which such a training fails, looked for in the rows of metrics.jsonl while they are written.

Each rule is a pure function of rows; what it finds names the figure, its values, the step and the recipe's keys to change. The same rows give the same
findings, so a run that was killed and continued says what an unbroken one does. Differences that chance explains are none: docs/log.md has the rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, stdev
from typing import Any

WINDOW = 40  # steps that are looked back on
EVERY = 10  # steps between looks, for each is like a throw of the dice
FEW = 10  # steps that tell how something began, or how it stands now
FLAT = 10.0  # a swing of a median of three steps, in deviations of a single step; noise alone swings by a third of that
SWINGS = 4  # up and down within the window
ALTERNATES = -0.7  # correlation of steps half a period apart; noise has 0 ± 0.16
HALVES = range(1, 6)  # half periods that are looked for so; longer swings are counted
LEGS = 3  # ups and downs of validation accuracy, each beyond SURE standard errors
SURE = 3.5  # standard errors, where many looks are taken
FELL = 0.1  # of accuracy, below which a fall is no collapse
FAR = 2.0  # nats a token from the student before training
LEFT = 0.05  # of the entropy at the beginning
SHRUNK, GROWN = 0.4, 2.5  # times the length before training
ALIKE = 0.9  # share of questions that get one and the same answer
EVEN = 0.95  # share of groups without a difference in reward
SWINGING = ("loss", "kl", "entropy", "reward_expected")

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Finding:
    """What goes wrong, the step at which it shows, the figure of metrics.jsonl that shows it with its values, and the recipe's keys to change."""

    name: str
    step: int
    figure: str
    values: Mapping[str, float]
    said: str
    settings: tuple[str, ...]
    advice: str

    def row(self) -> dict[str, Any]:
        """As it stands in metrics.jsonl."""
        return {"kind": "finding"} | asdict(self)

    def __str__(self) -> str:
        return f"{self.name} at step {self.step}: {self.said}; {self.advice}"


@dataclass(frozen=True)
class Watched:
    """What rows don't tell of their run: its number of updates, whether rewards count in it, and which weights it keeps ('last' or 'best')."""

    total: int
    rewarded: bool = True
    keep: str = "last"


class Watch:
    """The rows of a run so far, and what was found in them. Each kind of trouble is told once."""

    def __init__(self, run: Watched) -> None:
        self.run = run
        self.steps: list[Mapping[str, Any]] = []
        self.evaluations: list[Mapping[str, Any]] = []
        self.found: dict[str, Finding] = {}

    def add(self, row: Mapping[str, Any]) -> list[Finding]:
        """Take the next row; returns what it shows for the first time."""
        if row["kind"] not in ("step", "evaluation"):
            return []
        (self.steps if row["kind"] == "step" else self.evaluations).append(row)
        if row["kind"] == "step" and (row["step"] + 1) % EVERY:
            return []
        new = [finding for finding in look(self.steps, self.evaluations, self.run) if finding.name not in self.found]
        self.found |= {finding.name: finding for finding in new}
        return new


def watch(rows: Rows, run: Watched) -> list[Finding]:
    """All findings of a run's rows, in the order in which they arose."""
    watched = Watch(run)
    return [finding for row in rows for finding in watched.add(row)]


def look(steps: Rows, evaluations: Rows, run: Watched) -> list[Finding]:
    """What the latest of these rows show."""
    found = [oscillation(steps, evaluations), collapse(steps, evaluations), no_gain(steps, evaluations, run)]
    if run.rewarded:
        found += [reward_without_accuracy(steps, evaluations), nothing_to_reinforce(steps)]
    return [finding for finding in found if finding]


def oscillation(steps: Rows, evaluations: Rows) -> Finding | None:
    """A figure goes up and down instead of where it should: from step to step, slowly beyond the noise, or from one validation to the next."""
    keys = ("train.learning_rate", "train.questions_per_step", "train.warm_up")
    advice = "lower train.learning_rate, raise train.questions_per_step, or set train.warm_up"
    for key in SWINGING:
        values = _series(steps[-WINDOW:], key)
        if len(values) < WINDOW:
            continue
        correlation, half = min((lag_correlation(values, half), half) for half in HALVES)
        swings = count_swings(values)
        if correlation <= ALTERNATES or swings >= SWINGS:
            regular = f"went up and down every {2 * half} steps (correlation {correlation:.2f} at half of that)"
            how = f"swung {swings} times beyond the noise" if swings >= SWINGS else regular
            said = f"{key} {how} in {WINDOW} steps, between {min(values):.3g} and {max(values):.3g}"
            measured = {"swings": swings, "correlation": correlation, "least": min(values), "most": max(values)}
            return Finding("oscillation", steps[-1]["step"], key, measured, said, keys, advice)
    turns = accuracy_turns(evaluations)
    if len(turns) > LEGS:
        said = f"validation_accuracy went {' → '.join(f'{value:.3f}' for value in turns)}, each time by more than {SURE:g} standard errors"
        measured = {f"turn {i}": value for i, value in enumerate(turns)}
        return Finding("oscillation", evaluations[-1]["step"], "validation_accuracy", measured, said, keys, advice)
    return None


def collapse(steps: Rows, evaluations: Rows) -> Finding | None:
    """The student is far from where it began, undecided about nothing, answers nothing, no end or always the same, and is no better for it; or is far worse."""
    if len(evaluations) < 2:
        return None
    first, last = evaluations[0], evaluations[-1]
    keys, advice = ("train.learning_rate", "objective.beta", "train.warm_up"), "lower train.learning_rate, raise objective.beta, or set train.warm_up"
    if last["validation_accuracy"] > first["validation_accuracy"]:
        return None
    place = _now(steps, evaluations)
    was, now_is = first["validation_accuracy"], last["validation_accuracy"]
    for key, before, now, is_so in _forms(steps, first, last):
        if is_so:
            said = f"{key} is {now:.3g}, {before:.3g} at the beginning, and validation accuracy {now_is:.3f}, {was:.3f} before"
            return Finding("collapse", place, key, {"before": before, "now": now}, said, keys, advice)
    change, error = last.get("since_start", 0.0), last.get("since_start_error", math.inf)
    if change <= -FELL and change < -SURE * error:
        said = f"validation_accuracy fell from {was:.3f} to {now_is:.3f} (by {-change:.3f} ± {error:.3f}, question by question)"
        values = {"before": was, "now": now_is, "change": change, "error": error}
        return Finding("collapse", place, "validation_accuracy", values, said, keys, advice)
    return None


def _forms(steps: Rows, first: Mapping[str, Any], last: Mapping[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Figures that show a collapse, as they began, as they are, and whether that is one."""
    found = []
    for key in ("kl", "entropy") if len(steps) >= 2 * FEW else ():
        early, late = _series(steps[:FEW], key), _series(steps[-FEW:], key)
        if early and late:
            before, now = early[0] if key == "kl" else median(early), median(late)
            found.append((key, before, now, now > FAR if key == "kl" else now < LEFT * before))
    if "validation_tokens" in first and "validation_tokens" in last:
        before, now = first["validation_tokens"], last["validation_tokens"]
        found.append(("validation_tokens", before, now, not SHRUNK * before <= now <= GROWN * before))
    if "validation_commonest" in first and "validation_commonest" in last:
        before, now = first["validation_commonest"], last["validation_commonest"]
        found.append(("validation_commonest", before, now, now >= ALIKE > before))
    return found


def reward_without_accuracy(steps: Rows, evaluations: Rows) -> Finding | None:
    """Since the best validation so far the student has come to prefer what pays, while its accuracy on held-out questions fell: both beyond the noise."""
    if len(evaluations) < 2 or "since_best" not in (last := evaluations[-1]):
        return None
    if last["since_best"] >= -SURE * last["since_best_error"] or last["since_best"] >= 0:
        return None
    best = max(evaluations[:-1], key=lambda row: row["validation_accuracy"])
    after = [row["reward_expected"] for row in steps if row["step"] > best["step"] and "reward_expected" in row]
    until = [row["reward_expected"] for row in steps if row["step"] <= best["step"] and "reward_expected" in row]
    size = min(WINDOW // 2, len(after) // 2) if not until else min(WINDOW // 2, len(until), len(after))
    if size < FEW // 2:
        return None
    before, now = (until[-size:] if until else after[:size]), after[-size:]
    error = math.sqrt((stdev(before) ** 2 + stdev(now) ** 2) / size)
    if fmean(now) - fmean(before) <= SURE * error:
        return None
    accuracy = best["validation_accuracy"], last["validation_accuracy"]
    values = {"reward before": fmean(before), "reward now": fmean(now), "accuracy before": accuracy[0], "accuracy now": accuracy[1]}
    said = f"reward_expected rose from {fmean(before):.3f} to {fmean(now):.3f} while validation accuracy fell from {accuracy[0]:.3f} to {accuracy[1]:.3f}"
    keys = ("judge.kind", "objective.beta", "train.epochs", "train.keep")
    advice = "what pays is not what is right: read judge.json and change judge.kind, raise objective.beta, lower train.epochs, or set train.keep=best"
    return Finding("reward without accuracy", _now(steps, evaluations), "reward_expected", values, said, keys, advice)


def nothing_to_reinforce(steps: Rows) -> Finding | None:
    """Almost all groups have one reward for all their answers: nothing can be learned from rewards."""
    even = _series(steps[-WINDOW:], "zero_spread")
    if len(even) < WINDOW or fmean(even) < EVEN:
        return None
    said = f"zero_spread is {fmean(even):.2f}: in {fmean(even):.0%} of the groups of the last {WINDOW} steps all answers got the same reward"
    keys = ("answers.temperature", "answers.teacher", "answers.student", "data.train")
    advice = "raise answers.temperature, answers.teacher and answers.student, or choose questions in data.train that are sometimes answered right"
    return Finding("nothing to reinforce", steps[-1]["step"], "zero_spread", {"zero_spread": fmean(even)}, said, keys, advice)


def no_gain(steps: Rows, evaluations: Rows, run: Watched) -> Finding | None:
    """Halfway not a single score has changed; or at the end the weights that are kept are not above the student before training, or the baseline."""
    if len(evaluations) < 2 or evaluations[0]["step"] != -1 or "since_start" not in evaluations[-1]:
        return None
    last = evaluations[-1]
    if 2 * (last["step"] + 1) >= run.total and _unmoved(last):
        said = f"validation accuracy is {last['validation_accuracy']:.3f} as before training, question by question"
        advice = "the student has not moved: raise train.learning_rate"
        return Finding("no gain", last["step"], "since_start", {"change": 0.0, "error": 0.0}, said, ("train.learning_rate",), advice)
    if last["step"] + 1 < run.total:
        return None
    kept = max(evaluations, key=lambda row: row["validation_accuracy"]) if run.keep == "best" else last
    keys = ("objective.policy", "preset", "train.learning_rate", "train.epochs")
    advice = "compare with objective.policy=0 and with preset=sft (masters ablate), or change train.learning_rate or train.epochs"
    for name, other in (("start", "the student before training"), ("baseline", "the run in 'baseline'")):
        change, error = kept.get(f"since_{name}", 0.0), kept.get(f"since_{name}_error", 0.0)
        if (name == "baseline" and "since_baseline" not in kept) or change > 1.96 * error:
            continue
        said = f"validation accuracy {kept['validation_accuracy']:.3f} is {change:+.3f} ± {1.96 * error:.3f} from {other}, question by question"
        return Finding("no gain", last["step"], f"since_{name}", {"change": change, "error": error}, said + _spread(steps), keys, advice)
    return None


def _now(steps: Rows, evaluations: Rows) -> int:
    return max(int(rows[-1]["step"]) for rows in (steps, evaluations) if rows)


def _unmoved(row: Mapping[str, Any]) -> bool:
    return row["since_start"] == 0 and row["since_start_error"] == 0


def _spread(steps: Rows) -> str:
    even = _series(steps, "zero_spread")
    return f" ({fmean(even):.0%} of the groups had one reward for all answers)" if even else ""


def _series(rows: Rows, key: str) -> list[float]:
    return [float(row[key]) for row in rows if key in row and math.isfinite(row[key])]


def lag_correlation(values: Sequence[float], lag: int = 1) -> float:
    """Of each value with the one `lag` steps later, about their mean; 0 where they are all the same."""
    mean = fmean(values)
    total = sum((value - mean) ** 2 for value in values)
    return sum((a - mean) * (b - mean) for a, b in zip(values, values[lag:], strict=False)) / total if total > 1e-18 else 0.0


def count_swings(values: Sequence[float]) -> int:
    """How often medians of three go up or down by more than FLAT deviations of a single step, which second differences measure whatever the trend."""
    bends = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    noise = 1.4826 * median(bends) / math.sqrt(6)  # of independent values the second difference has variance 6
    smooth = [median(values[i : i + 3]) for i in range(len(values) - 2)]
    size = max(FLAT * noise, 0.1 * fmean(map(abs, smooth)), 1e-6)  # and by a tenth of what it is about
    return len(turning_points(smooth, size)) - 1


def turning_points(values: Sequence[float], size: float) -> list[float]:
    """Where a series turns, with its beginning and end, ups and downs of less than `size` being none."""
    turns, extreme, way = [values[0]], values[0], 0
    for value in values[1:]:
        if way == 0:
            low, high = min(turns[0], extreme, value), max(turns[0], extreme, value)
            if high - low > size:
                way, turns[0], extreme = (1, low, value) if value == high else (-1, high, value)
            else:
                turns[0], extreme = low, high
        elif (value - extreme) * way >= 0:
            extreme = value
        elif abs(value - extreme) > size:
            turns.append(extreme)
            extreme, way = value, -way
    return [*turns, extreme] if way else turns[:1]


def accuracy_turns(evaluations: Rows) -> list[float]:
    """Turning points of validation accuracy, by its own standard errors: those of a difference between two sets of questions, which is on the wide side."""
    known = [row for row in evaluations if {"validation_low", "validation_high"} <= row.keys()]
    if len(known) <= LEGS:
        return []
    error = max((row["validation_high"] - row["validation_low"]) / (2 * 1.96) for row in known)
    return turning_points([row["validation_accuracy"] for row in known], SURE * math.sqrt(2) * error) if error else []
