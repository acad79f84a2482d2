"""Every part of the method switched off alone: what it names is gone, and nothing else has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from masters.distill.inputs import Encoder
from masters.distill.models import freeze_vision, load_model
from masters.distill.recipe import build_recipe
from masters.distill.responses import DistinctResponse
from masters.distill.stages import distill
from masters.distill.train import Step, Trainer
from masters.samples import Sample

Update = tuple[dict[str, float], Tensor]


@pytest.fixture(scope="module")
def update_of(models: Any, encoder: Encoder, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Update]:
    """The row and the whole gradient of one update by preset `paper` with changes, of a student that has left its starting point."""
    folder = tmp_path_factory.mktemp("switches")
    teacher = load_model(models.teacher, torch.float32).eval()
    groups = {}
    for place, sample in enumerate(samples[:3]):
        texts = [sample.answers[0], *[text for text in ("blue", "7", "circle") if text not in sample.answers][:2]]
        groups[sample.id] = [DistinctResponse(tuple(encoder.answer(text)), 1 + (j == place), float(j == 0), j == 0, False) for j, text in enumerate(texts)]

    def update(**objective: Any) -> Update:
        files = {"train": "train.jsonl", "validation": "validation.jsonl"}
        raw = {"student": str(models.student), "teachers": [{"model": str(models.teacher)}], "data": files, "out": str(folder), "preset": "paper"}
        recipe = build_recipe(raw | {"objective": objective, "train": {"dtype": "float32", "clip": 1e9}})
        student = load_model(models.student, torch.float32)
        freeze_vision(student)
        trainer = Trainer(student, encoder, recipe, 10, folder)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in trainer.trained:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        found: list[Tensor] = []
        step = trainer.optimizer.step

        def noted(*given: Any, **named: Any) -> Any:
            found.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().clone() for p in trainer.trained]))
            return step(*given, **named)

        trainer.optimizer.step = noted  # type: ignore[method-assign]
        row = trainer.step(Step(1, 0, 0.0, (0, 1, 2)), samples, groups, teacher)
        return row, found[0]

    return update


def near(ours: Tensor, theirs: Tensor) -> bool:
    return float((ours - theirs).norm()) < 1e-4 * float(theirs.norm())


def test_the_gradient_is_the_sum_of_its_parts(update_of: Callable[..., Update]):
    row, whole = update_of()
    none = {"distill": 0.0, "policy": 0.0, "beta": 0.0}
    parts = {name: update_of(**{**none, name: weight}) for name, weight in (("distill", 1.0), ("policy", 1.0), ("beta", 0.1))}
    assert near(sum(gradient for _, gradient in parts.values()), whole)  # type: ignore[arg-type]
    for name, (_, gradient) in parts.items():
        assert float(gradient.norm()) > 0, name
        without_row, without = update_of(**{name: 0.0})
        assert near(without, whole - gradient), name
        for figure in ("divergence", "entropy", "reward_accuracy", "reward_distillation"):
            assert without_row[figure] == pytest.approx(row[figure], abs=1e-6), f"{figure} without {name}"
    assert row["kl"] > 0
    assert update_of(beta=0.0)[0]["kl"] == 0
    assert update_of(distill=0.0)[0]["loss_distill"] == 0
    assert update_of(distill=0.0)[0]["loss"] == pytest.approx(row["loss"] - row["loss_distill"], abs=1e-6)
    assert update_of(beta=0.0)[0]["loss"] == pytest.approx(row["loss"] - 0.1 * row["kl"], abs=1e-6)


REWARDS: list[dict[str, Any]] = [
    {"accuracy_reward": False},
    {"distillation_reward": "none"},
    {"distillation_reward": "jsd"},  # without min-max
    {"distillation_reward": "teacher_logprob"},
    {"reward_wrong": False},
    {"advantages": "positive"},
]


@pytest.mark.parametrize("switch", REWARDS, ids=str)
def test_a_switch_of_rewards_reaches_the_policy_alone(switch: dict[str, Any], update_of: Callable[..., Update]):
    row, whole = update_of()
    other_row, other = update_of(**switch)
    assert not near(other, whole)
    assert near(update_of(**switch, policy=0.0)[1], update_of(policy=0.0)[1])
    for figure in ("divergence", "entropy", "kl", "loss_distill", "reward_accuracy"):
        assert other_row[figure] == pytest.approx(row[figure], abs=1e-6), figure
    kept = "distillation_reward" not in switch
    if kept and switch != {"reward_wrong": False}:
        assert other_row["reward_distillation"] == pytest.approx(row["reward_distillation"], abs=1e-6)
    if switch == {"distillation_reward": "none"}:
        assert other_row["reward_distillation"] == 0


def test_without_min_max_a_reward_does_not_depend_on_its_group():
    from masters.distill.rewards import distillation_reward

    found = distillation_reward("jsd", torch.tensor([0.0, 0.25, 0.6, 3.0]), torch.zeros(4))
    assert found.tolist() == pytest.approx([1.0, 0.75, 0.4, 0.0]), "an unbounded divergence gets no less than nothing"
    assert distillation_reward("jsd", torch.tensor([0.25, 0.6]), torch.zeros(2)).tolist() == pytest.approx([0.75, 0.4])
    assert distillation_reward("jsd", torch.tensor([0.25, 0.3]), torch.zeros(2), least_spread=0.1).tolist() == [0.0, 0.0]


# Of a whole run


@pytest.fixture
def answers_of(models: Any, questions: Path, tmp_path: Path) -> Callable[..., dict[str, list[dict[str, Any]]]]:
    """The responses of a run of 8 questions in 2 mask stages, by source, with changes to its recipe."""
    raw: dict[str, Any] = {
        "student": str(models.student),
        "teachers": [{"model": str(models.teacher), "r_max": 0.2}],
        "data": {"train": str(questions / "train.jsonl"), "validation": str(questions / "validation.jsonl"), "limit": 8},
        "answers": {"batch": 8, "max_tokens": 3, "teacher": 2, "student": 2},
        "mask": {"step": 0.2},
        "train": {"dtype": "float32", "questions_per_step": 4},
    }

    def answers(**changes: Any) -> dict[str, list[dict[str, Any]]]:
        values = copy.deepcopy(raw) | {"out": str(tmp_path / f"run{len(list(tmp_path.iterdir()))}")}
        for key, change in changes.items():
            values[key] = {**values[key], **change} if isinstance(change, dict) else change
        out = distill(build_recipe(values), until="answers")
        rows = [row for path in sorted((out / "responses").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
        return {source: [row for row in rows if row["source"] == source] for source in ("teacher", "student")}

    return answers


def test_one_kind_of_responses_is_off_and_the_other_as_before(answers_of: Callable[..., Any]):
    both = answers_of()
    assert {source: len(rows) for source, rows in both.items()} == {"teacher": 16, "student": 16}
    assert answers_of(answers={"student": 0}) == {"teacher": both["teacher"], "student": []}
    assert answers_of(answers={"teacher": 0}) == {"teacher": [], "student": both["student"]}
    single = answers_of(answers={"teacher": 1, "student": 1})
    assert single == {source: rows[::2] for source, rows in both.items()}, "one response of each is the first of two"


def test_without_a_mask_the_student_answers_as_before(answers_of: Callable[..., Any]):
    masked, whole = answers_of(), answers_of(mask={"enabled": False})
    assert {row["ratio"] for row in masked["teacher"]} == {0.2, 0.0}
    assert {row["ratio"] for row in whole["teacher"]} == {0.0}

    def by_sample(rows: list[dict[str, Any]]) -> dict[str, list[list[int]]]:
        return {name: [row["ids"] for row in rows if row["sample"] == name] for name in {row["sample"] for row in rows}}

    assert by_sample(whole["student"]) == by_sample(masked["student"])
    unmasked = {row["sample"] for row in masked["teacher"] if row["ratio"] == 0}
    assert len(unmasked) == 4
    assert all(by_sample(whole["teacher"])[name] == by_sample(masked["teacher"])[name] for name in unmasked)


def test_the_mid_teacher_can_be_left_out(answers_of: Callable[..., Any], models: Any):
    mid, large = {"model": str(models.student), "r_max": 0.0}, {"model": str(models.teacher), "r_max": 0.2}
    alone = answers_of(teachers=[large])
    assert {row["model"] for row in alone["teacher"]} == {"teacher"}
    first = answers_of(teachers=[mid, large])
    assert {row["model"] for row in first["teacher"]} == {"student"}, "answers of the second teacher wait for the student that the first leaves"
    assert len(first["teacher"]) == len(alone["teacher"]) / 2
