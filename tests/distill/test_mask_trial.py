"""The trial of masks: what it measures against another way to the same, what it proposes, and what it does not measure twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from masters.bootstrap import paired_difference
from masters.cli import main
from masters.demo import demo
from masters.distill import stages
from masters.distill.evaluate import greedy_answers, scores
from masters.distill.inputs import Encoder
from masters.distill.mask import TensorMask
from masters.distill.mask_trial import TrialResult, judge_trial, measure, read_trials, trial_questions, trial_table
from masters.distill.materialize import MaterializeConfig, materialize
from masters.distill.models import load_model, load_processor
from masters.distill.recipe import Recipe, build_recipe
from masters.distill.stages import distill
from masters.errors import RecipeError, RunError
from masters.samples import Sample, read_samples

RATIOS = (0.0, 0.2, 0.4, 0.9)
MASKS = [TensorMask("w", 100, dict.fromkeys(RATIOS, 0.1), {r: r for r in RATIOS})]


@pytest.fixture
def raw(questions: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe on the demo's trained models, whose answers mean something."""
    return {
        "student": str(demo.HERE / "student"),
        "teachers": [{"model": str(demo.HERE / "teacher"), "r_max": 0.2}],
        "data": {"train": str(questions / "train.jsonl"), "validation": str(questions / "train.jsonl")},
        "answers": {"max_tokens": 6},
        "mask": {"step": 0.2},
        "mask_trial": {"ratios": [0.4, 0.9], "questions": 24, "tolerance": 0.1},
        "train": {"dtype": "float32"},
        "out": str(tmp_path / "run"),
    }


def recipe_of(raw: dict[str, Any], **changes: Any) -> Recipe:
    return build_recipe(raw | changes)


def asked(count: int) -> list[Sample]:
    return [Sample(str(i), (), f"question {i}?", ("yes",)) for i in range(count)]


def test_scores_are_those_of_the_masked_checkpoint_on_disk(raw: dict[str, Any], tmp_path: Path):
    """In place and rising here; there a checkpoint a ratio, loaded as any other."""
    recipe = recipe_of(raw)
    out = distill(recipe, until="mask")
    [trial] = read_trials(out)
    assert [row.ratio for row in trial.ratios] == [0.0, 0.2, 0.4, 0.9]
    samples = trial_questions(read_samples(recipe.data.validation), 24, recipe.seed)
    encoder = Encoder(load_processor(recipe.student))
    per_question = {}
    for row in trial.ratios:
        folder = materialize(MaterializeConfig(recipe, row.ratio, tmp_path / f"at-{row.ratio}"))
        found = scores(samples, greedy_answers(load_model(folder, torch.float32).eval(), encoder, samples, 6))
        stored = json.loads((out / "mask-trial-0" / f"ratio-{row.ratio:g}.json").read_text())
        assert stored["scores"] == dict(zip((s.id for s in samples), found, strict=True))
        assert row.score.mean == pytest.approx(np.mean(found))
        assert row.reached == pytest.approx(row.ratio, abs=0.01)
        per_question[row.ratio] = found
    assert row.score.mean < trial.ratios[0].score.mean - 0.3, "nine tenths less is another teacher"
    for row in trial.ratios:
        assert row.difference == paired_difference(per_question[row.ratio], per_question[0.0])
    assert trial.questions == 24
    assert trial.r_max in (0.0, 0.2, 0.4)


def test_the_largest_ratio_whose_doubt_lies_within_the_tolerance_is_proposed():
    right = [1.0] * 400
    one_in_hundred, one_in_ten = ([0.0 if i % n == 0 else 1.0 for i in range(400)] for n in (100, 10))
    scored = {0.0: right, 0.2: right, 0.4: one_in_hundred, 0.9: one_in_ten}
    trial = judge_trial("t", scored, MASKS, tolerance=0.03, step=0.1)
    assert [row.within for row in trial.ratios] == [True, True, True, False]
    assert trial.r_max == 0.4
    lost = trial.ratios[2].difference
    assert lost.mean == pytest.approx(-0.01)
    assert lost.low < -0.01 < lost.high
    assert judge_trial("t", scored, MASKS, tolerance=0.015, step=0.1).r_max == 0.2, "the mean is within, the interval is not"
    assert judge_trial("t", scored, MASKS, tolerance=0.2, step=0.1).r_max == 0.9
    assert judge_trial("t", {0.0: right, 0.2: one_in_ten}, MASKS, tolerance=0.02, step=0.1).r_max == 0.0, "no mask is always borne"


def test_only_ratios_that_the_schedule_can_start_from_are_proposed():
    right = [1.0] * 50
    scored = {0.0: right, 0.2: right, 0.4: right, 0.9: right}
    assert judge_trial("t", scored, MASKS, tolerance=0.02, step=0.2).r_max == 0.4
    assert judge_trial("t", scored, MASKS, tolerance=0.02, step=0.05).r_max == 0.9


def test_a_teacher_that_masking_improves_and_one_of_few_questions():
    better = {0.0: [0.0, 1.0] * 200, 0.2: [1.0, 1.0] * 200}
    assert judge_trial("t", better, MASKS, tolerance=0.0, step=0.2).r_max == 0.2
    few = {0.0: [1.0] * 10, 0.2: [0.0] + [1.0] * 9}
    assert judge_trial("t", few, MASKS, tolerance=0.02, step=0.2).r_max == 0.0, "ten questions prove nothing, so nothing is risked"


def test_ratios_that_were_measured_are_not_measured_again(tmp_path: Path):
    calls: list[float] = []

    def score(ratio: float) -> list[float]:
        calls.append(ratio)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [1 - ratio, 1.0]

    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, RATIOS, asked(2), score)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ratio-0.2.json", "ratio-0.json"]
    found = measure(tmp_path, RATIOS[::-1], asked(2), score)
    assert calls == [0.0, 0.2, 0.4, 0.4, 0.9], "rising, so that no weight has to be read again"
    assert found == {ratio: [1 - ratio, 1.0] for ratio in RATIOS}
    assert list(found) == list(RATIOS)
    assert measure(tmp_path, RATIOS, asked(2), score) == found
    assert len(calls) == 5


def test_other_questions_are_asked_anew_and_damage_is_named(tmp_path: Path):
    measure(tmp_path, (0.0,), asked(2), lambda ratio: [1.0, 1.0])
    assert measure(tmp_path, (0.0,), asked(3), lambda ratio: [0.0, 0.0, 0.0]) == {0.0: [0.0, 0.0, 0.0]}
    path = tmp_path / "ratio-0.json"
    path.write_text(json.dumps({"asked": json.loads(path.read_text())["asked"], "scores": None}))
    with pytest.raises(RunError, match=r"ratio-0\.json is damaged; expected .*, remove it") as caught:
        measure(tmp_path, (0.0,), asked(3), lambda ratio: [])
    assert "\n" not in str(caught.value)


def test_questions_are_drawn_from_the_whole_file_and_always_the_same():
    samples = asked(1000)
    chosen = trial_questions(samples, 200, seed=0)
    assert chosen == trial_questions(samples, 200, seed=0) != trial_questions(samples, 200, seed=1)
    places = [int(s.id) for s in chosen]
    assert places == sorted(set(places))
    assert len(places) == 200
    assert 400 < np.mean(places) < 600
    assert trial_questions(samples, 5000, seed=0) == samples


def test_the_command_prints_the_table_and_what_it_proposes(raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    wanted = ["distill", str(tmp_path / "recipe.yaml"), "--until", "mask"]
    done = CliRunner().invoke(main, wanted)
    assert done.exit_code == 0, done.output
    [trial] = read_trials(tmp_path / "run")
    lines = done.stdout.splitlines()
    assert lines[0] == "Masked teacher teacher"
    assert [line.split()[0] for line in lines[4:8]] == ["0", "0.2", "0.4", "0.9"]
    assert lines[-3:] == [f"Proposed: teachers.0.r_max={trial.r_max:g}", "", str(tmp_path / "run")]
    assert f"{trial.questions} validation questions" in done.stdout
    monkeypatch.setattr(stages, "greedy_answers", None)  # nothing is answered again
    assert CliRunner().invoke(main, wanted).stdout == done.stdout


def test_another_r_max_may_follow_and_nothing_else_and_only_before_answers(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    distill(recipe_of(raw), until="mask")
    monkeypatch.setattr(stages, "greedy_answers", None)  # the trial's scores hold for it too
    teacher = raw["teachers"][0]
    with pytest.raises(RunError, match="seed, teachers differ"):
        distill(recipe_of(raw, teachers=[{**teacher, "r_max": 0.4}], seed=1), until="check")
    out = distill(recipe_of(raw, teachers=[{**teacher, "r_max": 0.4}], mask_trial={"ratios": [0.2, 0.9], "questions": 24, "tolerance": 0.5}), until="mask")
    assert yaml.safe_load((out / "recipe.yaml").read_text())["teachers"][0]["r_max"] == 0.4
    assert [stage["ratio"] for stage in json.loads((out / "plan.json").read_text())["stages"]] == [0.4, 0.2, 0.0]
    assert read_trials(out)[0].tolerance == 0.5
    (out / "responses").mkdir()
    with pytest.raises(RunError, match="teachers differ"):
        distill(recipe_of(raw), until="mask")
    shutil.rmtree(out / "responses")
    (out / "recipe.yaml").write_text("teachers: [")
    with pytest.raises(RunError, match="damaged"):
        distill(recipe_of(raw), until="mask")


def test_without_masks_nothing_is_tried(raw: dict[str, Any]):
    out = distill(recipe_of(raw, preset="kd", mask={}), until="mask")
    assert read_trials(out) == []
    assert not list(out.glob("mask-trial*"))


@pytest.mark.parametrize("trial", [{"ratios": [1.0]}, {"ratios": [-0.1]}, {"questions": 0}, {"tolerance": -0.1}, {"ratio": [0.1]}])
def test_a_trial_that_can_not_be_is_refused(raw: dict[str, Any], trial: dict[str, Any]):
    with pytest.raises(RecipeError, match="mask_trial"):
        recipe_of(raw, mask_trial=trial)


def test_a_result_survives_json(tmp_path: Path):
    import dataclasses

    trial = judge_trial("t", {0.0: [1.0, 0.0], 0.2: [1.0, 1.0]}, MASKS, 0.02, 0.2)
    assert TrialResult.from_json(json.loads(json.dumps(dataclasses.asdict(trial)))) == trial
    shown = trial_table(trial)
    assert all(len(row) == len(shown.columns) for row in shown.rows)
    assert shown.rows[0][3] == "", "there is no difference to itself"
    assert shown.rows[1][3].startswith("+0.500 [")
