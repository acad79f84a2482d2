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

from .activations import known
from .int4 import Blocks, unpack_int4
from .precision import Precision
from .products import Product, give
from .quantize import ROWS, Weight
from .row import Row, judged
from .source import Source

# A healthy block's scale is the best one for its codes; float32 and codes at the edge of their range leave a thousandth.
SCALE = 0.01
# A weight is at most half a step from its code, or a tenth of its block's size away; a wrong zero point or order gives 1 and more.
HALF_STEPS = 1.01
BLOCK_ERROR = 0.35
HALF_EXPONENT = -14  # below 2^this float16 has even steps
PIECE = 2**22  # weights compared at once


def weight_rows(file: Path, part: str, originals: Mapping[str, Weight], calibrated: Mapping[str, Blocks]) -> list[Row]:
    """The stored weights of a quantised graph beside the original ones: the worst of each measure, named, and what quantisation lost in all.

    Those that were fitted to data (`calibrated`) are not the nearest ones; they must stand in the file as they were fitted.
    """
    stored = _initializers(file)
    lost = total = 0.0
    worst: dict[str, tuple[float, str, float]] = {}
    for name, original in originals.items():
        if not _has(stored, name):
            continue
        fitted = calibrated[name].weight(original.columns) if name in calibrated else None
        for here, blocks, steps, scales in _pieces(stored, name, original.rows()):
            kept = steps * scales[..., None]
            for measure, found, tolerance in _measures(stored, name, blocks, kept, scales) if fitted is None else _fitted(fitted[here], kept):
                worst[measure] = max(worst.get(measure, (-1.0, "", 0.0)), (found, name, tolerance))
            lost += float(np.square(blocks - kept).sum(dtype=np.float64))
            total += float(np.square(blocks).sum(dtype=np.float64))
    rows = [judged("weights", f"{part} {name}", ("", ""), measure, found, tolerance) for measure, (found, name, tolerance) in worst.items()]
    return [*rows, Row("weights", part, "", "", "relative error of all quantised weights", float(np.sqrt(lost / max(total, 1e-30))), None, "reported")]


def follows(precision: Precision, products: Sequence[Product]) -> bool:
    """Whether something is quantised, and PyTorch can round as the graphs of these products do on this machine."""
    words = {precision.vision, precision.embed, precision.decoder}
    return bool(precision.layers or words & {"int8", "int4"}) and all(
        known(precision.storage(product.part, product.name), product.shape[1]) for product in products
    )


def store_weights(source: Source, precision: Precision, products: Sequence[Product], files: Mapping[str, Path]) -> None:
    """Change the source's model to what its bundle is: the weights of its products as they stand in the part's file (`files`), activations rounded too.

    In place, because a second model would double the memory; the original is a load away.
    """
    stored = {part: _initializers(file) for part, file in files.items()}
    with torch.no_grad():
        for product in products:
            storage = precision.storage(product.part, product.name)
            if _has(stored[product.part], product.name):
                give(product, _kept(stored[product.part], product.name, product.shape[1]), storage)


def _has(stored: Mapping[str, Any], name: str) -> bool:
    return any(f"{name}_{kind}{order}" in stored for kind in ("int4", "int8", "fp16") for order in ("", ROWS))


def _initializers(file: Path) -> dict[str, Any]:
    return {name: value.const_value for name, value in ir.load(file).graph.initializers.items()}


def _kept(stored: Mapping[str, Any], name: str, columns: int) -> np.ndarray:
    """The weight float32 [N, K] that a product of the file multiplies by."""
    steps, scales = _steps(stored, name, slice(None))
    return np.asarray((steps * scales[..., None]).reshape(len(steps), -1)[:, :columns])


def _pieces(stored: Mapping[str, Any], name: str, weight: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """A weight [N, K] some rows at a time: which, their blocks float32 [n, blocks, block], their stored steps of the same shape, and scales [n, blocks]."""
    rows, columns = weight.shape
    step = max(1, PIECE // columns)
    for start in range(0, rows, step):
        here = slice(start, start + step)
        steps, scales = _steps(stored, name, here)
        padded = np.zeros((len(steps), steps.shape[1] * steps.shape[2]), np.float32)
        padded[:, :columns] = weight[here]
        yield here, padded.reshape(steps.shape), steps, scales


def _steps(stored: Mapping[str, Any], name: str, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Of some rows, how many scales each weight is, float32 [n, blocks, block], and the scales [n, blocks], read as the operators' specifications have it."""
    if (half := _some(stored, f"{name}_fp16", rows)) is not None:
        return half[:, None], np.ones((len(half), 1), np.float32)
    scales = stored[f"{name}_scale"].numpy().astype(np.float32)
    if f"{name}_int4" in stored:
        packed = stored[f"{name}_int4"].numpy()[rows]  # n, blocks, bytes: the even element in a byte's low half, 8 stands for 0
        codes = unpack_int4(packed, 2 * packed.shape[2])
        if f"{name}_zero" in stored:
            codes -= unpack_int4(stored[f"{name}_zero"].numpy()[rows], packed.shape[1])[..., None]
        return codes, scales.reshape(-1, packed.shape[1])[rows]
    whole = _some(stored, f"{name}_int8", rows)
    assert whole is not None
    return whole[:, None], scales.reshape(-1, 1)[rows]


def _some(stored: Mapping[str, Any], name: str, rows: slice) -> np.ndarray | None:
    """Some rows float32 [n, K] of a tensor that is stored by rows or by columns."""
    if f"{name}{ROWS}" in stored:
        return np.asarray(stored[f"{name}{ROWS}"].numpy()[rows].astype(np.float32))
    return np.asarray(stored[name].numpy()[:, rows].T.astype(np.float32)) if name in stored else None


def _measures(stored: Mapping[str, Any], name: str, blocks: np.ndarray, kept: np.ndarray, scales: np.ndarray) -> list[tuple[str, float, float]]:
    if f"{name}_int4" in stored:
        return _int4_measures(blocks, kept)
    if f"{name}_int8" in stored or f"{name}_int8{ROWS}" in stored:
        return _int8_measures(blocks, kept, scales)
    # float16 has ten bits behind the first.
    steps = np.exp2(np.maximum(np.frexp(blocks)[1] - 1, HALF_EXPONENT).astype(np.float32) - 10)
    return [("a weight's distance from its float16, in half steps", float((2 * np.abs(blocks - kept) / steps).max(initial=0)), HALF_STEPS)]


def _fitted(weight: np.ndarray, kept: np.ndarray) -> list[tuple[str, float, float]]:
    apart = np.abs(weight - kept.reshape(len(kept), -1)[:, : weight.shape[1]])
    return [("a weight's distance from the one fitted to data", float(apart.max(initial=0)), 0.0)]


def _int4_measures(blocks: np.ndarray, kept: np.ndarray) -> list[tuple[str, float, float]]:
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
