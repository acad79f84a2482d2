"""Adapters: which layers get them, that nothing else is trained, that the merged student is the adapted one, and that peft reads what is kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from masters.distill.families.idefics3 import LANGUAGE, collate_pixels
from masters.distill.forward import Group, pack, response_states
from masters.distill.inputs import Encoder
from masters.distill.lora import adapt, targets, without_adapters, write_adapter
from masters.distill.models import load_model
from masters.distill.recipe import Lora, build_recipe
from masters.distill.stages import distill
from masters.errors import RecipeError
from masters.samples import Sample


def states(model: Any, encoder: Encoder, samples: Sequence[Sample]) -> Tensor:
    groups = [Group(encoder.prompt(s), (tuple(encoder.answer(s.answers[0])), tuple(encoder.answer("no idea"))), s.id) for s in samples]
    with torch.no_grad():
        return response_states(model.eval(), pack(groups, encoder.pad, collate_pixels))


def with_random_adapters(student: Any, lora: Lora) -> Any:
    """As after some training: adapters begin as nothing."""
    adapted = adapt(student, lora, LANGUAGE, seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=generator)
    return adapted


def test_the_language_models_linear_layers_get_adapters_and_nothing_else_is_trained(models: Any):
    student = load_model(models.student, torch.float32)
    layers = student.config.text_config.num_hidden_layers
    assert len(targets(student, Lora(), LANGUAGE)) == 7 * layers
    assert targets(student, Lora(targets=(r"text_model.*\.q_proj$",)), LANGUAGE) == [f"model.text_model.layers.{i}.self_attn.q_proj" for i in range(layers)]
    adapt(student, Lora(rank=3), LANGUAGE, seed=0)
    trained = {name: p.shape for name, p in student.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * layers
    assert all("lora_" in name and "text_model" in name and 3 in shape for name, shape in trained.items())
    # The output matrix is read as a matrix, past its layer: an adapter there would do nothing.
    with pytest.raises(RecipeError, match=r"'lora\.targets' matches no linear layer of the student; expected some, such as model\."):
        targets(load_model(models.student, torch.float32), Lora(targets=("lm_head",)), LANGUAGE)


def test_adapters_begin_alike_everywhere_and_leave_the_random_numbers_alone(models: Any):
    first, second, other = (load_model(models.student, torch.float32) for _ in range(3))
    torch.manual_seed(1)
    adapt(first, Lora(), LANGUAGE, seed=7)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    torch.manual_seed(2)
    adapt(second, Lora(), LANGUAGE, seed=7)
    adapt(other, Lora(), LANGUAGE, seed=8)
    name = "model.text_model.layers.0.self_attn.q_proj.lora_A.default.weight"
    weights = [dict(model.named_parameters())[name] for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_merged_student_is_the_adapted_one_and_without_adapters_it_is_as_it_was(models: Any, encoder: Encoder, samples: list[Sample], tmp_path: Path):
    student = load_model(models.student, torch.float32)
    before = states(student, encoder, samples[:3])
    names = set(student.state_dict())
    adapted = with_random_adapters(student, Lora(rank=4, alpha=8))
    after = states(student, encoder, samples[:3])
    assert float((after - before).norm() / before.norm()) > 1e-2
    with without_adapters(student):
        assert torch.equal(states(student, encoder, samples[:3]), before)
    assert torch.equal(states(student, encoder, samples[:3]), after)
    write_adapter(adapted, tmp_path / "adapter", models.student)
    merged = adapted.merge_and_unload()
    assert set(merged.state_dict()) == names
    assert float((states(merged, encoder, samples[:3]) - after).norm() / after.norm()) < 1e-5
    # peft's own loading of what was kept, onto the model that it names
    loaded = peft.PeftModel.from_pretrained(load_model(models.student, torch.float32), tmp_path / "adapter")
    assert float((states(loaded.get_base_model(), encoder, samples[:3]) - after).norm() / after.norm()) < 1e-5
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "adapter")).base_model_name_or_path == str(models.student)


def test_a_run_trains_adapters_alone_and_leaves_them_merged(models: Any, questions: Path, tmp_path: Path):
    raw = {
        "student": str(models.student),
        "teachers": [{"model": str(models.teacher), "r_max": 0.0}],
        "data": {"train": str(questions / "train.jsonl"), "validation": str(questions / "validation.jsonl"), "limit": 8},
        "preset": "sft",
        "lora": {"rank": 4, "dropout": 0.1, "targets": ["q_proj", "v_proj"], "keep_adapter": True},
        "train": {"dtype": "float32", "learning_rate": 3e-2, "questions_per_step": 4, "evaluate_batch": 8},
        "out": str(tmp_path / "run"),
    }
    out = distill(build_recipe(copy.deepcopy(raw)))
    kept = torch.load(out / "checkpoints" / "last.pt")
    assert kept["student"]
    assert kept["student"].keys() == kept["optimizer"].keys()
    assert all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in kept["student"])
    final = AutoModelForImageTextToText.from_pretrained(out / "student", dtype=torch.float32).state_dict()
    for name, weight in load_model(models.student, torch.float32).state_dict().items():
        changed = not torch.equal(final[name].bfloat16(), weight.bfloat16())
        assert changed == (name.endswith(("q_proj.weight", "v_proj.weight")) and ("text_model" in name or "vision_model" in name)), name
    config = peft.PeftConfig.from_pretrained(str(out / "adapter"))
    assert (config.r, config.base_model_name_or_path) == (4, str(models.student))


@pytest.mark.parametrize(
    ("lora", "complaint"),
    [
        ({"rank": 0}, r"'lora\.rank' is 0; expected at least 1"),
        ({"alpha": 0}, r"'lora\.alpha' is 0; expected more than 0"),
        ({"dropout": 1.0}, r"'lora\.dropout' is 1\.0; expected less than 1"),
        ({"targets": ["("]}, r"'lora\.targets' holds '\(', which is no regular expression"),
        ({"ranks": 4}, r"unknown key 'lora\.ranks' in the recipe; did you mean 'rank'"),
    ],
)
def test_settings_that_can_not_be(lora: dict[str, Any], complaint: str):
    raw = {"student": "s", "teachers": [{"model": "t"}], "data": {"train": "a.jsonl", "validation": "b.jsonl"}, "out": "o", "lora": lora}
    with pytest.raises(RecipeError, match=complaint):
        build_recipe(raw)
