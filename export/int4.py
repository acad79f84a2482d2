"""Four bits a weight, in blocks of a row that share a scale: which codes, which scale, and how MatMulNBits has them packed.

Two ways that need the weights alone: `round_to_nearest`, symmetric, and `k_quant`, with a zero point for each block; gptq.py has one that needs data.
Scales are numbers that float16 holds, wherever that costs nothing: half their bytes, which is an eighth of a block of 32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

# Candidate scales, as fractions of the one that puts the largest weight at code -8, in the search for the least squared error.
STRETCH = np.linspace(1.15, 0.6, 23, dtype=np.float32)
# The same for a block with a zero point, as fractions of its range over fifteen steps.
RANGES = np.linspace(1.05, 0.7, 12, dtype=np.float32)
SEARCH_BYTES = 2**24  # of float32 handled at once, so that the search stays in the cache and its memory is bounded
HALF_ERROR = 2.0**-8  # the largest relative change by which a scale may become a float16

Trials = Callable[[np.ndarray], Iterator[tuple[np.ndarray | np.float32, np.ndarray | np.float32]]]


@dataclass(frozen=True)
class Blocks:
    """A weight [N, K] as int4: codes int8[N, blocks, block] in -8..7, scales float32[N, blocks], zeros int8[N, blocks], the code that stands for 0
    (None: 0 everywhere). K is padded with zeros to whole blocks."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None

    def weight(self, columns: int) -> np.ndarray:
        """The float32[N, columns] that MatMulNBits multiplies with."""
        offset = self.codes if self.zeros is None else self.codes - self.zeros[..., None]
        return np.asarray((offset * self.scales[..., None]).reshape(len(self.codes), -1)[:, :columns])


def round_to_nearest(weight: np.ndarray, block_size: int) -> Blocks:
    """float32[N, K] -> symmetric blocks.

    Each block's weight of largest magnitude lies at code -8 (the scale takes its opposite sign), which uses all sixteen codes; then the scale that
    gives the least squared error is searched around it, and refitted to the codes by least squares.
    """
    codes, _, scales = _search(weight, block_size, _symmetric)
    return Blocks(codes, scales)


def k_quant(weight: np.ndarray, block_size: int) -> Blocks:
    """float32[N, K] -> blocks with a zero point each: what round_to_nearest tries, and ranges from a block's least to its largest weight."""
    codes, zeros, scales = _search(weight, block_size, lambda x: (trial for trials in (_symmetric, _ranges) for trial in trials(x)))
    return Blocks(codes, scales, zeros)


METHODS: dict[str, Callable[[np.ndarray, int], Blocks]] = {"rtn": round_to_nearest, "k-quant": k_quant}


def half_scales(scales: np.ndarray) -> np.ndarray:
    """Scales as float16 holds them, but for those that it can't hold closely: in float32 still."""
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16).astype(np.float32)
    return np.where(np.abs(half - scales) <= HALF_ERROR * np.abs(scales), half, scales)


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """Codes -8..7, int8[..., n], as MatMulNBits stores them: +8, two a byte, the first in the low half, uint8[..., n / 2]; an odd last one is alone."""
    unsigned = (codes + 8).astype(np.uint8)
    if unsigned.shape[-1] % 2:
        unsigned = np.concatenate([unsigned, np.zeros_like(unsigned[..., :1])], axis=-1)
    return np.asarray(unsigned[..., 0::2] | (unsigned[..., 1::2] << 4))


def unpack_int4(packed: np.ndarray, count: int) -> np.ndarray:
    """The inverse of pack_int4: float32[..., count] in -8..7."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.float32)
    codes[..., 0::2], codes[..., 1::2] = packed % 16, packed // 16
    return codes[..., :count] - 8


def in_blocks(weight: np.ndarray, block_size: int) -> np.ndarray:
    """float[N, K] -> float32[N, blocks, block_size], padded with zeros."""
    rows, columns = weight.shape
    padded = np.zeros((rows, -(-columns // block_size) * block_size), np.float32)
    padded[:, :columns] = weight
    return padded.reshape(rows, -1, block_size)


def _search(weight: np.ndarray, block_size: int, trials: Trials) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes int8[N, blocks, block], zero points int8[N, blocks] and scales float32[N, blocks] of the best trial for each block."""
    blocks = in_blocks(weight, block_size)
    flat = blocks.reshape(-1, block_size)
    codes, zeros, scales = np.empty(flat.shape, np.int8), np.empty(len(flat), np.int8), np.empty(len(flat), np.float32)
    step = max(1, SEARCH_BYTES // (4 * block_size))
    for start in range(0, len(flat), step):
        here = slice(start, start + step)
        codes[here], zeros[here], scales[here] = _best(flat[here], trials)
    return codes.reshape(blocks.shape), zeros.reshape(blocks.shape[:2]), half_scales(scales).reshape(blocks.shape[:2])


def _best(x: np.ndarray, trials: Trials) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32[n, block] -> the best (codes, zeros, scales) of `trials`, each with its scale refitted."""
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    widest = np.where(np.abs(extreme) < np.finfo(np.float32).tiny, np.float32(1), extreme / -8)
    x = x / widest  # at most 8 in size, so that squares neither overflow nor vanish
    best, zeros, scales = np.zeros(x.shape, np.float32), np.zeros((len(x), 1), np.float32), np.ones(len(x), np.float32)
    best_gain = np.zeros(len(x), np.float32)
    for scale, zero in trials(x):
        steps = np.clip(np.rint(x / scale), -8 - zero, 7 - zero)
        # For fixed steps q the best scale is <x,q>/<q,q>; it lowers the squared error from |x|² by <x,q>²/<q,q>, which is what to maximise.
        along, norm = np.einsum("nb,nb->n", x, steps), np.maximum(np.einsum("nb,nb->n", steps, steps), 1)
        gain = along * along / norm
        better = gain > best_gain
        best[better], scales[better], best_gain[better] = steps[better], (along / norm)[better], gain[better]
        zeros[better] = np.broadcast_to(zero, zeros.shape)[better]
    return (best + zeros).astype(np.int8), zeros[:, 0].astype(np.int8), scales * widest[:, 0]


def _symmetric(_: np.ndarray) -> Iterator[tuple[np.float32, np.float32]]:
    for stretch in STRETCH:
        yield stretch, np.float32(0)


def _ranges(x: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    low, high = np.minimum(x.min(axis=1, keepdims=True), 0), np.maximum(x.max(axis=1, keepdims=True), 0)
    span = np.where(high > low, high - low, np.float32(1)) / 15
    for stretch in RANGES:
        yield span * stretch, np.clip(np.rint(-8 - low / (span * stretch)), -8, 7)
