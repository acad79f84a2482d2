"""The embed_tokens graph: token ids to rows of the embedding, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from .graph import GraphAuthor
from .int4 import Blocks, pack_int4
from .precision import Storage
from .quantize import int4_blocks, int8_rows

IDS = ("batch_size", "sequence_length")


def build_embedding(embedding: torch.nn.Embedding, storage: Storage, injected: int = 0, image_token: int | None = None) -> ir.Model:
    """input_ids i64[B, S] -> inputs_embeds f32[B, S, (1 + injected)·D]; the rows are stored as fp32, fp16, int8 with a scale per row, or int4 in blocks.

    Zeros follow each row for the `injected` first layers of the decoder that get something of an image added. With `image_token` there is
    a second input, image_features f32[n, (1 + injected)·D], whose rows take the places of that token in their order; n may be 0.
    """
    author = GraphAuthor("embed_tokens" if image_token is None else "embed_with_images")
    ids = author.input("input_ids", ir.DataType.INT64, IDS)
    weight = embedding.weight
    if storage.word == "int8":
        # GatherBlockQuantized would be one node, but browsers' builds of ONNX Runtime lack it.
        codes, scales = int8_rows(weight.detach().numpy())
        rows = author.cast(author.op("Gather", author.array("embed_tokens.weight_int8", codes), ids), ir.DataType.FLOAT)
        found = author.op("Mul", rows, author.op("Gather", author.array("embed_tokens.weight_scale", scales), ids))
    elif storage.word == "int4":
        found = _int4_rows(author, ids, int4_blocks(weight.detach().numpy(), storage), weight.shape[1])
    else:
        dtype = ir.DataType.FLOAT16 if storage.word == "fp16" else ir.DataType.FLOAT
        found = author.op("Gather", author.weight("embed_tokens.weight", tuple(weight.shape), dtype, lambda: weight), ids)
        if dtype == ir.DataType.FLOAT16:
            found = author.cast(found, ir.DataType.FLOAT)
    if injected:
        found = author.op("Pad", found, author.constant([0, 0, 0, 0, 0, injected * weight.shape[1]]))
    width = (1 + injected) * weight.shape[1]
    if image_token is not None:
        found = _with_images(author, ids, found, image_token, width)
    author.output(found, "inputs_embeds", ir.DataType.FLOAT, (*IDS, width))
    return author.model()


def _int4_rows(author: GraphAuthor, ids: ir.Value, blocks: Blocks, width: int) -> Any:
    """The rows float32[B, S, width] of a table in four bits, by operators that every build has: a byte's halves are its quotient and rest by 16."""
    op, constant, cast = author.op, author.constant, author.cast
    count, size = blocks.codes.shape[1:]
    packed = author.array("embed_tokens.weight_int4", pack_int4(blocks.codes).reshape(len(blocks.codes), -1))
    half = blocks.scales.astype(np.float16)
    scales = author.array("embed_tokens.weight_scale", half if np.array_equal(half, blocks.scales) else blocks.scales)
    pairs = cast(op("Gather", packed, ids), ir.DataType.FLOAT)
    high = op("Floor", op("Mul", pairs, constant(1 / 16, "float32")))
    low = op("Sub", pairs, op("Mul", high, constant(16, "float32")))
    codes = op("Concat", *(op("Unsqueeze", half_byte, constant([3])) for half_byte in (low, high)), axis=3)
    steps = op("Sub", op("Reshape", codes, constant([0, 0, count, size])), constant(8, "float32"))
    scale = op("Unsqueeze", cast(op("Gather", scales, ids), ir.DataType.FLOAT), constant([3]))
    rows = op("Reshape", op("Mul", steps, scale), constant([0, 0, count * size]))
    return op("Slice", rows, constant([0]), constant([width]), constant([2])) if width < count * size else rows


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
