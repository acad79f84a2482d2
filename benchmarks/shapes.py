"""Configurations of models at their real sizes, written down from their published ones: for plans and costs, since no weights come with them."""

from __future__ import annotations

from typing import Any

from transformers import Idefics3Config, InternVLConfig


def internvl3_5_38b() -> Any:
    """InternVL3.5-38B: InternViT-6B (45 layers of 3,200) before Qwen3-32B, 38.4 billion weights of bfloat16."""
    vision = dict(
        hidden_size=3200,
        intermediate_size=12800,
        num_hidden_layers=45,
        num_attention_heads=25,
        image_size=[448, 448],
        patch_size=[14, 14],
        use_qk_norm=True,
        norm_type="rms_norm",
        attention_bias=False,
    )
    text = dict(
        model_type="qwen3",
        hidden_size=5120,
        intermediate_size=25600,
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=False,
    )
    return InternVLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, dtype="bfloat16")


def smolvlm(size: str, tokenizer: Any) -> Any:
    """SmolVLM-256M ('256m') or -500M ('500m'), as the equal architecture Idefics3: a SigLIP tower of 93 M on tiles of 512 pixels, 64 tokens each."""
    text: dict[str, dict[str, int]] = {
        "256m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3),
        "500m": dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5),
    }
    rope = {"rope_type": "default", "rope_theta": 100_000.0}
    return Idefics3Config(
        text_config=text[size]
        | _ids(tokenizer)
        | dict(model_type="llama", vocab_size=len(tokenizer), head_dim=64, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_parameters=rope)
        | dict(tie_word_embeddings=True),
        vision_config=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512, patch_size=16),
        scale_factor=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
        **_ids(tokenizer),
    )


def internvl3_5_1b(tokenizer: Any) -> Any:
    """InternVL3.5-1B: InternViT-300M on tiles of 448 pixels, 256 tokens each, before Qwen3-0.6B."""
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=[448, 448], patch_size=[14, 14])
    text = dict(
        model_type="qwen3",
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
    )
    return InternVLConfig(
        vision_config=vision | dict(attention_bias=True),
        text_config=text | _ids(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=256,
        tie_word_embeddings=True,
    )


def _ids(tokenizer: Any) -> dict[str, int]:
    return dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
