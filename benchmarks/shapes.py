"""Configurations of large models at their real sizes, written down from their published ones: for plans and costs, since no weights come with them."""

from __future__ import annotations

from typing import Any

from transformers import InternVLConfig


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
