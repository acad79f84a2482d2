"""LLaVA-OneVision: a SigLIP tower over tiles, a projector of two layers, a Qwen2 decoder.

A thin module computes what `LlavaOnevisionModel.get_image_features` computes before it packs features, from the same weights:
pixel_values f32[tiles, 3, side, side] -> image_features f32[tiles, g² + 1, D], each tile's features and then the embedding of a line's end. That is a
whole picture as the model reads several (programs that flatten the output, as transformers.js does, need no more); the tiles of a picture alone are
packed by the runtime, which finds the line's end there too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, LlavaOnevisionProcessor

from ...errors import ModelError
from ...files import read_json
from .idefics3 import Layer, Projection

IMAGE_TOKEN = "<image>"
INPUTS = ("pixel_values",)
ANYRES = "anyres_max_"


class PictureProcessor(LlavaOnevisionProcessor):
    """LLaVA-OneVision's processor without its part for videos, which needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def load_processor(folder: Path) -> Any:
    """The folder's processor, with the image processor that works on Pillow images."""
    settings = read_json(folder / "processor_config.json") if (folder / "processor_config.json").is_file() else {}
    template = folder / "chat_template.jinja"
    known = {name: settings[name] for name in ("num_image_tokens", "vision_feature_select_strategy", "vision_aspect_ratio") if name in settings}
    return PictureProcessor(
        AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True),
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
        **known,
    )


def preprocessing(model: Any, processor: Any) -> dict[str, Any]:
    """The image processor's resolved settings, features along a tile's side and the most tiles' features. Raises ModelError where they don't fit the model."""
    settings = {name: value for name, value in processor.image_processor.to_dict().items() if value is not None}
    config = model.config
    side = config.vision_config.image_size
    features = side // config.vision_config.patch_size
    wanted = {
        "the image processor's size": (settings.get("size"), {"height": side, "width": side}),
        "the image processor's do_center_crop": (bool(settings.get("do_center_crop")), False),
        "the image processor's do_resize": (bool(settings.get("do_resize")), True),
        "the image processor's image_grid_pinpoints": (
            [list(point) for point in settings["image_grid_pinpoints"]],
            list(map(list, config.image_grid_pinpoints)),
        ),
        "the processor's num_image_tokens": (processor.num_image_tokens, features**2),
        "the processor's vision_aspect_ratio": (processor.vision_aspect_ratio, config.vision_aspect_ratio),
        "the processor's vision_feature_select_strategy": (processor.vision_feature_select_strategy, "full"),
        "the model's vision_feature_select_strategy": (config.vision_feature_select_strategy, "full"),
        "the model's vision tower": (config.vision_config.model_type, "siglip_vision_model"),
    }
    for name, (found, expected) in wanted.items():
        if found != expected:
            raise ModelError(f"{name} is {found}; expected {expected}, which the rest of the model asks for, set it so")
    if any(edge % side for point in config.image_grid_pinpoints for edge in point):
        raise ModelError(f"image_grid_pinpoints has a canvas that is no whole number of tiles; expected multiples of {side}, leave the others out")
    return settings | {"tile_features": features, "max_tiles": int(config.vision_aspect_ratio.removeprefix(ANYRES))}


def text_parts(model: Any) -> tuple[Any, nn.Linear]:
    """The decoder (with its embedding) and its head."""
    return model.model.language_model, model.lm_head


def image_features(model: Any, pixels: dict[str, torch.Tensor]) -> torch.Tensor:
    """PyTorch's packed features of all images, f32[image tokens, D], the reference."""
    return torch.cat(list(model.get_image_features(**pixels, return_dict=True).pooler_output))


def graph_pixels(pixels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the graph takes of the processor's tensors for one image."""
    return {"pixel_values": pixels["pixel_values"].flatten(0, 1)}


def vision_module(model: Any) -> nn.Module:
    return VisionEncoder(model).eval()


def vision_example(model: Any) -> tuple[tuple[torch.Tensor, ...], tuple[dict[int, Any], ...]]:
    """Inputs to trace with, and their free axes: any number of tiles."""
    side = model.config.vision_config.image_size
    pixels = torch.linspace(-1, 1, 2 * 3 * side * side).reshape(2, 3, side, side)
    return (pixels,), ({0: torch.export.Dim("num_tiles")},)


class VisionEncoder(nn.Module):
    """pixel_values f32[n, 3, side, side] -> f32[n, g² + 1, D]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        tower, projector = model.model.vision_tower, model.model.multi_modal_projector
        tower = getattr(tower, "vision_model", tower)
        chosen = model.config.vision_feature_layer
        # Counted from the embeddings, as hidden states are; the tower's last norm comes after all of them.
        places = range(len(tower.encoder.layers) + 1)
        self.chosen = [places[index] for index in ([chosen] if isinstance(chosen, int) else chosen)]
        self.patches = tower.embeddings.patch_embedding
        self.positions = tower.embeddings.position_embedding.weight
        self.layers = nn.ModuleList(Layer(layer) for layer in tower.encoder.layers[: max(self.chosen)])
        self.linear_1, self.linear_2, self.activation = Projection(projector.linear_1), Projection(projector.linear_2), projector.act
        self.line_end = model.model.image_newline

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.patches(pixel_values.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2) + self.positions  # n, g², C
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        x = torch.cat([states[index] for index in self.chosen], dim=-1)
        x = self.linear_2(self.activation(self.linear_1(x)))
        return torch.cat([x, self.line_end.expand(x.shape[0], 1, -1)], dim=1).float()
