"""Folders that can't be exported, each made for real, and the one line that says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from masters.errors import MastersError, ModelError
from masters.export import ExportConfig, bundle, export
from masters.export.precision import parse_precision
from masters.export.source import Source, load_source


@pytest.fixture
def folder(lively_vlm: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lively_vlm, tmp_path / "model"))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def shard_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:40]}, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    shards = {name: f"model-0000{1 if number < 40 else 2}-of-00002.safetensors" for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def tensor_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.text_model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def text_only(folder: Path) -> None:
    edit_config(folder, lambda config: (config.pop("vision_config"), config.update(model_type="llama")))


def other_family(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(model_type="blip_2"))


def no_image_token(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text().replace("<image>", "<picture>")
    (folder / "tokenizer.json").write_text(text)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("extra_special_tokens", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def other_tile(folder: Path) -> None:
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"]["max_image_size"] = {"longest_edge": 32}
    (folder / "processor_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_folder, ("no model folder",)),
        (no_config, ("no config.json",)),
        (no_weights, ("no weights", "model.safetensors")),
        (shard_missing, ("1 of 2 shards", "model-00002-of-00002.safetensors")),
        (truncated, ("can't be loaded",)),
        (tensor_missing, ("layers.1.mlp.up_proj.weight",)),
        (text_only, ("'llama'", "no vision-language model", "idefics3, ")),
        (other_family, ("'blip_2'", "not supported", "idefics3, ")),
        (no_image_token, ("'<image>'", "lacks it")),
        (other_tile, ("32 pixels", "64")),
    ],
)
def test_refused_in_one_line_and_nothing_left(folder: Path, tmp_path: Path, damage: Callable[[Path], None], words: tuple[str, ...]) -> None:
    damage(folder)
    with pytest.raises(ModelError) as caught:
        export(ExportConfig(folder, "onnx", tmp_path / "out" / "bundle"))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert list((tmp_path / "out").iterdir()) == []


def test_a_sharded_model_loads(folder: Path, lively_source: Source) -> None:
    lively_source.model.save_pretrained(folder, max_shard_size="300KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    weight = load_source(folder).model.lm_head.weight
    assert torch.equal(weight, lively_source.model.lm_head.weight)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "tflite"}, "onnx, coreml"),
        ({"precision": "int3"}, "fp32, fp16, int8, int4"),
        ({"precision": "vision=int8,vision=fp16"}, "at most once"),
        ({"int4_method": "awq"}, "rtn, k-quant, gptq"),
        ({"precision": "int4", "int4_method": "gptq"}, "--calibrate"),
        ({"precision": "auto", "max_bytes": 10}, "--calibrate"),
        ({"precision": "auto"}, "one budget"),
        ({"precision": "auto", "max_bytes": 10, "max_kl": 1.0}, "one budget"),
        ({"precision": "int4", "max_kl": 1.0}, "--precision auto"),
        ({"target": "coreml", "precision": "int4", "int4_method": "k-quant"}, "--target onnx"),
        ({"block_size": 33}, "16, 32, 64, 128"),
        ({"accuracy_level": 7}, "accuracy level"),
        ({"max_drop": 0.1}, "--data"),
    ],
)
def test_settings_out_of_range(lively_vlm: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(MastersError, match=words):
        export(replace(ExportConfig(lively_vlm, "onnx", tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()


def test_precision_words() -> None:
    assert str(parse_precision("int4")) == "vision=int8,decoder=int4,embed=int8"
    assert str(parse_precision("decoder=int4, embed=int8")) == "vision=fp32,decoder=int4,embed=int8"
    assert parse_precision("int8").decoder == "int8"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (64, 4, "rtn")),
        ({"calibrate": Path("questions.jsonl")}, (64, 4, "gptq")),
        ({"calibrate": Path("questions.jsonl"), "int4_method": "k-quant", "block_size": 32, "accuracy_level": 1}, (32, 1, "k-quant")),
        ({"target": "coreml", "calibrate": Path("questions.jsonl")}, (32, 4, "rtn")),
    ],
)
def test_what_is_left_open(changes: dict[str, Any], expected: tuple[int, int, str]) -> None:
    """The defaults that docs/precision.md gives reasons for."""
    precision = bundle._precision(replace(ExportConfig(Path("student"), "onnx", Path("out"), "int4"), **changes))
    assert (precision.block_size, precision.accuracy_level, precision.method) == expected


def test_an_existing_folder_is_refused_before_anything_runs(lively_vlm: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(MastersError, match="--force"):
        export(ExportConfig(lively_vlm, "onnx", tmp_path))
    with pytest.raises(MastersError, match="holds the model"):
        export(ExportConfig(lively_vlm, "onnx", lively_vlm, force=True))
    assert (tmp_path / "mine").read_text() == "precious"
    assert (lively_vlm / "model.safetensors").is_file()
