"""Scoring an answer against the accepted ones, by the metrics of the benchmarks people know.

Every metric maps a text to [0, 1] and takes the best over the accepted answers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from .samples import LETTERS, Sample


def score(sample: Sample, text: str) -> float:
    """The score in [0, 1] of `text` as the answer to `sample`, by the sample's metric; an empty text scores 0."""
    if not text.strip():
        return 0.0
    if sample.metric == "choice":
        return max(choice_match(text, answer, sample.choices) for answer in sample.answers)
    return max(_METRICS[sample.metric](text, answer) for answer in sample.answers)


def exact_match(text: str, answer: str) -> float:
    """1 if both are the same but for case, outer white space and a final full stop."""
    return float(_plain(text) == _plain(answer))


def contains(text: str, answer: str) -> float:
    """1 if the answer stands in the text as whole words."""
    return float(re.search(rf"(?<!\w){re.escape(_plain(answer))}(?!\w)", _plain(text)) is not None)


def relaxed_match(text: str, answer: str, tolerance: float = 0.05) -> float:
    """ChartQA's relaxed accuracy (Masry et al. 2022): numbers within 5% of the target, anything else exactly.

    A target of 0 has no 5% and compares as a string, as in the reference implementation.
    """
    found, target = _number(text), _number(answer)
    if found is None or not target:
        return exact_match(text, answer)
    return float(abs(found - target) / abs(target) <= tolerance)


def anls(text: str, answer: str, threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one pair (Biten et al. 2019): 1 - distance/length, 0 below the threshold.

    Exactly at the threshold the paper's formula gives 0 and the evaluation that published scores come from gives the similarity; so does this.
    """
    ours, theirs = " ".join(text.lower().split()), " ".join(answer.lower().split())
    length = max(len(ours), len(theirs))
    similarity = 1 - levenshtein(ours, theirs) / length if length else 1.0
    return similarity if similarity >= threshold else 0.0


def choice_match(text: str, answer: str, choices: tuple[str, ...]) -> float:
    """1 if the text names the right option, by its letter ('B', '(b)', 'B. blue', 'The answer is B') or by its own words."""
    found = chosen_letter(text, choices)
    return float(found is not None and found == (chosen_letter(answer, choices) or _plain(answer).upper()))


def chosen_letter(text: str, choices: tuple[str, ...]) -> str | None:
    """The letter of the option that `text` names, or None where it names none or is ambiguous."""
    letters = LETTERS[: len(choices)]
    if not letters:
        return None
    for letter, choice in zip(letters, choices, strict=True):
        if _plain(text) == _plain(choice):
            return letter
    lead = re.match(rf"\W*(?:(?:the )?(?:correct )?(?:answer|option|choice)\b(?: is)?)?\W*([{letters}])(?:\W*$|[).:,*])", text, re.IGNORECASE)
    if lead:
        return lead.group(1).upper()
    named = [choice for choice in choices if contains(text, choice)]
    # 'dark red' also names 'red': the longer one is meant.
    named = [choice for choice in named if not any(choice != other and contains(other, choice) for other in named)]
    return letters[choices.index(named[0])] if len(named) == 1 else None


def levenshtein(a: str, b: str) -> int:
    """Edit distance of two strings (Wagner & Fischer 1974), one row of the table at a time."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _number(text: str) -> float | None:
    """A number as charts print them: '1,234', '$5', '12%' (as 0.12, as ChartQA does); None for anything else."""
    text = text.strip().rstrip(".").replace(",", "").lstrip("$")
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


_METRICS: dict[str, Callable[[str, str], float]] = {"exact": exact_match, "relaxed": relaxed_match, "anls": anls, "contains": contains}
