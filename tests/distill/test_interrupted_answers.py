"""What goes wrong while a run answers or writes: an image that is lost on the way, a disk that fills. One line, and finished answers stay."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from test_stages import answers_of, one_line, raw, recipe_of, rows_of  # noqa: F401 - raw is a fixture

from masters.distill import answers, stages
from masters.distill.generate import generate_own
from masters.distill.stages import distill
from masters.errors import MastersError, RunError
from masters.samples import read_samples

# ruff: noqa: F811


def test_an_image_that_goes_bad_later_is_one_line_and_the_other_answers_stay(raw: dict[str, Any], questions: Path, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(questions, data)
    recipe = recipe_of(raw, data={"train": str(data / "train.jsonl"), "validation": str(data / "validation.jsonl"), "limit": 12})
    distill(recipe, until="check")
    sample = stages.plan_shares(recipe, read_samples(recipe.data.train, 12))[0].samples[11]
    image = sample.images[0]
    assert isinstance(image, Path)
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=rf"4 of 48 answers of teacher failed \(questions {sample.id} .*{image.name}") as caught:
        distill(recipe)
    one_line(caught)
    before = {row["key"]: row for row in answers_of(recipe.out)}
    bad = [row for row in before.values() if row["finish"] == "failed"]
    assert [(row["sample"], row["verdict"], row["ids"]) for row in bad] == [(sample.id, None, [])] * 4
    image.write_bytes(whole)
    distill(recipe, until="answers")
    after = {row["key"]: row for row in answers_of(recipe.out)}
    assert len(after) == 96
    assert not any(row["finish"] == "failed" for row in after.values())
    kept = before.keys() & after.keys()
    assert len(kept) == 44, "the whole image is another one, so its rows have other keys"
    assert all(after[key] == before[key] for key in kept)


def test_a_few_questions_without_an_answer_are_left_out_of_the_training(raw: dict[str, Any], questions: Path, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(questions, data)
    changes = {"data": {"train": str(data / "train.jsonl"), "validation": str(data / "validation.jsonl"), "limit": 12}}
    distill(recipe_of(raw, **changes), until="check")
    gone = read_samples(data / "train.jsonl", 12)[3]
    Path(gone.images[0]).unlink()  # type: ignore[arg-type]
    with pytest.raises(RunError, match=rf"an image of question '{gone.id}' can't be read"):
        distill(recipe_of(raw, **changes))
    out = distill(recipe_of(raw, **changes, answers__max_failed=0.1))
    assert sum(row["questions"] for row in rows_of(out, "step")) == 11
    assert {row["sample"] for row in answers_of(out) if row["finish"] == "failed"} == {gone.id}


def test_a_full_disk_during_answers_keeps_what_was_finished(raw: dict[str, Any], small_disk: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_of(raw, out=str(small_disk / "run"), answers__batch=1)
    with pytest.raises(MastersError, match=r"could not write .*\.parquet: .*No space left on device") as caught:
        distill(recipe)
    one_line(caught)
    kept = {row["key"]: row for path in (recipe.out / "responses").rglob("*.parquet") for row in pq.read_table(path).to_pylist()}
    assert 0 < len(kept) < 96
    assert len(kept) % 4 == 0
    assert not list(recipe.out.rglob(".*.part*")), "nothing half-written stays, so that the space is free again"
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    made: list[str] = []

    def noted(*arguments: Any, **more: Any) -> Any:
        made.extend(sample.id for sample in arguments[3])
        return generate_own(*arguments, **more)

    monkeypatch.setattr(answers, "generate_own", noted)
    distill(recipe, until="answers")
    after = {row["key"]: row for row in answers_of(recipe.out)}
    assert len(after) == 96
    assert all(after[key] == row for key, row in kept.items())
    assert len(made) == 24 - len(kept) // 4, "what was kept is not made again"


def test_a_full_disk_during_training_is_one_line(raw: dict[str, Any], small_disk: Path):
    shared = str(small_disk.parent / "shared")
    with pytest.raises(MastersError, match=r"could not write .*\.pt: ") as caught:
        distill(recipe_of(raw, out=str(small_disk / "run"), buffer=shared))
    one_line(caught)
    assert not list((small_disk / "run").rglob("*.part*"))


def test_a_full_disk_at_the_end_leaves_no_half_student(raw: dict[str, Any], small_disk: Path):
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    recipe = recipe_of(raw, preset="sft", out=str(small_disk / "run"))
    distill(recipe, until="train")
    filler = small_disk / "filler"
    free = os.statvfs(small_disk)
    filler.write_bytes(bytes(free.f_bavail * free.f_bsize - (200 << 10)))  # room for a report, not for weights
    with pytest.raises(MastersError, match=r"could not write .*student: .*") as caught:
        distill(recipe)
    one_line(caught)
    assert not (recipe.out / "student").exists()
    assert not list(recipe.out.rglob("*.part*"))
    filler.unlink()
    assert (distill(recipe) / "student" / "model.safetensors").exists()


def test_an_image_that_goes_bad_before_training_is_one_line_and_training_goes_on_with_it_whole(raw: dict[str, Any], questions: Path, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(questions, data)
    recipe = recipe_of(raw, data={"train": str(data / "train.jsonl"), "validation": str(data / "validation.jsonl"), "limit": 12})
    distill(recipe, until="answers")
    answered = answers_of(recipe.out)
    image = read_samples(recipe.data.train, 12)[7].images[0]
    assert isinstance(image, Path)
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MastersError, match=image.name) as caught:
        distill(recipe)
    one_line(caught)
    image.write_bytes(whole)
    distill(recipe)
    assert answers_of(recipe.out) == answered
    assert (recipe.out / "student" / "model.safetensors").is_file()
