"""Idefics3 (and SmolVLM, which changed nothing here): a SigLIP tower over tiles with partial masks, pixel shuffle, a Llama decoder.

A thin module computes what `Idefics3Model.get_image_features` computes, from the same weights, in operations that become a small
graph: packed projections, positions by comparison instead of a search, attention without the guard against rows that see nothing.

Shapes: n tiles, N patches of a tile, C channels of the tower, D hidden size of the decoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoProcessor

from ...errors import ModelError

IMAGE_TOKEN = "<image>"
INPUTS = ("pixel_values", "pixel_attention_mask")


def load_processor(folder: Path) -> Any:
    """The folder's processor, with the image processor that works on Pillow images."""
    return AutoProcessor.from_pretrained(folder, backend="pil", local_files_only=True)


def preprocessing(model: Any, processor: Any) -> dict[str, Any]:
    """The image processor's resolved settings and the count of image tokens a tile. Raises ModelError where its tiles don't fit the tower."""
    settings = {name: value for name, value in processor.image_processor.to_dict().items() if value is not None}
    side, expected = settings["max_image_size"].get("longest_edge"), model.config.vision_config.image_size
    if side != expected:
        raise ModelError(f"the image processor cuts tiles of {side} pixels, the vision tower takes {expected}; set max_image_size.longest_edge to {expected}")
    tokens = (expected // model.config.vision_config.patch_size // model.config.scale_factor) ** 2
    if processor.image_seq_len != tokens:
        raise ModelError(f"the processor writes {processor.image_seq_len} image tokens a tile, the model has {tokens} features; set image_seq_len to {tokens}")
    return settings | {"image_seq_len": tokens}


def text_parts(model: Any) -> tuple[Any, nn.Linear]:
    """The decoder (with its embedding) and its head."""
    return model.model.text_model, model.lm_head


def vision_parts(model: Any) -> tuple[Any, nn.Linear, int]:
    """The vision tower, the projection after the pixel shuffle, and the shuffle's factor."""
    connector = model.model.connector
    return model.model.vision_model, connector.modality_projection.proj, connector.scale_factor


def image_features(model: Any, pixels: dict[str, torch.Tensor]) -> torch.Tensor:
    """PyTorch's features of all images, f32[image tokens, D], the reference."""
    return torch.cat(model.get_image_features(**pixels, return_dict=True).pooler_output)


def vision_module(model: Any) -> nn.Module:
    return VisionEncoder(model).eval()


def vision_example(model: Any) -> tuple[tuple[torch.Tensor, ...], tuple[dict[int, Any], ...]]:
    """Inputs to trace with, and their free axes: any number of rows of images, any number of tiles in a row."""
    side = model.config.vision_config.image_size
    batch, tiles = torch.export.Dim("batch_size"), torch.export.Dim("num_tiles")
    pixels = torch.linspace(-1, 1, 2 * 3 * 3 * side * side).reshape(2, 3, 3, side, side)
    return (pixels, torch.ones(2, 3, side, side, dtype=torch.bool)), ({0: batch, 1: tiles}, {0: batch, 1: tiles})


class VisionEncoder(nn.Module):
    """pixel_values f32[batch, tiles, 3, side, side], pixel_attention_mask bool[batch, tiles, side, side] -> f32[real tiles, image tokens, D].

    A tile of zeros is padding and has no row in the output, as in PyTorch.
    """

    boundaries: torch.Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        vision, config = model.model.vision_model, model.config.vision_config
        self.patch = config.patch_size
        self.grid = config.image_size // config.patch_size
        self.shuffle = model.config.scale_factor
        self.patch_embedding = vision.embeddings.patch_embedding
        self.position_embedding = vision.embeddings.position_embedding
        # The very numbers that the PyTorch model compares with: computed otherwise, a fraction on a boundary may fall to its other side.
        self.register_buffer("boundaries", torch.arange(1 / self.grid, 1.0, 1 / self.grid))
        self.layers = nn.ModuleList(Layer(layer) for layer in vision.encoder.layers)
        self.norm = vision.post_layernorm
        self.projection = Projection(model.model.connector.modality_projection.proj)

    def forward(self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor) -> torch.Tensor:
        pixels, mask = pixel_values.flatten(0, 1), pixel_attention_mask.flatten(0, 1)
        real = (pixels != 0).flatten(1).any(1)
        pixels, mask = pixels[real], mask[real]
        seen = mask.reshape(-1, self.grid, self.patch, self.grid, self.patch).any(4).any(2)  # n, grid, grid
        dtype = self.patch_embedding.weight.dtype
        x = self.patch_embedding(pixels.to(dtype)).flatten(2).transpose(1, 2)  # n, N, C
        x = x + self.position_embedding(self.positions(seen))
        # A masked patch keeps its place and is seen by nobody.
        bias = torch.where(seen.flatten(1), 0.0, torch.finfo(dtype).min).to(dtype)[:, None, None]  # n, 1, 1, N
        for layer in self.layers:
            x = layer(x, bias)
        return self.projection(self.pixel_shuffle(self.norm(x))).float()

    def positions(self, seen: torch.Tensor) -> torch.Tensor:
        """Which learned position each patch has, i64[n, N]: the seen rectangle is stretched over the whole grid; a masked patch has position 0."""
        rows = self.bucket(seen[:, :, 0].sum(1))
        columns = self.bucket(seen[:, 0, :].sum(1))
        ids = rows[:, :, None] * self.grid + columns[:, None, :]
        return (ids * seen).flatten(1)

    def bucket(self, count: torch.Tensor) -> torch.Tensor:
        """i64[n] patches along an axis -> the learned row (or column) of each place on it, i64[n, grid]."""
        fraction = torch.arange(self.grid, dtype=torch.float32) * (1.0 / count)[:, None]
        return (fraction.clamp(max=1.0 - 1e-6)[:, :, None] >= self.boundaries).sum(2)

    def pixel_shuffle(self, x: torch.Tensor) -> torch.Tensor:
        """f[n, N, C] -> f[n, N / s², C · s²]: each s x s square of patches becomes one row."""
        s, grid, channels = self.shuffle, self.grid // self.shuffle, x.shape[-1]
        x = x.reshape(-1, grid, s, grid, s * channels).transpose(2, 3)
        return x.reshape(-1, grid * grid, s * s * channels)


class Layer(nn.Module):
    """One block of a SigLIP tower, its three attention projections packed into one product; `bias` is added to the scores."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention = layer.self_attn
        self.heads, self.scale = attention.num_heads, attention.scale
        self.norm1, self.norm2 = layer.layer_norm1, layer.layer_norm2
        self.qkv = Projection(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = Projection(attention.out_proj)
        self.fc1, self.fc2, self.activation = Projection(layer.mlp.fc1), Projection(layer.mlp.fc2), layer.mlp.activation_fn

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), bias)
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))

    def attention(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        n_tiles, n_patches, channels = x.shape
        # Each n, heads, N, head size; cut so that export/fuse.py finds the attention.
        shape = (n_tiles, n_patches, self.heads, channels // self.heads)
        query, key, value = (part.reshape(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        scores = (query * self.scale) @ key.transpose(2, 3)
        weights = F.softmax(scores if bias is None else scores + bias, dim=-1)
        return self.out((weights @ value).transpose(1, 2).reshape(n_tiles, n_patches, channels))


class Projection(nn.Module):
    """Linear layers side by side. The weight is kept as [inputs, outputs], which a MatMul takes without a Transpose before it."""

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        packed = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
        self.weight = nn.Parameter(packed.detach().T, requires_grad=False)
        biases: list[torch.Tensor] = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = x @ self.weight
        return product if self.bias is None else product + self.bias
