"""Weights read from files by the model's names, for every family, against what transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import FAMILIES, made

from masters.distill import stored as stored_module
from masters.distill.families import family_of
from masters.distill.mask import apply_mask, maskable, plan_masks, restore
from masters.distill.models import load_model, skeleton, weights_to_mask
from masters.distill.recipe import Mask
from masters.distill.stored import StoredTensors, read_header, read_tensor, stored_weights, weight_files
from masters.errors import ModelError


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the family in several files, as save_pretrained writes it."""
    found = tmp_path_factory.mktemp("checkpoint") / name
    made(name).build(seed=1).save_pretrained(found, max_shard_size="100KB")
    assert len(weight_files(found)) > 3
    return found


def test_every_stored_weight_is_found_under_the_name_that_the_model_has_for_it(folder: Path, name: str):
    model = load_model(folder, torch.float32)
    stored = stored_weights(folder, skeleton(model.config))
    assert stored == stored_weights(folder, model), "names and shapes are enough"
    keys = [place.key for file in weight_files(folder) for place in read_header(file)]
    assert sorted(place.key for place in stored.values()) == sorted(keys)
    named = dict(model.named_parameters())
    assert set(named) == set(stored)
    for key, parameter in named.items():
        assert torch.equal(read_tensor(stored[key]), parameter), key
    if name in ("internvl", "llava_onevision", "qwen2_5_vl"):
        assert any(place.key != key for key, place in stored.items()), "files of this family have names of their own"


def test_the_older_names_of_a_familys_files_are_known_too(folder: Path, name: str, tmp_path: Path):
    """Files as versions 4.52 to 4.57 wrote them: the module's names, unchanged."""
    model = load_model(folder, torch.float32)
    save_file({key: p.detach().clone() for key, p in model.named_parameters()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    stored, again = stored_weights(tmp_path, skeleton(model.config)), dict(load_model(tmp_path, torch.float32).named_parameters())
    assert set(stored) == set(again)
    assert all(torch.equal(read_tensor(stored[key]), p) for key, p in again.items())


def test_a_teacher_masked_from_its_files_falls_back_to_lower_ratios(folder: Path, name: str):
    """Planned from the files, masked in place, restored from the files: equal to a model that was loaded afresh and masked once."""
    model, fresh = load_model(folder, torch.float32), load_model(folder, torch.float32)
    weights = weights_to_mask(folder, Mask(), torch.float32)
    chosen, language = dict(model.named_parameters()), family_of(name).LANGUAGE
    tensors, expected = {key: chosen[key].data for key in weights}, maskable(fresh, language)
    plans = plan_masks(weights, (0.4, 0.2))
    assert plans == plan_masks(expected, (0.4, 0.2)), "the files' weights are the model's"
    apply_mask(tensors, plans, 0.4)
    restore(tensors, stored_weights(folder, model))
    apply_mask(tensors, plans, 0.2)
    apply_mask(expected, plans, 0.2)
    theirs = dict(fresh.named_parameters())
    assert all(torch.equal(p, theirs[key]) for key, p in model.named_parameters())
    zeros = sum(int((t == 0).sum()) for t in tensors.values()) / sum(t.numel() for t in tensors.values())
    assert zeros == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(
    ("stored", "wanted", "expected"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float32, torch.float32),
    ],
)
def test_weights_are_those_that_the_model_computes_with(stored: Any, wanted: Any, expected: Any, models: Any, tmp_path: Path):
    values = {key: t.to(stored) for key, t in load_file(models.student / "model.safetensors").items()}
    save_file(values, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((models.student / "config.json").read_text())
    weights, loaded = weights_to_mask(tmp_path, Mask(), wanted), dict(load_model(tmp_path, wanted).named_parameters())
    for key, weight in weights.items():
        assert weight.dtype == expected
        assert torch.equal(weight.to(wanted), loaded[key])


def test_planning_holds_one_tensor_at_a_time(models: Any, monkeypatch: pytest.MonkeyPatch):
    """Every tensor that was read is gone before the next one is."""
    import weakref

    held: list[Any] = []
    largest = 0

    def read(place: Any) -> Any:
        nonlocal largest
        tensor = read_tensor(place).clone()
        held.append(weakref.ref(tensor))
        largest = max(largest, sum(ref() is not None for ref in held))
        return tensor

    monkeypatch.setattr(stored_module, "read_tensor", read)
    for scope in ("per_tensor", "global"):
        held.clear()
        largest = 0
        weights = weights_to_mask(models.teacher, Mask(), torch.bfloat16)
        plans = plan_masks(weights, (0.1, 0.2), scope)
        assert len(held) >= len(plans) == 28
        assert largest <= 2, f"{largest} tensors at once"  # the last one's name still holds it while the next is read


def test_what_the_files_do_not_hold_one_to_one_is_refused(models: Any, tmp_path: Path):
    values = load_file(models.student / "model.safetensors")
    lost = "model.text_model.layers.1.mlp.up_proj.weight"
    del values[lost]
    save_file(values, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((models.student / "config.json").read_text())
    with pytest.raises(ModelError, match=lost.replace(".", r"\.") + r".*mask\.exclude") as caught:
        weights_to_mask(tmp_path, Mask(), torch.float32)
    assert "\n" not in str(caught.value)
    assert len(weights_to_mask(tmp_path, Mask(exclude=(r"layers\.1\.mlp",)), torch.float32)) == 3 * 7 - 3


def test_a_cut_or_lying_file_is_named(models: Any, tmp_path: Path):
    whole = (models.student / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 10**15]}}).encode()
    for content in (b"", whole[:5], whole[: len(whole) // 2], b"\xff" * 64, len(header).to_bytes(8, "little") + header):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"the weights in .*model\.safetensors can't be read") as caught:
            read_header(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="can't be read"):
        read_header(tmp_path / "missing.safetensors")


def test_an_index_decides_which_files_count(tmp_path: Path):
    for part in ("a", "b", "other"):
        (tmp_path / f"{part}.safetensors").write_bytes(b"")
    assert [file.name for file in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors", "other.safetensors"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}))
    assert [file.name for file in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]


def test_names_are_all_that_is_kept_of_weights_not_asked_for(models: Any, tiny: Any):
    stored = stored_weights(models.student, tiny)
    chosen = StoredTensors(stored, ["model.text_model.norm.weight"])
    assert (len(chosen), list(chosen)) == (1, ["model.text_model.norm.weight"])
    with pytest.raises(KeyError):
        chosen["model.text_model.layers.0.mlp.up_proj.weight"]
