"""The target onnx: three graphs in the layout that transformers.js reads, and the runtime's sessions on them.

Embedding and head are one matrix in most models. The layout opens embed_tokens and decoder_model_merged as two graphs, and a browser hands each the data files
of its own name only; so where both store the matrix alike, it stands in data files of its own under either name, and equal files are one on the disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..manifest import Manifest, Part
from ..runtime.graphs import OnnxParts
from .decoder import build_decoder
from .embedding import build_embedding, float_table, heads_table, heads_values, own_table
from .genai import write_genai
from .graph import CHUNK_BYTES, Spool, interface, save_graph
from .int4 import Blocks
from .precision import EMBED, HEAD, Precision
from .products import Product, decoder_products, is_tied, product_weights, vision_products
from .quantize import Weight, quantize_products
from .row import Row
from .source import load_family
from .stored import follows, store_weights, weight_rows
from .vision import build_vision
from .written import Written

__all__ = ["follows", "load_parts", "model_config", "store_weights", "write_parts"]

FOLDER = "onnx"
# transformers.js knows a file's precision by these. int8 is its q8: dynamic.
SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_quantized", "int4": "_q4"}
DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8", "int4": "q4"}
# The rotary tables hold a row for every position.
MOST_CONTEXT = 32768
# The decoder's past and present may be one buffer (GroupQueryAttention writes in place).
GENERATION = {"shared_cache": True}


def write_parts(
    model: Any, processor: Any, folder: Path, precision: Precision, calibrated: Mapping[str, Blocks] | None = None, chunk_bytes: int = CHUNK_BYTES
) -> Written:
    """Write the three graphs below `folder`, data files of at most `chunk_bytes`, int4 in the blocks of `calibrated` where it has the weight ('<part> <name>').

    Raises ModelError for a model that the graphs can't express.
    """
    family = load_family(model.config.model_type)
    text_model, lm_head = family.text_parts(model)
    context = min(text_model.config.max_position_embeddings, MOST_CONTEXT)
    injected = family.injected_layers(model) if hasattr(family, "injected_layers") else 0
    # The decoder first: what can't be exported shows there, before the slower tracing of the tower.
    tied = is_tied(text_model, lm_head) and precision.shares_table()
    decoder = build_decoder(text_model, lm_head, precision.decoder == "fp16", context, injected, tied)
    (folder / FOLDER).mkdir()
    parts = {}
    parts["decoder"], rows = _write_quantized(decoder, "decoder", precision, calibrated or {}, folder, chunk_bytes, tied)
    embed = text_model.embed_tokens
    table = heads_table(decoder) if tied else own_table(embed, precision.storage("embed", EMBED))
    embedding = build_embedding(table, embed.embedding_dim, injected)
    parts["embed_tokens"] = _write(embedding, folder, precision.embed, chunk_bytes)
    if not tied and _quantises("embed", precision):
        rows += weight_rows(folder / parts["embed_tokens"].file, "embed", {EMBED: Weight(EMBED, float_table(embed), by_rows=True)}, {})
    vision = build_vision(model, family, precision.vision == "fp16")
    # Their layers are found by values that the graph has only as long as it is float32.
    tower = vision_products(model, text_model, lm_head, vision) if _quantises("vision", precision) else []
    parts["vision_encoder"], found = _write_quantized(vision, "vision", precision, calibrated or {}, folder, chunk_bytes)
    if hasattr(family, "genai_processor"):
        graphs = {"decoder": decoder, "embed_tokens": embedding}
        write_genai(folder, model, family, family.preprocessing(model, processor), parts, graphs, table, context)
    # A shared table is the head's, whose rows were compared with the model's.
    row = Product("decoder", HEAD, (embed,)) if tied else Product("embed", EMBED, (embed,))
    return Written(parts, (*rows, *found), (*tower, row, *decoder_products(text_model, lm_head)))


def load_parts(folder: Path, manifest: Manifest) -> OnnxParts:
    """The runtime's sessions on the graphs of a bundle."""
    return OnnxParts(folder, manifest)


def model_config(config: dict[str, Any], folder: Path, precision: Precision) -> dict[str, Any]:
    """config.json with what transformers.js asks for: each graph's data files, default precision, and the type of a float16 cache."""
    data = {file.name: len(list(file.parent.glob(f"{file.name}_data*"))) for file in sorted((folder / FOLDER).glob("*.onnx"))}
    dtype = {"vision_encoder": DTYPES[precision.vision], "embed_tokens": DTYPES[precision.embed], "decoder_model_merged": DTYPES[precision.decoder]}
    ours = {
        "use_external_data_format": {name: chunks for name, chunks in data.items() if chunks},
        "dtype": dtype,
        "kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"},
    }
    return config | {"transformers.js_config": ours}


def _quantises(part: str, precision: Precision) -> bool:
    return bool(precision.layers) or getattr(precision, part) in ("int8", "int4")


def _write_quantized(
    graph: ir.Model, part: str, precision: Precision, calibrated: Mapping[str, Blocks], folder: Path, chunk_bytes: int, tied: bool = False
) -> tuple[Part, list[Row]]:
    """Quantise the graph in place as `precision` says, write it, and compare what stands in the file with the weights that it had. The head's stand in files
    of their own where the embedding is `tied` to it."""
    word = getattr(precision, part)
    if not _quantises(part, precision):
        return _write(graph, folder, word, chunk_bytes, tied), []
    originals = product_weights(graph)
    fitted = {name: calibrated[f"{part} {name}"] for name in originals if f"{part} {name}" in calibrated}
    quantize_products(graph, lambda name: precision.storage(part, name), fitted, Spool(folder))
    written = _write(graph, folder, word, chunk_bytes, tied)
    return written, weight_rows(folder / written.file, part, originals, fitted)


def _write(graph: ir.Model, folder: Path, word: str, chunk_bytes: int, head_apart: bool = False) -> Part:
    file = f"{FOLDER}/{graph.graph.name}{SUFFIXES[word]}.onnx"
    inputs, outputs = interface(graph)
    save_graph(graph, folder / file, chunk_bytes=chunk_bytes, apart=heads_values(graph) if head_apart else ())
    return Part(file, word, inputs, outputs)
