"""What a quantised bundle stores, held to the model it came from: its weights one by one, and PyTorch computing with them.

A quantised graph differs from the model by what its weights lost and by how its activations are rounded; in a small or random model that drowns a
wrong scale. Here the two are taken apart. The stored weights are read back from the file and compared with the original ones, block by block
(`weight_rows`); and PyTorch, given those weights and the same rounding (`store_weights`), is what the graph's arithmetic is held to, closely.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from ..runtime.graphs import TILES_AT_ONCE
from .decoder import product_layers
from .precision import Precision
from .quantize import FACTOR, dequantize_int4, int4_blocks, int8_rows
from .row import Row, judged
from .source import Source

# A healthy block's scale is the best one for its codes; float32 and codes at the edge of their range leave a thousandth.
SCALE = 0.01
# A weight is at most half a step from its code, or a tenth of its block's size away; a wrong zero point or order gives 1 and more.
HALF_STEPS = 1.01
BLOCK_ERROR = 0.35
PIECE = 2**22  # weights compared at once
# Accuracy levels at which MatMulNBits computes in float32, which is what PyTorch computes here.
EXACT_LEVELS = (0, 1)


def product_weights(graph: ir.Model) -> dict[str, ir.TensorProtocol]:
    """The weights [K, N] that products of a float graph multiply by, by name: what quantisation will replace."""
    second = [node.inputs[1] for node in graph.graph if node.op_type == "MatMul" and not node.domain]
    return {value.name: value.const_value for value in second if value and value.name and value.const_value is not None and len(value.const_value.shape) == 2}


def weight_rows(file: Path, part: str, originals: Mapping[str, ir.TensorProtocol]) -> list[Row]:
    """The stored weights of a quantised graph beside the original ones: the worst of each measure, named, and what quantisation lost in all."""
    stored = _initializers(file)
    lost = total = 0.0
    worst: dict[str, tuple[float, str, float]] = {}
    for name, original in originals.items():
        measured = _int4_measures if f"{name}_int4" in stored else _int8_measures
        for blocks, codes, scales in _pieces(stored, name, original.numpy().T):
            kept = codes * scales[..., None]
            for measure, found, tolerance in measured(blocks, kept, scales):
                worst[measure] = max(worst.get(measure, (-1.0, "", 0.0)), (found, name, tolerance))
            lost += float(np.square(blocks - kept).sum(dtype=np.float64))
            total += float(np.square(blocks).sum(dtype=np.float64))
    rows = [judged("weights", f"{part} {name}", ("", ""), measure, found, tolerance) for measure, (found, name, tolerance) in worst.items()]
    return [*rows, Row("weights", part, "", "", "relative error of all quantised weights", float(np.sqrt(lost / max(total, 1e-30))), None, "reported")]


def follows(precision: Precision) -> bool:
    """Whether something is quantised, and PyTorch can round as the graphs do: not where int4's products sum in int8 (accuracy levels above 1)."""
    words = {precision.vision, precision.embed, precision.decoder}
    return bool(words & {"int8", "int4"}) and (precision.accuracy_level in EXACT_LEVELS or "int4" not in words)


def store_weights(source: Source, precision: Precision, decoder: Path) -> None:
    """Change the source's model to what its bundle is: the decoder's weights as they stand in its file, the others rounded anew, activations rounded too.

    In place, because a second model would double the memory; the original is a load away.
    """
    text_model, head = source.family.text_parts(source.model)
    layers = product_layers(text_model, head)
    inside = {layer for side_by_side in layers.values() for layer in side_by_side}
    with torch.no_grad():
        if precision.decoder in ("int8", "int4"):
            stored = _initializers(decoder)
            for name, side_by_side in layers.items():
                _restore(side_by_side, _kept(stored, f"{name}.weight", side_by_side[0].in_features), precision.decoder)
        if precision.vision in ("int8", "int4"):
            for layer in (module for module in source.model.modules() if isinstance(module, nn.Linear) and module not in inside):
                _restore((layer,), _rounded_weight(layer, precision), precision.vision)
        if precision.embed == "int8":
            codes, scales = int8_rows(text_model.embed_tokens.weight.detach().numpy())
            text_model.embed_tokens.weight = _parameter(codes * scales)  # a new one: a tied head keeps other bits


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x as ONNX's DynamicQuantizeLinear keeps it: 256 even steps from the least to the largest value, zero among them (its specification's formula)."""
    low, high = np.float32(min(float(x.min()), 0.0)), np.float32(max(float(x.max()), 0.0))
    scale = (high - low) / np.float32(255)
    if scale == 0:
        return x
    zero = float(np.clip(np.rint(-low / scale), 0, 255))
    return ((torch.round(x / float(scale)) + zero).clamp(0, 255) - zero) * float(scale)


def _restore(layers: Sequence[nn.Linear], weight: np.ndarray, word: str) -> None:
    """Give layers that stand side by side their rows of float32 [N, K], and the rounding of what they are given."""
    start = 0
    for layer in layers:
        layer.weight = _parameter(weight[start : start + layer.out_features])
        start += layer.out_features
        if word == "int8":
            layer.register_forward_pre_hook(_round_inputs)


def _parameter(values: np.ndarray) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)), requires_grad=False)


def _rounded_weight(layer: nn.Linear, precision: Precision) -> np.ndarray:
    weight = np.ascontiguousarray(layer.weight.detach().numpy())
    if precision.vision == "int4":
        return dequantize_int4(*int4_blocks(weight, precision.block_size), weight.shape[1])
    codes, scales = int8_rows(weight, FACTOR)
    return codes * scales


def _initializers(file: Path) -> dict[str, Any]:
    return {name: value.const_value for name, value in ir.load(file).graph.initializers.items()}


def _kept(stored: Mapping[str, Any], name: str, columns: int) -> np.ndarray:
    """The weight float32 [N, K] that a product of the file multiplies by."""
    codes, scales = _codes(stored, name, slice(None))
    return (codes * scales[..., None]).reshape(len(codes), -1)[:, :columns]


def _round_inputs(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # The runtime encodes a few tiles at a time, each time with a range of its own; a decoder's batch is 1.
    return (torch.cat([rounded(piece) for piece in inputs[0].split(TILES_AT_ONCE)]) if inputs[0].dim() == 3 else rounded(inputs[0]), *inputs[1:])


def _pieces(stored: Mapping[str, Any], name: str, weight: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """A weight [N, K] some rows at a time: its blocks float32 [n, blocks, block], their stored codes of the same shape, and scales [n, blocks]."""
    rows, columns = weight.shape
    step = max(1, PIECE // columns)
    for start in range(0, rows, step):
        codes, scales = _codes(stored, name, slice(start, start + step))
        padded = np.zeros((len(codes), codes.shape[1] * codes.shape[2]), np.float32)
        padded[:, :columns] = weight[start : start + step]
        yield padded.reshape(codes.shape), codes, scales


def _codes(stored: Mapping[str, Any], name: str, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Signed codes float32 [n, blocks, block] and scales [n, blocks] of some rows, read as the operators' specifications have it."""
    scales = stored[f"{name}_scale"].numpy()
    if f"{name}_int4" in stored:
        packed = stored[f"{name}_int4"].numpy()[rows]  # n, blocks, bytes: the even element in a byte's low half, 8 stands for 0
        codes = np.empty((*packed.shape[:2], 2 * packed.shape[2]), np.float32)
        codes[..., 0::2], codes[..., 1::2] = packed % 16, packed // 16
        return codes - 8, scales.reshape(-1, packed.shape[1])[rows]
    return stored[f"{name}_int8"].numpy()[:, rows].T.astype(np.float32)[:, None], scales.reshape(-1, 1)[rows]


def _int4_measures(blocks: np.ndarray, kept: np.ndarray, scales: np.ndarray) -> list[tuple[str, float, float]]:
    """How far a block's scale is from the best one for its codes, and the largest error of a block against its size."""
    apart = blocks - kept
    along, size, norm, error = (np.einsum("nbk,nbk->nb", a, b) for a, b in ((blocks, kept), (kept, kept), (blocks, blocks), (apart, apart)))
    used = norm > np.finfo(np.float32).tiny
    off, lost = np.abs(along[used] / np.maximum(size[used], np.finfo(np.float32).tiny) - 1), np.sqrt(error[used] / norm[used])
    return [("a block's scale, off the best by", float(off.max(initial=0)), SCALE), ("relative error of a block", float(lost.max(initial=0)), BLOCK_ERROR)]


def _int8_measures(rows: np.ndarray, kept: np.ndarray, scales: np.ndarray) -> list[tuple[str, float, float]]:
    """The largest distance of a weight from what is stored, in half steps of its row."""
    apart = np.abs(rows - kept).max(axis=2, initial=0) / (np.abs(scales) / 2)
    return [("a weight's distance from its code, in half steps", float(apart.max(initial=0)), HALF_STEPS)]
