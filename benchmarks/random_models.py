"""Models at the shapes of published ones, with random weights, as ordinary Hugging Face folders: what costs a conversion is the shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from masters.demo.models import TEMPLATE, build_model, build_processor, build_tokenizer, save_model

SMOLVLM_VISION = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512, patch_size=16)
SMOLVLM_TEXT: dict[str, dict[str, int]] = {
    "256m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3),
    "500m": dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5),
}
QWEN3_VL_2B_VISION = dict(
    depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, out_hidden_size=2048, patch_size=16, num_position_embeddings=2304,
    deepstack_visual_indexes=[5, 11, 17],
)  # fmt: skip
QWEN3_VL_2B_TEXT = dict(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
    max_position_embeddings=262144, rms_norm_eps=1e-6, tie_word_embeddings=True,
    rope_parameters=dict(rope_type="default", rope_theta=5_000_000.0, mrope_section=[24, 20, 20], mrope_interleaved=True),
)  # fmt: skip
QWEN_MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny(folder: Path) -> None:
    """The demo's student, untrained."""
    tokenizer = build_tokenizer()
    save_model(folder, build_model("student", tokenizer), build_processor(tokenizer))


def smolvlm(size: str, folder: Path) -> None:
    """SmolVLM-256M or -500M, images split into tiles of 512 pixels."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 100_000.0}
    text: dict[str, Any] = dict(model_type="llama", vocab_size=49280, head_dim=64, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_parameters=rope)
    config = Idefics3Config(
        text_config=text | SMOLVLM_TEXT[size] | _ids(tokenizer) | {"tie_word_embeddings": True},
        vision_config=SMOLVLM_VISION,
        scale_factor=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
        **_ids(tokenizer),
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})
    save_model(folder, Idefics3ForConditionalGeneration(config), Idefics3Processor(images, tokenizer, image_seq_len=64, chat_template=TEMPLATE))


def qwen3_vl_2b(folder: Path) -> None:
    """Qwen3-VL-2B; made in bfloat16, in which it is saved."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN_MARKS})
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    marks = {name: tokenizer.convert_tokens_to_ids(token) for name, token in zip(names, QWEN_MARKS, strict=True)}
    config = Qwen3VLConfig(
        text_config=QWEN3_VL_2B_TEXT | _ids(tokenizer), vision_config=QWEN3_VL_2B_VISION, tie_word_embeddings=True, **marks, **_ids(tokenizer)
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=16, size=dict(shortest_edge=65536, longest_edge=16777216)).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen3VLProcessor"}))
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE)


def _ids(tokenizer: Any) -> dict[str, int]:
    return dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)


BUILT: dict[str, Callable[[Path], None]] = {"tiny": tiny, "256m": partial(smolvlm, "256m"), "500m": partial(smolvlm, "500m"), "2b": qwen3_vl_2b}
