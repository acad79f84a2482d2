"""Who is taught what by whom: the questions of each teacher, the mask stages among them, and the updates of the run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import RecipeError
from ..samples import Sample
from .answers import Source
from .recipe import Recipe, Teacher
from .schedule import mask_ratios, stage_bounds
from .train import Step, plan_steps


@dataclass(frozen=True)
class Share:
    """The questions that one teacher is trained on, and the bounds of its mask stages among them."""

    teacher: Teacher
    number: int
    samples: tuple[Sample, ...]
    ratios: tuple[float, ...]
    bounds: tuple[range, ...]

    def asked(self, stages: Sequence[int]) -> list[Sample]:
        """The questions of some mask stages."""
        return [self.samples[i] for stage in stages for i in self.bounds[stage]]


def teacher_sources(share: Share, count: int) -> list[Source]:
    """Whose answers a teacher's questions get, mask stage by mask stage."""
    name = share.teacher.model.name
    return [Source(f"teacher{share.number}-stage{stage}", "teacher", share.number, name, ratio, count) for stage, ratio in enumerate(share.ratios)]


def plan_shares(recipe: Recipe, samples: Sequence[Sample]) -> list[Share]:
    """Shuffle the questions once, give every teacher an equal run of them, and every mask stage its part of that."""
    order = list(samples)
    random.Random(recipe.seed).shuffle(order)
    shares = []
    for number, (teacher, part) in enumerate(zip(recipe.teachers, stage_bounds(len(order), len(recipe.teachers)), strict=True)):
        ratios = mask_ratios(teacher.r_max, recipe.mask.step) if recipe.mask.enabled else (0.0,)
        if len(part) < len(ratios):
            raise RecipeError(f"{len(samples)} questions leave {len(part)} for {len(ratios)} mask stages of {teacher.model.name}; expected at least one each")
        mine = tuple(order[part.start : part.stop])
        shares.append(Share(teacher, number, mine, ratios, tuple(stage_bounds(len(mine), len(ratios)))))
    return shares


def plan_run(recipe: Recipe, shares: Sequence[Share]) -> list[list[Step]]:
    """The updates under each teacher, numbered through the run."""
    planned: list[list[Step]] = []
    seed = recipe.seed if recipe.train.seed is None else recipe.train.seed
    for share in shares:
        first = sum(map(len, planned))
        planned.append(plan_steps(share.bounds, share.ratios, recipe.train.questions_per_step, recipe.train.epochs, seed, first))
    return planned
