"""InternVL3 and 3.5 in the class that is transformers' own: a ViT over square tiles, pixel shuffle, a Qwen2, Qwen3 or Llama decoder.

A thin module computes what `InternVLModel.get_image_features` computes, from the same weights. There is no convention for this family's graph,
so it has LLaVA's names: pixel_values f32[tiles, 3, side, side] -> image_features f32[tiles, tokens of a tile, D].

Shapes: n tiles, N patches of a tile, C channels of the tower, D hidden size of the decoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, InternVLProcessor

from ...errors import ModelError
from ...files import read_json
from .idefics3 import Projection

IMAGE_TOKEN, START, END = "<IMG_CONTEXT>", "<img>", "</img>"
INPUTS = ("pixel_values",)


class PictureProcessor(InternVLProcessor):
    """InternVL's processor without its part for videos, which needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def load_processor(folder: Path) -> Any:
    """The folder's processor, with the image processor that works on Pillow images."""
    settings = read_json(folder / "processor_config.json") if (folder / "processor_config.json").is_file() else {}
    template = folder / "chat_template.jinja"
    return PictureProcessor(
        AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True),
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
        image_seq_length=settings.get("image_seq_length", 256),
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
    )


def preprocessing(model: Any, processor: Any) -> dict[str, Any]:
    """The image processor's resolved settings and the count of image tokens a tile. Raises ModelError where tiles or marks don't fit the model."""
    settings = {name: value for name, value in processor.image_processor.to_dict().items() if value is not None}
    # The processor's own defaults go before its image processor's: it always cuts tiles.
    settings |= type(processor).images_kwargs
    vision, size = model.config.vision_config, settings["size"]
    if [size.get("height"), size.get("width")] != list(vision.image_size):
        raise ModelError(f"the image processor cuts tiles of {dict(size)}, the vision tower takes {list(vision.image_size)}; set its size to the tower's")
    tokens = round(vision.image_size[0] // vision.patch_size[0] * model.config.downsample_ratio) ** 2
    if processor.image_seq_length != tokens:
        raise ModelError(
            f"the processor writes {processor.image_seq_length} image tokens a tile, the model has {tokens} features; set image_seq_length to {tokens}"
        )
    marks = (processor.image_token, processor.start_image_token, processor.end_image_token)
    if marks != (IMAGE_TOKEN, START, END):
        raise ModelError(f"the tokenizer's image tokens are {', '.join(marks)}; expected {IMAGE_TOKEN}, {START}, {END}, use the model's own tokenizer")
    return settings | {"image_seq_length": tokens}


def text_parts(model: Any) -> tuple[Any, nn.Linear]:
    """The decoder (with its embedding) and its head."""
    return model.model.language_model, model.lm_head


def image_features(model: Any, pixels: dict[str, torch.Tensor]) -> torch.Tensor:
    """PyTorch's features of all tiles, f32[image tokens, D], the reference."""
    return torch.as_tensor(model.get_image_features(pixels["pixel_values"], return_dict=True).pooler_output).flatten(0, 1)


def vision_module(model: Any) -> nn.Module:
    return VisionEncoder(model).eval()


def vision_example(model: Any) -> tuple[tuple[torch.Tensor, ...], tuple[dict[int, Any], ...]]:
    """Inputs to trace with, and their free axes: any number of tiles."""
    height, width = model.config.vision_config.image_size
    pixels = torch.linspace(-1, 1, 2 * 3 * height * width).reshape(2, 3, height, width)
    return (pixels,), ({0: torch.export.Dim("num_tiles")},)


class VisionEncoder(nn.Module):
    """pixel_values f32[n, 3, side, side] -> f32[n, image tokens of a tile, D]."""

    positions: torch.Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        tower, projector = model.model.vision_tower, model.model.multi_modal_projector
        config = model.config
        layers = config.vision_feature_layer
        if not isinstance(layers, int):
            raise ModelError(f"the model takes features of the vision layers {list(layers)}; expected one layer, this version can't export several")
        # Counted from the embeddings, as hidden states are; the last one goes through the tower's own norm.
        count = len(tower.encoder.layer) if layers == -1 else range(len(tower.encoder.layer) + 1)[layers]
        self.grid = config.vision_config.image_size[0] // config.vision_config.patch_size[0]
        self.shuffle = round(1 / config.downsample_ratio)
        self.drop_class = config.vision_feature_select_strategy == "default"
        self.patches = tower.embeddings.patch_embeddings.projection
        self.class_token = tower.embeddings.cls_token
        known = tower.embeddings.position_embeddings
        self.register_buffer("positions", torch.zeros_like(self.class_token) if known is None else known.detach())
        self.layers = nn.ModuleList(Layer(layer) for layer in tower.encoder.layer[:count])
        self.norm = tower.layernorm if layers == -1 else nn.Identity()
        self.projector_norm, self.activation = projector.layer_norm, projector.act
        self.linear_1, self.linear_2 = Projection(projector.linear_1), Projection(projector.linear_2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.patches(pixel_values.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2)  # n, N, C
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        x = self.pixel_shuffle(x[:, 1:] if self.drop_class else x)
        return self.linear_2(self.activation(self.linear_1(self.projector_norm(x)))).float()

    def pixel_shuffle(self, x: torch.Tensor) -> torch.Tensor:
        """f[n, N, C] -> f[n, N / s², C · s²]: each s x s square of patches becomes one row."""
        s, grid, channels = self.shuffle, self.grid // self.shuffle, x.shape[-1]
        x = x.reshape(-1, grid, s, grid, s * channels).transpose(2, 3)
        return x.reshape(-1, grid * grid, s * s * channels)


class Layer(nn.Module):
    """One block of the tower, its three attention projections packed into one product."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention = layer.attention
        self.heads, self.scale = attention.num_heads, attention.scale
        self.norm1, self.norm2 = layer.layernorm_before, layer.layernorm_after
        self.query_norm, self.key_norm = attention.q_norm, attention.k_norm
        self.qkv = Projection(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = Projection(attention.projection_layer)
        self.fc1, self.fc2, self.activation = Projection(layer.mlp.fc1), Projection(layer.mlp.fc2), layer.mlp.activation_fn
        self.lambda_1, self.lambda_2 = layer.lambda_1, layer.lambda_2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.lambda_1 * self.attention(self.norm1(x))
        return x + self.lambda_2 * self.fc2(self.activation(self.fc1(self.norm2(x))))

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        n_tiles, n_patches, channels = x.shape
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        query, key, value = (
            part.reshape(n_tiles, n_patches, self.heads, channels // self.heads).transpose(1, 2) for part in (self.query_norm(query), self.key_norm(key), value)
        )
        weights = F.softmax((query * self.scale) @ key.transpose(2, 3), dim=-1)
        return self.out((weights @ value).transpose(1, 2).reshape(n_tiles, n_patches, channels))
