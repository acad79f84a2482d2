"""judge.json: whether a judge can be trusted, measured against the rules of each sample's metric, and by what it should not look at.

Answers that were not asked about (empty and repetitive ones) agree by definition and are left out. Intervals resample questions, since the answers to one
are judged alike.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bootstrap import Interval, sums_interval
from ..errors import RunError
from ..files import read_json, write_json
from ..progress import say
from ..samples import Sample
from .judge import Judge, judge
from .responses import Response

READ = 50  # disagreements to read
LEAST = 30  # answers with both verdicts from which a judge is accused of anything
LENGTHS = (1, 2, 4, 8, 16, 32, 64)  # words; the bounds of the bins
BIAS = 0.05  # partial correlation with length that an interval must wholly exceed
SAYS_ANYWAY = 0.9  # share of one verdict, whatever the rules say
AGREES = 0.4  # kappa; below it, agreement is fair at best (Landis & Koch 1977)
NULLS = 0.05
BLIND = ("says yes", "says no")  # flags of a judge whose verdict tells nothing


@dataclass(frozen=True)
class Judged:
    """One answer with its verdict and that of the rules, 1, 0 or None each."""

    sample: Sample
    source: str
    ratio: float
    text: str
    verdict: float | None
    reason: str
    rules: float | None
    asked: bool  # and not settled by being empty or repetitive

    @property
    def words(self) -> int:
        return len(self.text.split())


@dataclass(frozen=True)
class Flag:
    """What is wrong with a judge: the figure that shows it, and what to do."""

    name: str
    figure: str
    advice: str


def judged(rows: Sequence[Response], samples: Sequence[Sample]) -> list[Judged]:
    """The answers that could be judged, beside the rules' verdict on each."""
    by_id, known = {sample.id: sample for sample in samples}, dict[tuple[str, str], Any]()
    found = []
    for row in rows:
        if row.finish == "failed":
            continue
        if (row.sample, row.text) not in known:
            known[row.sample, row.text] = judge(by_id[row.sample], row.text)
        rules = known[row.sample, row.text]
        asked = rules.reason not in ("empty", "repetitive")
        found.append(Judged(by_id[row.sample], row.source, row.ratio, row.text, row.verdict, row.reason, rules.value, asked))
    return found


def write_agreement(path: Path, rows: Sequence[Judged], kind: str) -> None:
    """Write judge.json; a judge of kind 'rules' is not compared with itself."""
    write_json(path, {"judge": kind} | describe(rows, compare=kind != "rules"))


def check_judge(path: Path, rows: Sequence[Judged], settings: Judge, trained: bool) -> None:
    """Write judge.json and say what speaks against the judge, once. Raises RunError before anything is trained on verdicts that tell nothing."""
    told = {flag["name"] for flag in read_json(path).get("flags", [])} if path.exists() else set()
    write_agreement(path, rows, settings.kind)
    flagged = read_json(path).get("flags", [])
    for flag in flagged:
        if flag["name"] not in told or flag["name"] in BLIND:
            say(f"JUDGE: {flag['name']}: {flag['figure']}; {flag['advice']}")
    for flag in flagged:
        if flag["name"] in BLIND and settings.blind == "stop" and not trained:
            raise RunError(
                f"the judge can't tell right from wrong: {flag['figure']}; answers and verdicts are kept, nothing was trained: read {path}, then take another "
                "judge or judge.kind=rules, or, if it is the rules that are too strict for these answers, set judge.blind=warn"
            )


def describe(rows: Sequence[Judged], compare: bool = True) -> dict[str, Any]:
    """All figures of judge.json; those that compare are over distinct answers, the shares over all."""
    asked = [row for row in rows if row.asked and row.sample.answers]
    nulls = sum(row.verdict is None for row in asked) / len(asked) if asked else 0.0
    shares = {
        "positives_by_source": _shares(rows, lambda row: row.source),
        "positives_by_ratio": _shares(rows, lambda row: f"{row.source} {row.ratio:g}"),
        "positives_by_words": _shares(rows, lambda row: _bin(row.words), [_bin(n) for n in (0, *LENGTHS)]),
    }
    head = {"answers": len(rows), "asked": len(asked), "null_rate": nulls}
    if not compare:
        return head | shares
    pairs = distinct_pairs(asked)
    found = figures(pairs)
    differ = sorted((row for row in pairs if row.verdict != row.rules), key=_mixed)
    return {
        **head,
        "compared": len(pairs),
        "agreement": {name: asdict(interval) if interval else None for name, interval in found.items()},
        "flags": [asdict(flag) for flag in flags(found, nulls, len(pairs))],
        **shares,
        "disagreements": {"count": len(differ), "to_read": [_shown(row) for row in differ[:READ]]},
    }


def distinct_pairs(rows: Sequence[Judged]) -> list[Judged]:
    """Each answer with both verdicts once."""
    found = {(row.sample.id, row.text): row for row in rows if row.verdict is not None and row.rules is not None}
    return list(found.values())


def figures(rows: Sequence[Judged]) -> dict[str, Interval | None]:
    """Agreement with the rules and what else decides, each with an interval over questions; None where it is not defined.

    kappa: Cohen's (1960). right_called_right and wrong_called_right: shares of what the rules call so. length: the partial correlation of the verdict
    with the logarithm of the answer's length in words, given the rules' verdict.
    """
    sums = question_sums(rows)
    statistics = {"kappa": kappa_of, "right_called_right": _called_right(1), "wrong_called_right": _called_right(0), "length": length_correlation}
    return {name: _interval(sums, statistic) for name, statistic in statistics.items()}


def question_sums(rows: Sequence[Judged]) -> np.ndarray:
    """[questions, 2, 5]: for answers that the rules call wrong and right, their number and the sums of verdict, length, length² and verdict x length."""
    places = {name: place for place, name in enumerate(dict.fromkeys(row.sample.id for row in rows))}
    sums = np.zeros((len(places), 2, 5))
    for row in rows:
        verdict, length = float(row.verdict or 0), math.log1p(row.words)
        sums[places[row.sample.id], int(row.rules or 0)] += (1, verdict, length, length**2, verdict * length)
    return sums


def kappa_of(sums: np.ndarray) -> np.ndarray:
    """Cohen's kappa of sums [..., 2, 5]; NaN where both judges give one and the same verdict throughout."""
    wrong, right = sums[..., 0, :], sums[..., 1, :]
    total = wrong[..., 0] + right[..., 0]
    agreed = (wrong[..., 0] - wrong[..., 1] + right[..., 1]) / total
    ours, theirs = (wrong[..., 1] + right[..., 1]) / total, right[..., 0] / total
    chance = ours * theirs + (1 - ours) * (1 - theirs)
    return np.where(chance < 1, (agreed - chance) / np.where(chance < 1, 1 - chance, 1.0), np.nan)


def length_correlation(sums: np.ndarray) -> np.ndarray:
    """Partial correlation of verdict and length given the rules' verdict: within both classes, as a two-valued control leaves class means behind.

    0 where the verdict, within both, never changes; NaN where length does not.
    """
    n, v, w, ww, vw = np.moveaxis(sums, -1, 0)
    count = np.maximum(n, 1)
    # Verdicts are 0 or 1: their squares sum to what they sum to.
    both, ours, lengths = ((part).sum(-1) for part in (vw - v * w / count, v - v * v / count, ww - w * w / count))
    defined = (ours > 1e-9) & (lengths > 1e-9)
    found = both / np.sqrt(np.where(defined, ours * lengths, 1.0))
    return np.where(defined, found, np.where(lengths > 1e-9, 0.0, np.nan))


def _called_right(rules: int) -> Callable[[np.ndarray], np.ndarray]:
    def share(sums: np.ndarray) -> np.ndarray:
        n = sums[..., rules, 0]
        return np.where(n > 0, sums[..., rules, 1] / np.maximum(n, 1), np.nan)

    return share


def _interval(sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Interval | None:
    if not len(sums):
        return None
    found = sums_interval(sums, statistic)
    return found if math.isfinite(found.mean) else None


def flags(found: dict[str, Interval | None], nulls: float, count: int) -> list[Flag]:
    """What speaks against a judge, of `count` answers compared. Differences that chance explains are not held against it."""
    flagged = []
    if nulls > NULLS:
        flagged.append(Flag("nulls", f"{nulls:.1%} of the answers have no verdict", "raise judge.max_tokens, or take a judge that keeps to the form"))
    if count < LEAST:
        return flagged
    read = "read 'disagreements', take another judge, or judge.kind=rules"
    kappa, right, wrong, length = (found[name] for name in ("kappa", "right_called_right", "wrong_called_right", "length"))
    if wrong and wrong.low >= SAYS_ANYWAY:
        flagged.append(
            Flag(
                "says yes",
                f"of answers that the rules call wrong, {wrong} are called right, kappa with the rules {kappa}",
                f"its verdict tells nothing: {read}",
            )
        )
    if right and right.high <= 1 - SAYS_ANYWAY:
        flagged.append(
            Flag(
                "says no", f"of answers that the rules call right, {right} are called right, kappa with the rules {kappa}", f"its verdict tells nothing: {read}"
            )
        )
    if length and (length.low >= BIAS or length.high <= -BIAS):
        kind, figure = "likes long answers" if length.mean > 0 else "likes short answers", f"partial correlation of verdict and length {length}"
        flagged.append(Flag(kind, figure, f"with the same verdict by the rules, length decides; unless longer answers say what the rules can't see, {read}"))
    if kappa and kappa.high < AGREES:
        flagged.append(Flag("disagrees", f"kappa with the rules {kappa}", read))
    return flagged


def _shares(rows: Sequence[Judged], by: Callable[[Judged], str], order: Sequence[str] = ()) -> dict[str, dict[str, float | int | None]]:
    groups: dict[str, list[Judged]] = defaultdict(list)
    for row in rows:
        groups[by(row)].append(row)
    names = [name for name in order if name in groups] if order else sorted(groups)
    found: dict[str, dict[str, float | int | None]] = {}
    for name in names:
        known = [row.verdict for row in groups[name] if row.verdict is not None]
        ruled = [row.rules for row in groups[name] if row.rules is not None]
        found[name] = {
            "answers": len(groups[name]),
            "null": len(groups[name]) - len(known),
            "positive": sum(known) / len(known) if known else None,
            "positive_by_rules": sum(ruled) / len(ruled) if ruled else None,
        }
    return found


def _bin(words: int) -> str:
    below = max((bound for bound in LENGTHS if bound <= words), default=0)
    above = min((bound for bound in LENGTHS if bound > words), default=None)
    return f"{below} or more" if above is None else str(below) if above == below + 1 else f"{below} to {above - 1}"


def _mixed(row: Judged) -> str:
    """An order that has nothing to do with questions, sources or verdicts, and is the same each time."""
    return hashlib.sha256(f"{row.sample.id}/{row.text}".encode()).hexdigest()


def _shown(row: Judged) -> dict[str, Any]:
    kept = {"id": row.sample.id, "question": row.sample.prompt, "truth": list(row.sample.answers), "metric": row.sample.metric}
    return kept | {"source": row.source, "answer": row.text, "verdict": row.verdict, "rules": row.rules, "reason": row.reason}
