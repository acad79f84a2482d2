"""Qwen3-VL: Qwen2.5-VL's packed patches without windows, learned positions stretched over each image, and features of middle layers for the decoder.

A token's row is its embedding and, behind it, what the outputs of the decoder's first layers get added: a picture's features of the tower's middle
layers, zeros for text. So the graphs keep the interface of a model without such features, and programs that know none carry them along.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
import transformers

from ..packed_vision import PackedTower
from .qwen2_5_vl import IMAGE_TOKEN, genai_processor, images_and_text, new_tower, preprocessing, text_parts

__all__ = ["IMAGE_TOKEN", "author_vision", "genai_processor", "image_features", "injected_layers", "load_processor", "preprocessing", "text_parts"]


def load_processor(folder: Path) -> Any:
    """The folder's image processor and tokenizer in Qwen3-VL's processor, without its part for videos, which needs torchvision."""
    return images_and_text(transformers.Qwen3VLProcessor, folder)


def injected_layers(model: Any) -> int:
    """How many of the decoder's first layers get features of their own."""
    return len(model.config.vision_config.deepstack_visual_indexes)


def image_features(model: Any, pixels: dict[str, torch.Tensor]) -> torch.Tensor:
    """PyTorch's features of all images, f32[image tokens, (1 + injected layers)·D]: those of the last layer first."""
    found = model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"], return_dict=True)
    return torch.cat([torch.cat(list(level)) for level in (found.pooler_output, *found.deepstack_features)], dim=-1)


def author_vision(model: Any, half: bool) -> ir.Model:
    """pixel_values f32[P, 3·T·p·p], image_grid_thw i64[n, 3] -> image_features f32[image tokens, (1 + injected layers)·D], for images of any sizes."""
    visual, config = model.model.visual, model.config.vision_config
    tower = new_tower(config, half)
    tower.rotary_tables(visual.rotary_pos_emb.inv_freq)
    x = tower.author.op("Add", tower.patch_embedding(visual.patch_embed.proj), tower.interpolated(visual.pos_embed.weight, visual.num_grid_per_side))
    levels: dict[int, Any] = {}
    for index, block in enumerate(visual.blocks):
        name = f"blocks.{index}"
        x = tower.author.op("Add", x, tower.attention(tower.layer_norm(x, block.norm1, f"{name}.norm1"), block.attn, None, f"{name}.attention"))
        up = tower.linear(tower.layer_norm(x, block.norm2, f"{name}.norm2"), block.mlp.linear_fc1, f"{name}.mlp.fc1")
        x = tower.author.op("Add", x, tower.linear(tower.activation(up, config.hidden_act), block.mlp.linear_fc2, f"{name}.mlp.fc2"))
        if index in config.deepstack_visual_indexes:
            place = config.deepstack_visual_indexes.index(index)
            levels[place] = _merged(tower, x, visual.deepstack_merger_list[place], f"deepstack.{place}")
    last = _merged(tower, x, visual.merger, "merger")
    features = tower.author.op("Concat", last, *(levels[place] for place in sorted(levels)), axis=-1) if levels else last
    return tower.finish(features, (1 + len(levels)) * config.out_hidden_size)


def _merged(tower: PackedTower, x: Any, merger: Any, name: str) -> Any:
    """A cell's patches as one row of the decoder's width; the norm is over each patch or, in the middle layers' mergers, over the cell."""
    channels = merger.hidden_size // tower.merge**2
    if merger.use_postshuffle_norm:
        x = tower.layer_norm(tower.cells(x, channels), merger.norm, f"{name}.norm")
    else:
        x = tower.cells(tower.layer_norm(x, merger.norm, f"{name}.norm"), channels)
    up = tower.activation(tower.linear(x, merger.linear_fc1, f"{name}.fc1"), "gelu")
    return tower.linear(up, merger.linear_fc2, f"{name}.fc2")
