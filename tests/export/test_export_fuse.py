"""The fused operators of a traced tower: that they are there, in both forms of attention, and only where the formula is the one they compute.

That they compute what PyTorch computes, with patches hidden and without, test_export_vision.py and test_export_families.py say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from masters.export.fuse import fuse_vision
from masters.export.graph import GraphAuthor
from masters.export.source import Source
from masters.export.vision import build_vision

CUBE, ROOT = 0.044715, float(np.sqrt(2 / np.pi))


def kinds(graph: ir.Graph) -> Counter[str]:
    return Counter(node.op_type for node in graph)


def test_every_layer_is_fused(lively_source: Source) -> None:
    graph = build_vision(lively_source.model, lively_source.family).graph
    layers, found = lively_source.model.config.vision_config.num_hidden_layers, kinds(graph)
    assert (found["If"], found["FastGelu"], found["Softmax"], found["Tanh"]) == (layers, layers, 0, 0)
    for node in (node for node in graph if node.op_type == "If"):
        whole, masked = (next(iter(node.attributes[f"{branch}_branch"].as_graph())) for branch in ("then", "else"))
        assert (whole.op_type, len(whole.inputs), masked.op_type, len(masked.inputs)) == ("MultiHeadAttention", 3, "MultiHeadAttention", 5)


@pytest.mark.parametrize("name", ["internvl", "llava_onevision"])
def test_towers_without_a_mask_have_one_form(name: str, family_source: Callable[[str], Source]) -> None:
    source = family_source(name)
    found = kinds(build_vision(source.model, source.family).graph)
    assert found["MultiHeadAttention"] > 0
    assert found["If"] == found["Softmax"] == 0


def gelu(cube: float = CUBE, root: float = ROOT, power: float = 3.0) -> ir.Model:
    author = GraphAuthor("gelu")
    op, number = author.op, lambda value: author.constant(value, np.float32)
    x = author.input("x", ir.DataType.FLOAT, (4, 32))
    inner = op("Mul", number(root), op("Add", x, op("Mul", number(cube), op("Pow", x, number(power)))))
    author.output(op("Mul", x, op("Mul", number(0.5), op("Add", op("Tanh", inner), number(1.0)))), "y", ir.DataType.FLOAT, (4, 32))
    return author.model()


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    return np.asarray(onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {"x": x})[0])


@pytest.mark.parametrize(("change", "fused"), [({}, True), ({"cube": 0.05}, False), ({"root": 0.7}, False), ({"power": 2.0}, False)])
def test_only_the_very_formula_is_replaced(change: dict[str, float], fused: bool) -> None:
    x = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    expected = run(gelu(**change), x)
    model = fuse_vision(gelu(**change))
    assert ("FastGelu" in kinds(model.graph)) is fused
    np.testing.assert_allclose(run(model, x), expected, atol=2e-6)
