"""The decay of the mask ratio over a teacher's questions (Masters, arXiv 2512.22238)."""

from __future__ import annotations

import itertools

from ..errors import RecipeError


def mask_ratios(r_max: float, step: float) -> tuple[float, ...]:
    """The ratios of one teacher's stages, falling from `r_max` to 0: M = r_max/step + 1 of them."""
    if not 0 <= r_max < 1 or step <= 0:
        raise RecipeError(f"mask ratios from {r_max} in steps of {step}; expected 0 <= r_max < 1 and a positive step")
    stages = round(r_max / step)
    if abs(stages * step - r_max) > 1e-9:
        raise RecipeError(f"r_max {r_max} is no multiple of the step {step}; expected one, such as {max(1, stages) * step:.4g}")
    return tuple(round(r_max - step * i, 10) for i in range(stages + 1))


def stage_of(index: int, total: int, stages: int) -> int:
    """The stage floor(i*M/I) in which item `index` of `total` is seen; r[i] = r_max - step * stage."""
    return index * stages // total


def stage_bounds(total: int, stages: int) -> list[range]:
    """The items of each stage: the inverse of `stage_of`, so that every item stands in exactly one."""
    starts = [-(-stage * total // stages) for stage in range(stages + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]
