"""Whole exports: what stands in a bundle, that it shrinks, that it is the same each time, and that a wrong one is not written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from masters.errors import ParityError
from masters.export import ExportConfig, export, onnx_target
from masters.export.awkward import awkward_images
from masters.export.parity import QUESTIONS, check_parity, failures
from masters.export.reference import encode, greedy
from masters.export.source import Source
from masters.manifest import read_manifest, verify_files
from masters.runtime import load

FILES = {
    "fp32": ("vision_encoder", "embed_tokens", "decoder_model_merged"),
    "fp16": ("vision_encoder_fp16", "embed_tokens_fp16", "decoder_model_merged_fp16"),
    "int8": ("vision_encoder_quantized", "embed_tokens_quantized", "decoder_model_merged_quantized"),
    "int4": ("vision_encoder_quantized", "embed_tokens_q4", "decoder_model_merged_q4"),
}
Bundles = Callable[[str], Path]


def graph_bytes(bundle: Path) -> int:
    return sum(file.stat().st_size for file in (bundle / "onnx").iterdir())


@pytest.mark.parametrize("precision", FILES)
def test_bundle(precision: str, bundle_of: Bundles) -> None:
    """The layout that transformers.js reads; a manifest that holds; a bundle that the runtime opens, its golden self-test included."""
    bundle = bundle_of(precision)
    assert {file.stem for file in (bundle / "onnx").glob("*.onnx")} == set(FILES[precision])
    for name in ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (bundle / name).is_file(), name
    for file in (bundle / "onnx").glob("*.onnx"):
        onnx.checker.check_model(str(file))
    manifest = read_manifest(bundle)
    verify_files(bundle, manifest)
    assert {file.relative_to(bundle).as_posix() for file in bundle.rglob("*") if file.is_file()} == {*manifest.files, "masters.json"}
    assert manifest.parity
    assert not [row for row in manifest.parity if row["verdict"] == "fail"]
    weights = {"weights"} if precision in ("int8", "int4") else set()
    assert {row["stage"] for row in manifest.parity} == weights | {"pixels", "prompt", "features", "embeddings", "prefill", "decode", "tokens"}
    assert {row["image"] for row in manifest.parity if row["stage"] == "tokens"} == set(awkward_images())
    assert load(bundle).answer("What is this?", [awkward_images()["plain"]], max_tokens=3).token_ids


def test_config_for_transformers_js(bundle_of: Bundles) -> None:
    settings = json.loads((bundle_of("int4") / "config.json").read_text())["transformers.js_config"]
    assert settings["dtype"] == {"vision_encoder": "q8", "embed_tokens": "q4", "decoder_model_merged": "q4"}
    assert settings["use_external_data_format"] == {}  # all graphs of this size are single files
    assert settings["kv_cache_dtype"]["fp16"] == "float16"


def test_sizes_shrink(bundle_of: Bundles) -> None:
    """Bytes of weights and graph: half for fp16, near a quarter for int8, less for int4; a graph's own overhead weighs at this size."""
    full = graph_bytes(bundle_of("fp32"))
    parts = {precision: graph_bytes(bundle_of(precision)) / full for precision in ("fp16", "int8", "int4")}
    assert parts["fp16"] < 0.6
    assert parts["int8"] < 0.45
    assert parts["int4"] < parts["int8"]


def test_fp32_answers_are_pytorchs(lively_source: Source, bundle_of: Bundles) -> None:
    """From the image file to the last token, on every awkward image, in the runtime and in PyTorch."""
    vlm = load(bundle_of("fp32"))
    seen = set()
    for name, image in awkward_images().items():
        tokens, _ = greedy(lively_source, encode(lively_source, QUESTIONS[0], [image]), 12)
        assert vlm.answer(QUESTIONS[0], [image], max_tokens=12).token_ids == tuple(tokens), name
        seen |= set(tokens.tolist())
    assert len(seen) > 10


def test_int4_answers_are_pytorchs_with_the_same_weights(int4_source: Source, bundle_of: Bundles) -> None:
    """What int4 changes is the weights, and nothing else."""
    vlm, image = load(bundle_of("decoder=int4,embed=int4")), awkward_images()["plain"]
    tokens, _ = greedy(int4_source, encode(int4_source, QUESTIONS[1], [image]), 16)
    assert vlm.answer(QUESTIONS[1], [image], max_tokens=16).token_ids == tuple(tokens)


def test_the_same_input_gives_the_same_bytes_and_force_replaces(lively_vlm: Path, bundle_of: Bundles, tmp_path: Path) -> None:
    out = tmp_path / "again"
    out.mkdir()
    (out / "old").write_text("of an earlier export")
    export(ExportConfig(lively_vlm, "onnx", out, "int4", force=True))
    first = bundle_of("int4")
    names = sorted(file.relative_to(first) for file in first.rglob("*") if file.is_file())
    assert names == sorted(file.relative_to(out) for file in out.rglob("*") if file.is_file())
    assert [name.as_posix() for name in names if (first / name).read_bytes() != (out / name).read_bytes()] == []


@pytest.fixture
def traced(bundle_of: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports below start from a traced vision graph."""
    path = bundle_of("fp32") / "onnx" / "vision_encoder.onnx"
    monkeypatch.setattr(onnx_target, "build_vision", lambda *_: ir.load(path))


def wrong_part(monkeypatch: pytest.MonkeyPatch, part: str, change: Callable[[ir.Model], None]) -> None:
    """Let the export write one graph whose weights were changed after they were taken from PyTorch."""
    original = getattr(onnx_target, part)

    def changed(*arguments: Any, **options: Any) -> ir.Model:
        graph: ir.Model = original(*arguments, **options)
        change(graph)
        return graph

    monkeypatch.setattr(onnx_target, part, changed)


def scale_weight(name: str, factor: float) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        value = next(value for key, value in model.graph.initializers.items() if name in key)
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=value.name)

    return change


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("part", "weight", "stage", "tensor"),
    [
        ("build_vision", "patch_embedding.weight", "features", "image_features"),
        ("build_embedding", "embed_tokens.weight", "embeddings", "inputs_embeds"),
        ("build_decoder", "layers.1.attention.qkv.weight", "prefill", "logits"),
    ],
)
def test_a_wrong_graph_is_named_and_not_written(
    lively_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, weight: str, stage: str, tensor: str
) -> None:
    wrong_part(monkeypatch, part, scale_weight(weight, 1.01))
    with pytest.raises(ParityError) as caught:
        export(ExportConfig(lively_vlm, "onnx", tmp_path / "bundle"))
    assert f"'{stage}'" in str(caught.value)
    assert tensor in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("traced")
def test_a_mismatch_may_be_kept_and_is_marked(lively_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_part(monkeypatch, "build_decoder", scale_weight("rotary.cos", 0.0))
    manifest = export(ExportConfig(lively_vlm, "onnx", tmp_path / "bundle", allow_mismatch=True))
    assert "mismatch" in manifest.notes[0]
    assert "'prefill'" in manifest.notes[0]
    assert read_manifest(tmp_path / "bundle").notes == manifest.notes


def test_wrong_pixels_are_named(bundle_of: Bundles, lively_source: Source) -> None:
    vlm = load(bundle_of("fp32"))
    vlm.manifest.preprocessing["image_mean"] = [0.4, 0.5, 0.5]
    rows, references = check_parity(vlm, lively_source)
    assert references == []
    assert "'pixels'" in failures(rows)[0]
    assert "pixel_values" in failures(rows)[0]


def test_shared_cache_is_declared(bundle_of: Bundles, lively_source: Source) -> None:
    manifest = read_manifest(bundle_of("fp32"))
    assert manifest.generation["shared_cache"] is True
    assert manifest.generation["eos_token_ids"] == [lively_source.processor.tokenizer.eos_token_id]
    assert manifest.parameters == sum(parameter.numel() for parameter in lively_source.model.parameters())
