"""The decay of the mask ratio against the paper's table and its formula."""

from __future__ import annotations

import math

import pytest

from masters.distill.schedule import mask_ratios, stage_bounds, stage_of
from masters.errors import RecipeError


def test_the_papers_two_tables():
    assert mask_ratios(0.2, 0.05) == (0.20, 0.15, 0.10, 0.05, 0.0)
    assert mask_ratios(0.4, 0.05) == (0.40, 0.35, 0.30, 0.25, 0.20, 0.15, 0.10, 0.05, 0.0)


def test_no_mask_is_one_stage_at_zero():
    assert mask_ratios(0.0, 0.05) == (0.0,)


@pytest.mark.parametrize(("r_max", "step", "total"), [(0.2, 0.05, 1000), (0.2, 0.05, 37), (0.4, 0.05, 10), (0.3, 0.1, 4), (0.5, 0.25, 101)])
def test_every_question_gets_the_ratio_of_the_papers_formula(r_max: float, step: float, total: int):
    ratios, stages = mask_ratios(r_max, step), round(r_max / step) + 1
    found = [ratios[stage_of(i, total, len(ratios))] for i in range(total)]
    assert found == pytest.approx([r_max - step * math.floor(i * stages / total) for i in range(total)])


@pytest.mark.parametrize("stages", [1, 2, 5, 9])
@pytest.mark.parametrize("total", [1, 4, 5, 9, 64, 97])
def test_bounds_and_stage_are_each_others_inverse(total: int, stages: int):
    bounds = stage_bounds(total, stages)
    assert len(bounds) == stages
    assert [i for part in bounds for i in part] == list(range(total)), "every question once, in order"
    assert [stage for stage, part in enumerate(bounds) for _ in part] == [stage_of(i, total, stages) for i in range(total)]
    sizes = [len(part) for part in bounds]
    assert max(sizes) - min(sizes) <= 1, "stages of equal length, but for a remainder"


@pytest.mark.parametrize(("r_max", "step"), [(0.2, 0.03), (0.22, 0.05), (0.02, 0.05), (1.0, 0.05), (-0.1, 0.05), (0.2, 0.0), (0.2, -0.05), (math.nan, 0.05)])
def test_ratios_that_no_decay_can_reach_are_refused(r_max: float, step: float):
    with pytest.raises(RecipeError, match="expected") as caught:
        mask_ratios(r_max, step)
    assert "\n" not in str(caught.value)
