"""Tiny models of the families that have no demo model: real configurations, random weights wide enough for answers to vary, ordinary Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from masters.demo.models import TEMPLATE, build_tokenizer

SIDE, PATCH = 64, 8
TEXT: dict[str, Any] = dict(
    hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, head_dim=32, max_position_embeddings=2048,
    rms_norm_eps=1e-5,
)  # fmt: skip
VISION: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=PATCH)


def wake(model: Any, seed: int = 5) -> Any:
    """Wide random weights: near-zero ones repeat one token for ever, and a broken cache or mask would go unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "embed" not in name and "token" not in name:
                scale = 0.5 if "vision" in name else 4.0 / weight.shape[-1] ** 0.5
                weight.normal_(0, min(scale, 0.25), generator=generator)
            elif any(word in name for word in ("embed_tokens", "bias", "position", "cls_token", "newline")):
                weight.normal_(0, 0.3, generator=generator)
            elif "norm" in name or "lambda" in name:  # ones would hide a scale that is left out
                weight.add_(torch.empty_like(weight).normal_(0, 0.1, generator=generator))
    return model


def ids(tokenizer: Any) -> dict[str, int]:
    return dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)


def smolvlm(folder: Path, side: int = SIDE, patch: int = PATCH, shuffle: int = 2, tiles: int = 4, **text: Any) -> Path:
    """Tiles of `side` pixels from pictures of at most `tiles` times that, by default 16 tokens each. Its own processor needs torchvision; the folder is
    what it would save."""
    words = build_tokenizer()
    images = SmolVLMImageProcessorPil(size={"longest_edge": tiles * side}, max_image_size={"longest_edge": side}, do_image_splitting=True)
    config = transformers.SmolVLMConfig(
        text_config={**TEXT, **ids(words), "model_type": "llama", "vocab_size": len(words), "tie_word_embeddings": True, **text},
        vision_config={**VISION, "model_type": "smolvlm_vision", "image_size": side, "patch_size": patch},
        scale_factor=shuffle,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
        **ids(words),
    )
    return saved(folder, config, words, images, {"processor_class": "SmolVLMProcessor", "image_seq_len": (side // patch // shuffle) ** 2}, TEMPLATE)


def internvl(folder: Path, text: str = "qwen3", **vision: Any) -> Path:
    """Tiles of 64 pixels, at most 4 and the whole, 16 tokens each."""
    named = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>")
    words = chat_tokenizer(**named)
    images = GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, max_patches=4)
    config = transformers.InternVLConfig(
        text_config={**TEXT, **ids(words), "model_type": text, "vocab_size": len(words), "tie_word_embeddings": True},
        vision_config={**VISION, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], **vision},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        tie_word_embeddings=True,
    )
    return saved(folder, config, words, images, {"processor_class": "InternVLProcessor", "image_seq_length": 16}, chat_template("<IMG_CONTEXT>\n"))


def llava_onevision(folder: Path, most: int = 2, **changes: Any) -> Path:
    """Tiles of 64 pixels on canvases of up to 3 x 3 (so that more than `most` tiles' features are thinned out), 64 features each."""
    words = chat_tokenizer(image_token="<image>", video_token="<video>")
    canvases = [[high * SIDE, wide * SIDE] for high in (1, 2, 3) for wide in (1, 2, 3)]
    images = LlavaOnevisionImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=canvases)
    settings = {"vision_feature_select_strategy": "full", "vision_aspect_ratio": f"anyres_max_{most}"}
    config = transformers.LlavaOnevisionConfig(
        text_config={**TEXT, **ids(words), "model_type": "qwen2", "vocab_size": len(words)},
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_id=words.convert_tokens_to_ids("<image>"),
        video_token_id=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=canvases,
        **settings,
        **changes,
    )
    processor = {"processor_class": "LlavaOnevisionProcessor", "num_image_tokens": (SIDE // PATCH) ** 2, **settings}
    return saved(folder, config, words, images, processor, chat_template("<image>\n"))


def chat_tokenizer(**named: str) -> Any:
    """The demo's tokenizer with more special tokens, by the attribute that a processor asks for."""
    words = build_tokenizer()
    words.add_special_tokens({"additional_special_tokens": list(named.values())})
    words._set_model_specific_special_tokens(named)
    return words


def chat_template(image: str) -> str:
    """A template of ChatML's form, which these families have, with `image` where a picture stands."""
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def saved(folder: Path, config: Any, tokenizer: Any, images: Any, processor: dict[str, Any], template: str) -> Path:
    torch.manual_seed(0)
    model = wake(transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.jinja").write_text(template)
    return folder
