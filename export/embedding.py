"""The embed_tokens graph: token ids to rows of the embedding, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from .graph import GraphAuthor, lazy_tensor
from .int4 import pack_int4
from .precision import EMBED, HEAD, Storage
from .quantize import ROWS, half_if_exact, int4_blocks, int8_rows

IDS = ("batch_size", "sequence_length")
KINDS = ("", f"_fp16{ROWS}", f"_int8{ROWS}", "_int4", "_scale", "_zero")
Table = Mapping[str, ir.TensorProtocol]  # of rows [V, D], by KINDS: float as "" or "_fp16_rows", int8 with a scale a row, or int4 as MatMulNBits has it


def own_table(embedding: torch.nn.Embedding, storage: Storage) -> Table:
    """The rows of an embedding as `storage` says."""
    weight = embedding.weight.detach()
    match storage.word:
        case "int8":
            codes, scales = int8_rows(weight.numpy())
            return {f"_int8{ROWS}": ir.tensor(codes), "_scale": ir.tensor(scales[:, 0])}
        case "int4":
            blocks = int4_blocks(weight.numpy(), storage)
            return {"_int4": ir.tensor(pack_int4(blocks.codes)), "_scale": ir.tensor(half_if_exact(blocks.scales))}
        case "fp16":
            return {f"_fp16{ROWS}": lazy_tensor(EMBED, tuple(weight.shape), ir.DataType.FLOAT16, lambda: weight)}
    return {"": float_table(embedding)}


def float_table(embedding: torch.nn.Embedding) -> ir.LazyTensor:
    return lazy_tensor(EMBED, tuple(embedding.weight.shape), ir.DataType.FLOAT, lambda: embedding.weight)


def heads_table(decoder: ir.Model) -> Table:
    """The rows of an embedding that is the same matrix as the head of this decoder, where it stands by rows."""
    return {(value.name or "").removeprefix(HEAD): value.const_value for value in heads_values(decoder) if value.const_value is not None}


def heads_values(decoder: ir.Model) -> list[ir.Value]:
    """The weights of a decoder's head, in the order in which an embedding has them."""
    return [decoder.graph.initializers[f"{HEAD}{kind}"] for kind in KINDS if f"{HEAD}{kind}" in decoder.graph.initializers]


def build_embedding(table: Table, width: int, injected: int = 0, image_token: int | None = None) -> ir.Model:
    """input_ids i64[B, S] -> inputs_embeds f32[B, S, (1 + injected)·D], rows of D = `width` numbers from `table`, whose tensors it keeps.

    Zeros follow each row for the `injected` first layers of the decoder that get something of an image added. With `image_token` there is
    a second input, image_features f32[n, (1 + injected)·D], whose rows take the places of that token in their order; n may be 0.
    """
    author = GraphAuthor("embed_tokens" if image_token is None else "embed_with_images")
    ids = author.input("input_ids", ir.DataType.INT64, IDS)
    weights = {kind: author.tensor(f"{EMBED}{kind}", tensor) for kind, tensor in table.items()}
    found = _int4_rows(author, ids, weights, width) if "_int4" in weights else _rows(author, ids, weights)
    if injected:
        found = author.op("Pad", found, author.constant([0, 0, 0, 0, 0, injected * width]))
    if image_token is not None:
        found = _with_images(author, ids, found, image_token, (1 + injected) * width)
    author.output(found, "inputs_embeds", ir.DataType.FLOAT, (*IDS, (1 + injected) * width))
    return author.model()


def _rows(author: GraphAuthor, ids: ir.Value, weights: Mapping[str, ir.Value]) -> Any:
    """The rows float32[B, S, width] of a table of whole numbers or floats."""
    (weight,) = (value for kind, value in weights.items() if kind != "_scale")
    rows = author.op("Gather", weight, ids)
    if weight.dtype != ir.DataType.FLOAT:
        rows = author.cast(rows, ir.DataType.FLOAT)
    if "_scale" in weights:  # GatherBlockQuantized would be one node, but browsers' builds of ONNX Runtime lack it
        rows = author.op("Mul", rows, author.op("Unsqueeze", author.op("Gather", weights["_scale"], ids), author.constant([2])))
    return rows


def _int4_rows(author: GraphAuthor, ids: ir.Value, weights: Mapping[str, ir.Value], width: int) -> Any:
    """The rows float32[B, S, width] of a table in four bits, by operators that every build has."""
    op, constant = author.op, author.constant
    packed = weights["_int4"]
    assert packed.shape is not None
    _, count, size = packed.shape.numpy()
    codes = op("Reshape", _halves(author, packed, ids, 4), constant([0, 0, count, 2 * size]))
    if "_zero" in weights:
        zeros = op("Reshape", _halves(author, weights["_zero"], ids, 3), constant([0, 0, -1]))
        zeros = op("Slice", zeros, constant([0]), constant([count]), constant([2]))
        steps = op("Sub", codes, op("Unsqueeze", zeros, constant([3])))
    else:
        steps = op("Sub", codes, constant(8, "float32"))
    scale = op("Unsqueeze", author.cast(op("Gather", weights["_scale"], ids), ir.DataType.FLOAT), constant([3]))
    rows = op("Reshape", op("Mul", steps, scale), constant([0, 0, 2 * count * size]))
    return op("Slice", rows, constant([0]), constant([width]), constant([2])) if width < 2 * count * size else rows


def _halves(author: GraphAuthor, packed: ir.Value, ids: ir.Value, axis: int) -> Any:
    """The bytes of some rows as the numbers 0..15 of their halves, the low one first, along a new last axis: a byte's quotient and rest by 16."""
    op, constant = author.op, author.constant
    pairs = author.cast(op("Gather", packed, ids), ir.DataType.FLOAT)
    high = op("Floor", op("Mul", pairs, constant(1 / 16, "float32")))
    low = op("Sub", pairs, op("Mul", high, constant(16, "float32")))
    return op("Concat", *(op("Unsqueeze", half_byte, constant([axis])) for half_byte in (low, high)), axis=axis)


def _with_images(author: GraphAuthor, ids: ir.Value, rows: ir.Value, image_token: int, width: int) -> Any:
    """`rows` with the k-th image token's replaced by the k-th row of image_features. A row of zeros stands before them, which every other token finds."""
    op, constant = author.op, author.constant
    features = author.input("image_features", ir.DataType.FLOAT, ("num_image_tokens", width))
    places = op("Equal", ids, constant(image_token))
    marks = author.cast(places, ir.DataType.INT64)
    counted = op("Reshape", op("CumSum", op("Reshape", marks, constant([-1])), constant(0)), op("Shape", ids))
    nothing = op("ConstantOfShape", constant([1, width]), value=ir.tensor(np.zeros(1, np.float32)))
    found = op("Gather", op("Concat", nothing, features, axis=0), op("Mul", counted, marks))
    return op("Where", op("Unsqueeze", places, constant([2])), found, rows)
