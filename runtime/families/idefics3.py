"""Idefics3: pictures to tiles and `<image>` to image tokens, in numpy and Pillow.

Computes what transformers' Idefics3ImageProcessorPil and Idefics3Processor (5.23) compute; tests hold both side by side. Every
size below goes through the same floating-point steps as theirs, because one pixel of a side is a whole tile more or less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..chat import fill_marks
from ..pixels import Grid, Pixels, level_table

IMAGE, FRAME, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
MAX_SIDE = 4096  # pixels; the processor never enlarges beyond it
WHOLE: Grid = (0, 0)

Size = tuple[int, int]  # width, height, as Pillow has it


def preprocess(images: Sequence[Image.Image], settings: dict[str, Any]) -> Pixels:
    """Tiles of upright RGB `images`, in order, as pixel_values float32 [1, tiles, 3, H, W] with their mask bool [1, tiles, H, W].

    `settings` are the HF image processor's resolved fields. With do_image_splitting a picture becomes rows x columns tiles and, last,
    a view of the whole; without, one tile. Tiles smaller than the largest are padded with zeros at the right and the bottom.
    """
    tiles: list[Image.Image] = []
    grids: list[Grid] = []
    for image in images:
        cut, grid = tile(image, settings)
        tiles += cut
        grids.append(grid)
    width, height = (max((t.size[axis] for t in tiles), default=0) for axis in (0, 1))
    values = np.zeros((1, len(tiles), 3, height, width), np.float32)
    mask = np.zeros((1, len(tiles), height, width), np.bool_)
    table = level_table(settings)
    for number, one in enumerate(tiles):
        levels = np.asarray(one)  # uint8 [h, w, 3]
        for channel in range(3):
            values[0, number, channel, : one.height, : one.width] = table[channel][levels[:, :, channel]]
        mask[0, number, : one.height, : one.width] = True
    return Pixels({"pixel_values": values, "pixel_attention_mask": mask}, tuple(grids), tile_axis=1)


def expand(prompt: str, grids: Sequence[Grid], settings: dict[str, Any]) -> str:
    """`prompt` with each `<image>` replaced by the tokens of the picture that stands there.

    Raises DataError if there are not as many `<image>` marks as pictures.
    """
    return fill_marks(prompt, IMAGE, [image_tokens(grid, settings["image_seq_len"]) for grid in grids])


def image_tokens(grid: Grid, per_tile: int) -> str:
    """The text that stands for one picture: its tiles row by row, each named by its place, then the view of the whole."""
    rows, columns = grid
    whole = f"{FRAME}{GLOBAL}{IMAGE * per_tile}{FRAME}"
    if grid == WHOLE:
        return whole
    lines = ("".join(f"{FRAME}<row_{row}_col_{column}>{IMAGE * per_tile}" for column in range(1, columns + 1)) + "\n" for row in range(1, rows + 1))
    return "".join(lines) + "\n" + whole


def tile(image: Image.Image, settings: dict[str, Any]) -> tuple[list[Image.Image], Grid]:
    """The tiles of one picture, the view of the whole last, and (rows, columns)."""
    side, resample = settings["max_image_size"]["longest_edge"], Image.Resampling(settings.get("resample", Image.Resampling.BILINEAR))
    if settings.get("do_resize"):
        image = image.resize(_bounded(image.size, settings["size"]), resample)
    if not settings.get("do_image_splitting"):
        return [image.resize((side, side), resample)], WHOLE
    image = image.resize(_whole_tiles(image.size, side), resample)
    columns, rows = image.width // side, image.height // side
    if rows == columns == 1:
        return [image], WHOLE
    boxes = [(x * side, y * side, (x + 1) * side, (y + 1) * side) for y in range(rows) for x in range(columns)]
    return [*(image.crop(box) for box in boxes), image.resize((side, side), resample)], (rows, columns)


def _bounded(size: Size, wanted: dict[str, int]) -> Size:
    """The picture's size with its longest edge at `longest_edge`, the other one even, neither above MAX_SIDE."""
    if not wanted.get("longest_edge"):
        return wanted["width"], wanted["height"]
    width, height = size
    longest = wanted["longest_edge"]
    ratio = width / height
    if width >= height:
        width, height = longest, _even(int(longest / ratio))
    else:
        width, height = _even(int(longest * ratio)), longest
    width, height = max(width, 1), max(height, 1)
    ratio = width / height
    if width >= height and width > MAX_SIDE:
        width, height = MAX_SIDE, int(MAX_SIDE / ratio)
    elif height > width and height > MAX_SIDE:
        width, height = int(MAX_SIDE * ratio), MAX_SIDE
    return max(width, 1), max(height, 1)


def _whole_tiles(size: Size, side: int) -> Size:
    """The next size up whose edges are multiples of `side`, the longer edge first, the other following its ratio."""
    width, height = size
    ratio = width / height
    if width >= height:
        width = math.ceil(width / side) * side
        height = math.ceil(int(width / ratio) / side) * side
    else:
        height = math.ceil(height / side) * side
        width = math.ceil(int(height * ratio) / side) * side
    return width, height


def _even(number: int) -> int:
    return number + number % 2
