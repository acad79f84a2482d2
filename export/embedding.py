"""The embed_tokens graph: token ids to rows of the embedding, and nothing else."""

from __future__ import annotations

import onnx_ir as ir
import torch

from .graph import GraphAuthor
from .quantize import int8_rows

IDS = ("batch_size", "sequence_length")


def build_embedding(embedding: torch.nn.Embedding, precision: str, injected: int = 0) -> ir.Model:
    """input_ids i64[B, S] -> inputs_embeds f32[B, S, (1 + injected)·D]; the rows are stored as `precision` (fp32, fp16 or int8 with a scale per row).

    Zeros follow each row for the `injected` first layers of the decoder that get something of an image added.
    """
    author = GraphAuthor("embed_tokens")
    ids = author.input("input_ids", ir.DataType.INT64, IDS)
    weight = embedding.weight
    if precision == "int8":
        # GatherBlockQuantized would be one node, but browsers' builds of ONNX Runtime lack it.
        codes, scales = int8_rows(weight.detach().numpy())
        rows = author.cast(author.op("Gather", author.array("embed_tokens.weight_int8", codes), ids), ir.DataType.FLOAT)
        found = author.op("Mul", rows, author.op("Gather", author.array("embed_tokens.weight_scale", scales), ids))
    else:
        dtype = ir.DataType.FLOAT16 if precision == "fp16" else ir.DataType.FLOAT
        found = author.op("Gather", author.weight("embed_tokens.weight", tuple(weight.shape), dtype, lambda: weight), ids)
        if dtype == ir.DataType.FLOAT16:
            found = author.cast(found, ir.DataType.FLOAT)
    if injected:
        found = author.op("Pad", found, author.constant([0, 0, 0, 0, 0, injected * weight.shape[1]]))
    author.output(found, "inputs_embeds", ir.DataType.FLOAT, (*IDS, (1 + injected) * weight.shape[1]))
    return author.model()
