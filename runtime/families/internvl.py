"""InternVL3 and 3.5: pictures to rows of square tiles and a view of the whole, `<IMG_CONTEXT>` to image tokens, in numpy and Pillow.

Computes what transformers' GotOcr2ImageProcessorPil and InternVLProcessor (5.23) compute; tests hold both side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from ..chat import fill_marks
from ..pixels import Grid, Pixels, level_table

IMAGE, START, END = "<IMG_CONTEXT>", "<img>", "</img>"
WHOLE: Grid = (1, 1)


def preprocess(images: Sequence[Image.Image], settings: dict[str, Any]) -> Pixels:
    """Tiles of upright RGB `images`, in order, as pixel_values float32 [tiles, 3, H, W].

    `settings` are the HF image processor's resolved fields. With crop_to_patches a picture becomes rows x columns tiles and, last, a view of
    the whole where there is more than one tile; without, it is one tile.
    """
    table = level_table(settings)
    tiles: list[Image.Image] = []
    grids: list[Grid] = []
    for image in images:
        cut, grid = tile(image, settings)
        tiles += cut
        grids.append(grid)
    values = np.empty((len(tiles), 3, settings["size"]["height"], settings["size"]["width"]), np.float32)
    for number, one in enumerate(tiles):
        levels = np.asarray(one)  # uint8 [h, w, 3]
        for channel in range(3):
            values[number, channel] = table[channel][levels[:, :, channel]]
    return Pixels({"pixel_values": values}, tuple(grids), tile_axis=0)


def expand(prompt: str, grids: Sequence[Grid], settings: dict[str, Any]) -> str:
    """`prompt` with each `<IMG_CONTEXT>` replaced by the tokens of the picture that stands there.

    Raises DataError if there are not as many marks as pictures.
    """
    return fill_marks(prompt, IMAGE, [START + IMAGE * (settings["image_seq_length"] * tile_count(grid)) + END for grid in grids])


def tile(image: Image.Image, settings: dict[str, Any]) -> tuple[list[Image.Image], Grid]:
    """The tiles of one picture row by row, the view of the whole last, and (rows, columns)."""
    width, height = settings["size"]["width"], settings["size"]["height"]
    resample = Image.Resampling(settings.get("resample", Image.Resampling.BICUBIC))
    rows, columns = WHOLE
    if settings.get("crop_to_patches") and settings["max_patches"] > 1:
        rows, columns = best_grid(image.size, (width, height), settings["min_patches"], settings["max_patches"])
    whole = image.resize((width, height), resample)
    if rows * columns == 1:
        return [whole], (rows, columns)
    canvas = image.resize((columns * width, rows * height), resample)
    boxes = [(x * width, y * height, (x + 1) * width, (y + 1) * height) for y in range(rows) for x in range(columns)]
    return [*(canvas.crop(box) for box in boxes), whole], (rows, columns)


def tile_count(grid: Grid) -> int:
    """Tiles of a picture cut into (rows, columns), the view of the whole included."""
    rows, columns = grid
    return rows * columns + (rows * columns > 1)


def best_grid(size: tuple[int, int], side: tuple[int, int], least: int, most: int) -> Grid:
    """(rows, columns) whose shape is nearest to that of a picture of `size` (width, height).

    Of two as near, the one with more tiles, unless it has twice the picture's area or more.
    """
    ratio, area = size[0] / size[1], size[0] * size[1]
    best, nearest = WHOLE, float("inf")
    for columns, rows in grid_shapes(least, most):
        distance = abs(ratio - columns / rows)
        if distance < nearest or (distance == nearest and area > 0.5 * side[0] * side[1] * columns * rows):
            best, nearest = (rows, columns), distance
    return best


@cache
def grid_shapes(least: int, most: int) -> list[tuple[int, int]]:
    """(columns, rows) of every grid with `least` to `most` tiles, fewer tiles first."""
    shapes = [(columns, rows) for columns in range(1, most + 1) for rows in range(1, most + 1) if least <= columns * rows <= most]
    return sorted(shapes, key=lambda shape: shape[0] * shape[1])
