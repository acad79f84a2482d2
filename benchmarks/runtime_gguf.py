"""The benchmark's models as the two GGUF files that llama.cpp's server takes: decoder with tokenizer, and tower.

Every matrix of the decoder has one type, embedding and head too, which is its fastest form. llama.cpp encodes every picture of Idefics3 twice, as a tile and as
a whole, where transformers encodes one of a tile's size once: to compare the same work, SmolVLM's tower is entered under Gemma 3's projector, which averages
squares of patches and multiplies by 768 x 576 where SmolVLM has 12,288 x 576: half a per cent less work, and as many tokens.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes  # noqa: F401 - gives numpy the type bfloat16
import numpy as np
from safetensors.numpy import load_file

from masters.files import read_json

TEXT = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    **{f"self_attn.{name}_proj": f"attn_{theirs}" for name, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))},
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}
SIGLIP = {
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    "post_layernorm": "v.post_ln",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "encoder.layers": "v.blk",
    **{f"self_attn.{name}": f"attn_{theirs}" for name, theirs in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "out"))},
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
INTERN_VIT = {
    "embeddings.patch_embeddings.projection": "v.patch_embd",
    "embeddings.position_embeddings": "v.position_embd.weight",
    "embeddings.cls_token": "v.class_embd",
    "layernorm_before": "ln1",
    "layernorm_after": "ln2",
    "lambda_1": "ls1.weight",
    "lambda_2": "ls2.weight",
    "encoder.layer": "v.blk",
    **{f"attention.{name}": f"attn_{theirs}" for name, theirs in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("projection_layer", "out"))},
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
PROJECTOR = {"layer_norm": "mm.model.mlp.0", "linear_1": "mm.model.mlp.1", "linear_2": "mm.model.mlp.3"}


def write_gguf(folder: Path, out: Path, kind: str, vision_kind: str) -> None:
    """model.gguf and mmproj.gguf in `out`, matrices as `kind` and `vision_kind` (F32, F16, BF16, Q8_0, Q4_0)."""
    config = read_json(folder / "config.json")
    weights = {name: array.astype(np.float32) for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}
    _write_text(out / "model.gguf", config["text_config"], folder, weights, kind)
    _write_vision(out / "mmproj.gguf", config, weights, vision_kind)


def _write_text(path: Path, config: dict[str, Any], folder: Path, weights: dict[str, np.ndarray], kind: str) -> None:
    qwen = config["model_type"] == "qwen3"
    writer = gguf.GGUFWriter(path, "qwen3" if qwen else "llama")
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
        short = re.sub(r"^(model\.)?(text_model|language_model\.model)\.", "", name)
        if short != name:
            turned = re.search(r"self_attn\.([qk])_proj", short)
            _add(writer, _renamed(short, TEXT | {"layers": "blk"}), _interleaved(tensor, counts[turned[1]]) if turned and not qwen else tensor, kind)
    _finish(writer)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    tokenizer, settings = (read_json(folder / name) for name in ("tokenizer.json", "tokenizer_config.json"))
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    ids = tokenizer["model"]["vocab"] | {name: token["id"] for name, token in added.items()}
    vocabulary = sorted(ids, key=lambda name: ids[name])
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


def _write_vision(path: Path, config: dict[str, Any], weights: dict[str, np.ndarray], kind: str) -> None:
    writer = gguf.GGUFWriter(path, "clip")
    vision, width, intern = config["vision_config"], config["text_config"]["hidden_size"], config["model_type"] == "internvl"
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(gguf.VisionProjectorType.INTERNVL if intern else gguf.VisionProjectorType.GEMMA3)
    writer.add_vision_projection_dim(width)
    writer.add_vision_image_size(_first(vision["image_size"]))
    writer.add_vision_patch_size(_first(vision["patch_size"]))
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(vision["num_hidden_layers"])
    writer.add_vision_head_count(vision["num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(vision.get("layer_norm_eps", 1e-6))
    writer.add_vision_image_mean([0.5] * 3)
    writer.add_vision_image_std([0.5] * 3)
    writer.add_vision_projector_scale_factor(round(1 / config["downsample_ratio"]) if intern else config["scale_factor"])
    writer.add_vision_use_gelu(True)
    for name, tensor in weights.items():
        short = re.sub(r"^(model\.)?(vision_model|vision_tower|multi_modal_projector)\.", "", name)
        if short != name:
            names = PROJECTOR if "projector" in name else INTERN_VIT if intern else SIGLIP
            flat = tensor.reshape(tensor.shape[-2:]) if "position" in name else tensor.ravel() if "cls_token" in name else tensor
            _add(writer, _renamed(short, names), flat, kind)
    if not intern:
        _add(writer, "mm.soft_emb_norm.weight", np.ones(vision["hidden_size"], np.float32), kind)
        _add(writer, "mm.input_projection.weight", np.random.default_rng(0).normal(0, 0.02, (vision["hidden_size"], width)).astype(np.float32), "F32")
    _finish(writer)


def _first(size: Any) -> int:
    return int(size[0] if isinstance(size, list) else size)


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    """A matrix as `kind`; other tensors, and the positions, which are looked up in float32, as they are."""
    values = np.ascontiguousarray(values)
    if kind == "F32" or values.ndim != 2 or "position" in name:
        writer.add_tensor(name, values)
        return
    stored = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)


def _renamed(name: str, names: dict[str, str]) -> str:
    for theirs, ours in names.items():
        name = re.sub(rf"(^|\.){re.escape(theirs)}(\.|$)", rf"\1{ours}\2", name)
    return name


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's Llama rotates neighbouring pairs, Hugging Face's the two halves of a head."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
