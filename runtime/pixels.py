"""What a family's preprocessing hands to the vision graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Grid = tuple[int, ...]


@dataclass(frozen=True)
class Pixels:
    """The vision graph's inputs for some images, and how each image was laid out.

    `tensors` go by the graph's input names, for Idefics3 pixel_values float32 [1, tiles, 3, H, W] and pixel_attention_mask bool
    [1, tiles, H, W]. `grids` has one entry an image, in the family's own terms: for Idefics3 (rows, columns) of tiles, (0, 0) for an
    image that is shown whole.
    """

    tensors: dict[str, np.ndarray]
    grids: tuple[Grid, ...]

    @property
    def values(self) -> np.ndarray:
        return self.tensors["pixel_values"]
