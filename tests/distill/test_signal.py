"""The teacher's kept states: equal to those of the teacher in memory, shared by equal beginnings, refused where they are another's."""

from __future__ import annotations

import copy
import gc
import json
import os
import random
import shutil
import subprocess
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from masters.distill import models as loading
from masters.distill import signal, stages
from masters.distill.families import family_of
from masters.distill.forward import Group, pack, response_states
from masters.distill.inputs import Encoder
from masters.distill.reading import Reading
from masters.distill.recipe import Recipe, build_recipe
from masters.distill.responses import DistinctResponse
from masters.distill.signal import CachedSignal, SignalReader, check_signal, lay_out, prefixes, walk, write_head
from masters.distill.stages import distill
from masters.distill.train import Trainer
from masters.errors import MastersError, RunError
from masters.samples import Sample

Answers = dict[str, list[DistinctResponse]]


def answers_to(samples: list[Sample], seed: int = 0, longest: int = 6) -> Answers:
    """Distinct responses of a small vocabulary, so that many begin alike; some are one token long."""
    rng = random.Random(seed)
    drawn = {s.id: {tuple(rng.choice((5, 6, 7)) for _ in range(rng.randint(1, longest))) for _ in range(6)} for s in samples}
    return {name: [DistinctResponse(ids, 1, 0.0, True, False) for ids in sorted(group)] for name, group in drawn.items()}


def groups_of(samples: list[Sample], answers: Answers, encoder: Encoder) -> list[Group]:
    return [Group(encoder.prompt(s), tuple(r.ids for r in answers[s.id]), s.id) for s in samples]


def written(folder: Path, teacher: Any, encoder: Encoder, samples: list[Sample], answers: Answers, shared: bool = True) -> Path:
    collate = family_of(teacher.config.model_type).collate_pixels
    head = write_head(folder, "head", 0.0, teacher, {}, "mine")
    path, layout = folder / "chunk.safetensors", lay_out(samples, answers)
    SignalReader(encoder, collate, shared, torch.float32).write(path, layout, samples, teacher, {"head": head.name, "mark": "mine"})
    return path


# Beginnings


def test_equal_beginnings_share_a_row_and_no_others_do():
    rng = random.Random(1)
    for _ in range(50):
        responses = [[rng.choice((1, 2)) for _ in range(rng.randint(1, 5))] for _ in range(rng.randint(1, 6))]
        rows = prefixes(responses)
        expected = {tuple(ids[:n]) for ids in responses for n in range(len(ids))}
        assert 1 + len(rows) == len(expected)
        place: dict[tuple[int, ...], int] = {}
        for ids in responses:
            for n, row in enumerate(walk(rows, ids)):
                assert place.setdefault(tuple(ids[:n]), row) == row
        assert sorted(place.values()) == list(range(len(expected))), "rows are numbered without a gap"
    with pytest.raises(KeyError):
        walk(prefixes([[1, 2, 3]]), [2, 2])


# Files


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_from_the_file_are_the_teachers(
    shared: bool, dtype: torch.dtype, tiny_teacher: Any, encoder: Encoder, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(signal, "FORWARD_TOKENS", 500)  # several batches a file
    teacher = copy.deepcopy(tiny_teacher).to(dtype)
    answers, asked = answers_to(samples[:12]), samples[:12]
    path = written(tmp_path, teacher, encoder, asked, answers, shared)
    stored = load_file(path)
    tokens = sum(len(r.ids) for group in answers.values() for r in group)
    assert stored["states"].dtype == dtype
    assert stored["states"].shape[1] == teacher.config.text_config.hidden_size
    assert len(stored["states"]) == sum(stored["rows"].tolist()) < tokens == len(stored["tokens"])
    assert torch.equal(load_file(tmp_path / "head.safetensors")["head"], teacher.lm_head.weight)

    cached = CachedSignal([path], torch.device("cpu"))
    collate = family_of(teacher.config.model_type).collate_pixels
    rng = random.Random(2)
    for _ in range(3):  # other batches than those it was written in, and responses in another order
        chosen = rng.sample(asked, 5)
        mixed = {s.id: rng.sample(answers[s.id], len(answers[s.id]) - 1) for s in chosen}
        batch = pack(groups_of(chosen, mixed, encoder), encoder.pad, collate, shared)
        with torch.no_grad():
            expected = response_states(teacher, batch)
        states, head = cached.read(batch)
        assert torch.equal(head, teacher.lm_head.weight)
        apart = float((states.float() - expected.float()).abs().max())
        assert apart < (2e-5 if dtype == torch.float32 else 0.15), apart


def test_a_response_that_was_not_read_is_named(tiny_teacher: Any, encoder: Encoder, samples: list[Sample], tmp_path: Path):
    answers = answers_to(samples[:3])
    cached = CachedSignal([written(tmp_path, tiny_teacher, encoder, samples[:3], answers)], torch.device("cpu"))
    collate = family_of(tiny_teacher.config.model_type).collate_pixels
    other = {samples[1].id: [DistinctResponse((9, 9, 9), 1, 0.0, True, False)]}
    for sample, given in ((samples[1], other), (samples[3], answers_to(samples[3:4]))):
        with pytest.raises(RunError, match=f"lacks a response to question '{sample.id}'; remove it"):
            cached.read(pack(groups_of([sample], given, encoder), encoder.pad, collate))


def test_files_of_others_and_damaged_ones_are_refused(tiny_teacher: Any, encoder: Encoder, samples: list[Sample], tmp_path: Path):
    answers = answers_to(samples[:3])
    path = written(tmp_path, tiny_teacher, encoder, samples[:3], answers)
    layout = lay_out(samples[:3], answers)
    check_signal(path, layout, "mine")
    with pytest.raises(RunError, match="computed with another recipe, teacher or buffer; remove the folder"):
        check_signal(path, layout, "theirs")
    with pytest.raises(RunError, match="computed with other responses; remove the folder"):
        check_signal(path, lay_out(samples[:3], answers_to(samples[:3], seed=1)), "mine")
    whole = path.read_bytes()
    for keep in (0, 7, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(RunError, match=r"chunk\.safetensors is damaged .*remove it") as caught:
            check_signal(path, layout, "mine")
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    write_head(tmp_path / "other", "head", 0.0, tiny_teacher, {}, "theirs")
    shutil.copyfile(tmp_path / "other" / "head.safetensors", tmp_path / "head.safetensors")
    batch = pack(groups_of(samples[:1], answers, encoder), encoder.pad, family_of("idefics3").collate_pixels)
    with pytest.raises(RunError, match="is not of the states beside it"):
        CachedSignal([path], torch.device("cpu")).read(batch)


def test_a_masked_head_is_kept_once_a_ratio(tiny_teacher: Any, tmp_path: Path):
    plain = [write_head(tmp_path, "head", ratio, tiny_teacher, {}, "") for ratio in (0.2, 0.0)]
    masked = [write_head(tmp_path, "head", ratio, tiny_teacher, {"lm_head.weight": tiny_teacher.lm_head.weight}, "") for ratio in (0.2, 0.0)]
    assert [path.name for path in plain] == ["head.safetensors"] * 2
    assert [path.name for path in masked] == ["head-0.2.safetensors", "head-0.safetensors"]


# Runs


@pytest.fixture
def raw(models: Any, questions: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe's plain values: 12 questions, 2 mask stages, 4 updates."""
    return {
        "student": str(models.student),
        "teachers": [{"model": str(models.teacher), "r_max": 0.2}],
        "data": {"train": str(questions / "train.jsonl"), "validation": str(questions / "validation.jsonl"), "limit": 12},
        "answers": {"batch": 8, "max_tokens": 3},
        "mask": {"step": 0.2},
        "train": {"dtype": "float32", "learning_rate": 1e-3, "questions_per_step": 3, "evaluate_batch": 8},
        "teacher_signal": "cached",
        "out": str(tmp_path / "run"),
    }


def recipe_of(raw: dict[str, Any], **changes: Any) -> Recipe:
    return build_recipe(copy.deepcopy(raw) | changes)


def steps_of(out: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "step"]


@pytest.mark.parametrize("preset", ["paper", "default", "opd"])
def test_training_on_the_kept_signal_is_training_with_the_teacher(raw: dict[str, Any], preset: str):
    shared = raw["out"] + "-shared"
    live = distill(recipe_of(raw, preset=preset, teacher_signal="live", buffer=shared, out=raw["out"] + "-live"))
    cached = distill(recipe_of(raw, preset=preset, buffer=shared))
    ours, theirs = steps_of(cached), steps_of(live)
    assert len(ours) == len(theirs) == 4
    for name in ("loss", "loss_distill", "divergence", "reward_distillation", "kl", "grad_norm"):
        apart = max(abs(a[name] - b[name]) for a, b in zip(ours, theirs, strict=True))
        assert apart < (1e-6 if "grad" not in name else 1e-5), f"{name} is {apart:.1e} apart"
    assert any(row["divergence"] > 0 for row in ours)


def test_no_teacher_is_in_memory_while_the_student_is_trained(raw: dict[str, Any], models: Any, monkeypatch: pytest.MonkeyPatch):
    teachers: list[Any] = []
    load, step = loading.load_model, Trainer.step

    def noted(folder: Path, dtype: torch.dtype) -> Any:
        model = load(folder, dtype)
        if folder == models.teacher:
            teachers.append(weakref.ref(model))
        return model

    def alone(self: Trainer, *given: Any) -> Any:
        assert not [teacher for teacher in teachers if teacher() is not None], "a teacher is still held"
        return step(self, *given)

    monkeypatch.setattr(loading, "load_model", noted)
    monkeypatch.setattr(Trainer, "step", alone)
    gc.collect()
    shared = raw["out"] + "-shared"
    distill(recipe_of(raw, buffer=shared))
    assert len(teachers) == 2, "for its answers and its signal"
    teachers.clear()
    made = {path: path.stat().st_mtime_ns for path in Path(shared).rglob("*.*")}
    second = distill(recipe_of(raw, buffer=shared, out=raw["out"] + "-second", preset="paper", objective={"beta": 0.2}))
    assert not teachers, "an ablation on the same buffer loads no teacher at all"
    assert {path: path.stat().st_mtime_ns for path in Path(shared).rglob("*.*")} == made
    assert len(steps_of(second)) == 4


def test_the_plan_says_what_the_signal_takes(raw: dict[str, Any], models: Any):
    out = distill(recipe_of(raw, preset="paper"), until="signal")
    plan = json.loads((out / "plan.json").read_text())["teacher_signal"]
    [teacher] = plan["teachers"]
    hidden = loading.read_config(models.teacher).text_config.hidden_size
    assert (plan["kind"], teacher["hidden"], teacher["bytes_per_token"]) == ("cached", hidden, 4 * hidden)
    assert (teacher["longest_tokens"], teacher["longest_bytes"]) == (12 * 8 * 3, 12 * 8 * 3 * 4 * hidden)
    head = load_file(out / "teacher" / "teacher0-head.safetensors")["head"]
    assert teacher["head_bytes"] == head.numel() * 4
    files = sorted((out / "teacher").glob("teacher0-stage*.safetensors"))
    assert len(files) == 2
    stored = [load_file(path)["states"] for path in files]
    assert 0 < sum(t.numel() * 4 for t in stored) <= teacher["longest_bytes"]
    assert not (out / "metrics.jsonl").exists(), "nothing has been trained"


def test_a_recipe_without_a_teacher_keeps_no_signal(raw: dict[str, Any]):
    out = distill(recipe_of(raw, preset="sft"), until="signal")
    assert not (out / "teacher").exists()
    assert json.loads((out / "plan.json").read_text())["teacher_signal"]["teachers"] == []


def test_a_signal_is_continued_chunk_by_chunk_and_refused_where_it_is_anothers(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stages, "QUESTIONS_PER_FILE", 2)
    recipe = recipe_of(raw)
    read, count = SignalReader.write, 0

    def dies(self: Any, *given: Any) -> Reading:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return read(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(SignalReader, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            distill(recipe)
    kept = {path.name: path.stat().st_ino for path in (recipe.out / "teacher").glob("*stage*")}
    assert len(kept) == 3
    distill(recipe, until="signal")
    found = {path.name: path.stat().st_ino for path in (recipe.out / "teacher").glob("*stage*")}
    assert len(found) == 6
    assert kept.items() < found.items()

    other = recipe_of(raw, out=raw["out"] + "-other", seed=7)
    distill(other, until="answers")
    shutil.copytree(recipe.out / "teacher", other.out / "teacher")
    with pytest.raises(RunError, match="was computed with other responses; remove the folder"):
        distill(other)
    shutil.rmtree(other.out / "teacher")
    distill(other, until="signal")


def test_a_disk_too_small_for_the_signal_is_found_before_the_forward(raw: dict[str, Any], small_disk: Path, monkeypatch: pytest.MonkeyPatch):
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    recipe = recipe_of(raw, out=str(small_disk / "run"))
    distill(recipe, until="answers")
    free = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(free.f_bavail * free.f_bsize - (20 << 10)))
    monkeypatch.setattr(SignalReader, "states", lambda *given: pytest.fail("the teacher has read for nothing"))
    with pytest.raises(MastersError, match=r"of the teacher's signal takes .* MB and .* left; free some") as caught:
        distill(recipe)
    assert "\n" not in str(caught.value)
    assert not list(small_disk.rglob("*.part*"))
