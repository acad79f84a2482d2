"""Passes over a traced vision tower: its attention and its activation in ONNX Runtime's fused operators. What does not match a pattern stays as it is.

A traced tower writes every attention score to memory, adds the mask, reads all again for the softmax and once more for the values: 48 MiB a layer for one tile
of 512 pixels. MultiHeadAttention works on pieces that stay in the cache, though only where nothing is masked; so where the tower has a mask, each
layer holds both forms, and the masked one runs when some patch is hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from .graph import MICROSOFT, new_initializer

BY_HEAD = (0, 2, 1, 3)  # [n, N, heads, h] <-> [n, heads, N, h]


@dataclass(frozen=True)
class Attention:
    """softmax(query · keyᵀ · scale + bias) · value, each factor f[n, N, heads · h] before it is cut by heads; `last` gives f[n, N, heads · h]."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    bias: ir.Value | None  # f[n, 1, 1, N]: 0 where a patch is seen
    heads: int
    scale: float
    last: ir.Node


def fuse_vision(model: ir.Model) -> ir.Model:
    """Replace what matches, in place; inputs, outputs and weights stay."""
    model.graph.opset_imports[MICROSOFT] = 1
    masks: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for node in list(model.graph):
        if node.op_type == "Tanh" and (found := gelu_input(node)):
            x, last = found
            _put(model, last, [ir.node("FastGelu", [x], domain=MICROSOFT, name=f"{node.name}.gelu")])
        elif node.op_type == "Softmax" and (attention := match_attention(node)):
            _put(model, attention.last, _fused(model, attention, masks, f"{node.name}.attention"))
    passes.RemoveUnusedNodesPass()(model)
    return model


def gelu_input(tanh: ir.Node) -> tuple[ir.Value, ir.Node] | None:
    """x and the last node of x · (½ · (1 + tanh(√(2/π) · (x + 0.044715 x³)))), the tanh form of GELU, which FastGelu computes in one pass over memory."""
    outer = _maker(tanh.inputs[0], "Mul")
    inner = _maker(_other(outer, np.sqrt(2 / np.pi)), "Add")
    half = _user(_user(tanh, "Add", 1.0), "Mul", 0.5)
    last = _user(half, "Mul")
    if inner is None or half is None or last is None:
        return None
    x = next((value for value in last.inputs if value is not None and value is not half.outputs[0]), None)
    cube = _maker(_other(_maker(next((value for value in inner.inputs if value is not x), None), "Mul"), 0.044715), "Pow")
    if x is None or x not in inner.inputs or cube is None or cube.inputs[0] is not x or not _is(cube.inputs[1], 3.0):
        return None
    return x, last


def match_attention(softmax: ir.Node) -> Attention | None:
    """The attention around a softmax over its scores."""
    scores, bias = softmax.inputs[0], None
    if masked := _maker(scores, "Add"):
        scores, bias = masked.inputs
        if bias is None or bias.shape is None or len(bias.shape) != 4 or list(bias.shape)[1:3] != [1, 1]:
            return None
    product, mixed = _maker(scores, "MatMul"), _user(softmax, "MatMul")
    last = _user(_user(mixed, "Transpose", order=BY_HEAD), "Reshape")
    if product is None or mixed is None or last is None or mixed.inputs[0] is not softmax.outputs[0]:
        return None
    scaled = _maker(product.inputs[0], "Mul")
    scale = next((value for value in scaled.inputs if _number(value) is not None), None) if scaled else None
    query = _flat(next((value for value in scaled.inputs if value is not scale), None)) if scaled else None
    key, value = _flat(product.inputs[1], (0, 2, 3, 1)) or _flat(_transposed(product.inputs[1])), _flat(mixed.inputs[1])
    number, shape = _number(scale), scaled.outputs[0].shape if scaled else None
    if query is None or key is None or value is None or number is None or shape is None or not isinstance(shape[1], int):
        return None
    return Attention(query, key, value, bias, shape[1], number, last)


def _fused(model: ir.Model, found: Attention, masks: dict[ir.Value, tuple[ir.Value, ir.Value]], name: str) -> list[ir.Node]:
    def attend(kind: str, *mask: ir.Value | None) -> ir.Node:
        settings = dict(num_heads=found.heads, scale=found.scale, mask_filter_value=float(np.finfo(np.float32).min))
        return ir.node("MultiHeadAttention", [found.query, found.key, found.value, *mask], settings, domain=MICROSOFT, name=f"{name}.{kind}")

    if found.bias is None:
        return [attend("fused")]
    first: list[ir.Node] = []
    if found.bias not in masks:
        first = _mask_nodes(model, found.bias)
        masks[found.bias] = first[2].outputs[0], first[-1].outputs[0]
    seen, everything = masks[found.bias]
    branches = {
        f"{branch}_branch": ir.Graph([], node.outputs, nodes=[node], name=f"{name}.{branch}")
        for branch, node in {"then": attend("whole"), "else": attend("masked", None, seen)}.items()
    }
    for branch, graph in branches.items():
        graph.outputs[0].name = f"{name}.{branch}.out"
        graph.outputs[0].shape, graph.outputs[0].type = found.last.outputs[0].shape, found.last.outputs[0].type
    return [*first, ir.node("If", [everything], branches, name=name)]


def _mask_nodes(model: ir.Model, bias: ir.Value) -> list[ir.Node]:
    """From f[n, 1, 1, N] to i32[n, N], 1 where a patch is seen, and whether all are."""
    zero, axes = (_constant(model, value) for value in (np.array(0, np.float32), np.array([1, 2], np.int64)))
    flat = ir.node("Squeeze", [bias, axes], name=f"{bias.name}.flat")
    seen = ir.node("GreaterOrEqual", [flat.outputs[0], zero], name=f"{bias.name}.seen")
    marks = ir.node("Cast", [seen.outputs[0]], {"to": ir.DataType.INT32.value}, name=f"{bias.name}.marks")
    least = ir.node("ReduceMin", [marks.outputs[0]], {"keepdims": 0}, name=f"{bias.name}.least")
    every = ir.node("Cast", [least.outputs[0]], {"to": ir.DataType.BOOL.value}, name=f"{bias.name}.every")
    return [flat, seen, marks, least, every]


def _constant(model: ir.Model, value: np.ndarray) -> ir.Value:
    name = f"fuse.{value.dtype}.{value.tobytes().hex()}"
    if name not in model.graph.initializers:
        model.graph.register_initializer(new_initializer(name, ir.tensor(value, name=name)))
    return model.graph.initializers[name]


def _put(model: ir.Model, old: ir.Node, new: list[ir.Node]) -> None:
    """`new` where `old` stands, the last one's output under the old one's name."""
    for node in new:
        for value in node.outputs:
            value.name = value.name or f"{node.name}.out"
    before, after = old.outputs[0], new[-1].outputs[0]
    name, after.shape, after.type = before.name, before.shape, before.type
    ir.convenience.replace_nodes_and_values(model.graph, old, [old], new, [before], [after])
    after.name = name


def _maker(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None


def _user(node: ir.Node | None, kind: str, number: float | None = None, order: Sequence[int] | None = None) -> ir.Node | None:
    """The only user of a node's output, if it is of `kind`, with `number` as its other factor or `order` as its permutation."""
    uses = list(node.outputs[0].uses()) if node is not None else []
    if len(uses) != 1 or uses[0].node.op_type != kind:
        return None
    user = uses[0].node
    if number is not None and not any(_is(value, number) for value in user.inputs):
        return None
    return user if order is None or tuple(user.attributes["perm"].as_ints()) == tuple(order) else None


def _other(node: ir.Node | None, number: float) -> ir.Value | None:
    """The input of a node that stands beside the constant `number`."""
    if node is None or not any(_is(value, number) for value in node.inputs):
        return None
    return next((value for value in node.inputs if not _is(value, number)), None)


def _number(value: ir.Value | None) -> float | None:
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().item())


def _is(value: ir.Value | None, number: float) -> bool:
    found = _number(value)
    return found is not None and bool(np.isclose(found, number, rtol=1e-5))


def _transposed(value: ir.Value | None) -> ir.Value | None:
    node = _maker(value, "Transpose")
    return node.inputs[0] if node is not None and tuple(node.attributes["perm"].as_ints()) == (0, 1, 3, 2) else None


def _flat(value: ir.Value | None, order: Sequence[int] = BY_HEAD) -> ir.Value | None:
    """f[n, N, heads · h] from which a factor was cut by heads."""
    node = _maker(value, "Transpose")
    cut = _maker(node.inputs[0], "Reshape") if node is not None and tuple(node.attributes["perm"].as_ints()) == tuple(order) else None
    flat = cut.inputs[0] if cut is not None else None
    return flat if flat is not None and flat.shape is not None and len(flat.shape) == 3 else None
