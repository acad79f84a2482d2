"""The runtime's preprocessing against transformers' own processors: same pixels, same token ids."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers import Idefics3Processor, PreTrainedTokenizerFast
from transformers.image_utils import load_image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from masters.demo.models import SPECIAL, TEMPLATE, build_tokenizer
from masters.errors import DataError
from masters.images import open_image
from masters.runtime.families import idefics3, smolvlm

rng = np.random.default_rng(7)


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    """Noise over a gradient: every kernel and every rounding shows."""
    ramp = np.linspace(0, 160, width)[None, :, None] + np.zeros((height, 1, channels))
    return Image.fromarray((ramp + rng.integers(0, 96, (height, width, channels))).astype(np.uint8).squeeze())


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(noise(90, 61), "JPEG", exif=exif)


def animated_gif() -> bytes:
    return saved(noise(50, 40).quantize(64), "GIF", save_all=True, append_images=[noise(50, 40).quantize(64)])


def keyed_png() -> bytes:
    """RGB with one of its colours declared transparent."""
    image = noise(70, 70).quantize(8).convert("RGB")
    return saved(image, "PNG", transparency=image.getpixel((35, 35)))


AWKWARD = {
    "plain": lambda: saved(noise(300, 200), "PNG"),
    "exactly a tile": lambda: saved(noise(64, 64), "PNG"),
    "grey": lambda: saved(noise(120, 97, 1).convert("L"), "PNG"),
    "one bit": lambda: saved(noise(33, 70, 1).convert("1"), "PNG"),
    "palette with transparency": lambda: saved(noise(70, 70).quantize(16), "PNG", transparency=3),
    "colour declared transparent": keyed_png,
    "cmyk": lambda: saved(noise(130, 77).convert("CMYK"), "JPEG"),
    "alpha": lambda: saved(noise(65, 129, 4), "PNG"),
    "grey with alpha": lambda: saved(noise(65, 129, 2).convert("LA"), "PNG"),
    "16 bits": lambda: saved(Image.fromarray(rng.integers(0, 65535, (50, 70), dtype=np.uint16)), "PNG"),
    "exif-rotated": rotated_jpeg,
    "animation": animated_gif,
    "1 x N": lambda: saved(noise(1, 100), "PNG"),
    "N x 1": lambda: saved(noise(100, 1), "PNG"),
    "very large": lambda: saved(noise(3003, 1999), "JPEG"),
    "one over a tile": lambda: saved(noise(257, 255), "PNG"),
    "tall": lambda: saved(noise(31, 400), "PNG"),
}
SETTINGS = {
    "whole": dict(size={"longest_edge": 64}, max_image_size={"longest_edge": 64}, do_image_splitting=False, image_mean=[0.5] * 3, image_std=[0.5] * 3),
    "split": dict(size={"longest_edge": 256}, max_image_size={"longest_edge": 64}, do_image_splitting=True, image_mean=[0.5] * 3, image_std=[0.5] * 3),
    "split at the original size": dict(size={"longest_edge": 256}, max_image_size={"longest_edge": 91}, do_image_splitting=True, do_resize=False),
    "imagenet, bicubic, fixed size": dict(size={"height": 80, "width": 112}, max_image_size={"longest_edge": 56}, do_image_splitting=True, resample=3),
    "unnormalised": dict(size={"longest_edge": 128}, max_image_size={"longest_edge": 64}, do_image_splitting=True, do_normalize=False),
    "levels": dict(size={"longest_edge": 130}, max_image_size={"longest_edge": 64}, do_image_splitting=False, do_rescale=False, do_normalize=False),
}


@cache
def picture(name: str) -> bytes:
    return AWKWARD[name]()


# A picture that costs seconds need not be seen by every setting.
CASES = [(name, settings) for name in AWKWARD for settings in SETTINGS if name != "very large" or settings in ("whole", "split")]


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("processor_class", [Idefics3ImageProcessorPil, SmolVLMImageProcessorPil])
def test_pixels_and_tiles_equal_transformers(processor_class: type, name: str, settings: str, tmp_path: Path) -> None:
    file = tmp_path / "picture"
    file.write_bytes(picture(name))
    reference = processor_class(**SETTINGS[settings])
    theirs = reference.preprocess([load_image(str(file))], return_tensors="np", return_row_col_info=True)
    family = idefics3 if processor_class is Idefics3ImageProcessorPil else smolvlm
    ours = family.preprocess([open_image(file)], reference.to_dict())
    assert ours.values.shape == theirs["pixel_values"].shape
    largest = float(np.abs(ours.values - theirs["pixel_values"]).max())
    assert largest <= 1e-5, f"largest pixel difference {largest}"
    assert ours.values.dtype == np.float32
    np.testing.assert_array_equal(ours.tensors["pixel_attention_mask"], theirs["pixel_attention_mask"].astype(bool))
    assert ours.grids == ((theirs["rows"][0][0], theirs["cols"][0][0]),)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.mark.parametrize("splitting", [True, False])
@pytest.mark.parametrize("pictures", [["plain"], ["plain", "tall", "exactly a tile"], ["very large"], ["N x 1", "grey"]])
def test_expanded_prompt_gives_transformers_ids(pictures: list[str], splitting: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    # An edge of 512 makes up to 8 tiles: names beyond <row_6_col_6> are ordinary text.
    image_processor = Idefics3ImageProcessorPil(size={"longest_edge": 512}, max_image_size={"longest_edge": 64}, do_image_splitting=splitting)
    processor = Idefics3Processor(image_processor, tokenizer, image_seq_len=16, chat_template=TEMPLATE)
    images = [open_image(picture(name)) for name in pictures]
    prompt = "<|im_start|>User:" + " and ".join(["<image>"] * len(images)) + "what is this?<end_of_utterance>\nAssistant:"
    theirs = processor(text=prompt, images=[images], return_tensors="np")["input_ids"][0]
    settings = image_processor.to_dict() | {"image_seq_len": 16}
    text = idefics3.expand(prompt, idefics3.preprocess(images, settings).grids, settings)
    ours = tokenizer(text)["input_ids"]
    np.testing.assert_array_equal(ours, theirs)
    assert tokenizer.convert_tokens_to_ids("<image>") in ours


def test_expansion_refuses_marks_without_images() -> None:
    with pytest.raises(DataError, match="2 '<image>' marks for 1 images"):
        idefics3.expand("<image> is <image>?", [(0, 0)], {"image_seq_len": 4})


def test_several_images_are_their_tiles_in_order() -> None:
    settings = Idefics3ImageProcessorPil(**SETTINGS["split"]).to_dict()
    images = [open_image(picture(name)) for name in ("plain", "exactly a tile", "tall")]
    together = idefics3.preprocess(images, settings)
    alone = [idefics3.preprocess([image], settings) for image in images]
    np.testing.assert_array_equal(together.values, np.concatenate([pixels.values for pixels in alone], axis=1))
    assert together.grids == tuple(pixels.grids[0] for pixels in alone)
    pieces = list(together.pieces(4))
    np.testing.assert_array_equal(np.concatenate([piece["pixel_values"] for piece in pieces], axis=1), together.values)
    assert max(piece["pixel_attention_mask"].shape[1] for piece in pieces) == 4


def test_upright_is_what_the_camera_meant() -> None:
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(rotated_jpeg())))
    assert upright.size == (61, 90)
    assert open_image(rotated_jpeg()).size == (61, 90)
    assert "<row_6_col_6>" in SPECIAL
