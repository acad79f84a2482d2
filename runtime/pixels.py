"""What a family's preprocessing hands to the vision graph, and the arithmetic on levels that all share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Grid = tuple[int, ...]


@dataclass(frozen=True)
class Pixels:
    """The vision graph's inputs for some images, and how each image was laid out.

    `tensors` go by the graph's input names, for Idefics3 pixel_values float32 [1, tiles, 3, H, W] and pixel_attention_mask bool
    [1, tiles, H, W]. `grids` has one entry an image, in the family's own terms: for Idefics3 (rows, columns) of tiles, (0, 0) for an
    image that is shown whole. `tile_axis` is the axis along which every tensor may be cut and encoded piece by piece, None if it may not.
    """

    tensors: dict[str, np.ndarray]
    grids: tuple[Grid, ...]
    tile_axis: int | None = None

    @property
    def values(self) -> np.ndarray:
        return self.tensors["pixel_values"]

    def pieces(self, tiles: int) -> Iterator[dict[str, np.ndarray]]:
        """The tensors in pieces of at most `tiles` tiles, in order."""
        if self.tile_axis is None:
            yield self.tensors
            return
        for start in range(0, self.values.shape[self.tile_axis], tiles):
            cut = (slice(None),) * self.tile_axis + (slice(start, start + tiles),)
            yield {name: tensor[cut] for name, tensor in self.tensors.items()}


def level_table(settings: dict[str, Any]) -> np.ndarray:
    """Rescaling and normalisation of the 256 levels of each channel, float32 [3, 256]: a lookup is exact and costs no arithmetic per pixel."""
    levels = np.arange(256, dtype=np.float64)
    if settings.get("do_rescale"):
        levels = levels * settings["rescale_factor"]
    table = np.tile(levels.astype(np.float32), (3, 1))
    if settings.get("do_normalize"):
        table = (table - _per_channel(settings["image_mean"])) / _per_channel(settings["image_std"])
    return table


def _per_channel(value: float | list[float]) -> np.ndarray:
    return np.broadcast_to(np.asarray(value, np.float32), (3,))[:, None]
