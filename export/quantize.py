"""Quantising weights: int8 per row or column, int4 in blocks, and the passes that put them into a graph.

The maths is numpy on arrays; a pass replaces the MatMul nodes of a graph whose second factor is a weight, one at a time, so that no
more than one weight is held in float32. Convolutions keep their weights: few bytes, and a quantised one loses accuracy on devices.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from .graph import MICROSOFT, new_initializer

# Candidate scales, as fractions of the one that puts the largest weight at code -8, in the search for the least squared error.
STRETCH = np.linspace(1.15, 0.6, 23, dtype=np.float32)
# The largest code of a weight that is multiplied in integers: processors without VNNI add two products 255 · code in 16 bits, which larger ones overflow.
FACTOR = 64
SEARCH_BYTES = 2**24  # of float32 handled at once, so that the search stays in the cache and its memory is bounded


def int8_rows(weight: np.ndarray, largest: int = 127) -> tuple[np.ndarray, np.ndarray]:
    """float[R, C] -> (codes int8[R, C], scales float32[R, 1]): symmetric, a row's largest magnitude is `largest`."""
    scales = np.maximum(np.abs(weight).max(axis=1, keepdims=True), np.finfo(np.float32).tiny).astype(np.float32) / largest
    return np.clip(np.rint(weight / scales), -largest, largest).astype(np.int8), scales


def int4_blocks(weight: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """float32[N, K] -> (codes int8[N, blocks, block_size] in -8..7, scales float32[N, blocks]), round to nearest, symmetric.

    Each block's weight of largest magnitude lies at code -8 (the scale takes its opposite sign), which uses all sixteen codes; then the scale that
    gives the least squared error is searched around it, and refitted to the codes by least squares. K is padded with zeros.
    """
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    padded = np.zeros((rows, blocks * block_size), np.float32)
    padded[:, :columns] = weight
    flat = padded.reshape(-1, block_size)
    codes, scales = np.empty(flat.shape, np.int8), np.empty(len(flat), np.float32)
    step = max(1, SEARCH_BYTES // (4 * block_size))
    for start in range(0, len(flat), step):
        codes[start : start + step], scales[start : start + step] = _search_scale(flat[start : start + step])
    return codes.reshape(rows, blocks, block_size), scales.reshape(rows, blocks)


def _search_scale(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32[n, block] -> its best (codes, scales) over STRETCH, each candidate refitted."""
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    widest = np.where(np.abs(extreme) < np.finfo(np.float32).tiny, np.float32(1), extreme / -8)
    x = x / widest  # at most 8 in size, so that squares neither overflow nor vanish
    best_codes, best_scales = np.zeros(x.shape, np.float32), np.ones(len(x), np.float32)
    best_gain = np.zeros(len(x), np.float32)
    for stretch in STRETCH:
        codes = np.clip(np.rint(x / stretch), -8, 7)
        # For fixed codes q the best scale is <x,q>/<q,q>; it lowers the squared error from |x|² by <x,q>²/<q,q>, which is what to maximise.
        along, norm = np.einsum("nb,nb->n", x, codes), np.maximum(np.einsum("nb,nb->n", codes, codes), 1)
        gain = along * along / norm
        better = gain > best_gain
        best_codes[better], best_scales[better], best_gain[better] = codes[better], (along / norm)[better], gain[better]
    return best_codes.astype(np.int8), best_scales * widest[:, 0]


def dequantize_int4(codes: np.ndarray, scales: np.ndarray, columns: int) -> np.ndarray:
    """The float32[N, K] that MatMulNBits multiplies with."""
    return (codes * scales[:, :, None]).reshape(len(codes), -1)[:, :columns]


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """Codes -8..7, int8[N, blocks, block], as MatMulNBits stores them: +8, two a byte, the first in the low half, uint8[N, blocks, block / 2]."""
    unsigned = (codes + 8).astype(np.uint8)
    return unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)


def quantize_int8(model: ir.Model) -> ir.Model:
    """Replace every MatMul by a weight with a dynamically quantised one: activations uint8 per call, weights int8 per column, at most FACTOR in size.

    Signed, because ONNX Runtime multiplies unsigned weights without the processor's instructions for it, four times slower (docs/speed.md).
    """
    quantised: dict[str, list[ir.Value]] = {}  # an activation that feeds several products is quantised once

    def replace(node: ir.Node, x: ir.Value, weight: np.ndarray) -> list[ir.Node]:
        codes, scales = int8_rows(weight.T, FACTOR)
        name = _weight_name(node)
        new: list[ir.Node] = []
        if (x.name or "") not in quantised:
            new.append(_node("DynamicQuantizeLinear", [x], f"{x.name}.quantized", outputs=3))
            quantised[x.name or ""] = list(new[-1].outputs)
        x_codes, x_scale, x_zero = quantised[x.name or ""]
        w_codes, w_scale = _add(model, f"{name}_int8", codes.T), _add(model, f"{name}_scale", scales[:, 0])
        product = _node("MatMulInteger", [x_codes, w_codes, x_zero], f"{node.name}.integer")
        wide = _node("Cast", [product.outputs[0]], f"{node.name}.cast", to=ir.DataType.FLOAT.value)
        scale = _node("Mul", [x_scale, w_scale], f"{node.name}.scale")
        return [*new, product, wide, scale, _node("Mul", [wide.outputs[0], scale.outputs[0]], f"{node.name}.scaled")]

    return _replace_products(model, replace)


def quantize_int4(model: ir.Model, block_size: int = 32, accuracy_level: int = 0) -> ir.Model:
    """Replace every MatMul by a weight with MatMulNBits: 4 bits, symmetric, a float32 scale for each `block_size` weights of a column."""

    def replace(node: ir.Node, x: ir.Value, weight: np.ndarray) -> list[ir.Node]:
        inputs, outputs = weight.shape
        codes, scales = int4_blocks(np.ascontiguousarray(weight.T, dtype=np.float32), block_size)
        name = _weight_name(node)
        factors = [x, _add(model, f"{name}_int4", pack_int4(codes)), _add(model, f"{name}_scale", scales)]
        settings = dict(K=inputs, N=outputs, bits=4, block_size=block_size)
        if accuracy_level:
            settings["accuracy_level"] = accuracy_level
        return [_node("MatMulNBits", factors, node.name or name, domain=MICROSOFT, **settings)]

    model.graph.opset_imports[MICROSOFT] = 1
    return _replace_products(model, replace)


def _replace_products(model: ir.Model, replace: Callable[[ir.Node, ir.Value, np.ndarray], list[ir.Node]]) -> ir.Model:
    """Put `replace(node, x, weight)` in place of each MatMul of x with a two-dimensional weight; drop the weights that nothing uses then."""
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" and not node.domain else None
        if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2 or node.inputs[0] is None:
            continue
        new = replace(node, node.inputs[0], weight.const_value.numpy())
        old_output, new_output = node.outputs[0], new[-1].outputs[0]
        name, shape, dtype = old_output.name, old_output.shape, old_output.type
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], new, [old_output], [new_output])
        new_output.name, new_output.shape, new_output.type = name, shape, dtype
        if weight.name and not weight.uses():
            del model.graph.initializers[weight.name]
    return model


def _node(kind: str, inputs: list[ir.Value], name: str, outputs: int = 1, domain: str = "", **attributes: int) -> ir.Node:
    node = ir.node(kind, inputs, attributes=attributes, domain=domain, num_outputs=outputs, name=name)
    for index, value in enumerate(node.outputs):
        value.name = f"{name}.{index}"
    return node


def _add(model: ir.Model, name: str, values: np.ndarray) -> ir.Value:
    """The initializer `name`; one that exists already is the same constant."""
    if name not in model.graph.initializers:
        model.graph.register_initializer(new_initializer(name, ir.tensor(np.ascontiguousarray(values), name=name)))
    return model.graph.initializers[name]


def _weight_name(node: ir.Node) -> str:
    weight = node.inputs[1]
    assert weight is not None
    return weight.name or str(node.name)
