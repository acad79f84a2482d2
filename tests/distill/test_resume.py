"""Runs killed with SIGKILL, again and again, against one that was left alone: the same answers, losses and weights, bit for bit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from masters.distill.recipe import build_recipe
from masters.distill.stages import distill


def recipe_of(models: Any, questions: Path, out: Path) -> dict[str, Any]:
    """Two teachers in a row over 40 questions: 2 x 2 mask stages of 10 questions, 12 updates, a checkpoint after every second one and every stage."""
    return {
        "preset": "default",
        "student": str(models.student),
        "teachers": [{"model": str(models.student), "r_max": 0.3}, {"model": str(models.teacher), "r_max": 0.3}],
        "data": {"train": str(questions / "train.jsonl"), "validation": str(questions / "validation.jsonl")},
        "answers": {"teacher": 2, "student": 2, "batch": 3, "max_tokens": 4},
        "mask": {"step": 0.3},
        "train": {
            "dtype": "float32",
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "questions_per_step": 4,
            "accumulate": 2,
            "checkpoint_steps": 2,
            "evaluate_batch": 8,
        },
        "out": str(out),
    }


def metrics(out: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without their times; a line that is being written is left out."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines if line.endswith("}")]


def tensorboard(out: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard's own reader finds, step by step; a step that it finds twice is an error."""
    reader = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    found = {name: [(event.step, event.value) for event in reader.Scalars(name)] for name in reader.Tags()["scalars"] if not name.startswith("speed/")}
    assert all([step for step, _ in events] == sorted({step for step, _ in events}) for events in found.values())
    return {name: dict(events) for name, events in found.items()}


def responses(out: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted((out / "responses").glob("[!.]*.parquet"))}


def part_files(out: Path, shelf: str) -> list[Path]:
    """The finished batches of the sources whose names begin so."""
    try:
        return list((out / "responses").glob(f"{shelf}*/[!.]*.parquet"))
    except FileNotFoundError:  # put together and removed just now
        return []


def kept_rows(out: Path) -> dict[str, dict[str, Any]]:
    """All rows of a run that nobody works on, by their keys."""
    return {row["key"]: row for path in (out / "responses").rglob("[!.]*.parquet") for row in pq.read_table(path).to_pylist()}


@pytest.fixture(scope="module")
def unbroken(models: Any, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    processes.run(recipe_of(models, questions, folder / "run"), folder / "complaint")
    return folder / "run"


def test_the_unbroken_run_did_what_it_was_asked(unbroken: Path):
    rows = metrics(unbroken)
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(12))
    assert [row["ratio"] for row in steps] == [0.3] * 3 + [0.0] * 3 + [0.3] * 3 + [0.0] * 3
    assert [row["step"] for row in rows if row["kind"] == "evaluation"] == [-1, 2, 5, 8, 11]
    assert len({row["loss"] for row in steps}) == 12
    shown = tensorboard(unbroken)
    assert shown["loss/total"] == {row["step"] + 1: pytest.approx(row["loss"]) for row in steps}
    assert shown["validation/accuracy"] == {row["step"] + 1: pytest.approx(row["validation_accuracy"]) for row in rows if row["kind"] == "evaluation"}
    files = responses(unbroken)
    assert sorted(files) == [f"{name}.parquet" for name in ("student0", "student1", *(f"teacher{i}-stage{j}" for i in (0, 1) for j in (0, 1)))]
    for name, file in files.items():
        assert {row["ratio"] for row in file} == ({0.0} if "student" in name or "stage1" in name else {0.3})
        assert all(len(row["ids"]) <= 4 and row["verdict"] in (0.0, 1.0) for row in file)
    answered = [row["sample"] for file in files.values() for row in file]
    assert len(answered) == 40 * 4
    assert all(answered.count(sample) == 4 for sample in set(answered))


# What a run has just done when it is killed, in the order in which it happens.
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "before its first answers": lambda out: (out / "recipe.yaml").exists(),
    "among the first teacher's answers": lambda out: len(part_files(out, "teacher0")) >= 2,
    "among the student's answers": lambda out: len(part_files(out, "student0")) >= 2,
    "between two checkpoints of a stage": lambda out: any(row["step"] == 0 for row in metrics(out)),
    "at a stage change": lambda out: any(row["kind"] == "evaluation" and row["step"] == 2 for row in metrics(out)),
    "inside the next stage": lambda out: any(row["step"] == 4 for row in metrics(out)),
    "among the trained student's answers": lambda out: len(part_files(out, "student1")) >= 2,
    "under the second teacher": lambda out: any(row["step"] == 7 for row in metrics(out)),
    "after its last update": lambda out: any(row["step"] == 11 for row in metrics(out)),
}


def test_a_run_killed_again_and_again_ends_as_the_unbroken_one(unbroken: Path, models: Any, questions: Path, tmp_path: Path):
    out, complaint, rng = tmp_path / "run", tmp_path / "complaint", random.Random(0)
    values = recipe_of(models, questions, out)
    finished: dict[str, dict[str, Any]] = {}
    for moment, reached in MOMENTS.items():
        process = processes.start(values, complaint)
        processes.kill_when(process, lambda reached=reached: reached(out), delay=rng.random() * 0.02)
        assert not (out / "student").exists(), moment
        kept = kept_rows(out)
        assert all(kept[key] == row for key, row in finished.items()), f"{moment}: finished answers were lost or made again"
        finished = kept
        if moment == "inside the next stage":
            with open(out / "metrics.jsonl", "a") as log:
                log.write('{"kind": "step", "step": 5, "lo')  # a line that the kill has cut
    processes.run(values, complaint)

    assert responses(out) == responses(unbroken)
    assert metrics(out) == metrics(unbroken)
    assert tensorboard(out) == {name: pytest.approx(values) for name, values in tensorboard(unbroken).items()}
    ours, theirs = ((folder / "student" / "model.safetensors").read_bytes() for folder in (out, unbroken))
    assert ours == theirs
    for name in ("plan.json", "mask-0.json", "mask-1.json"):
        assert (out / name).read_text() == (unbroken / name).read_text(), name
    left = [str(path.relative_to(out)) for path in out.rglob(".*") if path.name != ".lock"]
    assert not left, f"half-written files of killed processes stay behind: {left}"


def test_the_student_was_trained_but_for_its_vision_tower(unbroken: Path, models: Any):
    with safe_open(unbroken / "student" / "model.safetensors", "pt") as after, safe_open(models.student / "model.safetensors", "pt") as before:
        assert set(after.keys()) == set(before.keys())
        changed = {name for name in before.keys() if not after.get_tensor(name).equal(before.get_tensor(name))}  # noqa: SIM118
    assert not any("vision_model" in name for name in changed)
    for part in ("connector", "embed_tokens", "q_proj", "down_proj", "norm"):
        assert any(part in name for name in changed), f"no {part} was trained"


def snapshot(out: Path) -> dict[str, tuple[bytes, int]]:
    """Contents and inodes of all files, but for what every start writes anew."""
    return {str(p.relative_to(out)): (p.read_bytes(), p.stat().st_ino) for p in out.rglob("*") if p.is_file() and p.name not in ("plan.json", ".lock")}


def test_a_finished_run_started_again_does_nothing(unbroken: Path, models: Any, questions: Path, monkeypatch: pytest.MonkeyPatch):
    from masters.distill import stages

    monkeypatch.setattr(stages, "QUESTIONS_PER_FILE", processes.QUESTIONS_PER_FILE)
    before = snapshot(unbroken)
    assert distill(build_recipe(recipe_of(models, questions, unbroken))) == unbroken
    assert snapshot(unbroken) == before
