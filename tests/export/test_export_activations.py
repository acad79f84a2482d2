"""Rounded activations: each way against the program that has it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_export_quantize import product, run, stored

from masters.export.activations import by_block, by_row, by_tensor, known, rounding_of
from masters.export.precision import Storage
from masters.export.products import stored_weight
from masters.export.quantize import quantize_products


def onnx_runtimes(x: np.ndarray) -> np.ndarray:
    """x through ONNX Runtime's DynamicQuantizeLinear and back."""
    nodes = [
        onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"]),
        onnx.helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
    ]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None]) for name in ("x", "y")]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:]), opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    return np.asarray(found)


def values(low: float, count: int = 5000) -> np.ndarray:
    x = np.random.default_rng(1).uniform(low, low + 4 if low > -1 else 5, count).astype(np.float32)
    return -x if low == -0.1 else x


@pytest.mark.parametrize("low", [-3.0, 0.5, -0.1])
def test_rounding_is_onnx_runtimes(low: float) -> None:
    """Mixed signs, all positive, all negative; a row by itself is a tensor."""
    x = values(low)
    np.testing.assert_array_equal(by_tensor(torch.from_numpy(x)).numpy(), onnx_runtimes(x))
    rows = np.stack([x, 3 * x, -x])
    np.testing.assert_array_equal(by_row(torch.from_numpy(rows)).numpy(), np.stack([onnx_runtimes(row) for row in rows]))


def test_rounding_of_zeros() -> None:
    zeros = torch.zeros(2, 40)
    for found in (by_tensor(zeros), by_row(zeros), by_block(zeros, 16)):
        assert found.tolist() == zeros.tolist()


def test_blocks_of_a_row() -> None:
    """Each in steps of its own largest magnitude, so that a large block leaves a small one's bits alone; a last block may be short."""
    x = torch.tensor([[127.0, 0.6, -1.5, 2.5, 0.0127, 0.00996, 1.0]])
    assert by_block(x, 4)[0].tolist() == pytest.approx([127, 1, -2, 2, 2 / 127, 1 / 127, 1], abs=1e-7)


@pytest.mark.parametrize("method", ["rtn", "k-quant"])
@pytest.mark.parametrize(("inputs", "block"), [(64, 32), (64, 16), (100, 32), (128, 128), (96, 64)])
def test_an_int4_product_at_level_4_is_followed(inputs: int, block: int, method: str, tmp_path: Path) -> None:
    """Whatever this machine's kernel makes of its inputs, for one row and for several."""
    rng = np.random.default_rng(3)
    weight, storage = rng.standard_normal((inputs, 48)).astype(np.float32), Storage("int4", block, method, 4)
    x = (rng.standard_normal((5, inputs)) * rng.exponential(1, inputs)).astype(np.float32)
    assert known(storage, inputs)
    rounding = rounding_of(storage, inputs)
    given = x if rounding is None else rounding(torch.from_numpy(x)).numpy()
    graph = quantize_products(product(weight), stored("int4", block, method, level=4))
    for rows in (slice(5), slice(1)):
        (ours,) = run(graph, tmp_path / "q4.onnx", x=x[rows])
        expected = given[rows] @ stored_weight(np.ascontiguousarray(weight.T), storage).T
        np.testing.assert_allclose(ours, expected, atol=2e-4 * np.abs(expected).max())


def test_products_in_float32_round_nothing() -> None:
    for storage in (Storage("fp32"), Storage("fp16"), *(Storage("int4", accuracy_level=level) for level in range(4))):
        assert rounding_of(storage, 64) is None
        assert known(storage, 64)
