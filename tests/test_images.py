"""The one way in for pixels: equal to transformers' loader on every kind of image, and safe on damaged and hostile ones."""

from __future__ import annotations

import io
import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from masters.errors import ImageError
from masters.images import MAX_ASPECT, open_image


def noise(mode: str, size: tuple[int, int] = (23, 17)) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, size=(size[1], size[0], bands), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), "RGB" if mode == "RGB" else None) if bands in (1, 3) else Image.frombytes(mode, size, pixels.tobytes())


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def with_orientation(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(noise("RGB"), "JPEG", exif=exif)


def transparent_palette() -> bytes:
    image = noise("RGB").quantize(16)
    return encode(image, "PNG", transparency=3)


def animation() -> bytes:
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "green", "blue")]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)


def sixteen_bit() -> bytes:
    return encode(Image.fromarray(np.linspace(0, 65535, 20 * 30).reshape(20, 30).astype(np.uint16)), "PNG")


KINDS: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encode(noise("RGB"), "JPEG"),
    "progressive jpeg": lambda: encode(noise("RGB"), "JPEG", progressive=True),
    "grey jpeg": lambda: encode(noise("L"), "JPEG"),
    "CMYK jpeg": lambda: encode(noise("CMYK"), "JPEG"),
    "png": lambda: encode(noise("RGB"), "PNG"),
    "alpha png": lambda: encode(noise("RGBA"), "PNG"),
    "grey alpha png": lambda: encode(noise("LA"), "PNG"),
    # Pillow clips what exceeds 255 to white; a student served by other programs sees it so too, hence so do we.
    "16-bit grey png": sixteen_bit,
    "one-bit png": lambda: encode(noise("L").convert("1"), "PNG"),
    "palette with transparency": transparent_palette,
    "animated gif": animation,
    "webp": lambda: encode(noise("RGBA"), "WEBP", lossless=True),
    "bmp": lambda: encode(noise("RGB"), "BMP"),
    "tiff": lambda: encode(noise("RGB"), "TIFF"),
} | {f"exif orientation {value}": lambda value=value: with_orientation(value) for value in range(1, 9)}


@pytest.mark.parametrize("kind", KINDS)
def test_same_pixels_as_transformers(tmp_path: Path, kind: str) -> None:
    raw = KINDS[kind]()
    (tmp_path / "image").write_bytes(raw)
    # Its loader, then the conversion that its processors apply to what was loaded.
    expected = convert_to_rgb(load_image(str(tmp_path / "image")), return_numpy=True)
    assert expected.std() > 0 or kind == "animated gif"
    for source in (tmp_path / "image", str(tmp_path / "image"), raw, Image.open(io.BytesIO(raw))):
        image = open_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), expected, err_msg=kind)


def test_orientation_is_applied() -> None:
    """Orientation 6 asks for a quarter turn clockwise: the sides change places and the left edge becomes the top."""
    plain, turned = np.asarray(open_image(with_orientation(1))), np.asarray(open_image(with_orientation(6)))
    assert turned.shape == (23, 17, 3)
    np.testing.assert_array_equal(turned, np.rot90(plain, -1))


def test_first_frame_of_an_animation() -> None:
    assert open_image(animation()).getpixel((0, 0)) == (255, 0, 0)


def test_arrays() -> None:
    colour, grey = np.asarray(noise("RGB")), np.asarray(noise("L"))
    np.testing.assert_array_equal(np.asarray(open_image(colour)), colour)
    np.testing.assert_array_equal(np.asarray(open_image(grey)), np.repeat(grey[..., None], 3, axis=2))


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing: a few bytes that would ask for gigabytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_bomb_is_refused_on_its_header() -> None:
    bomb = png_header(20_000, 20_000)
    assert len(bomb) < 200
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError) as caught:
        open_image(bomb)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 50, f"refusing took {grown:.0f} MB"
    message = str(caught.value)
    assert "\n" not in message
    assert "is too large" in message
    assert "400000000 pixels" in message
    assert "at most 100 megapixels are decoded, scale it down first" in message


def test_large_photo_within_the_limit_is_read() -> None:
    """Pillow itself warns above 89 megapixels; ours is the only limit."""
    image = open_image(encode(Image.new("L", (9000, 9950), 7), "PNG"))
    assert (image.size, image.getpixel((8999, 0))) == ((9000, 9950), (7, 7, 7))


def truncated(form: str, keep: float = 0.6) -> bytes:
    whole = encode(noise("RGB", (200, 150)), form)
    return whole[: int(len(whole) * keep)]


BAD: dict[str, tuple[Callable[[], object], list[str]]] = {
    "truncated jpeg": (lambda: truncated("JPEG"), ["could not decode", "expected a whole JPEG"]),
    "truncated png": (lambda: truncated("PNG"), ["could not decode"]),
    "truncated webp": (lambda: truncated("WEBP"), ["could not decode"]),
    "jpeg header alone": (lambda: truncated("JPEG", 0.01), ["could not decode"]),
    "damaged png": (lambda: encode(noise("RGB"), "PNG").replace(b"IDAT", b"IDAX", 1), ["could not decode"]),
    "text": (lambda: b"not an image", ["an image of 12 bytes", "could not decode"]),
    "nothing": (lambda: b"", ["an image of 0 bytes"]),
    "1 x 1": (lambda: encode(Image.new("RGB", (1, 1)), "PNG"), ["1 x 1", "at least 2 pixels", "remove the row"]),
    "a line": (lambda: encode(Image.new("RGB", (MAX_ASPECT * 3 + 1, 3)), "PNG"), [f"at most {MAX_ASPECT} times", "crop it first"]),
    "pixels just over the limit": (lambda: png_header(10_000, 10_001), ["10000 x 10001", "at most 100"]),
    "absent file": (lambda: Path("no/such.jpg"), ["no image file at no/such.jpg"]),
    "a folder": (lambda: Path("."), ["could not decode"]),
    "float array": (lambda: np.zeros((4, 4, 3)), ["an image", "could not decode"]),
    "array of two bands": (lambda: np.zeros((4, 4, 2, 2), np.uint8), ["could not decode"]),
    "empty array": (lambda: np.zeros((0, 4, 3), np.uint8), ["an image"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_image_is_one_line(case: str) -> None:
    make, expected = BAD[case]
    with pytest.raises(ImageError) as caught:
        open_image(make())  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    for words in expected:
        assert words in message


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(truncated("JPEG"))
    with pytest.raises(ImageError, match=r"cut\.jpg"):
        open_image(tmp_path / "cut.jpg")


def test_source_image_is_left_as_it_was() -> None:
    image = noise("RGBA")
    before = image.tobytes()
    open_image(image).putpixel((0, 0), (1, 2, 3))
    assert (image.mode, image.tobytes()) == ("RGBA", before)
    plain = noise("RGB")
    before = plain.tobytes()
    open_image(plain).putpixel((0, 0), (1, 2, 3))
    assert plain.tobytes() == before
