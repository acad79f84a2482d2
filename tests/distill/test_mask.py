"""Masks against a sort, against PyTorch's own pruning, and against the checkpoint that they are restored from."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from masters.distill import mask as mask_module
from masters.distill.families.idefics3 import LANGUAGE
from masters.distill.mask import TensorMask, apply_mask, maskable, plan_masks, restore, thresholds
from masters.distill.models import load_model
from masters.distill.stored import stored_weights
from masters.errors import ModelError, RecipeError
from masters.files import read_json, write_json

RATIOS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.7, 0.95)
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights(dtype: torch.dtype, shape: tuple[int, ...] = (96, 160), seed: int = 0) -> Tensor:
    return (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_thresholds_are_the_magnitudes_that_a_sort_finds(dtype: torch.dtype):
    weight = weights(dtype)
    ranked = weight.abs().double().flatten().sort().values
    assert thresholds([weight], RATIOS) == [float(ranked[round(ratio * weight.numel())]) for ratio in RATIOS]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.4])
def test_a_mask_is_pytorchs_own_l1_pruning_up_to_ties(dtype: torch.dtype, ratio: float):
    layer = nn.Linear(160, 96, bias=False, dtype=dtype)
    layer.weight.data = weights(dtype)
    original = layer.weight.data.clone()
    [plan] = plan_masks({"w": original}, [ratio])
    kept = original.abs() >= plan.thresholds[ratio]
    prune.l1_unstructured(layer, "weight", amount=ratio)
    theirs = dict(layer.named_buffers())["weight_mask"].bool()
    differ = kept != theirs
    # PyTorch takes some of a tie to hit the count; we keep a tie together, so only magnitudes equal to the threshold can differ, and by being kept.
    assert bool((original[differ].abs().double() == plan.thresholds[ratio]).all())
    assert bool(kept[differ].all())
    ties = int((original.abs().double() == plan.thresholds[ratio]).sum())
    assert int(differ.sum()) < max(1, ties)
    assert int((~theirs).sum()) == round(ratio * original.numel()), "the reference really pruned"


def test_float32_is_exact_where_its_upper_half_says_nothing():
    # 2,000 magnitudes that differ in their lowest bits alone, so that all fall into one code of the first count.
    bits = torch.randperm(2000, generator=torch.Generator().manual_seed(0)).to(torch.int32) + (0x3F800000)
    weight = bits.view(torch.float32) * torch.where(torch.arange(2000) % 2 == 0, 1, -1)
    [plan] = plan_masks({"w": weight}, [0.25, 0.5])
    assert plan.reached == {0.25: 0.25, 0.5: 0.5}
    assert plan.thresholds[0.5] == float(weight.abs().sort().values[1000])


@pytest.mark.parametrize("dtype", TYPES)
def test_working_in_chunks_changes_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    weight = weights(dtype)
    whole, other = {"w": weight.clone()}, {"w": weight.clone()}
    plans = plan_masks(whole, RATIOS)
    apply_mask(whole, plans, 0.4)
    monkeypatch.setattr(mask_module, "CHUNK", 7)
    assert plan_masks(other, RATIOS) == plans
    apply_mask(other, plans, 0.4)
    assert torch.equal(whole["w"], other["w"])


@pytest.mark.parametrize("dtype", TYPES)
def test_the_ratio_reached_is_the_one_asked_for_but_for_ties(dtype: torch.dtype):
    weight = weights(dtype)
    [plan] = plan_masks({"w": weight}, RATIOS)
    for ratio in RATIOS:
        masked = {"w": weight.clone()}
        apply_mask(masked, [plan], ratio)
        zeros = int((masked["w"] == 0).sum()) - int((weight == 0).sum())
        below = int(((weight.abs().double() < plan.thresholds[ratio]) & (weight != 0)).sum())
        assert zeros == below, "exactly what lies below the threshold"
        assert plan.reached[ratio] == int((weight.abs().double() < plan.thresholds[ratio]).sum()) / weight.numel()
        tie = int((weight.abs().double() == plan.thresholds[ratio]).sum())
        assert ratio - tie / weight.numel() <= plan.reached[ratio] <= ratio + 0.5 / weight.numel()
        assert torch.equal(masked["w"][masked["w"] != 0], weight[masked["w"] != 0]), "what stays is untouched"


def test_equal_magnitudes_are_kept_together():
    weight = torch.tensor([0.1, -0.1, 0.1, 0.1, 0.2, -0.3, 0.4, 0.5, -0.6, 0.7])
    [plan] = plan_masks({"w": weight}, [0.2, 0.4, 0.5])
    assert plan.reached == {0.2: 0.0, 0.4: 0.4, 0.5: 0.5}, "two of four equal magnitudes can't be told apart"
    assert plan.thresholds[0.2] == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", TYPES)
def test_masks_are_nested_and_rising_in_place_equals_masking_afresh(dtype: torch.dtype):
    weight = weights(dtype, seed=1)
    [plan] = plan_masks({"w": weight}, RATIOS)
    rising = {"w": weight.clone()}
    before = torch.zeros_like(weight, dtype=torch.bool)
    for ratio in RATIOS:
        place = rising["w"].data_ptr()
        apply_mask(rising, [plan], ratio)
        fresh = {"w": weight.clone()}
        apply_mask(fresh, [plan], ratio)
        assert torch.equal(rising["w"], fresh["w"])
        assert rising["w"].data_ptr() == place
        zero = rising["w"] == 0
        assert bool((zero | ~before).all()), f"the mask of {ratio} lost a weight that a smaller ratio had zeroed"
        before = zero


def test_r_max_zero_masks_nothing():
    weight = weights(torch.bfloat16)
    [plan] = plan_masks({"w": weight}, [0.0])
    assert plan.reached == {0.0: 0.0}
    masked = {"w": weight.clone()}
    apply_mask(masked, [plan], 0.0)
    assert torch.equal(masked["w"], weight)


def test_scopes_share_a_threshold_by_tensor_by_block_or_over_all():
    tensors = {
        "model.layers.0.q.weight": weights(torch.bfloat16, seed=1),
        "model.layers.0.mlp.weight": 3 * weights(torch.bfloat16, seed=2),
        "model.layers.1.q.weight": 9 * weights(torch.bfloat16, seed=3),
    }

    def reference(names: list[str]) -> float:
        together = torch.cat([tensors[name].abs().double().flatten() for name in names]).sort().values
        return float(together[round(0.3 * len(together))])

    names = list(tensors)
    expected = {
        "per_tensor": [reference([name]) for name in names],
        "per_block": [reference(names[:2])] * 2 + [reference(names[2:])],
        "global": [reference(names)] * 3,
    }
    for scope, values in expected.items():
        assert [plan.thresholds[0.3] for plan in plan_masks(tensors, [0.3], scope)] == values, scope
    # Why the paper rejects one global threshold: it empties the layers with small weights.
    reached = {plan.name: plan.reached[0.3] for plan in plan_masks(tensors, [0.3], "global")}
    assert reached["model.layers.0.q.weight"] > 0.5 > 0.1 > reached["model.layers.1.q.weight"]
    with pytest.raises(RecipeError, match="per_tensor, per_block, global"):
        plan_masks(tensors, [0.3], "layer")


@pytest.mark.parametrize("scope", ["per_block", "global"])
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16), (torch.float16, torch.float32, torch.bfloat16)])
def test_tensors_of_several_types_share_a_threshold_of_their_values(types: tuple[torch.dtype, ...], scope: str):
    """0.5 has another code in each type, so that counting codes together would rank the types and not the values."""
    tensors = {f"layers.0.{i}.weight": (1 + i) * weights(dtype, seed=i) for i, dtype in enumerate(types)}
    together = torch.cat([t.abs().double().flatten() for t in tensors.values()])
    plans = plan_masks(tensors, RATIOS, scope)
    for ratio in RATIOS:
        expected = float(together.sort().values[round(ratio * len(together))])
        assert {plan.thresholds[ratio] for plan in plans} == {expected}
        masked = {name: t.clone() for name, t in tensors.items()}
        apply_mask(masked, plans, ratio)
        for plan in plans:
            below = tensors[plan.name].abs().double() < expected
            assert torch.equal(masked[plan.name] == 0, below | (tensors[plan.name] == 0)), plan.name
            assert plan.reached[ratio] == int(below.sum()) / below.numel()


@pytest.mark.parametrize("dtype", TYPES)
def test_a_tensor_too_small_for_its_ratio_is_emptied_as_pytorch_does_and_survives_json(dtype: torch.dtype, tmp_path: Path):
    layer = nn.Linear(2, 1, bias=False, dtype=dtype)
    layer.weight.data = torch.tensor([[0.5, -0.25]], dtype=dtype)
    weight = {"w": layer.weight.data.clone()}
    [plan] = plan_masks(weight, [0.2, 0.4, 0.8])
    assert plan.reached == {0.2: 0.0, 0.4: 0.5, 0.8: 1.0}
    write_json(tmp_path / "mask.json", [dataclasses.asdict(plan)])
    [again] = [TensorMask.from_json(row) for row in read_json(tmp_path / "mask.json")]
    assert again == plan
    apply_mask(weight, [again], 0.8)
    prune.l1_unstructured(layer, "weight", amount=0.8)
    assert torch.equal(weight["w"], layer.weight.data)
    assert not weight["w"].any()


@pytest.mark.parametrize("dtype", TYPES)
def test_the_largest_number_of_a_type_has_nothing_above_it(dtype: torch.dtype):
    weight = torch.tensor([1.0, -torch.finfo(dtype).max], dtype=dtype)
    [plan] = plan_masks({"w": weight}, [0.8])
    assert math.isfinite(plan.thresholds[0.8])
    assert plan.reached == {0.8: 0.5}, "it is kept"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", TYPES)
def test_weights_that_are_not_finite_are_refused(dtype: torch.dtype, bad: float):
    weight = weights(dtype)
    weight[3, 4] = bad
    with pytest.raises(ModelError, match="not finite"):
        thresholds([weight], [0.2])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_types_whose_magnitudes_are_not_counted_are_refused(dtype: torch.dtype):
    with pytest.raises(ModelError, match="unquantised"):
        plan_masks({"w": torch.ones(4, 4).to(dtype)}, [0.2])


def test_only_the_language_models_linear_weights_are_masked(tiny: Any):
    found = maskable(tiny, LANGUAGE)
    layers = tiny.config.text_config.num_hidden_layers
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert set(found) == {f"model.text_model.layers.{i}.{part}.weight" for i in range(layers) for part in parts}
    named = dict(tiny.named_parameters())
    for name, tensor in found.items():
        assert tensor.data_ptr() == named[name].data_ptr(), "the weights themselves, not copies"
    skipped = set(named) - set(found)
    for kind in ("embed_tokens", "norm", "vision_model", "connector", "bias"):
        assert any(kind in name for name in skipped), f"the model has no {kind} to leave out"
    assert tiny.lm_head.weight.data_ptr() not in {t.data_ptr() for t in found.values()}


def test_names_can_be_left_whole_or_added_by_expression(tiny: Any):
    every, fewer = maskable(tiny, LANGUAGE), maskable(tiny, LANGUAGE, exclude=(r"layers\.0\.", r"down_proj"))
    assert set(every) - set(fewer) == {name for name in every if "layers.0." in name or "down_proj" in name}
    more = maskable(tiny, LANGUAGE, include=(r"connector\..*proj",))
    assert set(more) - set(every) == {"model.connector.modality_projection.proj.weight"}
    tower = maskable(tiny, (), include=("vision_model",), exclude=("fc",))
    assert tower
    assert all("vision_model" in name and "attn" in name for name in tower), "linear weights, so no embeddings or norms"
    with pytest.raises(ModelError, match=r"lm_head\.weight is also model\.text_model\.embed_tokens\.weight.*mask\.exclude"):
        maskable(tiny, LANGUAGE, include=("lm_head",))
    with pytest.raises(ModelError, match=r"expected the language model's attention and MLP"):
        maskable(tiny, ("transformer.h.",))


def test_masking_a_loaded_teacher_and_restoring_it_is_bit_identical(models: Any):
    teacher = load_model(models.teacher, torch.bfloat16)
    before = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    tensors = maskable(teacher, LANGUAGE)
    plans = plan_masks(tensors, (0.2, 0.1))
    for ratio in (0.1, 0.2):
        apply_mask(tensors, plans, ratio)
        after = dict(teacher.named_parameters())
        zeros = sum(int((after[name] == 0).sum()) for name in tensors) / sum(t.numel() for t in tensors.values())
        assert zeros == pytest.approx(ratio, abs=0.01), "the model that computes is the one that is masked"
        assert zeros >= sum(p.reached[ratio] * p.weights for p in plans) / sum(p.weights for p in plans)
        assert all(torch.equal(after[name], before[name]) for name in before if name not in tensors)
    restore(tensors, stored_weights(models.teacher, teacher))
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter.view(torch.int16), before[name].view(torch.int16)), name


def test_a_stage_gives_the_same_teacher_in_whichever_order_it_is_reached(models: Any):
    one, other = load_model(models.teacher, torch.float32), load_model(models.teacher, torch.float32)
    ours, theirs = maskable(one, LANGUAGE), maskable(other, LANGUAGE)
    plans = plan_masks(ours, (0.4, 0.2))
    apply_mask(ours, plans, 0.4)
    restore(ours, stored_weights(models.teacher, one))
    apply_mask(ours, plans, 0.2)
    apply_mask(theirs, plans, 0.2)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_restoring_from_another_checkpoint_names_what_it_lacks(models: Any, tiny: Any):
    stored = stored_weights(models.student, tiny)
    with pytest.raises(ModelError, match=r"stores no tensor model\.layers\.9\.w"):
        restore({"model.layers.9.w": torch.zeros(2, 2)}, stored)


def test_thresholds_survive_json_exactly():
    import json

    weight = weights(torch.float32)
    [plan] = plan_masks({"w": weight}, (0.2,))
    stored = json.loads(json.dumps({"thresholds": plan.thresholds}))["thresholds"]
    again = TensorMask("w", plan.weights, {float(k): v for k, v in stored.items()}, {})
    ours, theirs = {"w": weight.clone()}, {"w": weight.clone()}
    apply_mask(ours, [plan], 0.2)
    apply_mask(theirs, [again], 0.2)
    assert torch.equal(ours["w"], theirs["w"])
