"""The close check of quantised bundles: weights read back, and one planted fault after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from masters.errors import ParityError
from masters.export import ExportConfig, activations, export, onnx_target
from masters.export.int4 import round_to_nearest
from masters.export.precision import EMBED, Storage, parse_precision
from masters.export.products import Product, decoder_products, product_weights, vision_products
from masters.export.row import Row
from masters.export.source import Source, load_source
from masters.export.stored import follows, store_weights, weight_rows
from masters.manifest import read_manifest

Change = Callable[[ir.Model], None]
WEIGHT = "layers.1.mlp.up.weight"


def only(rows: list[Row], verdict: str) -> list[Row]:
    return [row for row in rows if row.verdict == verdict]


def decoder(source: Source) -> ir.Model:
    return onnx_target.build_decoder(*source.family.text_parts(source.model))


def rows_of(source: Source, word: str, folder: Path, change: Change = lambda _: None) -> list[Row]:
    """The rows of a decoder that is changed between quantisation and file."""
    graph = decoder(source)
    originals = product_weights(graph)
    method = "k-quant" if word == "k-quant" else "rtn"
    quantised = onnx_target.quantize_products(graph, lambda _: Storage("int4" if word == "k-quant" else word, 32, method))
    change(quantised)
    ir.save(quantised, folder / "decoder.onnx")
    return weight_rows(folder / "decoder.onnx", "decoder", originals, {})


def edit(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def changed(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(change(value.const_value.numpy().copy()), name=name)

    return changed


def scaled(place: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(scales: np.ndarray) -> np.ndarray:
        scales[place] *= 1.1
        return scales

    return change


@pytest.mark.parametrize("word", ["fp16", "int8", "int4", "k-quant"])
def test_healthy_weights_pass_and_the_loss_is_reported(word: str, lively_source: Source, tmp_path: Path) -> None:
    rows = rows_of(lively_source, word, tmp_path)
    assert not only(rows, "fail")
    (loss,) = only(rows, "reported")
    layers = [
        layer.weight.detach().numpy()
        for layer in lively_source.family.text_parts(lively_source.model)[0].layers.modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    assert len(product_weights(decoder(lively_source))) == 1 + 5 * len(layers) // 7  # queries, keys and values are one product; and the head
    assert loss.difference == pytest.approx({"fp16": 0, "int8": 0.012, "int4": 0.08, "k-quant": 0.075}[word], rel=0.3, abs=1e-6)  # saved as bfloat16


FAULTS = {
    "int4": {
        "a scale of one block, 10% off": edit(f"{WEIGHT}_scale", scaled((5, 1))),
        "two blocks in each other's place": edit(f"{WEIGHT}_int4", lambda packed: packed[:, [1, 0, *range(2, packed.shape[1])]]),
        "the halves of bytes": edit(f"{WEIGHT}_int4", lambda packed: packed % 16 * 16 + packed // 16),
        "the zero point, one off": edit(f"{WEIGHT}_int4", lambda packed: np.where(packed % 16 < 15, packed + 1, packed).astype(np.uint8)),
        "two rows in each other's place": edit(f"{WEIGHT}_scale", lambda scales: scales[[1, 0, *range(2, len(scales))]]),
    },
    "k-quant": {
        "a zero point of one block, one off": edit(f"{WEIGHT}_zero", lambda zeros: np.where(np.arange(zeros.size).reshape(zeros.shape) == 5, zeros ^ 1, zeros)),
    },
    "fp16": {
        "one weight": edit(f"{WEIGHT}_fp16", lambda half: np.where(np.arange(half.size).reshape(half.shape) == 77, half * np.float16(1.01), half)),
    },
    "int8": {
        "a scale of one column, 10% off": edit(f"{WEIGHT}_scale", scaled(5)),
        "every code, one off": edit(f"{WEIGHT}_int8", lambda codes: codes + np.int8(1)),
        "two rows in each other's place": edit(f"{WEIGHT}_int8", lambda codes: codes[[1, 0, *range(2, len(codes))]]),
        "one code": edit(f"{WEIGHT}_int8", lambda codes: np.where(np.arange(codes.size).reshape(codes.shape) == 77, codes ^ 2, codes).astype(np.int8)),
    },
}


@pytest.mark.parametrize(("word", "fault"), [(word, fault) for word, faults in FAULTS.items() for fault in faults])
def test_a_planted_fault_is_found_in_the_weights(word: str, fault: str, lively_source: Source, tmp_path: Path) -> None:
    failed = only(rows_of(lively_source, word, tmp_path, FAULTS[word][fault]), "fail")
    assert failed
    assert fault.startswith("the zero point") or all(WEIGHT in row.tensor for row in failed)


@pytest.fixture
def traced(bundle_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports below start from a traced vision graph."""
    path = bundle_of("fp32") / "onnx" / "vision_encoder.onnx"
    monkeypatch.setattr(onnx_target, "build_vision", lambda *_: ir.load(path))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("precision", "level", "norm", "stage"),
    [
        ("vision=fp32,decoder=int4", 1, "layers.1.mlp_norm.weight", "prefill"),
        ("vision=fp32,decoder=int4", 4, "layers.1.mlp_norm.weight", "prefill"),
        ("vision=fp32,decoder=int8", 0, "layers.1.mlp_norm.weight", "prefill"),
        ("vision=int8,decoder=fp32", 0, "layers.0.norm1.weight", "features"),  # the tower's norms are equal and stored once
    ],
)
def test_a_fault_of_the_graph_is_found_in_its_arithmetic(
    precision: str, level: int, norm: str, stage: str, lively_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer's norm is 10% off: every quantised weight is right, what is computed with them is not."""
    original = onnx_target.quantize_products

    def faulty(model: ir.Model, *arguments: Any) -> ir.Model:
        graph = original(model, *arguments)
        if norm in graph.graph.initializers:
            edit(norm, lambda weight: weight * np.float32(1.1))(graph)
        return graph

    monkeypatch.setattr(onnx_target, "quantize_products", faulty)
    with pytest.raises(ParityError, match=f"the stage '{stage}'"):
        export(ExportConfig(lively_vlm, "onnx", tmp_path / "bundle", precision, accuracy_level=level))


@pytest.mark.usefixtures("traced")
def test_a_wrong_scale_stops_the_export_and_is_named(lively_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = onnx_target.quantize_products

    def faulty(model: ir.Model, *arguments: Any) -> ir.Model:
        graph = original(model, *arguments)
        FAULTS["int4"]["a scale of one block, 10% off"](graph)
        return graph

    monkeypatch.setattr(onnx_target, "quantize_products", faulty)
    with pytest.raises(ParityError, match=rf"the stage 'weights' .* decoder {WEIGHT} differs by 0.09"):
        export(ExportConfig(lively_vlm, "onnx", tmp_path / "bundle", "decoder=int4"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_bundles_report_the_loss_apart(precision: str, bundle_of: Callable[[str], Path]) -> None:
    rows = read_manifest(bundle_of(precision)).parity
    close = [row for row in rows if "stored weights" in row["measure"]]
    assert {row["stage"] for row in close} == {"features", "embeddings", "prefill", "decode"}
    assert {row["verdict"] for row in close} == {"pass"}
    lost = [row for row in rows if row["stage"] == "prefill" and "stored" not in row["measure"]]
    assert {row["verdict"] for row in lost} == {"reported"}
    # What is judged is far below what quantisation costs: both round what products are given, and at a rounding's edge one value may fall to either side.
    assert max(row["difference"] for row in close if row["stage"] == "prefill") < 0.2 * max(row["difference"] for row in lost)


@pytest.mark.parametrize(
    ("precision", "level", "expected"),
    [
        ("fp32", 0, False), ("vision=fp16,decoder=fp32", 0, False), ("vision=int8", 0, True), ("embed=int8", 0, True), ("int4", 1, True),
        ("int4", 4, True), ("int8", 4, True),
    ],
)  # fmt: skip
def test_what_is_followed(precision: str, level: int, expected: bool, lively_source: Source) -> None:
    products = decoder_products(*lively_source.family.text_parts(lively_source.model))
    assert follows(parse_precision(precision, accuracy_level=level), products) is expected


def test_a_rounding_that_is_not_known_is_not_followed(lively_source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that no way of ours fits."""
    monkeypatch.setattr(activations, "_through_identity", lambda x, *_: 1.01 * x)
    activations._probed.cache_clear()
    products = decoder_products(*lively_source.family.text_parts(lively_source.model))
    assert follows(parse_precision("int4", accuracy_level=1), products)
    assert not follows(parse_precision("int4", accuracy_level=4), products)
    assert not follows(parse_precision("vision=int8,decoder=int4", accuracy_level=4), products)
    activations._probed.cache_clear()


def test_the_models_weights_become_the_files(lively_vlm: Path, bundle_of: Callable[[str], Path]) -> None:
    source, original = load_source(lively_vlm), load_source(lively_vlm)
    text_model, head = source.family.text_parts(source.model)
    graphs = bundle_of("vision=int8,decoder=int4,embed=int8") / "onnx"
    tower = vision_products(source.model, text_model, head, ir.load(bundle_of("fp32") / "onnx" / "vision_encoder.onnx"))
    products = [*tower, Product("embed", EMBED, (text_model.embed_tokens,)), *decoder_products(text_model, head)]
    names = {"decoder": "decoder_model_merged_q4", "vision": "vision_encoder_quantized", "embed": "embed_tokens_quantized"}
    store_weights(source, parse_precision("vision=int8,decoder=int4,embed=int8"), products, {part: graphs / f"{name}.onnx" for part, name in names.items()})
    change = {name: float((weight - original.model.state_dict()[name]).norm() / weight.norm()) for name, weight in source.model.state_dict().items()}
    down, embedding = "model.text_model.layers.0.mlp.down_proj.weight", "model.text_model.embed_tokens.weight"
    assert change[down] == pytest.approx(0.08, rel=0.3)
    assert change[embedding] == pytest.approx(0.007, rel=0.5)
    assert change["lm_head.weight"] == pytest.approx(0.08, rel=0.3), "a tied embedding keeps bits of its own"
    assert change["model.vision_model.encoder.layers.0.mlp.fc1.weight"] == pytest.approx(0.012, rel=0.5)
    assert change["model.vision_model.embeddings.patch_embedding.weight"] == change["model.text_model.norm.weight"] == 0
    kept = source.model.get_parameter(down)
    np.testing.assert_array_equal(kept.numpy(), round_to_nearest(original.model.get_parameter(down).detach().numpy(), 64).weight(kept.shape[1]))
