"""Opening images from untrusted bytes: the one way in for every stage, so that teacher, student and device see the same pixels."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .errors import ImageError

# Above this a decoded RGB image takes over 300 MB; phones' largest photos are near 50 megapixels, panoramas near 75.
MAX_PIXELS = 100_000_000
# LANCZOS needs several source pixels per side to mean anything, and some processors divide by the aspect ratio.
MAX_ASPECT = 200
# What people's pictures are in. Pillow knows more, but hands some to other programs (EPS to Ghostscript), which bytes from strangers must not reach.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

ImageSource = Path | str | bytes | Image.Image | np.ndarray


def open_image(source: ImageSource) -> Image.Image:
    """Decode an image to upright 8-bit RGB: EXIF rotation applied, first frame of an animation, alpha dropped, as transformers does.

    `source` is a path, encoded bytes, a PIL image, or a uint8 array [H, W, 3] or [H, W]. Raises ImageError, naming the source, if it
    can't be decoded in full, is a single pixel, has more than 100 megapixels, or has a side over 200 times the other.
    """
    name = _name(source)
    with _refusing(name):
        image = _decode(source)
        _check_size(image, name)
        image.load()
        return _on_white(ImageOps.exif_transpose(image).convert("RGB"))


def image_size(source: ImageSource) -> tuple[int, int]:
    """Width and height as the file's head states them, before any rotation; nothing is decoded. Errors as for `open_image`, as far as the head shows them."""
    name = _name(source)
    with _refusing(name):
        image = _decode(source)
        _check_size(image, name)
        return image.size


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turn what goes wrong with the image `name` into an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"no image file at {name}; expected a JPEG, PNG, WebP, GIF or BMP file there") from None
    except Image.DecompressionBombError as error:  # from twice Pillow's own limit on, before a size is known here
        raise ImageError(f"{name} is too large ({_one_line(error)}); at most {MAX_PIXELS // 10**6} megapixels are decoded, scale it down first") from None
    except Exception as error:  # a decoder that is given damaged bytes may raise anything
        raise ImageError(f"could not decode {name} ({_one_line(error)}); expected a whole JPEG, PNG, WebP, GIF or BMP, save it again") from None


def _decode(source: ImageSource) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    with warnings.catch_warnings():
        # Our own limit is checked straight after, on the header alone.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)


def _on_white(image: Image.Image) -> Image.Image:
    """White where a picture has the one colour that its file declares transparent: transformers' processors do so, whatever was converted before."""
    if "transparency" not in image.info:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height < 2:
        raise ImageError(f"{name} is {width} x {height}; expected at least 2 pixels, a single one shows nothing: it is probably a placeholder, remove the row")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name} is {width} x {height}, {width * height / 1e6:.0f} megapixels; at most {MAX_PIXELS // 10**6} are decoded, scale it down first")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{name} is {width} x {height}; one side may be at most {MAX_ASPECT} times the other, crop it first")


def _name(source: ImageSource) -> str:
    if isinstance(source, bytes):
        return f"an image of {len(source)} bytes"
    # Where a path is expected, some files hold a picture's base64.
    return str(source)[-256:] if isinstance(source, Path | str) else "an image"


def _one_line(error: Exception) -> str:
    return str(error).split("\n")[0][:120] or type(error).__name__
