"""A folder of the tiny Idefics3 as the two GGUF files that llama.cpp's server takes: the Llama decoder with its tokenizer, and the vision tower."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes  # noqa: F401 - gives numpy the type bfloat16
import numpy as np
from safetensors.numpy import load_file

TEXT = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{name}_proj": f"attn_{gguf_name}" for name, gguf_name in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))},
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}
VISION = {
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    "post_layernorm": "v.post_ln",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    **{f"self_attn.{name}": f"attn_{gguf_name}" for name, gguf_name in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "out"))},
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


UNUSED = "<row_6_col_6>"


@dataclass(frozen=True)
class Gguf:
    model: Path
    mmproj: Path


def write_gguf(folder: Path, out: Path, kind: str = "F32", vision_kind: str = "F32") -> Gguf:
    """Both files beside each other in `out`, their matrices as `kind` and `vision_kind` (F32, F16, Q8_0, Q4_0)."""
    out.mkdir(parents=True, exist_ok=True)
    found = Gguf(out / "model.gguf", out / "mmproj.gguf")
    config = json.loads((folder / "config.json").read_text())
    weights = {name: array.astype(np.float32) for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}
    _write_text(found.model, config["text_config"], folder, weights, kind)
    _write_vision(found.mmproj, config, folder, weights, vision_kind)
    return found


def _write_text(path: Path, config: dict[str, Any], folder: Path, weights: dict[str, np.ndarray], kind: str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    heads, width = config["num_attention_heads"], config["head_dim"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(config["rope_parameters"]["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_tokenizer(writer, folder)
    counts = {"q": heads, "k": config["num_key_value_heads"]}
    for name, tensor in weights.items():
        short = name.removeprefix("model.text_model.")
        if short != name:
            attention = re.search(r"self_attn\.([qk])_proj", short)
            values = _interleaved(tensor, counts[attention[1]]) if attention else tensor
            _add(writer, _renamed(short, TEXT, "layers", "blk"), values, kind)
    _finish(writer)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    tokenizer, settings = (json.loads((folder / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json"))
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    ids = tokenizer["model"]["vocab"] | {name: token["id"] for name, token in added.items()}
    # llama.cpp puts two line ends before a picture, as one token, which this small vocabulary lacks: a tile's name that is never used stands for it.
    if "ĊĊ" not in ids:
        ids["ĊĊ"] = ids.pop(UNUSED)
    vocabulary = sorted(ids, key=lambda name: ids[name])
    assert [ids[name] for name in vocabulary] == list(range(len(vocabulary)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")  # single digits, then GPT-2's rule
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.CONTROL if added.get(name, {}).get("special") else gguf.TokenType.NORMAL for name in vocabulary])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(ids[settings["bos_token"]])
    writer.add_eos_token_id(ids[settings["eos_token"]])
    writer.add_pad_token_id(ids[settings["pad_token"]])
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


def _write_vision(path: Path, config: dict[str, Any], folder: Path, weights: dict[str, np.ndarray], kind: str) -> None:
    writer = gguf.GGUFWriter(path, "clip")
    vision, pictures = config["vision_config"], json.loads((folder / "processor_config.json").read_text())["image_processor"]
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(gguf.VisionProjectorType.IDEFICS3)
    writer.add_vision_projection_dim(config["text_config"]["hidden_size"])
    writer.add_vision_image_size(vision["image_size"])
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(vision["num_hidden_layers"])
    writer.add_vision_head_count(vision["num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(vision.get("layer_norm_eps", 1e-6))
    writer.add_vision_image_mean(pictures["image_mean"])
    writer.add_vision_image_std(pictures["image_std"])
    writer.add_vision_projector_scale_factor(config["scale_factor"])
    writer.add_vision_preproc_image_size(pictures["size"]["longest_edge"])
    writer.add_vision_use_gelu(True)
    for name, tensor in weights.items():
        short = name.removeprefix("model.vision_model.")
        if short != name:
            _add(writer, _renamed(short, VISION, "encoder.layers", "v.blk"), tensor, kind)
    _add(writer, "mm.model.fc.weight", weights["model.connector.modality_projection.proj.weight"], kind)
    _finish(writer)


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    """A matrix as `kind`; other tensors, and the positions, which are looked up in float32, as they are."""
    values = np.ascontiguousarray(values)
    if kind == "F32" or values.ndim != 2 or "position" in name:
        writer.add_tensor(name, values)
        return
    stored = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)


def _renamed(name: str, names: dict[str, str], layers: str, block: str) -> str:
    for theirs, ours in names.items():
        name = re.sub(rf"(^|\.){re.escape(theirs)}(\.|$)", rf"\1{ours}\2", name)
    return re.sub(rf"^{re.escape(layers)}\.", f"{block}.", name)


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's Llama rotates neighbouring pairs, Hugging Face's the two halves of a head."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
