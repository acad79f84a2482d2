"""Qwen2.5-VL: pictures to rows of patches, `<|image_pad|>` to as many as a picture has cells, and positions of three axes, in numpy and Pillow.

Computes what transformers' Qwen2VLImageProcessorPil, Qwen2_5_VLProcessor and get_rope_index (5.23) compute; tests hold both side by side.
A cell is merge_size x merge_size patches and becomes one image token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ...errors import DataError
from ..pixels import Grid, Pixels, level_table

IMAGE = "<|image_pad|>"
MOST_RATIO = 200  # of a picture's sides

Size = tuple[int, int]  # width, height, as Pillow has it


def preprocess(images: Sequence[Image.Image], settings: dict[str, Any]) -> Pixels:
    """Upright RGB `images` as pixel_values float32 [patches, 3·T·p·p] and image_grid_thw int64 [images, 3]: (time, height, width) in patches.

    Patches stand cell by cell, each repeated over the T frames that a video would fill. Raises DataError for a picture 200 times as long as wide.
    """
    table = level_table(settings)
    rows, grids = [], []
    for image in images:
        image = _resized(image, settings)
        side = settings["patch_size"]
        grids.append((1, image.height // side, image.width // side))
        rows.append(_patches(image, table, side, settings["merge_size"], settings["temporal_patch_size"]))
    values = np.concatenate(rows) if rows else np.zeros((0, 3 * settings["temporal_patch_size"] * settings["patch_size"] ** 2), np.float32)
    return Pixels({"pixel_values": values, "image_grid_thw": np.array(grids, np.int64).reshape(-1, 3)}, tuple(grids))


def expand(prompt: str, grids: Sequence[Grid], settings: dict[str, Any]) -> str:
    """`prompt` with each `<|image_pad|>` repeated once a cell of the picture that stands there.

    Raises DataError if there are not as many marks as pictures.
    """
    texts = prompt.split(IMAGE)
    if len(texts) - 1 != len(grids):
        raise DataError(f"the prompt holds {len(texts) - 1} '{IMAGE}' marks for {len(grids)} images; expected one each, take it out of the question's text")
    cells = [math.prod(grid) // settings["merge_size"] ** 2 for grid in grids]
    return texts[0] + "".join(IMAGE * count + text for count, text in zip(cells, texts[1:], strict=True))


def positions(ids: np.ndarray, grids: Sequence[Grid], settings: dict[str, Any], image_token: int) -> np.ndarray:
    """Positions int64 [3, S] (time, height, width) of a prompt's tokens int64 [S]: text counts on in all axes alike, a picture's cells span a box.

    What follows a picture counts on from the longer side of its box, which is fewer than its cells.
    """
    spans: list[np.ndarray] = []
    read = place = 0
    starts = np.flatnonzero(ids == image_token)
    for time, height, width in grids:
        box = (time, height // settings["merge_size"], width // settings["merge_size"])
        start = int(starts[np.searchsorted(starts, read)])
        spans += [_counting(place, start - read), np.indices(box).reshape(3, -1) + place + start - read]
        place += start - read + max(box[1:])
        read = start + math.prod(box)
    return np.concatenate([*spans, _counting(place, len(ids) - read)], axis=1).astype(np.int64)


def fitting_size(size: Size, cell: int, least: int, most: int) -> Size:
    """The size nearest to a picture's whose sides are multiples of `cell` pixels and whose area lies from `least` to `most` pixels.

    Raises DataError for a picture too long for its width.
    """
    width, height = size
    if max(size) / min(size) > MOST_RATIO:
        raise DataError(f"a picture of {width} x {height} pixels; expected one at most {MOST_RATIO} times as long as wide, crop it")
    # The processor's own rounding, half to even, and its order of operations: a pixel more is a whole row of cells.
    wide, high = round(width / cell) * cell, round(height / cell) * cell
    if wide * high > most:
        shrink = math.sqrt((height * width) / most)
        wide, high = (max(cell, math.floor(side / shrink / cell) * cell) for side in size)
    elif wide * high < least:
        grow = math.sqrt(least / (height * width))
        wide, high = (math.ceil(side * grow / cell) * cell for side in size)
    return wide, high


def _resized(image: Image.Image, settings: dict[str, Any]) -> Image.Image:
    cell = settings["patch_size"] * settings["merge_size"]
    if settings.get("do_resize", True):
        size = fitting_size(image.size, cell, settings["size"]["shortest_edge"], settings["size"]["longest_edge"])
        return image.resize(size, Image.Resampling(settings.get("resample", Image.Resampling.BICUBIC)))
    if image.width % cell or image.height % cell or not min(image.size):
        raise DataError(f"a picture of {image.width} x {image.height} pixels for a model that does not resize; expected multiples of {cell}, resize it")
    return image


def _patches(image: Image.Image, table: np.ndarray, side: int, merge: int, frames: int) -> np.ndarray:
    """float32 [patches, 3 · frames · side · side] of one picture whose sides are whole cells."""
    levels = np.asarray(image).reshape(image.height // (side * merge), merge, side, image.width // (side * merge), merge, side, 3)
    levels = levels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, side, side)  # cell row, cell column, row and column within, channel, y, x
    values = np.empty((len(levels), 3, frames, side, side), np.float32)
    for channel in range(3):
        values[:, channel] = table[channel][levels[:, channel]][:, None]
    return values.reshape(len(levels), -1)


def _counting(start: int, count: int) -> np.ndarray:
    return np.broadcast_to(np.arange(start, start + count), (3, count))
