"""LLaVA-OneVision: an image alone to a view of the whole and tiles, several to one tile each; `<image>` to image tokens; features to rows of text.

Computes what transformers' LlavaOnevisionImageProcessorPil, LlavaOnevisionProcessor and LlavaOnevisionModel.pack_image_features (5.23) compute; tests
hold both side by side. The vision graph gives each tile's features and, after them, the embedding of a line's end.

Shapes: n tiles, g x g features of a tile, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..chat import fill_marks
from ..pixels import Grid, Pixels, level_table

IMAGE = "<image>"
WHOLE: Grid = (0, 0)
ALONE_IN_TILES = True
# Features beyond `max_tiles` tiles by more than this, along a side, are thinned out.
SLACK = 1.1

Size = tuple[int, int]  # height, width, as the processor's settings have it


def preprocess(images: Sequence[Image.Image], settings: dict[str, Any]) -> Pixels:
    """Tiles of upright RGB `images`, in order, as pixel_values float32 [n, 3, H, W].

    `settings` are the HF image processor's resolved fields. An image alone in its prompt is shown whole and then in tiles, its grid being its (height,
    width) in pixels; `together` in the settings, or several images, ask for one tile each, padded to a square, with the grid (0, 0).
    """
    table = level_table(settings)
    together = settings.get("together", len(images) > 1)
    tiles = [one for image in images for one in ([_whole(image, settings)] if together else _tiles(image, settings))]
    side = settings["size"]
    values = np.empty((len(tiles), 3, side["height"], side["width"]), np.float32)
    for number, one in enumerate(tiles):
        levels = np.asarray(one)  # uint8 [h, w, 3]
        for channel in range(3):
            values[number, channel] = table[channel][levels[:, :, channel]]
    return Pixels({"pixel_values": values}, tuple(WHOLE if together else (image.height, image.width) for image in images), tile_axis=0)


def expand(prompt: str, grids: Sequence[Grid], settings: dict[str, Any]) -> str:
    """`prompt` with each `<image>` replaced by the tokens of the picture that stands there.

    Raises DataError if there are not as many `<image>` marks as pictures.
    """
    return fill_marks(prompt, IMAGE, [IMAGE * token_count(grid, settings) for grid in grids])


def pack(features: np.ndarray, grids: Sequence[Grid], settings: dict[str, Any]) -> np.ndarray:
    """Rows of tiles f32[n * (g² + 1), D] as the vision graph gives them -> the pictures' features f32[image tokens, D].

    A picture alone: the view of the whole; then its tiles joined, without the rows or columns that only padding fills, thinned out if they are too
    many, each line followed by its end.
    """
    side = settings["tile_features"]
    tiles = features.reshape(-1, side * side + 1, features.shape[-1])
    found, start = [], 0
    for grid in grids:
        count = tile_count(grid, settings)
        found.append(tiles[start] if grid == WHOLE else _packed(tiles[start : start + count], grid, settings))
        start += count
    return np.concatenate(found)


def tile_count(grid: Grid, settings: dict[str, Any]) -> int:
    """Tiles of a picture, the view of the whole included."""
    if grid == WHOLE:
        return 1
    height, width = best_canvas(grid, settings["image_grid_pinpoints"])
    return 1 + math.ceil(height / settings["size"]["height"]) * math.ceil(width / settings["size"]["width"])


def token_count(grid: Grid, settings: dict[str, Any]) -> int:
    """Image tokens of a picture."""
    side = settings["tile_features"]
    if grid == WHOLE:
        return int(side * side + 1)
    rows, columns = thinned(_kept(grid, settings), settings)
    return int(side * side + rows * (columns + 1))


def best_canvas(size: Grid, canvases: Sequence[Sequence[int]]) -> Size:
    """The (height, width) of `canvases` on which a picture of `size` (height, width) keeps the most pixels, and of those the smallest."""
    height, width = size
    best, most, least_waste = (0, 0), 0, math.inf
    for high, wide in canvases:
        scale = min(wide / width, high / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        if used > most or (used == most and high * wide - used < least_waste):
            best, most, least_waste = (high, wide), used, high * wide - used
    return best


def unpadded(size: Grid, joined: Size) -> Size:
    """How many (rows, columns) of the joined tiles' features show a picture of `size` (height, width) rather than its padding."""
    height, width = size
    rows, columns = joined
    if width / height > columns / rows:
        return rows - (rows - int(round(height * (columns / width), 7))) // 2 * 2, columns
    return rows, columns - (columns - int(round(width * (rows / height), 7))) // 2 * 2


def thinned(size: Size, settings: dict[str, Any]) -> Size:
    """(rows, columns) of features after thinning, where they are more than `max_tiles` tiles have."""
    rows, columns = size
    ratio = math.sqrt(rows * columns / (settings["max_tiles"] * settings["tile_features"] ** 2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > SLACK else size


def resample(features: np.ndarray, size: Size) -> np.ndarray:
    """f32[rows, columns, D] -> f32[*size, D], bilinear between the centres of cells, as torch's interpolate without align_corners."""
    for axis in (0, 1):
        count = features.shape[axis]
        place = np.maximum((np.arange(size[axis], dtype=np.float32) + np.float32(0.5)) * np.float32(count / size[axis]) - np.float32(0.5), 0)
        low = np.minimum(place.astype(np.int64), count - 1)
        high = np.minimum(low + 1, count - 1)
        weight = (place - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        features = features.take(low, axis) * (1 - weight) + features.take(high, axis) * weight
    return features


def _packed(tiles: np.ndarray, size: Grid, settings: dict[str, Any]) -> np.ndarray:
    """f32[n, g² + 1, D] of one picture of `size` -> f32[tokens, D]."""
    side, width = settings["tile_features"], tiles.shape[-1]
    whole, line_end = tiles[0, :-1], tiles[0, -1]
    rows, columns = _joined(size, settings)
    joined = tiles[1:, :-1].reshape(rows // side, columns // side, side, side, width).transpose(0, 2, 1, 3, 4).reshape(rows, columns, width)
    high, wide = _kept(size, settings)
    top, left = (rows - high) // 2, (columns - wide) // 2
    shown = joined[top : top + high, left : left + wide]
    if thinned((high, wide), settings) != (high, wide):
        shown = resample(shown, thinned((high, wide), settings))
    lines = np.concatenate([shown, np.broadcast_to(line_end, (len(shown), 1, width))], axis=1)
    return np.concatenate([whole, lines.reshape(-1, width)])


def _joined(size: Grid, settings: dict[str, Any]) -> Size:
    """(rows, columns) of the features of all tiles of a picture of `size` side by side."""
    height, width = best_canvas(size, settings["image_grid_pinpoints"])
    return height // settings["size"]["height"] * settings["tile_features"], width // settings["size"]["width"] * settings["tile_features"]


def _kept(size: Grid, settings: dict[str, Any]) -> Size:
    return unpadded(size, _joined(size, settings))


def _tiles(image: Image.Image, settings: dict[str, Any]) -> list[Image.Image]:
    """The view of the whole, then the tiles row by row of the picture in the middle of its canvas."""
    method, side = _resampling(settings), (settings["size"]["width"], settings["size"]["height"])
    height, width = best_canvas((image.height, image.width), settings["image_grid_pinpoints"])
    by_width, by_height = width / image.width, height / image.height
    narrow, low = min(math.ceil(image.width * by_height), width), min(math.ceil(image.height * by_width), height)
    size = (width, low) if by_width < by_height else (narrow, height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(size, method), ((width - size[0]) // 2, (height - size[1]) // 2))
    boxes = [(x, y, x + side[0], y + side[1]) for y in range(0, height, side[1]) for x in range(0, width, side[0])]
    return [image.resize(side, method), *(canvas.crop(box) for box in boxes)]


def _whole(image: Image.Image, settings: dict[str, Any]) -> Image.Image:
    """The picture in the middle of a square of the mean colour."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), tuple(int(level * 255) for level in settings["image_mean"]))
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    return square.resize((settings["size"]["width"], settings["size"]["height"]), _resampling(settings))


def _resampling(settings: dict[str, Any]) -> Image.Resampling:
    return Image.Resampling(settings.get("resample", Image.Resampling.BICUBIC))
