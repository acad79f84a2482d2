"""The operations of Core ML's intermediate language (MIL), each as a numpy function whose parameters bear MIL's names.

Written from the op definitions of opset iOS 18. Numbers of either float type arrive as float32 arrays; the program's float16 rounding is applied to results by
the caller, so that products and sums accumulate in float32 as Apple's engines do. No function writes into its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
# The integer and boolean types of MIL; both float types are float32 arrays here.
NUMPY_TYPES = {"fp16": np.float32, "fp32": np.float32, "bool": np.bool_} | {
    f"{sign}int{bits}": np.dtype(f"{sign}int{bits}").type for sign in ("", "u") for bits in (8, 16, 32)
}


# Products


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x [..., in] times weight [out, in] transposed, plus bias [out]."""
    product = x @ weight.T
    return product if bias is None else product + bias


def matmul(x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False) -> Array:
    return (np.swapaxes(x, -1, -2) if transpose_x else x) @ (np.swapaxes(y, -1, -2) if transpose_y else y)


def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Sequence[int] = (1, 1),
    pad_type: str = "valid",
    pad: Sequence[int] = (0, 0, 0, 0),
    dilations: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Array:
    """Two-dimensional convolution: x [N, in, H, W], weight [out, in / groups, kh, kw], `pad` top, bottom, left, right."""
    if pad_type not in ("valid", "custom"):
        raise NotImplementedError(f"pad_type '{pad_type}'")
    if weight.shape[2:] == (1, 1) and groups == 1 and tuple(strides) == (1, 1) and not any(pad):
        result = (weight[:, :, 0, 0] @ x.reshape(*x.shape[:2], -1)).reshape(len(x), len(weight), *x.shape[2:])
    else:
        if pad_type == "custom":
            x = np.pad(x, ((0, 0), (0, 0), tuple(pad[:2]), tuple(pad[2:])))
        parts = zip(np.split(x, groups, axis=1), np.split(weight, groups), strict=True)
        result = np.concatenate([_windows_times(part, kernel, strides, dilations) for part, kernel in parts], axis=1)
    return result if bias is None else result + bias[:, None, None]


def _windows_times(x: Array, weight: Array, strides: Sequence[int], dilations: Sequence[int]) -> Array:
    """One group of a convolution: the windows of x [N, in, H, W] times weight [out, in, kh, kw]."""
    reach = tuple((size - 1) * step + 1 for size, step in zip(weight.shape[2:], dilations, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(x, reach, axis=(2, 3))
    windows = windows[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]  # [N, in, h, w, kh, kw]
    return np.moveaxis(np.tensordot(windows, weight, axes=((1, 4, 5), (1, 2, 3))), -1, 1)


def scaled_dot_product_attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    """softmax(query key^T / sqrt(width) + mask) value; a boolean mask is true where a position attends."""
    scores = query @ np.swapaxes(key, -1, -2) / np.float32(math.sqrt(query.shape[-1]))
    if attn_mask is not None:
        scores = scores + (np.where(attn_mask, np.float32(0), np.float32(-np.inf)) if attn_mask.dtype == np.bool_ else attn_mask)
    return softmax(scores) @ value


# Normalisation and activations


def softmax(x: Array, axis: int = -1) -> Array:
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


def layer_norm(x: Array, axes: Sequence[int], gamma: Array | None = None, beta: Array | None = None, epsilon: float = 1e-5) -> Array:
    """Zero mean and unit variance over `axes`, then gamma and beta, which have those axes' shape."""
    axes = tuple(axis % x.ndim for axis in axes)
    centred = x - x.mean(axis=axes, keepdims=True)
    normal = centred / np.sqrt(np.square(centred).mean(axis=axes, keepdims=True) + np.float32(epsilon))
    shape = tuple(size if axis in axes else 1 for axis, size in enumerate(x.shape))
    normal = normal if gamma is None else normal * gamma.reshape(shape)
    return normal if beta is None else normal + beta.reshape(shape)


def batch_norm(x: Array, mean: Array, variance: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: float = 1e-5) -> Array:
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta, one number of each a channel, the second axis of x."""
    shape = (-1,) + (1,) * (x.ndim - 2)
    scale = 1 / np.sqrt(variance + np.float32(epsilon)) * (1 if gamma is None else gamma)
    normal = (x - mean.reshape(shape)) * scale.reshape(shape)
    return normal if beta is None else normal + beta.reshape(shape)


def erf(x: Array) -> Array:
    """The error function to 2e-7, which numpy lacks (Abramowitz & Stegun 1964, formula 7.1.26)."""
    t = 1 / (1 + np.float32(0.3275911) * np.abs(x))
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * np.float32(1.061405429)))))
    return np.sign(x) * (1 - series * np.exp(-x * x))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def gelu(x: Array, mode: str = "EXACT") -> Array:
    """x times the normal distribution's cumulative function, exact or by its tanh or sigmoid approximation (Hendrycks & Gimpel 2016)."""
    if mode == "EXACT":
        return 0.5 * x * (1 + erf(x * np.float32(math.sqrt(0.5))))
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))
    return x * sigmoid(np.float32(1.702) * x)


def rsqrt(x: Array, epsilon: float = 1e-12) -> Array:
    return 1 / np.sqrt(x + np.float32(epsilon))


def inverse(x: Array, epsilon: float = 1e-4) -> Array:
    return 1 / (x + np.float32(epsilon))


def log(x: Array, epsilon: float = 1e-45) -> Array:
    return np.log(x + np.float32(epsilon))


# Types, elements and sums


def cast(x: Array, dtype: str) -> Array:
    return np.asarray(x).astype(NUMPY_TYPES[dtype])


def real_div(x: Array, y: Array) -> Array:
    """Division of the numbers' own type: integers stay integers, rounded towards zero."""
    quotient = np.true_divide(x, y)
    return quotient if np.issubdtype(np.asarray(x).dtype, np.floating) else np.trunc(quotient).astype(np.asarray(x).dtype)


def _unary(function: Callable[..., Any]) -> Callable[..., Array]:
    return lambda x: function(x)


def _binary(function: Callable[..., Any]) -> Callable[..., Array]:
    return lambda x, y: function(x, y)


def _reduction(function: Callable[..., Any]) -> Callable[..., Array]:
    def reduce(x: Array, axes: Sequence[int] | None = None, keep_dims: bool = False) -> Array:
        return np.asarray(function(x, axis=None if axes is None else tuple(axes), keepdims=bool(keep_dims)))

    return reduce


# Shapes and places


def reshape(x: Array, shape: Sequence[int]) -> Array:
    """A 0 in `shape` keeps that dimension, a -1 takes what is left."""
    return x.reshape([x.shape[axis] if size == 0 else int(size) for axis, size in enumerate(shape)])


def concat(values: Sequence[Array], axis: int, interleave: bool = False) -> Array:
    if interleave:
        stacked = np.stack(values, axis=axis % np.ndim(values[0]) + 1)
        return stacked.reshape([size * len(values) if i == axis % np.ndim(values[0]) else size for i, size in enumerate(values[0].shape)])
    return np.concatenate([np.atleast_1d(value) for value in values], axis=axis)


def split(x: Array, axis: int, num_splits: int | None = None, split_sizes: Sequence[int] | None = None) -> tuple[Array, ...]:
    places = int(num_splits or 1) if split_sizes is None else np.cumsum(split_sizes)[:-1]
    return tuple(np.split(x, places, axis=axis))


def gather(x: Array, indices: Array, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Array:
    if batch_dims:
        raise NotImplementedError(f"batch_dims {batch_dims}")
    return np.take(x, np.asarray(indices).astype(np.int64), axis=axis)


def slice_by_index(
    x: Array,
    begin: Sequence[int],
    end: Sequence[int],
    stride: Sequence[int] | None = None,
    begin_mask: Sequence[bool] | None = None,
    end_mask: Sequence[bool] | None = None,
    squeeze_mask: Sequence[bool] | None = None,
) -> Array:
    return np.asarray(x[_slices(x.ndim, begin, end, stride, begin_mask, end_mask, squeeze_mask)])


def slice_update(
    x: Array,
    update: Array,
    begin: Sequence[int],
    end: Sequence[int],
    stride: Sequence[int] | None = None,
    begin_mask: Sequence[bool] | None = None,
    end_mask: Sequence[bool] | None = None,
    squeeze_mask: Sequence[bool] | None = None,
) -> Array:
    updated = x.copy()
    target = updated[_slices(x.ndim, begin, end, stride, begin_mask, end_mask, squeeze_mask)]
    if target.shape != update.shape:
        raise ValueError(f"an update of shape {update.shape} for a slice of shape {target.shape}")
    target[...] = update
    return updated


def _slices(rank: int, begin: Any, end: Any, stride: Any, begin_mask: Any, end_mask: Any, squeeze_mask: Any) -> tuple[slice | int, ...]:
    """A mask's true ignores begin or end at that axis; squeeze_mask's true takes the one element at begin."""
    places: list[slice | int] = []
    for axis in range(rank):
        first = None if begin_mask is not None and begin_mask[axis] else int(begin[axis])
        last = None if end_mask is not None and end_mask[axis] else int(end[axis])
        squeezed = squeeze_mask is not None and squeeze_mask[axis]
        places.append(int(begin[axis]) if squeezed else slice(first, last, None if stride is None else int(stride[axis])))
    return tuple(places)


# States: a pair of the dictionary of states and the state's name


def read_state(input: tuple[dict[str, Array], str]) -> Array:
    states, name = input
    return states[name]


def coreml_update_state(state: tuple[dict[str, Array], str], value: Array) -> Array:
    states, name = state
    states[name] = value
    return value


# Compressed constants


def constexpr_blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """scale * (data - offset), each scale standing for a block of data.shape / scale.shape."""
    for axis, (size, scales) in enumerate(zip(data.shape, scale.shape, strict=True)):
        scale = np.repeat(scale, size // scales, axis)
        offset = None if offset is None else np.repeat(offset, size // scales, axis)
    wide = data.astype(np.float32)
    return (wide if offset is None else wide - offset.astype(np.float32)) * scale


def constexpr_lut_to_dense(indices: Array, lut: Array, vector_axis: int | None = None) -> Array:
    """Each index replaced by its entry of the table [..., entries, 1] of its group."""
    if lut.shape[-1] != 1:
        raise NotImplementedError("a table of vectors")
    table, groups = lut[..., 0], lut.shape[: indices.ndim]
    for axis, (size, count) in enumerate(zip(indices.shape, groups, strict=True)):
        table = np.repeat(table, size // count, axis)
    return np.take_along_axis(table, indices[..., None].astype(np.int64), axis=-1)[..., 0]


OPERATIONS: dict[str, Callable[..., Any]] = {
    **{f.__name__: f for f in (linear, matmul, conv, scaled_dot_product_attention, softmax, layer_norm, batch_norm)},
    **{f.__name__: f for f in (erf, sigmoid, gelu, rsqrt, inverse, log, cast)},
    **{f.__name__: f for f in (real_div, reshape, concat, split, gather, slice_by_index, slice_update, read_state, coreml_update_state)},
    **{f.__name__: f for f in (constexpr_blockwise_shift_scale, constexpr_lut_to_dense)},
    **{name: _unary(getattr(np, name)) for name in ("abs", "sqrt", "exp", "tanh", "square", "floor", "ceil", "sin", "cos", "sign", "logical_not")},
    **{name: _binary(getattr(np, name)) for name in ("maximum", "minimum", "mod", "equal", "not_equal", "less", "less_equal", "greater", "greater_equal")},
    **{name: _binary(getattr(np, name)) for name in ("logical_and", "logical_or", "logical_xor")},
    **{name: _binary(function) for name, function in {"add": np.add, "sub": np.subtract, "mul": np.multiply, "pow": np.power}.items()},
    **{f"reduce_{name}": _reduction(getattr(np, name)) for name in ("mean", "sum", "max", "min")},
    "floor_div": _binary(np.floor_divide),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * sigmoid(x),
    "clip": lambda x, alpha, beta: np.clip(x, alpha, beta),
    "select": lambda cond, a, b: np.where(cond, a, b),
    "identity": lambda x: x,
    "transpose": lambda x, perm: x.transpose([int(axis) for axis in perm]),
    "expand_dims": lambda x, axes: np.expand_dims(x, tuple(int(axis) for axis in axes)),
    "squeeze": lambda x, axes=None: np.squeeze(x, None if axes is None else tuple(int(axis) for axis in axes)),
    "stack": lambda values, axis: np.stack(values, axis=axis),
    "tile": lambda x, reps: np.tile(x, [int(count) for count in reps]),
    "shape": lambda x: np.array(np.shape(x), dtype=np.int32),
    "fill": lambda shape, value: np.full([int(size) for size in shape], value),
}

# These only move numbers, which need no rounding afterwards.
MOVES = frozenset(
    {"reshape", "concat", "split", "gather", "slice_by_index", "slice_update", "read_state", "coreml_update_state", "transpose", "expand_dims", "squeeze"}
    | {"stack", "tile", "shape", "identity", "select", "abs", "sign", "relu", "maximum", "minimum", "reduce_max", "reduce_min"}
)
