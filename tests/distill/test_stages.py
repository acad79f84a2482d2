"""Whole runs on two tiny random models and a few questions: what they leave, what they refuse, and what survives a failure."""

from __future__ import annotations

import copy
import fcntl
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText, AutoProcessor

from masters.distill import stages, validation
from masters.distill.judge import Verdict
from masters.distill.masked_teacher import MaskedTeacher
from masters.distill.recipe import PRESETS, Recipe, build_recipe
from masters.distill.stages import distill
from masters.errors import DataError, MastersError, ModelError, RecipeError, RunError
from masters.samples import read_samples


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
        "out": str(tmp_path / "run"),
    }


def recipe_of(raw: dict[str, Any], **changes: Any) -> Recipe:
    """The recipe with changes such as train__epochs=2."""
    values = copy.deepcopy(raw)
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = values
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    return build_recipe(values)


def rows_of(out: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


def answers_of(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((out / "responses").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def one_line(error: pytest.ExceptionInfo[MastersError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


# What a run leaves


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_runs_and_leaves_an_ordinary_model(preset: str, raw: dict[str, Any], models: Any, monkeypatch: pytest.MonkeyPatch):
    # A random model is never right, and where all are wrong there is nothing to reinforce.
    monkeypatch.setattr(stages, "judge", lambda sample, text: Verdict(float(len(text) % 2), "odd or even"))
    recipe = recipe_of(raw, preset=preset)
    out = distill(recipe)
    assert out == recipe.out
    found = {path.name for path in out.iterdir()} - {".lock"}
    assert found == {
        *("recipe.yaml", "skipped.jsonl", "plan.json", "mask-0.json", "responses", "judge.json", "costs.jsonl", "cost.json"),
        *("metrics.jsonl", "trackers.json", "tensorboard", "validation", "checkpoints", "report.html", "student"),
    }
    samples = read_samples(recipe.data.train, 12)
    expected = {"teacher": recipe.answers.teacher, "student": recipe.answers.student}
    for source, count in expected.items():
        given = [row for row in answers_of(out) if row["source"] == source]
        assert sorted(row["sample"] for row in given) == sorted(s.id for s in samples for _ in range(count))
    masked = {row["sample"]: row["ratio"] for row in answers_of(out) if row["source"] == "teacher"}
    if masked:
        ratios = {0.2: 6, 0.0: 6} if recipe.mask.enabled else {0.0: 12}
        assert {ratio: list(masked.values()).count(ratio) for ratio in ratios} == ratios

    steps = rows_of(out, "step")
    assert [row["step"] for row in steps] == [0, 1, 2, 3]
    assert [row["ratio"] for row in steps] == ([0.2, 0.2, 0.0, 0.0] if recipe.mask.enabled else [0.0] * 4)
    assert all(row["questions"] == 3 and row["grad_norm"] > 0 for row in steps)
    assert any(row["divergence"] > 0 for row in steps) == (preset not in ("sft", "grpo"))
    assert all((row["loss_distill"] > 0) == (preset not in ("sft", "grpo")) for row in steps)
    assert len(rows_of(out, "evaluation")) == (3 if recipe.mask.enabled else 2), "before training, and after every stage"

    student = AutoModelForImageTextToText.from_pretrained(out / "student", dtype="auto")
    assert student.dtype == torch.bfloat16
    before = dict(AutoModelForImageTextToText.from_pretrained(models.student, dtype="auto").named_parameters())
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert any("text_model" in name for name in changed)
    assert not any("vision_model" in name for name in changed)
    ours, theirs = (AutoProcessor.from_pretrained(folder) for folder in (out / "student", models.student))
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    assert ours.chat_template == theirs.chat_template
    assert ours.image_processor.to_dict() == theirs.image_processor.to_dict()
    carried = json.loads((out / "student" / "masters_recipe.json").read_text())
    assert (carried["preset"], carried["student"], carried["data"]["train"]) == (preset, models.student.name, "train.jsonl")
    texts = [path.read_text() for path in (out / "student").iterdir() if path.suffix in (".json", ".md", ".jinja", ".txt")]
    assert len(texts) > 4
    assert not any(str(place) in text for text in texts for place in (models.student.parent, out.parent)), "no path of this machine"


def test_the_run_folder_says_what_was_done(raw: dict[str, Any]):
    out = distill(recipe_of(raw, preset="paper", answers={"batch": 8, "max_tokens": 3, "teacher": 1, "student": 1}))
    written = yaml.safe_load((out / "recipe.yaml").read_text())
    assert written["objective"]["distillation_reward"] == "jsd_minmax"
    assert written["train"]["learning_rate"] == 1e-3
    assert len(written["fingerprints"]["student"]) == 64
    card: Any = ModelCard.load(out / "student" / "README.md").data
    assert (card.base_model, card.pipeline_tag) == (written["student"].rpartition("/")[2], "image-text-to-text")
    assert card.eval_results[0].metric_value == pytest.approx(rows_of(out, "evaluation")[-1]["validation_accuracy"], abs=1e-4)
    plan = json.loads((out / "plan.json").read_text())
    assert [(s["ratio"], s["questions"], s["steps"]) for s in plan["stages"]] == [(0.2, 6, 2), (0.0, 6, 2)]
    assert (plan["steps"], plan["validation"]) == (4, 8)
    masks = json.loads((out / "mask-0.json").read_text())
    assert len(masks) == 4 * 7, "four blocks of seven linear layers"
    for mask in masks:
        assert "text_model.layers" in mask["name"]
        assert 0.19 < mask["reached"]["0.2"] <= 0.2
        assert mask["thresholds"]["0.2"] > mask["thresholds"]["0.0"] >= 0


def test_the_masked_teacher_answers_and_teaches(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """The weights in use at each stage are zero where they should be, in generation and in training."""
    seen: list[tuple[str, float, float]] = []

    def note(what: str, teacher: Any) -> None:
        weights = [t for name, t in teacher.model.named_parameters() if "text_model.layers" in name and t.ndim == 2]
        seen.append((what, teacher.ratio, sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)))

    original = MaskedTeacher.set_ratio

    def set_ratio(self: Any, ratio: float) -> None:
        original(self, ratio)
        note("set", self)

    monkeypatch.setattr(MaskedTeacher, "set_ratio", set_ratio)
    distill(recipe_of(raw, teachers=[{**raw["teachers"][0], "r_max": 0.4}], preset="default"))
    assert [ratio for _, ratio, _ in seen[:3]] == [0.4, 0.2, 0.0], "answers, stage by stage"
    assert sorted({ratio for _, ratio, _ in seen[3:]}, reverse=True) == [0.4, 0.2, 0.0]
    for _, ratio, zeros in seen:
        assert zeros == pytest.approx(ratio, abs=0.01)


def test_two_teachers_share_the_questions_and_the_student_answers_anew(raw: dict[str, Any], models: Any):
    both = [{"model": str(models.student), "r_max": 0.2}, {"model": str(models.teacher), "r_max": 0.0}]
    out = distill(recipe_of(raw, teachers=both, preset="default", train__learning_rate=5e-3))
    teachers: dict[str, set[str]] = {"teacher": set(), "student": set()}
    for row in answers_of(out):
        if row["source"] == "teacher":
            teachers[row["model"]].add(row["sample"])
    assert [len(questions) for questions in teachers.values()] == [6, 6]
    assert not teachers["teacher"] & teachers["student"]
    assert [row["ratio"] for row in rows_of(out, "step")] == [0.2, 0.0, 0.0, 0.0]
    assert {path.name for path in out.glob("mask-*.json")} == {"mask-0.json", "mask-1.json"}
    # The same question to the untouched student: its answers differ, since the first teacher has changed it.
    untouched = distill(recipe_of(raw, teachers=both[1:], preset="default", out=str(out.parent / "one")), until="answers")
    ours, theirs = (
        {row["sample"]: row["ids"] for row in answers_of(folder) if row["source"] == "student" and row["sample"] in teachers["teacher"]}
        for folder in (out, untouched)
    )
    assert set(ours) == set(theirs)
    assert ours != theirs


def test_keeping_the_best_weights_instead_of_the_last(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    # Validation says that the first stage's student was the best, and the last no better.
    reached = iter([0.1, 0.9, 0.9])
    monkeypatch.setattr(validation, "scores", lambda samples, answers: [next(reached)] * len(samples))
    out = distill(recipe_of(raw, preset="sft", mask={"enabled": True, "step": 0.2}, train__keep="best"))
    assert [row["validation_accuracy"] for row in rows_of(out, "evaluation")] == pytest.approx([0.1, 0.9, 0.9])
    student = AutoModelForImageTextToText.from_pretrained(out / "student", dtype="auto").state_dict()
    best, last = torch.load(out / "checkpoints" / "best.pt")["student"], torch.load(out / "checkpoints" / "last.pt")["student"]
    assert all(torch.equal(student[name], tensor.to(torch.bfloat16)) for name, tensor in best.items())
    assert not all(torch.equal(tensor, last[name]) for name, tensor in best.items())


def test_validation_within_a_stage(raw: dict[str, Any]):
    rows = rows_of(distill(recipe_of(raw, preset="sft", train__epochs=2, train__evaluate_steps=3)), "evaluation")
    assert [row["step"] for row in rows] == [-1, 2, 5, 7], "before training, after every third of eight updates, and at the end"


# Stages one by one


def test_a_run_in_parts_equals_a_run_in_one_go(raw: dict[str, Any]):
    whole = distill(recipe_of(raw, out=raw["out"] + "-whole"))
    expected = {
        "check": {"recipe.yaml", "skipped.jsonl", "plan.json", "mask-cost.json"},
        "mask": {"costs.jsonl", "cost.json", "mask-0.json", "mask-trial-0", "mask-trial-0.json"},
        "answers": {"responses", "judge.json"},
        "train": {"metrics.jsonl", "trackers.json", "tensorboard", "validation", "checkpoints"},
        "student": {"report.html", "student"},
    }
    found: set[str] = {".lock"}
    for stage, new in expected.items():
        out = distill(recipe_of(raw), until=stage)
        assert {path.name for path in out.iterdir()} == found | new, stage
        found |= new
    assert (out / "student" / "model.safetensors").read_bytes() == (whole / "student" / "model.safetensors").read_bytes()
    with pytest.raises(RecipeError, match="check, mask, answers, signal, train, student"):
        distill(recipe_of(raw), until="export")


def test_answers_made_ahead_do_not_come_from_a_student_of_another_time(raw: dict[str, Any], models: Any):
    """The second teacher's questions are answered by the student that the first has trained, also where answers were asked for first."""
    both = [{"model": str(models.student), "r_max": 0.0}, {"model": str(models.teacher), "r_max": 0.0}]
    whole = distill(recipe_of(raw, teachers=both, out=raw["out"] + "-whole"))
    distill(recipe_of(raw, teachers=both), until="answers")
    parts = distill(recipe_of(raw, teachers=both))
    assert answers_of(parts) == answers_of(whole)
    assert (parts / "student" / "model.safetensors").read_bytes() == (whole / "student" / "model.safetensors").read_bytes()


def test_runs_can_share_their_answers(raw: dict[str, Any]):
    shared = str(Path(raw["out"]).parent / "shared")
    first = distill(recipe_of(raw, preset="paper", buffer=shared))
    made = {path: path.stat().st_mtime_ns for path in Path(shared).iterdir()}
    second = distill(recipe_of(raw, preset="default", buffer=shared, out=raw["out"] + "-second"))
    assert {path: path.stat().st_mtime_ns for path in Path(shared).iterdir()} == made
    assert not (first / "responses").exists()
    assert (first / "student" / "model.safetensors").read_bytes() != (second / "student" / "model.safetensors").read_bytes()
    with pytest.raises(RunError, match=r"buffer of responses .*\(answers\.max_tokens differ\)"):
        distill(recipe_of(raw, buffer=shared, out=raw["out"] + "-third", answers={"batch": 8, "max_tokens": 4}))


def test_several_teachers_share_answers_only_between_runs_that_train_alike(raw: dict[str, Any], models: Any):
    both = [{"model": str(models.student), "r_max": 0.0}, {"model": str(models.teacher), "r_max": 0.0}]
    shared = str(Path(raw["out"]).parent / "shared")
    distill(recipe_of(raw, teachers=both, preset="paper", buffer=shared), until="answers")
    with pytest.raises(RunError, match="objective"):
        distill(recipe_of(raw, teachers=both, preset="default", buffer=shared, out=raw["out"] + "-second"), until="answers")


# What a run refuses


def test_another_recipe_on_the_same_folder_is_refused_and_named(raw: dict[str, Any]):
    out = distill(recipe_of(raw), until="check")
    before = (out / "recipe.yaml").read_bytes(), (out / "plan.json").read_bytes()
    with pytest.raises(RunError, match=r"begun with another recipe \(objective\.beta, train\.learning_rate differ\)") as caught:
        distill(recipe_of(raw, train__learning_rate=2e-3, objective={"beta": 0.2}))
    one_line(caught)
    assert ((out / "recipe.yaml").read_bytes(), (out / "plan.json").read_bytes()) == before
    distill(recipe_of(raw), until="check")


def test_another_student_or_other_questions_under_the_same_name_are_refused(raw: dict[str, Any], models: Any, questions: Path, tmp_path: Path):
    data, student = tmp_path / "data", tmp_path / "student"
    shutil.copytree(questions, data)
    shutil.copytree(models.student, student)
    recipe = recipe_of(raw, student=str(student), data={"train": str(data / "train.jsonl"), "validation": str(data / "validation.jsonl")})
    distill(recipe, until="check")
    lines = (data / "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(RunError, match=r"\(fingerprints\.train differ\)"):
        distill(recipe, until="check")
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    distill(recipe, until="check")
    shutil.copyfile(models.teacher / "generation_config.json", student / "generation_config.json")
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"note": "changed"}))
    with pytest.raises(RunError, match=r"\(fingerprints\.student differ\)"):
        distill(recipe, until="check")
    (student / "config.json").write_text(json.dumps(config, indent=2))
    (student / "tokenizer.json").write_text((student / "tokenizer.json").read_text() + " ")
    with pytest.raises(RunError, match=r"fingerprints\.tokenizer differ\)"):
        distill(recipe, until="check")


def test_a_run_goes_on_with_another_address_and_other_limits(raw: dict[str, Any]):
    endpoint = {"url": "http://127.0.0.1:1/v1", "model": "{name}-{ratio}"}
    distill(recipe_of(raw, answers__engine="endpoint", answers__endpoint=endpoint), until="check")
    distill(recipe_of(raw, answers__engine="endpoint", answers__endpoint=endpoint | {"url": "http://127.0.0.1:2/v1"}, answers__max_failed=0.5), until="check")
    with pytest.raises(RunError, match=r"\(answers\.engine differ\)"):
        distill(recipe_of(raw), until="check")


def test_a_recipe_that_was_refused_can_be_mended_and_run_in_the_same_folder(raw: dict[str, Any]):
    with pytest.raises(ModelError, match="no model in"):
        distill(recipe_of(raw, student="/nowhere/student"))
    with pytest.raises(DataError, match="no file of questions"):
        distill(recipe_of(raw, data__validation="/nowhere/validation.jsonl"))
    assert not Path(raw["out"]).exists()
    distill(recipe_of(raw), until="check")


def test_a_second_process_is_refused(raw: dict[str, Any]):
    out = Path(raw["out"])
    out.mkdir()
    holder = subprocess.Popen(["flock", "-x", str(out / ".lock"), "sh", "-c", "echo held; read x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="another process is working in") as caught:
            distill(recipe_of(raw), until="check")
        one_line(caught)
        assert [path.name for path in out.iterdir()] == [".lock"]
    finally:
        holder.communicate(b"\n")
    distill(recipe_of(raw), until="check")


def test_the_lock_is_let_go_after_an_error(raw: dict[str, Any]):
    distill(recipe_of(raw), until="check")
    with pytest.raises(RunError, match="another recipe"):
        distill(recipe_of(raw, seed=1))
    with open(Path(raw["out"]) / ".lock") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_an_out_that_is_a_file_is_one_line(raw: dict[str, Any], tmp_path: Path):
    (tmp_path / "taken").write_text("mine")
    for out in (tmp_path / "taken", tmp_path / "taken" / "run"):
        with pytest.raises(MastersError, match="taken") as caught:
            distill(recipe_of(raw, out=str(out)))
        one_line(caught)
    assert (tmp_path / "taken").read_text() == "mine"


def test_too_few_questions_for_the_stages(raw: dict[str, Any]):
    with pytest.raises(RecipeError, match=r"1 questions leave 1 for 2 mask stages"):
        distill(recipe_of(raw, data__limit=1))


def test_a_first_prompt_that_is_too_long_is_found_at_once(raw: dict[str, Any]):
    with pytest.raises(DataError, match=r"takes \d+ tokens"):
        distill(recipe_of(raw, longest=10))
    assert not (Path(raw["out"]) / "recipe.yaml").exists()


# What survives a failure


def test_a_truncated_answers_file_is_named_and_made_again_once_removed(raw: dict[str, Any]):
    out = distill(recipe_of(raw), until="answers")
    made = answers_of(out)
    path = sorted((out / "responses").glob("teacher0*.parquet"))[1]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=rf"{path.name} is damaged .*remove it") as caught:
        distill(recipe_of(raw))
    one_line(caught)
    path.unlink()
    distill(recipe_of(raw), until="answers")
    assert answers_of(out) == made


def test_a_damaged_recipe_or_mask_file_is_one_line(raw: dict[str, Any]):
    out = distill(recipe_of(raw), until="mask")
    mask = (out / "mask-0.json").read_text()
    (out / "mask-0.json").write_text(mask[:100])
    with pytest.raises(DataError, match=r"mask-0\.json is not valid JSON") as caught:
        distill(recipe_of(raw), until="mask")
    one_line(caught)
    (out / "mask-0.json").write_text(mask)
    (out / "recipe.yaml").write_text("[")
    with pytest.raises(RunError, match=r"recipe\.yaml is damaged") as caught_again:
        distill(recipe_of(raw), until="mask")
    assert len(str(caught_again.value)) < 500


def test_a_loss_that_is_no_number_names_the_questions_and_keeps_the_last_checkpoint(raw: dict[str, Any], questions: Path):
    recipe = recipe_of(raw, preset="sft", train__learning_rate=1e30, train__checkpoint_steps=1, train__clip=1e30)
    with pytest.raises(RunError, match=r"(loss|norm) is (nan|inf|-inf) at step \d \(questions train-\d+, ") as caught:
        distill(recipe)
    message = one_line(caught)
    step = int(message.split("at step ")[1].split()[0])
    state = torch.load(recipe.out / "checkpoints" / "last.pt")
    assert state["step"] == step > 0
    named = message.split("(questions ")[1].split(")")[0].split(", ")
    assert set(named) <= {sample.id for sample in read_samples(questions / "train.jsonl")}
    assert len(named) == 3
    assert [row["step"] for row in rows_of(recipe.out, "step")] == list(range(step))
    assert not (recipe.out / "student").exists()


@pytest.fixture
def spoilt(raw: dict[str, Any], questions: Path, tmp_path: Path) -> dict[str, Any]:
    """The recipe on 40 questions and 8 of validation, of which two and one can't be used: an image cut short, one missing, a question too long.

    Two lines more are no questions: one that was cut, and one that stands there a second time.
    """
    data = tmp_path / "data"
    shutil.copytree(questions, data)
    paths = {name: data / f"{name}.jsonl" for name in ("train", "validation")}
    train, validation = ([json.loads(line) for line in path.read_text().splitlines()] for path in paths.values())
    cut = data / "cut.png"
    cut.write_bytes((data / train[3]["images"][0]).read_bytes()[:-30])
    train[3]["images"], train[10]["images"] = ["cut.png"], ["absent.png"]
    validation[2]["question"] *= 200
    for path, rows in zip(paths.values(), (train, validation), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(paths["train"], "a") as lines:
        lines.write(json.dumps(train[0]) + "\n" + json.dumps(train[1])[:-9])
    return raw | {"data": {name: str(path) for name, path in paths.items()} | {"max_skipped": 0.2}, "train": raw["train"] | {"questions_per_step": 10}}


@pytest.mark.parametrize("preset", ["default", "sft"])
def test_rows_that_cant_be_used_are_left_out_everywhere(preset: str, spoilt: dict[str, Any], capfd: pytest.CaptureFixture[str]):
    out = distill(recipe_of(spoilt, preset=preset))
    rows = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    bad = [("train", "malformed row")] * 2
    assert [(row["file"], row["reason"]) for row in rows] == [*bad, ("train", "damaged image"), ("train", "missing image"), ("validation", "too long")]
    plan = json.loads((out / "plan.json").read_text())
    assert plan["skipped"] == {"train": {"missing image": 1, "damaged image": 1, "malformed row": 2}, "validation": {"too long": 1}}
    assert (sum(stage["questions"] for stage in plan["stages"]), plan["validation"]) == (38, 7)
    assert "4 of 42 train questions are skipped: missing image 1, damaged image 1, malformed row 2; their ids stand in" in capfd.readouterr().err
    assert not {row["id"] for row in rows} & {row["sample"] for row in answers_of(out)}
    assert sum(row["questions"] for row in rows_of(out, "step")) == 38
    accuracy = rows_of(out, "evaluation")[0]["validation_accuracy"]
    assert accuracy * 7 == pytest.approx(round(accuracy * 7)), "a mean over seven questions"


def test_a_run_continues_with_the_rows_that_it_began_with(spoilt: dict[str, Any], tmp_path: Path):
    """An image that comes later is of no use to a run that began without it, nor to its answers."""
    shared = str(tmp_path / "shared")
    recipe = recipe_of(spoilt, buffer=shared)
    out = distill(recipe, until="answers")
    before = (out / "plan.json").read_bytes()
    folder = recipe.data.train.parent
    shutil.copyfile(next(folder.rglob("*[0-9].png")), folder / "absent.png")
    distill(recipe)
    assert (out / "plan.json").read_bytes() == before
    (out / "skipped.jsonl").unlink()
    with pytest.raises(RunError, match=r"\(fingerprints\.skipped differ\)"):
        distill(recipe)
    with pytest.raises(RunError, match=r"buffer of responses .*\(fingerprints\.skipped differ\)"):
        distill(recipe_of(spoilt, buffer=shared, out=str(tmp_path / "second")))


def test_more_bad_rows_than_the_recipe_allows_stop_the_run_before_it_begins(spoilt: dict[str, Any]):
    with pytest.raises(
        DataError, match=r"4 of 42 questions in .*train\.jsonl can't be used \(missing image 1, damaged image 1, malformed row 2\); at most 9% are skipped"
    ) as caught:
        distill(recipe_of(spoilt, data__max_skipped=0.09))
    one_line(caught)
    assert not Path(spoilt["out"]).exists()
    distill(recipe_of(spoilt), until="check")
