"""`ablate(config)`: variants of one recipe, each trained several times, on the same responses and the same teacher's signal.

Runs that would generate the same responses share a buffer, so the teacher is read once for all of them and no run after the first loads it. What a
seed changes is the order of questions in training (`train.seed`): the intervals hold for another order and for other questions, and not for
responses drawn anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ..bootstrap import Interval, crossed_interval
from ..errors import RecipeError
from ..files import read_json, sha256_file, write_json
from ..page import Table
from ..progress import say
from ..samples import Sample
from . import models, ranks
from .claims import answers_values, digest, locked
from .evaluate import greedy_answers, scores
from .families import family_of
from .inputs import Encoder
from .recipe import Recipe, read_recipe
from .report import write_report
from .skipped import SKIPPED, read_file, read_skipped, write_skipped
from .stages import distill

UNTOUCHED = "untouched student"


@dataclass(frozen=True)
class AblateConfig:
    """A recipe, its variants ('key=a,b', all combinations of several; with `alone` each value by itself against the recipe), and how they are scored."""

    recipe: Path
    vary: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    seeds: int = 3
    data: Path | None = None  # questions to score on; the recipe's validation where none are given
    alone: bool = False


@dataclass(frozen=True)
class Arm:
    """One variant: its overrides, its score over seeds and questions, and the difference to the first arm, question by question."""

    name: str
    overrides: tuple[str, ...]
    score: Interval
    seeds: tuple[float, ...]  # the mean of each
    difference: Interval | None


@dataclass(frozen=True)
class Ablation:
    """What came out, the first arm being what the others are compared with."""

    out: Path
    questions: int
    seeds: int
    arms: tuple[Arm, ...]

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "out": str(self.out)}


@dataclass(frozen=True)
class Run:
    """One training: an arm under one seed."""

    arm: str
    seed: int
    recipe: Recipe


def ablate(config: AblateConfig) -> Ablation:
    """Train and score every arm under every seed, or what is left of them; writes ablation.json and report.html into the recipe's `out`.

    Raises RecipeError, DataError or ModelError before any work where one of the variants does not fit.
    """
    base = read_recipe(config.recipe, config.overrides)
    arms = dict(plan_arms(config.vary, config.alone))
    runs = [run for name, arm in arms.items() for run in plan_runs(config, base, name, arm)]
    data = config.data or base.data.validation
    samples = read_file(data).samples
    with locked(base.out, "an ablation"):
        looked: dict[Any, Path] = {}
        for run in runs:
            _share_skipped(looked.setdefault((run.recipe.buffer, run.recipe.data.validation), run.recipe.out / SKIPPED), run.recipe.out / SKIPPED)
            distill(run.recipe, "check")
        found: dict[str, list[list[float]]] = {UNTOUCHED: [_scored(base.student, base, data, samples, base.out / "untouched")]}
        for place, run in enumerate(runs, start=1):
            say(f"run {place} of {len(runs)}: {run.arm}, seed {run.seed}")
            found.setdefault(run.arm, []).append(_scored(distill(run.recipe) / "student", run.recipe, data, samples, run.recipe.out))
        result = compare(base.out, found, arms)
        ranks.once(write_json, base.out / "ablation.json", result.to_json())
        first = {run.arm: run.recipe.out for run in reversed(runs)}
        ranks.once(write_report, base.out / "report.html", "Ablation", dict(reversed(first.items())), [result_table(result)], sentences(result), [])
    return result


def plan_arms(vary: Sequence[str], alone: bool = False) -> list[tuple[str, tuple[str, ...]]]:
    """Names and overrides of the arms. Raises RecipeError for a variant without a key, with one value, or whose key occurs twice."""
    axes = [_axis(text, least=1 if alone else 2) for text in vary]
    keys = [axis[0].partition("=")[0] for axis in axes]
    if not axes or len(set(keys)) < len(keys):
        raise RecipeError(f"an ablation varies {', '.join(keys) or 'nothing'}; expected one or more different keys, as in --vary objective.beta=0,0.1")
    if "train.seed" in keys:
        raise RecipeError("an ablation can't vary train.seed, which tells the runs of one arm apart; pass --seeds, or vary 'seed' for other responses")
    arms: list[tuple[str, ...]] = [(), *((value,) for axis in axes for value in axis)] if alone else list(itertools.product(*axes))
    return [(", ".join(arm) or "the recipe", arm) for arm in arms]


def plan_runs(config: AblateConfig, base: Recipe, name: str, arm: Sequence[str]) -> list[Run]:
    """One arm's runs. Those that would make the same responses have the same buffer: the recipe's own, if it has one and would make the same."""
    runs = []
    for seed in range(base.seed, base.seed + config.seeds):
        recipe = read_recipe(config.recipe, ("teacher_signal=cached", *config.overrides, *arm, f"train.seed={seed}"))
        made = answers_values(recipe)
        own = base.buffer is not None and made == answers_values(base)
        buffer = base.buffer if own else base.out / "buffers" / digest(made)[:16]
        runs.append(Run(name, seed, dataclasses.replace(recipe, out=base.out / "runs" / f"{_folder(name)}-seed{seed}", buffer=buffer)))
    return runs


def compare(out: Path, found: Mapping[str, Sequence[Sequence[float]]], arms: Mapping[str, tuple[str, ...]]) -> Ablation:
    """Intervals from the scores [seeds][questions] of every arm, and of the untouched student, which has one."""
    tables = {name: np.asarray(rows, dtype=np.float64) for name, rows in found.items()}
    first = next(iter(arms))
    rows = []
    for name, scored in tables.items():
        difference = None if name == first else crossed_interval(scored - tables[first])
        rows.append(Arm(name, arms.get(name, ()), crossed_interval(scored), tuple(scored.mean(axis=1).tolist()), difference))
    order = [*arms, UNTOUCHED]
    return Ablation(out, tables[first].shape[1], len(tables[first]), tuple(sorted(rows, key=lambda arm: order.index(arm.name))))


def result_table(result: Ablation) -> Table:
    """A row an arm: score, seeds apart, and the paired difference to the first one."""
    rows = tuple(
        (
            arm.name,
            str(arm.score),
            " ".join(f"{score:.3f}" for score in arm.seeds),
            "–" if arm.difference is None else f"{arm.difference.mean:+.3f} [{arm.difference.low:+.3f}, {arm.difference.high:+.3f}]",
        )
        for arm in result.arms
    )
    note = f"Mean score with its 95% bootstrap interval over {result.questions} questions and {result.seeds} seeds; differences are paired in both."
    return Table("Arms", ("arm", "score", "by seed", f"minus '{result.arms[0].name}'"), rows, note)


def sentences(result: Ablation) -> list[str]:
    """What the differences say, and how far that goes."""
    first, others = result.arms[0], [arm for arm in result.arms[1:] if arm.difference is not None]
    told = [_sentence(arm, first.name) for arm in others]
    if result.seeds == 1:
        told.append("One seed: the intervals are those of other questions, and say nothing of another run.")
    if len(others) > 1:
        told.append(f"Of {len(others)} such comparisons without any difference, each would seem to have one in 5% of ablations.")
    return told


def _sentence(arm: Arm, first: str) -> str:
    difference = arm.difference
    assert difference is not None
    size = f"{100 * difference.mean:+.1f} points [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    if not difference.excludes_zero():
        return f"'{arm.name}' and '{first}' can't be told apart: {size}."
    return f"'{arm.name}' scores {'above' if difference.mean > 0 else 'below'} '{first}': {size}."


def _axis(text: str, least: int) -> list[str]:
    """'key=a,b' as overrides 'key=a', 'key=b'; lists are written in brackets."""
    key, equals, values = text.partition("=")
    try:
        found = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError:
        found = []
    if not key or not equals or len(found) < least:
        raise RecipeError(f"the variant '{text}' has {len(found)} values; expected key=a,b such as objective.divergence=jsd,forward_kl")
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for value in found]


def _folder(name: str) -> str:
    """A name that every file system takes; a hash tells apart what was cut or replaced."""
    plain = re.sub(r"[^\w.=+,-]+", "_", name)
    return plain if plain == name and len(plain) <= 80 else f"{plain[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _share_skipped(found: Path, path: Path) -> None:
    """Which questions can't be used is the same for all runs of one buffer: only the first looks through the images."""
    if found.exists() and not path.exists():
        write_skipped(path, read_skipped(found))


def _scored(model: Path, recipe: Recipe, data: Path, samples: Sequence[Sample], folder: Path) -> list[float]:
    """The score of the model in a folder on every question, in their order; kept beside the run."""
    path = folder / f"scores-{sha256_file(data)[:16]}.json"
    if not ranks.agreed(path.exists()):
        student = models.frozen(models.load_model(model, getattr(torch, recipe.train.dtype))).to(ranks.device())
        encoder = Encoder(models.load_processor(model), recipe.longest, positions=family_of(student.config.model_type).positions)
        answers = greedy_answers(student, encoder, samples, recipe.answers.max_tokens, recipe.train.evaluate_batch, "scoring")
        ranks.once(write_json, path, {sample.id: score for sample, score in zip(samples, scores(samples, answers), strict=True)})
    kept = read_json(path)
    return [float(kept[sample.id]) for sample in samples]
