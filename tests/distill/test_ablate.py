"""Ablations: arms and seeds on one buffer, continued where they stopped, and differences that are those of the scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from masters.bootstrap import Interval, crossed_interval
from masters.cli import main
from masters.distill import ablate as module
from masters.distill import models as loading
from masters.distill.ablate import UNTOUCHED, AblateConfig, ablate, compare, plan_arms, plan_runs, result_table, sentences
from masters.distill.recipe import read_recipe
from masters.errors import MastersError, RecipeError


@pytest.fixture
def recipe(models: Any, questions: Path, tmp_path: Path) -> Path:
    """A recipe of 6 questions, one mask stage, 2 updates."""
    path = tmp_path / "recipe.yaml"
    values = {
        "preset": "paper",
        "student": str(models.student),
        "teachers": [{"model": str(models.teacher), "r_max": 0.0}],
        "data": {"train": str(questions / "train.jsonl"), "validation": str(questions / "validation.jsonl"), "limit": 6},
        "answers": {"batch": 8, "max_tokens": 2, "teacher": 2, "student": 2},
        "train": {"dtype": "float32", "learning_rate": 1e-3, "questions_per_step": 3, "evaluate_batch": 8},
        "out": str(tmp_path / "out"),
    }
    path.write_text(yaml.safe_dump(values))
    return path


# Arms


def test_all_combinations_or_each_alone():
    assert plan_arms(["objective.beta=0,0.1", "preset=paper,kd"]) == [
        ("objective.beta=0, preset=paper", ("objective.beta=0", "preset=paper")),
        ("objective.beta=0, preset=kd", ("objective.beta=0", "preset=kd")),
        ("objective.beta=0.1, preset=paper", ("objective.beta=0.1", "preset=paper")),
        ("objective.beta=0.1, preset=kd", ("objective.beta=0.1", "preset=kd")),
    ]
    alone = plan_arms(["mask.enabled=false", "answers.student=0", "mask.exclude=[], [a, b]"], alone=True)
    assert [name for name, _ in alone] == ["the recipe", "mask.enabled=false", "answers.student=0", "mask.exclude=[]", 'mask.exclude=["a", "b"]']
    assert alone[0][1] == ()


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ([], "varies nothing; expected one or more"),
        (["objective.beta"], "'objective.beta' has 0 values; expected key=a,b"),
        (["objective.beta=0"], "has 1 values; expected key=a,b"),
        (["=1,2"], "expected key=a,b"),
        (["objective.beta=[,"], "has 0 values"),
        (["seed=1,2", "seed=3,4"], "varies seed, seed; expected one or more different keys"),
        (["train.seed=1,2"], "can't vary train.seed"),
    ],
)
def test_variants_that_say_nothing(vary: list[str], message: str):
    with pytest.raises(RecipeError, match=message):
        plan_arms(vary)


def test_a_variant_that_does_not_fit_is_found_before_any_work(recipe: Path, tmp_path: Path):
    for vary, message in (
        ("objective.betta=0,1", "did you mean 'beta'"),
        ("objective.divergence=jsd,kl", "expected one of jsd"),
        ("longest=4096,10", "takes .* tokens"),
    ):
        with pytest.raises(MastersError, match=message):
            ablate(AblateConfig(recipe, (vary,), seeds=2))
        assert not list(tmp_path.rglob("*.parquet"))


def test_runs_that_make_the_same_responses_have_the_same_buffer(recipe: Path):
    config = AblateConfig(recipe, (), seeds=2)

    def buffers(*arms: str, overrides: tuple[str, ...] = ()) -> list[Path | None]:
        base = read_recipe(recipe, overrides)
        return [run.recipe.buffer for arm in arms for run in plan_runs(AblateConfig(recipe, (), overrides, 2), base, arm, [arm])]

    assert len(set(buffers("objective.beta=0", "objective.beta=0.3", "train.learning_rate=1e-5", "objective.divergence=reverse_kl"))) == 1
    assert len(set(buffers("answers.student=0", "answers.student=1", "seed=5", "mask.exclude=[a]"))) == 4
    assert len(set(buffers("objective.beta=0", "objective.beta=0.3", overrides=("answers.refresh=stage",)))) == 4, "here a trained student answers"
    own = buffers("objective.beta=0", "answers.student=0", overrides=("buffer=mine",))
    assert [path == recipe.parent / "mine" for path in own] == [True, True, False, False]
    runs = plan_runs(config, read_recipe(recipe), "a/b: c", ["objective.beta=0"])
    assert [run.recipe.train.seed for run in runs] == [0, 1]
    assert all(run.recipe.teacher_signal == "cached" for run in runs)
    assert len({run.recipe.out for run in runs} | {run.recipe.out for run in plan_runs(config, read_recipe(recipe), "a/b; c", ["objective.beta=0"])}) == 4


# What comes out


def test_differences_are_paired_run_by_run_and_question_by_question():
    rng = np.random.default_rng(0)
    hard, order = rng.random(200) < 0.6, rng.normal(0, 0.02, size=(3, 1))
    first = hard.astype(float) + order
    better = first + 0.05 * (rng.random((3, 200)) < 0.8)
    same = first + rng.choice([-0.05, 0.05], size=(3, 200))
    scored = {UNTOUCHED: [[0.5] * 200], "a": first.tolist(), "b": better.tolist(), "c": same.tolist()}
    result = compare(Path(), scored, {"a": (), "b": ("x=1",), "c": ("x=2",)})
    assert [arm.name for arm in result.arms] == ["a", "b", "c", UNTOUCHED]
    a, b, c, untouched = result.arms
    assert (result.seeds, result.questions, a.difference) == (3, 200, None)
    assert isinstance(b.difference, Interval)
    assert isinstance(c.difference, Interval)
    assert b.difference.mean == pytest.approx((better - first).mean())
    assert b.difference.excludes_zero(), "where paired"
    assert a.score.high > b.score.low, "though the scores overlap"
    assert not c.difference.excludes_zero()
    assert b.seeds == pytest.approx(better.mean(axis=1))
    assert untouched.seeds == (0.5,)
    told = sentences(result)
    assert told[0].startswith("'b' scores above 'a': +4.")
    assert told[1].startswith("'c' and 'a' can't be told apart: ")
    assert told[-1].startswith("Of 3 such comparisons")
    table = result_table(result)
    assert [row[0] for row in table.rows] == ["a", "b", "c", UNTOUCHED]
    assert table.rows[0][3] == "–"
    assert "200 questions and 3 seeds" in table.note
    one = compare(Path(), {UNTOUCHED: [[0.5] * 200], "a": first[:1].tolist()}, {"a": ()})
    assert any("One seed" in sentence for sentence in sentences(one))


def test_an_ablation_reads_the_teacher_once_stops_and_continues(recipe: Path, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loads: list[Path] = []
    load, distill, count = loading.load_model, module.distill, 0

    def noted(folder: Path, dtype: Any) -> Any:
        loads.append(folder)
        return load(folder, dtype)

    monkeypatch.setattr(loading, "load_model", noted)

    def interrupted(wanted: Any, until: str = "student") -> Path:
        nonlocal count
        count += until == "student"
        if count == 3:
            raise KeyboardInterrupt
        return distill(wanted, until)

    config = AblateConfig(recipe, ("objective.beta=0,0.3",), ("train.schedule=linear",), seeds=2)
    with monkeypatch.context() as patch:
        patch.setattr(module, "distill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ablate(config)
    out = tmp_path / "out"
    assert loads.count(models.teacher) == 2, "for its answers and its signal: there is no mask to find"
    finished = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/student/model.safetensors")}
    assert len(finished) == 2

    loads.clear()
    result = ablate(config)
    assert models.teacher not in loads
    students = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/student/model.safetensors")}
    assert len(students) == 4
    assert finished.items() < students.items()
    weights = {path.parents[1].name: path.read_bytes() for path in students}
    assert len(set(weights.values())) == 4, "arms and seeds differ"
    assert len(list((out / "buffers").iterdir())) == 1
    orders = [[json.loads(line) for line in (out / "runs" / f"objective.beta=0-seed{seed}" / "metrics.jsonl").read_text().splitlines()] for seed in (0, 1)]
    assert orders[0] != orders[1]

    assert [arm.name for arm in result.arms] == ["objective.beta=0", "objective.beta=0.3", UNTOUCHED]
    kept = [[list(json.loads(path.read_text()).values()) for path in sorted(out.glob(f"runs/{arm.name}-seed*/scores-*.json"))] for arm in result.arms[:2]]
    assert np.shape(kept) == (2, 2, 8)
    assert result.arms[1].difference == crossed_interval(np.subtract(kept[1], kept[0]))
    assert json.loads((out / "ablation.json").read_text())["arms"][1]["score"]["count"] == 8
    assert "objective.beta=0.3" in (out / "report.html").read_text()

    loads.clear()
    more = CliRunner().invoke(main, ["ablate", str(recipe), "train.schedule=linear", "--vary", "objective.beta=0,0.3", "--seeds", "2"])
    assert more.exit_code == 0, more.output
    assert loads == [], "a finished ablation loads nothing"
    lines = more.stdout.splitlines()
    assert lines[0].split() == ["arm", "score", "by", "seed", "minus", "'objective.beta=0'"]
    assert [line.split("  ")[0] for line in lines[2:5]] == [arm.name for arm in result.arms]
    assert "8 questions and 2 seeds" in lines[-1]
    refused = CliRunner().invoke(main, ["ablate", str(recipe), "--vary", "objective.beta=0,0.3", "--seeds", "2"])
    assert refused.exit_code == 2
    assert "another recipe (train.schedule differ" in refused.stderr
