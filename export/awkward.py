"""Image files of the kinds that break preprocessing: every export is compared with PyTorch on them, from the bytes on."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

UPRIGHT_BY_90_DEGREES = 6  # EXIF: as a phone held upright stores its pictures
ORIENTATION = 0x0112


@cache  # the large one takes a second to draw
def awkward_images() -> Mapping[str, bytes]:
    """Encoded files by name, the same each time; the first is an ordinary one, in PNG so that every decoder gives the same pixels."""
    scene = _scene(320, 240)
    exif = Image.Exif()
    exif[ORIENTATION] = UPRIGHT_BY_90_DEGREES
    veiled = scene.convert("RGBA")
    veiled.putalpha(Image.linear_gradient("L").resize(scene.size))
    frames = [_scene(120, 90, seed) for seed in range(3)]
    images = {
        "plain": _encoded(scene, "PNG"),
        "grey": _encoded(_scene(200, 333).convert("L"), "PNG"),
        "cmyk": _encoded(_scene(150, 150).convert("CMYK"), "JPEG", quality=90),
        "alpha": _encoded(veiled, "PNG"),
        "rotated": _encoded(_scene(301, 199), "JPEG", quality=90, exif=exif),
        "thin": _encoded(_scene(1, 100), "PNG"),
        "large": _encoded(_scene(4000, 3000), "JPEG", quality=80),
        "animated": _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100),
    }
    return MappingProxyType(images)


def _scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """Gradients, two hard-edged shapes and fine noise: smooth, sharp and random regions in one picture."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    u, v = x / width, y / height
    pixels = np.stack([255 * u, 255 * v, 127 + 120 * np.sin(9 * u + 5 * v + seed)], axis=-1)
    pixels[(u - 0.3) ** 2 + (v - 0.4) ** 2 < 0.04] = (230, 40, 30)
    pixels[(np.abs(u - 0.7) < 0.15) & (np.abs(v - 0.6) < 0.2)] = (20, 60, 200)
    noise = np.random.default_rng(seed).integers(-12, 13, (min(height, 256), min(width, 256), 3))
    pixels[: noise.shape[0], : noise.shape[1]] += noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
