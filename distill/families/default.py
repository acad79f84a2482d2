"""What holds for most families: one language model under `model.language_model`, images in a row, tokens at positions 0, 1, 2 …

Families with a file of their own take from here what they share; any other is read by these rules, once a forward has proved that they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError

# Module name patterns, relative to the model that AutoModelForImageTextToText returns.
LANGUAGE = ("model.language_model.layers.",)
VISION = ("model.vision_tower.", "model.vision_model.", "model.visual.")
PROJECTOR = ("model.multi_modal_projector.",)


def collate_pixels(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors whose first axis counts images (or their tiles, or patches), in a row over all prompts; other axes are padded with zeros.

    Raises ModelError if the processor says something of every token: packed responses would lack it.
    """
    batch = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        if name.endswith("token_type_ids"):
            raise ModelError(f"the model reads '{name}', a kind for every token, which is not known of responses; expected a family of causal attention alone")
        tensors = [row[name] for row in rows if name in row]
        largest = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
        batch[name] = torch.cat([_padded(t, largest) for t in tensors])
    return batch


def positions(ids: Tensor, pixels: dict[str, Tensor], processor: Any) -> Tensor:
    """The rotary positions [P] of a prompt's tokens `ids` [P]."""
    return torch.arange(len(ids))


def patch_pairs(pixels: dict[str, Tensor], vision: Any, patches: int) -> float:
    """How many pairs of patches look at each other in a layer of the tower, on average over its layers: those of one tile, here."""
    sides = vision.image_size if isinstance(vision.image_size, list | tuple) else (vision.image_size,) * 2
    size = vision.patch_size if isinstance(vision.patch_size, list | tuple) else (vision.patch_size,) * 2
    return float(patches * (sides[0] // size[0]) * (sides[1] // size[1]))


def _padded(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    if list(tensor.shape[1:]) == list(sizes):
        return tensor
    whole = tensor.new_zeros((len(tensor), *sizes))
    whole[tuple(slice(size) for size in tensor.shape)] = tensor
    return whole
