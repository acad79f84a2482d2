"""Writing graphs: external data in the files that loaders look for, chunks, alignment, equal bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.testing import assert_allclose

from masters.export.graph import PAGE, GraphAuthor, save_graph

WEIGHTS = [torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]  # 16 KiB each


def chain() -> ir.Model:
    author = GraphAuthor("chain")
    x = author.input("x", ir.DataType.FLOAT, ("rows", 64))
    for number, weight in enumerate(WEIGHTS):
        x = author.op("MatMul", x, author.weight(f"w{number}", (64, 64), ir.DataType.FLOAT, weight.clone))
        x = author.op("Mul", x, author.constant(0.125, np.float32))
    author.output(x, "y", ir.DataType.FLOAT, ("rows", 64))
    return author.model()


@pytest.mark.parametrize(("external_over", "chunk_bytes", "files"), [(10**6, 10**6, 0), (0, 10**6, 1), (0, 40_000, 3), (0, 1, 5)])
def test_external_data(tmp_path: Path, external_over: int, chunk_bytes: int, files: int) -> None:
    path = tmp_path / "chain_q4.onnx"
    assert save_graph(chain(), path, external_over, chunk_bytes) == files
    names = ["chain_q4.onnx_data", *(f"chain_q4.onnx_data_{number}" for number in range(1, files))][:files]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([path.name, *names])
    onnx.checker.check_model(str(path))
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    expected = x
    for weight in WEIGHTS:
        expected = expected @ weight.numpy() * 0.125
    assert_allclose(onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0], expected, atol=1e-4)


def test_small_tensors_stay_in_the_graph_and_large_ones_start_on_a_page(tmp_path: Path) -> None:
    """onnxruntime-node can't read scalars from external data; only whole pages can be memory-mapped."""
    save_graph(chain(), tmp_path / "chain.onnx", external_over=0)
    stored = onnx.load(tmp_path / "chain.onnx", load_external_data=False).graph.initializer
    external = [tensor for tensor in stored if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert [tensor.name for tensor in external] == [f"w{number}" for number in range(5)]
    assert len(stored) == 6
    for tensor in external:
        assert int({entry.key: entry.value for entry in tensor.external_data}["offset"]) % PAGE == 0


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_graph(chain(), tmp_path / name / "chain.onnx", external_over=0)
    for file in ("chain.onnx", "chain.onnx_data"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
