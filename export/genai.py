"""The same folder for onnxruntime-genai: genai_config.json, its image processor's file, and two graphs in the form that it asks for.

It puts image features into the prompt inside the embedding graph, and it knows no num_logits_to_keep. So beside the three graphs stand an embedding
with that step and a decoder that keeps the last position's logits; both name the weights' data files of the others, nothing large is stored twice.
The rows' width is given as the hidden size, which lets features for the decoder's first layers pass.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir

from ..files import write_json
from ..manifest import Part
from .embedding import Table, build_embedding
from .graph import new_initializer

CONFIG, PROCESSOR = "genai_config.json", "genai_processor.json"  # processor_config.json is another program's
EMBEDDING, DECODER = "onnx/genai_embedding.onnx", "onnx/genai_decoder.onnx"
LENGTH = 4096  # it allocates the cache for so many positions before the first token; callers may ask for another length


def write_genai(
    folder: Path, model: Any, family: ModuleType, settings: dict[str, Any], parts: dict[str, Part], graphs: dict[str, ir.Model], table: Table, context: int
) -> None:
    """Write them all below `folder`. `graphs` are the saved ones of `parts`; the decoder's is changed. `table` holds the embedding's rows, `context` is the
    most positions."""
    text_model, _ = family.text_parts(model)
    width = int(parts["embed_tokens"].outputs[0].shape[-1])
    injected = width // text_model.config.hidden_size - 1
    embedding = build_embedding(table, text_model.config.hidden_size, injected, model.config.image_token_id)
    _share_weights(embedding, graphs["embed_tokens"])
    ir.save(embedding, folder / EMBEDDING)
    ir.save(_last_logits(graphs["decoder"]), folder / DECODER)
    write_json(folder / PROCESSOR, family.genai_processor(settings))
    write_json(folder / CONFIG, _config(model, text_model.config, width, parts["vision_encoder"].file, context))


def _share_weights(graph: ir.Model, saved: ir.Model) -> None:
    """Let the weights of `graph` be those of the same names that `saved` keeps in a data file."""
    for name, value in graph.graph.initializers.items():
        twin = saved.graph.initializers.get(name)
        if twin is not None and isinstance(twin.const_value, ir.ExternalTensor):
            value.const_value = twin.const_value


def _last_logits(decoder: ir.Model) -> ir.Model:
    """The decoder without its choice of logits: only the last position's, which its declared shape must say."""
    kept = next(value for value in decoder.graph.inputs if value.name == "num_logits_to_keep")
    one = new_initializer("one_logit", ir.tensor(np.array(1, np.int64), name="one_logit"))
    decoder.graph.register_initializer(one)
    ir.convenience.replace_all_uses_with(kept, one)
    decoder.graph.inputs.remove(kept)
    logits = decoder.graph.outputs[0]
    assert logits.shape is not None
    logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])
    return decoder


def _config(model: Any, text: Any, width: int, vision_file: str, context: int) -> dict[str, Any]:
    config, settings = model.config, model.generation_config
    ends = settings.eos_token_id if settings.eos_token_id is not None else text.eos_token_id
    pads = (settings.pad_token_id, text.pad_token_id, ends[0] if isinstance(ends, list) else ends)
    marks = {name: getattr(config, name) for name in ("image_token_id", "video_token_id", "vision_start_token_id") if hasattr(config, name)}
    decoder = dict(
        filename=DECODER,
        session_options={"log_id": "onnxruntime-genai", "provider_options": []},
        head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        hidden_size=width,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        num_hidden_layers=text.num_hidden_layers,
        inputs={name: name for name in ("inputs_embeds", "attention_mask", "position_ids")}
        | {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in ("key", "value")},
        outputs={"logits": "logits"} | {f"present_{kind}_names": f"present.%d.{kind}" for kind in ("key", "value")},
    )
    vision = dict(
        filename=vision_file,
        config_filename=PROCESSOR,
        spatial_merge_size=config.vision_config.spatial_merge_size,
        patch_size=config.vision_config.patch_size,
        inputs={name: name for name in ("pixel_values", "image_grid_thw")},
        outputs={"image_features": "image_features"},
    )
    embedding = dict(filename=EMBEDDING, inputs={name: name for name in ("input_ids", "image_features")}, outputs={"inputs_embeds": "inputs_embeds"})
    tokens = dict(bos_token_id=text.bos_token_id, eos_token_id=ends, pad_token_id=next(pad for pad in pads if pad is not None))
    sizes = dict(vocab_size=text.vocab_size, context_length=context)
    parts = dict(decoder=decoder, embedding=embedding, vision=vision)
    present = {name: value for name, value in (tokens | marks).items() if value is not None}
    search = dict(do_sample=False, max_length=min(context, LENGTH), past_present_share_buffer=True, num_beams=1)
    return {"model": {"type": config.model_type, **present, **sizes, **parts}, "search": search}
