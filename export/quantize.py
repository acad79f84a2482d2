"""Quantised weights in a graph: the pass that puts them in place of float ones, product by product.

One weight at a time is held in float32. Convolutions keep their weights: few bytes, and a quantised one loses accuracy on devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from .graph import MICROSOFT, Spool, new_initializer
from .int4 import METHODS, Blocks, pack_int4, round_to_nearest
from .precision import HEAD, Storage

# The largest code of a weight that is multiplied in integers: processors without VNNI add two products 255 · code in 16 bits, which larger ones overflow.
FACTOR = 64
ROWS = "_rows"  # ends the name of a weight that is stored [N, K], as an embedding of these rows has it, in place of a product's [K, N]


@dataclass(frozen=True)
class Weight:
    """What a product multiplies by: [K, N], or [N, K] where it stands by rows."""

    name: str
    tensor: ir.TensorProtocol
    by_rows: bool = False

    @property
    def columns(self) -> int:
        return int(self.tensor.shape.numpy()[1 if self.by_rows else 0])

    def rows(self) -> np.ndarray:
        """[N, K]."""
        return np.asarray(self.tensor.numpy() if self.by_rows else self.tensor.numpy().T)


def int8_rows(weight: np.ndarray, largest: int = 127) -> tuple[np.ndarray, np.ndarray]:
    """float[R, C] -> (codes int8[R, C], scales float32[R, 1]): symmetric, a row's largest magnitude is `largest`."""
    scales = np.maximum(np.abs(weight).max(axis=1, keepdims=True), np.finfo(np.float32).tiny).astype(np.float32) / largest
    return np.clip(np.rint(weight / scales), -largest, largest).astype(np.int8), scales


def int4_blocks(weight: np.ndarray, storage: Storage) -> Blocks:
    """float32[N, K] by the storage's method; GPTQ needs data, without it it is where it starts from."""
    return METHODS.get(storage.method, round_to_nearest)(weight, storage.block_size)


def quantize_products(
    model: ir.Model, storage: Callable[[str], Storage], calibrated: Mapping[str, Blocks] | None = None, spool: Spool | None = None
) -> ir.Model:
    """Store the weight of every MatMul as `storage(name of the weight)` says, in place; int4 in the blocks of `calibrated` where it has the weight. What is
    made stays in memory, or goes into `spool` at once.

    fp16: stored so, multiplied in float32. int8: activations uint8 per call, weights int8 per column, at most FACTOR in size; signed, because ONNX Runtime
    multiplies unsigned weights without the processor's instructions for it, four times slower (docs/speed.md). int4: MatMulNBits. A weight that
    stands by rows (the head of decoder.py, a Gemm) stays so.
    """
    shared: dict[str, list[ir.Value]] = {}  # an activation that feeds several products is quantised once
    model.graph.opset_imports[MICROSOFT] = 1
    for node in list(model.graph):
        weight = product_weight(node)
        if weight is None or node.inputs[0] is None:
            continue
        chosen = storage(weight.name)
        match chosen.word:
            case "fp16":
                new = _half(model, node, weight)
            case "int8":
                new = _int8(model, node, weight, shared)
            case "int4":
                blocks = (calibrated or {}).get(weight.name) or int4_blocks(np.ascontiguousarray(weight.rows(), dtype=np.float32), chosen)
                new = _int4(model, node, blocks, weight, chosen.accuracy_level)
            case _:
                continue
        for value in dict.fromkeys(value for made in new for value in made.inputs):
            if spool and value is not None and value.const_value is not None:
                value.const_value = spool.tensor(value.name or "", value.const_value.numpy())
        old = node.inputs[1]
        _put(model, node, new)
        if old is not None and old.name and not old.uses():
            del model.graph.initializers[old.name]
    return model


def product_weight(node: ir.Node) -> Weight | None:
    """The weight that a product of a float graph multiplies by: any MatMul's, and that of a head by rows. Other Gemms stay as they are, like convolutions."""
    value = node.inputs[1] if node.op_type in ("MatMul", "Gemm") and not node.domain else None
    if value is None or value.const_value is None or len(value.const_value.shape) != 2 or (node.op_type == "Gemm" and value.name != HEAD):
        return None
    return Weight(value.name or str(node.name), value.const_value, node.op_type == "Gemm")


def _half(model: ir.Model, node: ir.Node, weight: Weight) -> list[ir.Node]:
    half = _add(model, f"{weight.name}_fp16{ROWS * weight.by_rows}", weight.tensor.numpy().astype(np.float16))
    wide = _node("Cast", [half], f"{weight.name}.wide", to=ir.DataType.FLOAT.value)
    transposed: dict[str, Any] = {"transB": 1} if weight.by_rows else {}
    return [wide, _node(node.op_type, [_input(node), wide.outputs[0]], f"{node.name}.half", **transposed)]


def _int8(model: ir.Model, node: ir.Node, weight: Weight, shared: dict[str, list[ir.Value]]) -> list[ir.Node]:
    name = weight.name
    codes, scales = int8_rows(weight.rows(), FACTOR)
    x = _input(node)
    new: list[ir.Node] = []
    if (x.name or "") not in shared:
        new.append(_node("DynamicQuantizeLinear", [x], f"{x.name}.quantized", outputs=3))
        shared[x.name or ""] = list(new[-1].outputs)
    x_codes, x_scale, x_zero = shared[x.name or ""]
    w_codes, w_scale = _add(model, f"{name}_int8{ROWS * weight.by_rows}", codes if weight.by_rows else codes.T), _add(model, f"{name}_scale", scales[:, 0])
    if weight.by_rows:  # once, when a session folds constants
        new.append(_node("Transpose", [w_codes], f"{name}.columns", perm=[1, 0]))
        w_codes = new[-1].outputs[0]
    product = _node("MatMulInteger", [x_codes, w_codes, x_zero], f"{node.name}.integer")
    wide = _node("Cast", [product.outputs[0]], f"{node.name}.cast", to=ir.DataType.FLOAT.value)
    scale = _node("Mul", [x_scale, w_scale], f"{node.name}.scale")
    return [*new, product, wide, scale, _node("Mul", [wide.outputs[0], scale.outputs[0]], f"{node.name}.scaled")]


def half_if_exact(scales: np.ndarray) -> np.ndarray:
    half = scales.astype(np.float16)
    return half if np.array_equal(half, scales) else scales


def _int4(model: ir.Model, node: ir.Node, blocks: Blocks, weight: Weight, accuracy_level: int) -> list[ir.Node]:
    name, (rows, _, block_size) = weight.name, blocks.codes.shape
    new: list[ir.Node] = []
    scales = _add(model, f"{name}_scale", half_if_exact(blocks.scales))
    if scales.dtype == ir.DataType.FLOAT16:
        # Widened once, when a session folds constants: on the CPU MatMulNBits wants scales of the activations' type.
        new.append(_node("Cast", [scales], f"{name}_scale.wide", to=ir.DataType.FLOAT.value))
        scales = new[0].outputs[0]
    factors = [_input(node), _add(model, f"{name}_int4", pack_int4(blocks.codes)), scales]
    if blocks.zeros is not None:
        factors.append(_add(model, f"{name}_zero", pack_int4(blocks.zeros)))
    settings = dict(K=weight.columns, N=rows, bits=4, block_size=block_size)
    if accuracy_level:
        settings["accuracy_level"] = accuracy_level
    return [*new, _node("MatMulNBits", factors, node.name or name, domain=MICROSOFT, **settings)]


def _put(model: ir.Model, node: ir.Node, new: list[ir.Node]) -> None:
    """`new` in the place of `node`, the last one's output under the name that the old one's had."""
    old_output, new_output = node.outputs[0], new[-1].outputs[0]
    name, shape, dtype = old_output.name, old_output.shape, old_output.type
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], new, [old_output], [new_output])
    new_output.name, new_output.shape, new_output.type = name, shape, dtype


def _input(node: ir.Node) -> ir.Value:
    assert node.inputs[0] is not None
    return node.inputs[0]


def _node(kind: str, inputs: list[ir.Value], name: str, outputs: int = 1, domain: str = "", **attributes: Any) -> ir.Node:
    node = ir.node(kind, inputs, attributes=attributes, domain=domain, num_outputs=outputs, name=name)
    for index, value in enumerate(node.outputs):
        value.name = f"{name}.{index}"
    return node


def _add(model: ir.Model, name: str, values: np.ndarray) -> ir.Value:
    """The initializer `name`; one that exists already is the same constant."""
    if name not in model.graph.initializers:
        model.graph.register_initializer(new_initializer(name, ir.tensor(np.ascontiguousarray(values), name=name)))
    return model.graph.initializers[name]
