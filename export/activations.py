"""What a product is given of its inputs: an int8 product rounds them to eight bits, and so may an int4 one, each in a way of its own.

PyTorch rounds the inputs of its layers alike (products.give), so that a bundle's arithmetic can be held to it closely.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import onnx
import onnxruntime
import torch

from ..runtime.graphs import TILES_AT_ONCE
from .int4 import pack_int4
from .precision import INT8_SUMS, Storage

Rounding = Callable[[torch.Tensor], torch.Tensor]
FLOAT32, UNKNOWN = "float32", "unknown"
PROBE_BLOCKS, PROBE_ROWS = 4, 3
CLOSE = 2e-4  # of the largest input: kernels take sums of blocks apart, which leaves 3e-5; a step of any rounding is 4e-3 or more


def by_tensor(x: torch.Tensor) -> torch.Tensor:
    """x as ONNX's DynamicQuantizeLinear keeps it: 256 even steps from the least to the largest value, zero among them (its specification's formula)."""
    return _even_steps(x, x.min(), x.max())


def by_row(x: torch.Tensor) -> torch.Tensor:
    """The same, each row [K] in steps of its own: Arm's kernels (KleidiAI's lhs_quant_pack_qai8dxp)."""
    return _even_steps(x, x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))


def by_block(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """x [..., K] in blocks of a row as int4 weights have them, each in steps of 1/127 of its largest magnitude (MLAS's QuantizeARow_CompInt8)."""
    columns = x.shape[-1]
    blocks = torch.nn.functional.pad(x, (0, -columns % block_size)).unflatten(-1, (-1, block_size))
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = torch.round(blocks * torch.where(largest > 0, 127 / largest, 0))
    return (codes * (largest / 127)).flatten(-2)[..., :columns]


def rounding_of(storage: Storage, columns: int) -> Rounding | None:
    """How a product whose weight [N, `columns`] is stored so rounds what it is given on this machine; None if it does not, or in no known way."""
    if storage.word == "int8":
        return _a_few_tiles
    return _ways(storage.block_size).get(_found(storage, columns)) if _sums_in_int8(storage) else None


def known(storage: Storage, columns: int) -> bool:
    """Whether `rounding_of` says all that there is to say."""
    return not _sums_in_int8(storage) or _found(storage, columns) != UNKNOWN


def _a_few_tiles(x: torch.Tensor) -> torch.Tensor:
    # The runtime encodes a few tiles at a time, each time with a range of its own; a decoder's batch is 1.
    return torch.cat([by_tensor(piece) for piece in x.split(TILES_AT_ONCE)]) if x.dim() == 3 else by_tensor(x)


def _sums_in_int8(storage: Storage) -> bool:
    return storage.word == "int4" and storage.accuracy_level >= INT8_SUMS


def _ways(block_size: int) -> dict[str, Rounding]:
    return {"block": partial(by_block, block_size=block_size), "row": by_row}


def _found(storage: Storage, columns: int) -> str:
    return _probed(storage.block_size, storage.accuracy_level, storage.method == "k-quant", columns % storage.block_size == 0)


@cache
def _probed(block_size: int, accuracy_level: int, zero_points: bool, whole_blocks: bool) -> str:
    """Which way MatMulNBits has here: processors have kernels of their own, and some have none that sums in int8."""
    columns = PROBE_BLOCKS * block_size - (0 if whole_blocks else block_size // 2)
    x = np.random.default_rng(0).standard_normal((PROBE_ROWS, columns)).astype(np.float32) + 0.5  # ranges are not even around 0
    found, inputs = torch.from_numpy(_through_identity(x, block_size, accuracy_level, zero_points)), torch.from_numpy(x)
    expected = {FLOAT32: inputs} | {name: way(inputs) for name, way in _ways(block_size).items()}
    errors = {name: float((values - found).abs().max()) for name, values in expected.items()}
    best = min(errors, key=lambda name: errors[name])
    return best if errors[best] <= CLOSE * float(np.abs(x).max()) else UNKNOWN


def _through_identity(x: np.ndarray, block_size: int, accuracy_level: int, zero_points: bool) -> np.ndarray:
    """float32 [M, K] times the identity as MatMulNBits has it: what the product is given."""
    columns = x.shape[1]
    blocks = -(-columns // block_size)
    codes = np.eye(columns, blocks * block_size, dtype=np.int8).reshape(columns, blocks, block_size)
    constants = {"codes": pack_int4(codes), "scales": np.ones((columns, blocks), np.float32)}
    if zero_points:
        constants["zeros"] = pack_int4(np.zeros((columns, blocks), np.int8))
    settings = dict(K=columns, N=columns, bits=4, block_size=block_size, accuracy_level=accuracy_level)
    node = onnx.helper.make_node("MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft", **settings)
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, columns]) for name in ("x", "y")]
    weights = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    versions = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "probe", ends[:1], ends[1:], weights), opset_imports=versions, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    (found,) = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return np.asarray(found)


def _even_steps(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """x in 256 even steps from `low` to `high`, stretched to have zero among them, so that zero stays zero."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, 1)
    zero = torch.round(-low / scale).clamp(0, 255)
    return (((torch.round(x / scale) + zero).clamp(0, 255)) - zero) * scale
