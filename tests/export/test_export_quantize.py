"""Quantisation against the error that theory and other tools give, against a second implementation, and in graphs that really run."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from masters.export.embedding import build_embedding, own_table
from masters.export.graph import GraphAuthor, Spool, save_graph
from masters.export.int4 import k_quant, pack_int4, round_to_nearest, unpack_int4
from masters.export.precision import Storage
from masters.export.quantize import int4_blocks, int8_rows, quantize_products

RNG = np.random.default_rng(0)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize(("block", "plain", "searched"), [(16, 0.076, 0.070), (32, 0.086, 0.081), (64, 0.095, 0.090), (128, 0.103, 0.097)])
def test_int4_error_on_gaussian_weights(block: int, plain: float, searched: float) -> None:
    """Scale search and refit reach the best known error for each block size; without them, the largest weight at -8, it is `plain`."""
    weight = RNG.standard_normal((512, 1024)).astype(np.float32)
    assert relative(round_to_nearest(weight, block).weight(1024), weight) == pytest.approx(searched, abs=1e-3)
    flat = weight.reshape(-1, block)
    widest = np.take_along_axis(flat, np.abs(flat).argmax(1)[:, None], 1) / -8
    assert relative(np.clip(np.rint(flat / widest), -8, 7) * widest, flat) == pytest.approx(plain, abs=1e-3)


@pytest.mark.parametrize("method", [round_to_nearest, k_quant])
def test_int4_scales_are_optimal_for_their_codes(method: Any) -> None:
    """Within what float16 can tell apart, no other scale gives the chosen codes a smaller squared error (least squares)."""
    weight = RNG.standard_normal((8, 64)).astype(np.float32)
    found = method(weight, 32)
    steps, blocks = found.codes - (0 if found.zeros is None else found.zeros[..., None]), weight.reshape(8, 2, 32)
    assert_allclose(found.scales, (blocks * steps).sum(-1) / np.square(steps, dtype=np.float32).sum(-1), rtol=2.0**-11)
    assert_array_equal(found.scales, found.scales.astype(np.float16))


@pytest.mark.parametrize("block", [32, 64, 128])
def test_k_quant_beats_round_to_nearest_and_onnx_runtimes(block: int) -> None:
    """Zero points pay most where blocks lie to one side; ONNX Runtime's own k-quant is the second implementation."""
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    for weight in (RNG.standard_normal((64, 512)), RNG.gamma(2.0, size=(64, 512)) - 0.5):
        weight = weight.astype(np.float32)
        codes, scales, zeros = quant_tensor_k_quant_cpu(weight.copy(), 4, block)
        theirs = relative(((codes - zeros) * scales).reshape(weight.shape), weight)
        ours, plain = (relative(method(weight, block).weight(512), weight) for method in (k_quant, round_to_nearest))
        assert ours < theirs
        assert ours < plain


@pytest.mark.parametrize("values", [np.zeros((2, 32)), np.full((2, 32), 0.3), np.eye(2, 32) * -5, np.full((1, 32), 1e-30)])
def test_int4_special_blocks(values: np.ndarray) -> None:
    """Blocks of zeros, of one value, of one outlier and of tiny numbers come back as they were."""
    weight = values.astype(np.float32)
    for method in (round_to_nearest, k_quant):
        found = method(weight, 32)
        assert np.isfinite(found.scales).all()
        assert_allclose(found.weight(32), weight, rtol=2.0**-11, atol=1e-35)


def test_int4_uses_all_sixteen_codes_and_packs_low_half_first() -> None:
    codes = round_to_nearest(RNG.standard_normal((64, 64)).astype(np.float32), 32).codes
    assert set(np.unique(codes)) == set(range(-8, 8))
    packed = pack_int4(codes)
    assert packed.shape == (64, 2, 16)
    assert_array_equal((packed & 15).astype(int) - 8, codes[..., 0::2])
    assert_array_equal((packed >> 4).astype(int) - 8, codes[..., 1::2])
    assert_array_equal(unpack_int4(pack_int4(codes[..., :31]), 31), codes[..., :31])


def test_int8_error_and_symmetry() -> None:
    weight = RNG.standard_normal((128, 512)).astype(np.float32)
    codes, scales = int8_rows(weight)
    # A row's step is its largest of 512 Gaussians (about 3.05 sigma) / 127, the error step / sqrt(12).
    assert relative(codes * scales, weight) == pytest.approx(3.05 / 127 / 12**0.5, rel=0.1)
    assert_array_equal(int8_rows(-weight)[0], -codes)
    assert np.isfinite(int8_rows(np.zeros((3, 4), np.float32))[1]).all()


def product(weight: np.ndarray, uses: int = 1) -> ir.Model:
    """y = x @ weight, as often as `uses` says, with another weight each time."""
    author = GraphAuthor("product")
    x = author.input("x", ir.DataType.FLOAT, ("rows", weight.shape[0]))
    for use in range(uses):
        scaled = torch.from_numpy(weight * (use + 1))
        y = author.op("MatMul", x, author.weight(f"w{use}", weight.shape, ir.DataType.FLOAT, scaled.clone), name=f"product{use}")
        author.output(y, f"y{use}", ir.DataType.FLOAT, ("rows", weight.shape[1]))
    return author.model()


def run(model: ir.Model, path: Path, **feeds: np.ndarray) -> list[np.ndarray]:
    save_graph(model, path)
    found: list[np.ndarray] = onnxruntime.InferenceSession(str(path)).run(None, feeds)
    return found


def stored(word: str, block: int = 32, method: str = "rtn", level: int = 0) -> Any:
    return lambda _: Storage(word, block, method, level)


@pytest.mark.parametrize("method", ["rtn", "k-quant"])
@pytest.mark.parametrize(("inputs", "block"), [(64, 32), (64, 16), (100, 32), (128, 128), (96, 64)])
def test_int4_graph_computes_with_the_dequantized_weight(inputs: int, block: int, method: str, tmp_path: Path) -> None:
    """ONNX Runtime's MatMulNBits reads our packing as we mean it, for widths that fill no whole block too."""
    weight, x = RNG.standard_normal((inputs, 48)).astype(np.float32), RNG.standard_normal((5, inputs)).astype(np.float32)
    (ours,) = run(quantize_products(product(weight), stored("int4", block, method, level=1)), tmp_path / "q4.onnx", x=x)
    assert_allclose(ours, x @ int4_blocks(np.ascontiguousarray(weight.T), Storage("int4", block, method)).weight(inputs).T, atol=1e-4)


def test_scales_that_float16_can_not_hold_stay_float32(tmp_path: Path) -> None:
    weight, x = RNG.standard_normal((64, 48)).astype(np.float32) * 1e-7, RNG.standard_normal((5, 64)).astype(np.float32)
    graph = quantize_products(product(weight), stored("int4", level=1))
    assert graph.graph.initializers["w0_scale"].dtype == ir.DataType.FLOAT
    (ours,) = run(graph, tmp_path / "q4.onnx", x=x)
    assert_allclose(ours, x @ round_to_nearest(weight.T, 32).weight(64).T, atol=1e-11)


def test_mixed_graph(tmp_path: Path) -> None:
    """Each product as its name says: float16 that computes in float32, int8, int4 and untouched."""
    words = {"w0": "fp16", "w1": "int8", "w2": "int4", "w3": "fp32"}
    weight, x = RNG.standard_normal((64, 40)).astype(np.float32), RNG.standard_normal((6, 64)).astype(np.float32)
    graph = quantize_products(product(weight, uses=4), lambda name: Storage(words[name]))
    assert set(graph.graph.initializers) == {"w0_fp16", "w1_int8", "w1_scale", "w2_int4", "w2_scale", "w3"}
    errors = [relative(y, x @ weight * (use + 1)) for use, y in enumerate(run(graph, tmp_path / "mixed.onnx", x=x))]
    assert errors[0] < 5e-4
    assert errors[1] < 0.02
    assert errors[2] < 0.12
    assert errors[3] < 1e-6


@pytest.mark.parametrize("level", [0, 4])
def test_accuracy_level_is_explicit(level: int) -> None:
    node = next(node for node in quantize_products(product(np.ones((32, 8), np.float32)), stored("int4", level=level)).graph if node.op_type == "MatMulNBits")
    assert (node.attributes["accuracy_level"].as_int() if "accuracy_level" in node.attributes else 0) == level


def test_int8_graph(tmp_path: Path) -> None:
    """Near the float product; signed weights whose products fit 16 bits; one quantisation of an activation that two products share; no float weight left."""
    weight, x = RNG.standard_normal((64, 40)).astype(np.float32), RNG.standard_normal((6, 64)).astype(np.float32)
    model = quantize_products(product(weight, uses=2), stored("int8"))
    kinds = [node.op_type for node in model.graph]
    assert (kinds.count("DynamicQuantizeLinear"), kinds.count("MatMulInteger"), kinds.count("MatMul")) == (1, 2, 0)
    types = {value.dtype for value in model.graph.initializers.values() if value.shape is not None and len(value.shape) == 2}
    assert types == {ir.DataType.INT8}
    largest = max(int(np.abs(value.const_value.numpy().astype(int)).max()) for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT8)
    assert 2 * 255 * largest < 2**15
    first, second = run(model, tmp_path / "q8.onnx", x=x)
    assert relative(first, x @ weight) < 0.02
    assert relative(second, x @ (2 * weight)) < 0.02


@pytest.mark.parametrize(("precision", "allowed", "bytes_per_weight"), [("fp32", 0, 4.0), ("fp16", 1e-3, 2.0), ("int8", 0.01, 1.1), ("int4", 0.1, 0.5625)])
def test_embedding(precision: str, allowed: float, bytes_per_weight: float, tmp_path: Path) -> None:
    table = torch.nn.Embedding(300, 96)
    ids: Any = np.array([[0, 299, 7], [5, 5, 1]])
    (ours,) = run(build_embedding(own_table(table, Storage(precision)), 96), tmp_path / "embed.onnx", input_ids=ids)
    theirs = table(torch.from_numpy(ids)).detach().numpy()
    assert ours.dtype == np.float32
    assert relative(ours, theirs) <= allowed
    assert (tmp_path / "embed.onnx").stat().st_size < 300 * 96 * bytes_per_weight + 2500


def test_int4_embedding_with_an_unfilled_block(tmp_path: Path) -> None:
    """Rows of 100 in blocks of 32, read by plain operators, are the dequantised ones."""
    table = torch.nn.Embedding(50, 100)
    ids: Any = np.array([[0, 49, 7]])
    (ours,) = run(build_embedding(own_table(table, Storage("int4")), 100), tmp_path / "embed.onnx", input_ids=ids)
    assert_array_equal(ours, round_to_nearest(table.weight.detach().numpy(), 32).weight(100)[ids])


@pytest.mark.parametrize("word", ["fp16", "int8", "int4"])
def test_finished_weights_wait_outside_of_memory(word: str, tmp_path: Path) -> None:
    """Of eight products none is held, and what is written is the same."""
    weight = RNG.standard_normal((256, 512)).astype(np.float32)
    graph = product(weight, uses=8)
    tracemalloc.start()
    quantize_products(graph, stored(word), spool=Spool(tmp_path))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 0.2 * weight.nbytes  # of more than one in all
    assert not list(tmp_path.iterdir())
    save_graph(graph, tmp_path / "spooled.onnx")
    save_graph(quantize_products(product(weight, uses=8), stored(word)), tmp_path / "kept.onnx")
    assert (tmp_path / "spooled.onnx").read_bytes() == (tmp_path / "kept.onnx").read_bytes()
