"""When the student answers: once a teacher or in every mask stage, always as it stands, also after an interruption."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from masters.distill.recipe import Recipe, build_recipe
from masters.distill.stages import distill
from masters.distill.train import Trainer
from masters.errors import MastersError, RunError


@pytest.fixture
def recipe_of(models: Any, questions: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Two teachers in a row, 12 questions, 2 mask stages and 1, 6 updates at a rate that changes every answer."""
    raw: dict[str, Any] = {
        "student": str(models.student),
        "teachers": [{"model": str(models.student), "r_max": 0.2}, {"model": str(models.teacher), "r_max": 0.0}],
        "data": {"train": str(questions / "train.jsonl"), "validation": str(questions / "validation.jsonl"), "limit": 12},
        "answers": {"batch": 8, "max_tokens": 3, "teacher": 2, "student": 2, "refresh": "stage"},
        "mask": {"step": 0.2},
        "train": {"dtype": "float32", "learning_rate": 5e-3, "questions_per_step": 2, "evaluate_batch": 8},
    }

    def recipe(out: str, **changes: Any) -> Recipe:
        values = copy.deepcopy(raw) | {"out": str(tmp_path / out)}
        for key, change in changes.items():
            values[key] = {**values[key], **change} if isinstance(change, dict) else change
        return build_recipe(values)

    return recipe


def answers_of(out: Path, name: str) -> dict[str, list[list[int]]]:
    """The ids of the responses in one kind of files, by question."""
    rows = [row for path in sorted((out / "responses").glob(f"{name}*.parquet")) for row in pq.read_table(path).to_pylist()]
    return {sample: [row["ids"] for row in rows if row["sample"] == sample] for sample in {row["sample"] for row in rows}}


def losses_of(out: Path) -> list[float]:
    path = out / "metrics.jsonl"
    rows = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return [row["loss"] for row in rows if row["kind"] == "step"]


def test_teachers_that_do_not_come_smallest_first_are_told_of(recipe_of: Callable[..., Recipe], models: Any, capsys: pytest.CaptureFixture[str]):
    distill(recipe_of("rising"), until="check")
    assert "smallest first" not in capsys.readouterr().err
    distill(recipe_of("falling", teachers=[{"model": str(models.teacher), "r_max": 0.0}, {"model": str(models.student), "r_max": 0.0}]), until="check")
    assert "takes the smallest first" in capsys.readouterr().err


def test_the_student_answers_anew_in_every_stage_and_under_every_teacher(recipe_of: Callable[..., Recipe]):
    staged = distill(recipe_of("staged"))
    names = sorted(path.stem for path in (staged / "responses").glob("student*"))
    assert names == ["student0-stage0", "student0-stage1", "student1"], "a teacher of one stage has one round"
    once = distill(recipe_of("once", answers={"refresh": "teacher"}))
    assert sorted(path.stem for path in (once / "responses").glob("student*")) == ["student0", "student1"]
    untouched = answers_of(once, "student0")
    assert len(untouched) == 6
    first, second = answers_of(staged, "student0-stage0"), answers_of(staged, "student0-stage1")
    assert first == {name: untouched[name] for name in first}, "nothing has been trained yet"
    assert second.keys() == untouched.keys() - first.keys()
    assert second != {name: untouched[name] for name in second}, "the first stage has changed the student"
    assert answers_of(staged, "teacher") == answers_of(once, "teacher"), "teachers answer as before"


def test_rounds_on_a_cached_signal_of_several_teachers_train_as_live(recipe_of: Callable[..., Recipe]):
    live, cached = distill(recipe_of("live")), distill(recipe_of("cached", teacher_signal="cached"))
    names = {path.name for path in (cached / "teacher").iterdir()}
    heads = {"teacher0-head.safetensors", "teacher1-head.safetensors"}
    assert names == heads | {f"{stage}-0000000.safetensors" for stage in ("teacher0-stage0", "teacher1-stage0")} | {"teacher0-stage1-0000003.safetensors"}
    assert answers_of(live, "") == answers_of(cached, "")
    ours, theirs = losses_of(cached), losses_of(live)
    # Errors of rounding grow from update to update at this rate; the first ones are compared to the digit elsewhere.
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert len(ours) == len(set(ours)) == 7


def test_a_run_in_rounds_that_stops_anywhere_ends_as_the_unbroken_one(recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch):
    whole = distill(recipe_of("whole", teacher_signal="cached"))
    recipe, step = recipe_of("parts", teacher_signal="cached"), Trainer.step
    distill(recipe, until="answers")
    distill(recipe, until="signal")
    for stop in (1, 3, 5):

        def stops(self: Trainer, planned: Any, *given: Any, stop: int = stop) -> Any:
            if planned.number == stop:
                raise KeyboardInterrupt
            return step(self, planned, *given)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", stops)
            with pytest.raises(KeyboardInterrupt):
                distill(recipe)
    parts = distill(recipe)
    assert losses_of(parts) == losses_of(whole)
    assert (parts / "student" / "model.safetensors").read_bytes() == (whole / "student" / "model.safetensors").read_bytes()


def test_answers_that_a_trained_student_can_no_longer_give_are_not_made_up(recipe_of: Callable[..., Recipe]):
    recipe = recipe_of("run")
    distill(recipe, until="train")
    for path in (recipe.out / "responses").glob("student0-stage1*"):
        path.unlink()
    with pytest.raises(RunError, match=r"stands at step 7, its answers in .* are missing and come from step 2; put them back, or remove") as caught:
        distill(recipe)
    assert "\n" not in str(caught.value)
    assert not list((recipe.out / "responses").glob("student0-stage1*"))


def test_a_checkpoint_of_another_recipe_is_refused(recipe_of: Callable[..., Recipe]):
    theirs, ours = (
        recipe_of(out, preset="sft", answers={"teacher": 0, "student": 0}, train={"learning_rate": rate}) for out, rate in (("theirs", 1e-3), ("ours", 1e-4))
    )
    distill(theirs, until="train")
    distill(ours, until="answers")
    shutil.copytree(theirs.out / "checkpoints", ours.out / "checkpoints")
    with pytest.raises(MastersError, match=r"last\.pt is another recipe's checkpoint; choose another 'out', or remove the folder") as caught:
        distill(ours)
    assert "\n" not in str(caught.value)
    assert not (ours.out / "student").exists()
    assert losses_of(ours.out) == [], "nothing was trained on another's weights"
