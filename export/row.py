"""One line of a parity report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One comparison. `verdict` is pass or fail; ambiguous where tokens nearly tie; reported where nothing is judged (no tolerance, or tokens of a quantised
    model, which may prefer others)."""

    stage: str
    tensor: str
    image: str
    question: str
    measure: str
    difference: float
    tolerance: float | None
    verdict: str


def judged(stage: str, tensor: str, where: tuple[str, str], measure: str, difference: float, tolerance: float) -> Row:
    """The row of a difference that must stay within `tolerance`; `where` is image and question."""
    return Row(stage, tensor, *where, measure, difference, tolerance, "pass" if difference <= tolerance else "fail")
