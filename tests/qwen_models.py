"""Tiny Qwen2.5-VL and Qwen3-VL: real configurations, random weights wide enough for answers to vary, ordinary Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from masters.demo.models import build_tokenizer

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT: dict[str, Any] = dict(
    hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=2048, rms_norm_eps=1e-5
)
ROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6])
# Windows of 2 x 2 cells; the picture's border cuts through some.
WINDOWS = dict(depth=4, hidden_size=64, intermediate_size=96, num_heads=2, patch_size=14, window_size=56, fullatt_block_indexes=[1, 3], out_hidden_size=96)
# A learned grid of 6 x 6 positions; two of three layers reach the decoder.
LAYERS = dict(
    depth=3, hidden_size=64, intermediate_size=96, num_heads=2, patch_size=16, num_position_embeddings=36, deepstack_visual_indexes=[0, 1], out_hidden_size=96
)
# Deviations of the decoder's weights: wider ones than these leave int4 nothing to keep.
WIDTHS = {"qwen2_5_vl": 0.15, "qwen3_vl": 0.25}
PATCH = {"qwen2_5_vl": 14, "qwen3_vl": 16}


def tokenizer() -> Any:
    words = build_tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]})
    return words


def image_processor(family: str) -> Any:
    """Pictures of 2 to 24 cells."""
    cell = 4 * PATCH[family] ** 2
    return Qwen2VLImageProcessorPil(patch_size=PATCH[family], size=dict(shortest_edge=2 * cell, longest_edge=24 * cell))


def config(family: str, words: Any) -> Any:
    marks = dict(image="<|image_pad|>", video="<|video_pad|>", vision_start="<|vision_start|>", vision_end="<|vision_end|>")
    marked = {f"{kind}_token_id": words.convert_tokens_to_ids(token) for kind, token in marks.items()}
    ids = dict(pad_token_id=words.pad_token_id, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id)
    text = {**TEXT, **ids, "vocab_size": len(words), "tie_word_embeddings": True}
    if family == "qwen2_5_vl":
        return transformers.Qwen2_5_VLConfig(text_config={**text, "rope_parameters": ROPE}, vision_config=WINDOWS, tie_word_embeddings=True, **marked, **ids)
    text |= {"head_dim": 32, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=LAYERS, tie_word_embeddings=True, **marked, **ids)


def wake(model: Any, seed: int = 5) -> Any:
    """Wide random weights: near-zero ones repeat one token for ever, and a broken cache, window or position would go unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "ln_q" in name:
                weight.add_(torch.empty_like(weight).normal_(0, 0.1, generator=generator))
            elif weight.ndim >= 2 and "embed" not in name:
                weight.normal_(0, min(0.25 if "visual" in name else WIDTHS[model.config.model_type], 6.0 / weight[0].numel() ** 0.5), generator=generator)
            else:
                weight.normal_(0, 0.3, generator=generator)
    return model


def build(family: str, folder: Path) -> Path:
    """A Hugging Face folder as Qwen's stand on the hub; its own processor needs torchvision, for videos alone."""
    words = tokenizer()
    model = wake(transformers.AutoModelForImageTextToText.from_config(config(family, words), dtype=torch.float32).eval())
    model.to(torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)
    image_processor(family).save_pretrained(folder)
    kind = "Qwen2_5_VLProcessor" if family == "qwen2_5_vl" else "Qwen3VLProcessor"
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": kind}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
