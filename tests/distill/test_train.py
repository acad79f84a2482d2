"""The plan of updates, the learning rate, and single updates of a real tiny model."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from masters.distill.families.idefics3 import LANGUAGE
from masters.distill.inputs import Encoder
from masters.distill.lora import adapt
from masters.distill.models import freeze_vision, load_model
from masters.distill.recipe import PRESETS, Lora, Recipe, build_recipe
from masters.distill.responses import DistinctResponse
from masters.distill.train import MetricsLog, Step, Trainer, plan_steps, rate_at
from masters.errors import RunError
from masters.samples import Sample


def test_every_epoch_of_a_stage_asks_each_of_its_questions_once():
    steps = plan_steps([range(10), range(10, 17)], [0.2, 0.0], per_step=4, epochs=3, seed=5, first=100)
    assert [step.number for step in steps] == list(range(100, 100 + 3 * 3 + 3 * 2))
    for stage, (bounds, ratio, batches) in enumerate([(range(10), 0.2, 3), (range(10, 17), 0.0, 2)]):
        mine = [step for step in steps if step.stage == stage]
        assert {step.ratio for step in mine} == {ratio}
        epochs = [[i for step in mine[e * batches : (e + 1) * batches] for i in step.questions] for e in range(3)]
        assert all(sorted(epoch) == list(bounds) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3, "in another order each time"
    assert [step.stage for step in steps] == sorted(step.stage for step in steps), "a stage is finished before the next"
    assert plan_steps([range(10)], [0.0], 4, 1, seed=5) == plan_steps([range(10)], [0.0], 4, 1, seed=5)
    assert plan_steps([range(10)], [0.0], 4, 1, seed=5) != plan_steps([range(10)], [0.0], 4, 1, seed=6)


def test_learning_rates():
    assert [rate_at(i, 10, "constant", 0) for i in (0, 5, 9)] == [1.0] * 3
    assert [rate_at(i, 10, "linear", 0) for i in (0, 5, 9)] == pytest.approx([1.0, 0.5, 0.1])
    assert [rate_at(i, 10, "cosine", 0) for i in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])
    assert [rate_at(i, 12, "linear", 4) for i in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.875])


def recipe_of(models: Any, tmp_path: Path, preset: str, **train: Any) -> Recipe:
    files = {"train": "train.jsonl", "validation": "validation.jsonl"}
    raw = {"student": str(models.student), "teachers": [{"model": str(models.teacher)}], "data": files, "out": str(tmp_path), "preset": preset}
    return build_recipe(raw | {"train": {"dtype": "float32", "learning_rate": 1e-3} | train})


def groups_of(samples: Sequence[Sample], encoder: Encoder) -> dict[str, list[DistinctResponse]]:
    """For each question the right answer, twice, and two wrong ones."""
    found = {}
    for sample in samples:
        wrong = [text for text in ("blue", "7", "circle") if text not in sample.answers][:2]
        rows = [DistinctResponse(tuple(encoder.answer(sample.answers[0])), 2, 1.0, True, False)]
        found[sample.id] = rows + [DistinctResponse(tuple(encoder.answer(text)), 1, 0.0, i == 0, False) for i, text in enumerate(wrong)]
    return found


def trainer_of(models: Any, encoder: Encoder, recipe: Recipe) -> Trainer:
    student = load_model(models.student, torch.float32)
    if recipe.lora:
        adapt(student, recipe.lora, LANGUAGE, seed=0)
    else:
        freeze_vision(student)
    return Trainer(student, encoder, recipe, 10, recipe.out / "checkpoints")


STEP = Step(0, 0, 0.2, (0, 1, 2, 3))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_measuring_the_gradients_of_both_parts_does_not_change_the_update(preset: str, models: Any, encoder: Encoder, samples: list[Sample], tmp_path: Path):
    recipe, groups = recipe_of(models, tmp_path, preset), groups_of(samples[:4], encoder)
    teacher = load_model(models.teacher, torch.float32).eval()
    weights, rows = [], []
    for number in (0, 1):  # gradient norms are measured at step 0
        trainer = trainer_of(models, encoder, recipe)
        rows.append(trainer.step(dataclasses.replace(STEP, number=number), samples, groups, teacher))
        weights.append({name: p.detach().clone() for name, p in trainer.student.named_parameters()})
    measured, plain = rows
    assert measured["loss"] == plain["loss"]
    assert measured["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    assert measured["grad_norm"] > 0
    if preset in ("paper", "default"):
        assert measured["grad_norm_distill"] > 0
        assert measured["grad_norm_policy"] > 0
        assert measured["grad_norm"] <= measured["grad_norm_distill"] + measured["grad_norm_policy"] + 1e-6, "the triangle inequality"
        assert "grad_norm_policy" not in plain
    before = dict(load_model(models.student, torch.float32).named_parameters())
    trained = {name for name in before if "vision_model" not in name}
    for name in before:
        changed = not torch.equal(weights[0][name], before[name])
        assert changed == (name in trained), name
        # Adam divides by the gradient's size, so that noise in a gradient near 0 shows up as large as the learning rate.
        assert float((weights[0][name] - weights[1][name]).abs().mean()) < 1e-4, name


def gradients_of(
    trainer: Trainer, samples: Sequence[Sample], groups: dict[str, list[DistinctResponse]], teacher: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradient of one step by name, and the step's figures."""
    trainer.student.train()
    figures = trainer._gradients(STEP, samples, groups, teacher, "all")
    return {name: p.grad for name, p in trainer.student.named_parameters() if p.grad is not None}, figures


@pytest.mark.parametrize("change", [{"accumulate": 2}, {"accumulate": 3}, {"accumulate": 9}, {"gradient_checkpointing": True}], ids=str)
def test_a_step_in_parts_or_computed_again_has_the_same_gradients(change: dict[str, Any], models: Any, encoder: Encoder, samples: list[Sample], tmp_path: Path):
    """Questions without an image among them, and groups of different sizes: the loss is a mean over questions, whichever part they are in."""
    asked = [*samples[:3], *(dataclasses.replace(sample, images=()) for sample in samples[3:5])]
    groups, teacher = groups_of(asked, encoder), load_model(models.teacher, torch.float32).eval()
    groups[asked[0].id] = groups[asked[0].id][:1]
    expected, whole = gradients_of(trainer_of(models, encoder, recipe_of(models, tmp_path, "default")), asked, groups, teacher)
    found, parts = gradients_of(trainer_of(models, encoder, recipe_of(models, tmp_path, "default", **change)), asked, groups, teacher)
    assert found.keys() == expected.keys()
    again = parts.pop("operations") / whole.pop("operations")
    assert 1.05 < again < 1.34 if change.get("gradient_checkpointing") else again == pytest.approx(1), "the layers' forward once more"
    assert parts == pytest.approx(whole, rel=1e-5, abs=1e-7)
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()) + 1e-9, name


def test_checkpointing_computes_layers_again(models: Any, encoder: Encoder, samples: list[Sample], tmp_path: Path):
    calls = []
    for wanted in (False, True):
        trainer = trainer_of(models, encoder, recipe_of(models, tmp_path, "sft", gradient_checkpointing=wanted))
        layer, count = trainer.student.model.text_model.layers[0].mlp, [0]
        layer.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        gradients_of(trainer, samples[:2], groups_of(samples[:2], encoder), None)
        calls.append(count[0])
    assert calls == [1, 2]


def test_a_weight_that_no_question_reaches_follows_its_momentum(models: Any, encoder: Encoder, samples: list[Sample], tmp_path: Path):
    """As it does where another process looks at a picture for it."""
    trainer, asked = trainer_of(models, encoder, recipe_of(models, tmp_path, "sft")), [samples[0], dataclasses.replace(samples[1], images=())]
    projector = trainer.student.model.connector.modality_projection.proj.weight
    groups, before = groups_of(asked, encoder), projector.detach().clone()
    trainer.step(Step(0, 0, 0.0, (0,)), asked, groups, None)
    first = projector.detach() - before
    trainer.step(Step(1, 0, 0.0, (1,)), asked, groups, None)
    second = projector.detach() - before - first
    # Adam's second step on a gradient of 0: its first moment has decayed to .09 / .19 of the first, its second to .000999 / .001999.
    expected = float(first.norm()) * (0.09 / 0.19) / math.sqrt(0.000999 / 0.001999)
    assert float(second.norm()) == pytest.approx(expected, rel=0.01)


def test_an_update_raises_what_its_advantages_are_for(models: Any, encoder: Encoder, samples: list[Sample], tmp_path: Path):
    recipe, groups = recipe_of(models, tmp_path, "grpo", learning_rate=3e-3), groups_of(samples[:4], encoder)
    trainer = trainer_of(models, encoder, recipe)

    def right_minus_wrong() -> float:
        with torch.no_grad():
            chosen = samples[:4]
            logprob, place, total = trainer._stats(chosen, [groups[s.id] for s in chosen], None).logprob, 0, 0.0
            for sample in chosen:
                rows = logprob[place : place + len(groups[sample.id])]
                total += float(rows[0] - rows[1:].mean())
                place += len(rows)
        return total / 4

    before = right_minus_wrong()
    for number in range(4):
        row = trainer.step(dataclasses.replace(STEP, number=number), samples, groups, None)
    assert right_minus_wrong() > before + 0.5
    assert row["reward_accuracy"] == 0.5
    assert row["right_outranks_total"] == row["pairs"] == 8
    assert row["kl"] > 0, "the student has left its starting point"


def test_the_papers_learning_rate_reaches_the_weights_in_bfloat16(models: Any, encoder: Encoder, samples: list[Sample], tmp_path: Path):
    """1e-6 is far below a bfloat16 weight's last digit, so that weights kept in it would hardly move."""
    recipe, groups = recipe_of(models, tmp_path, "paper", dtype="bfloat16", learning_rate=1e-6), groups_of(samples[:4], encoder)
    trainer = trainer_of(models, encoder, recipe)
    before = {name: p.detach().clone() for name, p in trainer.student.named_parameters() if p.requires_grad}
    teacher = load_model(models.teacher, torch.bfloat16).eval()
    row = trainer.step(STEP, samples, groups, teacher)
    moved = sum(int((p != before[name]).sum()) for name, p in trainer.student.named_parameters() if name in before) / sum(map(torch.numel, before.values()))
    assert moved > 0.6, f"{moved:.1%} of the trained weights moved"  # ids that occur nowhere have no gradient
    exact = trainer_of(models, encoder, recipe_of(models, tmp_path, "paper", learning_rate=1e-6))
    expected = exact.step(STEP, samples, groups, load_model(models.teacher, torch.float32).eval())
    for name in ("divergence", "entropy"):
        assert row[name] == pytest.approx(expected[name], rel=0.05), f"{name} in bfloat16 is that of float32 but for rounding"
    assert math.isclose(row["reward_accuracy"], expected["reward_accuracy"])


def test_a_loss_that_is_no_number_stops_before_the_update(models: Any, encoder: Encoder, samples: list[Sample], tmp_path: Path):
    trainer = trainer_of(models, encoder, recipe_of(models, tmp_path, "sft"))
    with torch.no_grad():
        trainer.student.model.text_model.norm.weight[0] = math.nan
    before = copy.deepcopy(trainer.student.state_dict())
    with pytest.raises(RunError, match=rf"the loss is nan at step 0 \(questions {samples[0].id}, {samples[1].id}"):
        trainer.step(STEP, samples, groups_of(samples[:4], encoder), None)
    assert trainer.done == 0
    for name, tensor in trainer.student.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0))


def test_a_gradient_that_is_no_number_stops_before_the_update(models: Any, encoder: Encoder, samples: list[Sample], tmp_path: Path):
    trainer = trainer_of(models, encoder, recipe_of(models, tmp_path, "sft"))
    trainer.student.model.text_model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    before = copy.deepcopy(trainer.student.state_dict())
    with pytest.raises(RunError, match=r"the gradient's norm is (nan|inf) at step 0 .*; the last checkpoint is kept") as caught:
        trainer.step(STEP, samples, groups_of(samples[:4], encoder), None)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.student.state_dict().items())


@pytest.mark.parametrize("lora", [None, Lora(rank=2, dropout=0.3)], ids=["whole", "adapters"])
def test_a_checkpoint_continues_bit_for_bit(lora: Lora | None, models: Any, encoder: Encoder, samples: list[Sample], tmp_path: Path):
    recipe, groups = recipe_of(models, tmp_path, "default", schedule="linear", accumulate=2), groups_of(samples[:8], encoder)
    recipe = dataclasses.replace(recipe, lora=lora)
    teacher = load_model(models.teacher, torch.float32).eval()
    steps = [Step(i, 0, 0.2, tuple(range(4 * (i % 2), 4 * (i % 2) + 4))) for i in range(4)]
    whole = trainer_of(models, encoder, recipe)
    assert whole.load() is False, "there is no checkpoint yet"
    losses = []
    for step in steps:
        losses.append(whole.step(step, samples, groups, teacher)["loss"])
        if step.number == 1:
            whole.best = 0.25
            whole.save()
    continued = trainer_of(models, encoder, recipe)
    assert continued.load() is True
    assert (continued.done, continued.best) == (2, 0.25)
    assert [continued.step(step, samples, groups, teacher)["loss"] for step in steps[2:]] == losses[2:]
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(tensor, continued.student.state_dict()[name]), name
    assert len(set(losses)) == 4


def test_a_damaged_checkpoint_is_one_line(models: Any, encoder: Encoder, tmp_path: Path):
    trainer = trainer_of(models, encoder, recipe_of(models, tmp_path, "sft"))
    trainer.save()
    path = tmp_path / "checkpoints" / "last.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(RunError, match=r"last\.pt is damaged .*remove the folder") as caught:
        trainer.load()
    assert "\n" not in str(caught.value)


def test_the_log_forgets_what_came_after_the_checkpoint(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    log.write({"kind": "evaluation", "step": -1})
    for step in range(5):
        log.write({"kind": "step", "step": step, "loss": 0.5})
    with open(path, "a") as handle:
        handle.write('{"kind": "step", "st')
    MetricsLog(path, 3)
    import json

    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [-1, 0, 1, 2]
    MetricsLog(path, 0)
    assert path.read_text() == "", "a run that begins anew has no past"
