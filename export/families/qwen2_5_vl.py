"""Qwen2.5-VL: a tower over patches of images of any size, most layers within windows, and a Qwen2 decoder with positions of three axes.

The tower is authored (packed_vision.py): no tracer follows windows that depend on the images' sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
import transformers
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer

from ...errors import ModelError
from ..packed_vision import PackedTower

IMAGE_TOKEN = "<|image_pad|>"


def load_processor(folder: Path) -> Any:
    """The folder's image processor and tokenizer in Qwen2.5-VL's processor, without its part for videos, which needs torchvision."""
    return images_and_text(transformers.Qwen2_5_VLProcessor, folder)


def images_and_text(kind: Any, folder: Path) -> Any:
    """The processor class `kind`, made of what it needs for images on Pillow."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    template = folder / "chat_template.jinja"
    words = template.read_text(encoding="utf-8") if template.is_file() else tokenizer.chat_template
    return without_videos(kind)(AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True), tokenizer, chat_template=words)


def without_videos(kind: Any) -> Any:
    """A processor class that takes all its parts but the one for videos."""
    kept = [part for part in kind.get_attributes() if part != "video_processor"]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: kept), "__module__": kind.__module__})


def preprocessing(model: Any, processor: Any) -> dict[str, Any]:
    """The image processor's resolved settings. Raises ModelError where its patches are not the tower's."""
    settings = {name: value for name, value in processor.image_processor.to_dict().items() if value is not None}
    vision = model.config.vision_config
    for ours, theirs in (("patch_size", "patch_size"), ("merge_size", "spatial_merge_size"), ("temporal_patch_size", "temporal_patch_size")):
        if settings[ours] != getattr(vision, theirs):
            raise ModelError(f"the image processor's {ours} is {settings[ours]}, the vision tower's {theirs} {getattr(vision, theirs)}; set them equal")
    return settings


def genai_processor(settings: dict[str, Any]) -> dict[str, Any]:
    """The same steps for onnxruntime-genai, which reads a file of its own; `qwen2_5_vl` makes it repeat an image over a patch's frames."""
    cells = {name: settings[name] for name in ("patch_size", "merge_size")}
    limits = dict(min_pixels=settings["size"]["shortest_edge"], max_pixels=settings["size"]["longest_edge"])
    steps: list[tuple[str, str, dict[str, Any]]] = [
        ("decode_image", "DecodeImage", {"color_space": "RGB"}),
        ("convert_to_rgb", "ConvertRGB", {}),
        # Width and height are asked for and, with smart_resize, not used.
        ("resize", "Resize", {"width": 560, "height": 560, "smart_resize": 1, **limits, **cells}),
        ("rescale", "Rescale", {"rescale_factor": settings["rescale_factor"]}),
        ("normalize", "Normalize", {"mean": list(settings["image_mean"]), "std": list(settings["image_std"]), "qwen2_5_vl": 1}),
        ("patch_image", "PatchImage", {**cells, "temporal_patch_size": settings["temporal_patch_size"]}),
    ]
    transforms = [{"operation": {"name": name, "type": kind, **({"attrs": attributes} if attributes else {})}} for name, kind, attributes in steps]
    return {"processor": {"name": "qwen2_5_image_processor", "transforms": transforms}}


def text_parts(model: Any) -> tuple[Any, nn.Linear]:
    """The decoder (with its embedding) and its head."""
    return model.model.language_model, model.lm_head


def image_features(model: Any, pixels: dict[str, torch.Tensor]) -> torch.Tensor:
    """PyTorch's features of all images, f32[image tokens, D], the reference."""
    return torch.cat(model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"], return_dict=True).pooler_output)


def author_vision(model: Any, half: bool) -> ir.Model:
    """pixel_values f32[P, 3·T·p·p], image_grid_thw i64[n, 3] -> image_features f32[image tokens, D], for images of any sizes."""
    visual, config = model.model.visual, model.config.vision_config
    tower = new_tower(config, half)
    x = tower.patch_embedding(visual.patch_embed.proj)
    tower.rotary_tables(visual.rotary_pos_emb.inv_freq)
    windows = tower.windows(config.window_size // config.spatial_merge_size // config.patch_size)
    for index, block in enumerate(visual.blocks):
        name = f"blocks.{index}"
        within = None if index in config.fullatt_block_indexes else windows
        normed = tower.root_mean_square_norm(x, block.norm1, f"{name}.norm1")
        x = tower.author.op("Add", x, tower.attention(normed, block.attn, within, f"{name}.attention"))
        normed = tower.root_mean_square_norm(x, block.norm2, f"{name}.norm2")
        gate = tower.activation(tower.linear(normed, block.mlp.gate_proj, f"{name}.mlp.gate"), config.hidden_act)
        up = tower.linear(normed, block.mlp.up_proj, f"{name}.mlp.up")
        x = tower.author.op("Add", x, tower.linear(tower.author.op("Mul", gate, up), block.mlp.down_proj, f"{name}.mlp.down"))
    x = tower.cells(tower.root_mean_square_norm(x, visual.merger.ln_q, "merger.norm"), config.hidden_size)
    first, _, second = visual.merger.mlp
    x = tower.linear(tower.activation(tower.linear(x, first, "merger.fc1"), "gelu"), second, "merger.fc2")
    return tower.finish(x, config.out_hidden_size)


def new_tower(config: Any, half: bool) -> PackedTower:
    """The inputs of a tower with this vision config."""
    features = config.in_channels * config.temporal_patch_size * config.patch_size**2
    return PackedTower(ir.DataType.FLOAT16 if half else ir.DataType.FLOAT, features, config.spatial_merge_size, config.num_heads)
