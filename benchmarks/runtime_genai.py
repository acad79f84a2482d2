"""Our embedding and decoder as one graph from token ids to logits, the form in which onnxruntime-genai runs text models of any family."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
from runtime_models import bundle_folder, cache_folder

from masters.files import read_json, whole_folder, write_json
from masters.manifest import Manifest, read_manifest


def text_model(shape: str, precision: str, threads: int) -> Path:
    """The folder that onnxruntime-genai opens; weights are the bundle's own files under a second name: it refuses links that lead out of its folder."""
    bundle = bundle_folder(shape, precision)
    folder = cache_folder() / shape / f"genai-{precision.replace('/', '-')}-{threads}"
    if not folder.exists():
        manifest = read_manifest(bundle)
        with whole_folder(folder) as part:
            for data in (bundle / "onnx").glob("*_data*"):
                os.link(data, part / data.name)
            ir.save(joined(bundle, manifest), part / "model.onnx")
            write_json(part / "genai_config.json", config(bundle, manifest, threads))
    return folder


def joined(bundle: Path, manifest: Manifest) -> ir.Model:
    embedding, decoder = (ir.load(bundle / manifest.parts[name].file) for name in ("embed_tokens", "decoder"))
    graph, inputs = decoder.graph, {value.name: value for value in decoder.graph.inputs}
    for value in list(embedding.graph.initializers.values()):
        tensor = value.const_value
        assert tensor is not None
        copy = ir.Value(name=f"embed.{value.name}", shape=value.shape, type=value.type, const_value=tensor)
        graph.register_initializer(copy)
        ir.convenience.replace_all_uses_with(value, copy)
    nodes, rows = list(embedding.graph), embedding.graph.outputs[0]
    embedding.graph.remove(nodes)
    for node in nodes:
        node.name = f"embed.{node.name}"
        for output in node.outputs:
            output.name = f"embed.{output.name}"
    graph.insert_before(graph[0], nodes)
    ir.convenience.replace_all_uses_with(inputs["inputs_embeds"], rows)
    one = ir.Value(name="one_logit", shape=ir.Shape(()), type=ir.TensorType(ir.DataType.INT64), const_value=ir.tensor(np.array(1, np.int64), name="one_logit"))
    graph.register_initializer(one)
    ir.convenience.replace_all_uses_with(inputs["num_logits_to_keep"], one)
    for name in ("inputs_embeds", "num_logits_to_keep"):
        graph.inputs.remove(inputs[name])
    graph.inputs.insert(0, embedding.graph.inputs.pop(0))
    logits = graph.outputs[0]
    assert logits.shape is not None
    logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])
    return decoder


def config(bundle: Path, manifest: Manifest, threads: int) -> dict[str, object]:
    text, geometry = read_json(bundle / "config.json")["text_config"], manifest.decoder
    options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1, "provider_options": []}
    decoder = dict(
        session_options=options,
        filename="model.onnx",
        head_size=geometry.head_dim,
        hidden_size=geometry.hidden_size,
        num_attention_heads=text["num_attention_heads"],
        num_key_value_heads=geometry.kv_heads,
        num_hidden_layers=geometry.layers,
        inputs={name: name for name in ("input_ids", "attention_mask", "position_ids")}
        | {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in ("key", "value")},
        outputs={"logits": "logits"} | {f"present_{kind}_names": f"present.%d.{kind}" for kind in ("key", "value")},
    )
    tokens = dict(bos_token_id=1, eos_token_id=manifest.generation["eos_token_ids"], pad_token_id=manifest.generation["pad_token_id"])
    model = dict(type="llama", vocab_size=geometry.vocab_size, context_length=geometry.context, decoder=decoder, **tokens)
    return {"model": model, "search": dict(do_sample=False, past_present_share_buffer=True, num_beams=1, max_length=geometry.context)}
