"""How much masking a teacher bears: its score on validation questions at every ratio, and the largest ratio that costs no more than a tolerance.

The useful ratio depends on the teacher, so it is measured before anything is distilled from it. Greedy answers, the same questions at every ratio,
compared with the unmasked teacher's one by one (paired bootstrap over questions).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bootstrap import Interval, mean_interval, paired_difference
from ..errors import RunError
from ..files import read_json, write_json
from ..page import Table
from ..progress import bar
from ..samples import Sample
from . import ranks
from .claims import digest
from .mask import TensorMask

Score = Callable[[float], Sequence[float]]  # the score of each question, of the teacher at a ratio


@dataclass(frozen=True)
class RatioScore:
    """The teacher at one ratio: the share of the masked matrices' weights that are zero, its score, and what that is more than the unmasked one's."""

    ratio: float
    reached: float
    score: Interval
    difference: Interval
    within: bool  # not worse by more than the tolerance, at the interval's lower end


@dataclass(frozen=True)
class TrialResult:
    """A teacher's scores by ratio; `r_max` is the largest ratio within the tolerance that the schedule's steps can start from."""

    teacher: str
    questions: int
    tolerance: float
    ratios: tuple[RatioScore, ...]
    r_max: float

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> TrialResult:
        """The inverse of `dataclasses.asdict` followed by JSON."""
        rows = [row | {key: Interval(**row[key]) for key in ("score", "difference")} for row in values["ratios"]]
        return TrialResult(**{**values, "ratios": tuple(RatioScore(**row) for row in rows)})


def trial_questions(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """`count` of the questions, drawn without looking at their order, since files are often sorted by kind."""
    chosen = random.Random(f"{seed}/mask trial").sample(range(len(samples)), min(count, len(samples)))
    return [samples[i] for i in sorted(chosen)]


def measure(folder: Path, ratios: Sequence[float], samples: Sequence[Sample], score: Score) -> dict[float, list[float]]:
    """The scores at every ratio, rising, each kept in a file of its own in `folder`: what a killed run has measured is not measured again.

    Scores of other questions than `samples` are made anew. Raises RunError for a damaged file.
    """
    asked = digest({"questions": [[s.id, s.prompt, list(s.answers), s.metric, *(str(i) for i in s.images if isinstance(i, Path))] for s in samples]})
    paths = {ratio: folder / f"ratio-{ratio:g}.json" for ratio in sorted(ratios)}
    found = ranks.agreed({ratio: scores for ratio, path in paths.items() if (scores := _kept(path, asked))})
    missing = [ratio for ratio in paths if ratio not in found]
    for ratio in bar(missing, "masked teacher", total=len(paths), done=len(found)):
        found[ratio] = list(score(ratio))
        by_question = {sample.id: value for sample, value in zip(samples, found[ratio], strict=True)}
        ranks.once(write_json, paths[ratio], {"ratio": ratio, "asked": asked, "scores": by_question})
    return {ratio: found[ratio] for ratio in paths}


def judge_trial(teacher: str, scores: Mapping[float, Sequence[float]], masks: Sequence[TensorMask], tolerance: float, step: float) -> TrialResult:
    """The verdict on scores by ratio (per question, the same questions for all; ratio 0 among them), and the ratio that it proposes.

    A ratio is within the tolerance if the 95% interval of its paired difference lies above -tolerance: a doubt counts against it.
    """
    rows = []
    for ratio in sorted(scores):
        difference = paired_difference(scores[ratio], scores[0.0])
        weights = sum(mask.weights for mask in masks)
        reached = sum(mask.reached[ratio] * mask.weights for mask in masks) / weights
        rows.append(RatioScore(ratio, reached, mean_interval(scores[ratio]), difference, difference.low >= -tolerance))
    r_max = max(row.ratio for row in rows if row.within and abs(row.ratio / step - round(row.ratio / step)) < 1e-6)
    return TrialResult(teacher, len(scores[0.0]), tolerance, tuple(rows), r_max)


def trial_table(trial: TrialResult) -> Table:
    """The scores by ratio, in rows of text."""
    columns = ("mask ratio", "reached", "score", "minus unmasked", f"within {trial.tolerance:g}")
    rows = [_row(row) for row in trial.ratios]
    note = f"{trial.questions} validation questions, greedy answers, 95% intervals (bootstrap over questions, paired for the difference)."
    return Table(f"Masked teacher {trial.teacher}", columns, tuple(rows), note)


def read_trials(out: Path) -> list[TrialResult]:
    """The finished trials in a run folder, teacher by teacher."""
    return [TrialResult.from_json(read_json(path)) for path in sorted(out.glob("mask-trial-*.json"))]


def _row(row: RatioScore) -> tuple[str, ...]:
    difference = f"{row.difference.mean:+.3f} [{row.difference.low:+.3f}, {row.difference.high:+.3f}]" if row.ratio else ""
    return (f"{row.ratio:g}", f"{row.reached:.4f}", str(row.score), difference, "yes" if row.within else "no")


def _kept(path: Path, asked: str) -> list[float] | None:
    if not path.exists():
        return None
    values = read_json(path)
    try:
        return [float(value) for value in values["scores"].values()] if values["asked"] == asked else None
    except (KeyError, TypeError, AttributeError, ValueError):
        raise RunError(f"{path} is damaged; expected the scores of a mask ratio, remove it and run again") from None
