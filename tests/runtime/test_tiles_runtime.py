"""InternVL's and LLaVA-OneVision's preprocessing, prompts and packing against transformers' own: same pixels, same ids, same features."""

from __future__ import annotations

import math
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, LlavaOnevisionConfig
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil, get_optimal_tiled_canvas
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from masters.errors import DataError
from masters.export.awkward import awkward_images
from masters.export.source import load_family
from masters.images import open_image
from masters.runtime.chat import read_chat_format, user_message
from masters.runtime.families import internvl, llava_onevision

RNG = np.random.default_rng(11)
# Further shapes: a tile exactly, one pixel more, long and short, twice as wide as high.
SHAPES = ((64, 64), (65, 64), (200, 31), (17, 300), (256, 128), (3, 3))
CANVASES = [[32 * high, 32 * wide] for high in range(1, 5) for wide in range(1, 5)]
INTERNVL: dict[str, dict[str, Any]] = {
    "cut": dict(size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=12),
    "at least four": dict(size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=4, max_patches=6, resample=2, image_mean=[0.5] * 3),
    "whole, not square": dict(size={"height": 24, "width": 40}, crop_to_patches=False),
    "cut, not square": dict(size={"height": 24, "width": 40}, crop_to_patches=True, max_patches=5, do_normalize=False),
}
LLAVA: dict[str, dict[str, Any]] = {
    "usual": dict(size={"height": 32, "width": 32}, image_grid_pinpoints=CANVASES),
    "bilinear, no normalisation": dict(size={"height": 16, "width": 16}, image_grid_pinpoints=[[32, 16], [48, 48]], resample=2, do_normalize=False),
}


def noise(width: int, height: int) -> Image.Image:
    ramp = np.linspace(0, 160, width)[None, :, None] + np.zeros((height, 1, 3))
    return Image.fromarray((ramp + RNG.integers(0, 96, (height, width, 3))).astype(np.uint8))


@cache
def pictures() -> dict[str, Image.Image]:
    """As the runtime opens them, which test_images compares with transformers; here it is what follows."""
    opened = {name: open_image(data) for name, data in awkward_images().items()}
    return opened | {f"{width} x {height}": noise(width, height) for width, height in SHAPES}


@pytest.mark.parametrize("settings", INTERNVL)
def test_internvl_pixels(settings: str) -> None:
    processor = GotOcr2ImageProcessorPil(**INTERNVL[settings])
    for name, picture in pictures().items():
        expected = processor.preprocess([picture], return_tensors="np")
        found = internvl.preprocess([picture], processor.to_dict())
        assert found.values.shape == expected["pixel_values"].shape, name
        assert np.abs(found.values - expected["pixel_values"]).max() <= 1e-5, name
        assert internvl.tile_count(found.grids[0]) == expected["num_patches"][0]


@pytest.mark.parametrize("settings", LLAVA)
@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_llava_onevision_pixels(settings: str, together: bool) -> None:
    processor = LlavaOnevisionImageProcessorPil(**LLAVA[settings])
    known = processor.to_dict() | {"together": together}
    for name, picture in pictures().items():
        expected = processor.preprocess([[picture, picture]] if together else [[picture]], return_tensors="np")["pixel_values"][0]
        found = llava_onevision.preprocess([picture], known)
        assert found.values.shape == expected.shape, name
        assert np.abs(found.values - expected).max() <= 1e-5, name
        assert llava_onevision.tile_count(found.grids[0], known) == len(expected)


def test_grids_for_thousands_of_sizes() -> None:
    """The choice of a grid hangs on comparisons of fractions: it must be theirs for any size."""
    points = LlavaOnevisionConfig().image_grid_pinpoints
    for width, height in np.exp(RNG.uniform(0, math.log(6000), (3000, 2))).astype(int).tolist():
        columns, rows = get_optimal_tiled_canvas((height, width), (448, 448), 1, 12)
        assert internvl.best_grid((width, height), (448, 448), 1, 12) == (rows, columns), (width, height)
        assert llava_onevision.best_canvas((height, width), points) == select_best_resolution((height, width), points), (width, height)


@pytest.fixture(scope="module", params=["internvl", "llava_onevision"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, Any, Any]:
    """The runtime's module, transformers' processor, and the chat format of its folder."""
    folder = getattr(tiny_models, request.param)(tmp_path_factory.mktemp("tiny") / request.param)
    return (
        {"internvl": internvl, "llava_onevision": llava_onevision}[request.param],
        load_family(request.param).load_processor(folder),
        read_chat_format(folder),
    )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_prompt_ids(family: tuple[ModuleType, Any, Any], count: int) -> None:
    """One image, and several in one message, which LLaVA-OneVision shows smaller."""
    module, processor, form = family
    settings = processor.image_processor.to_dict() | dict(image_seq_length=16, crop_to_patches=True, tile_features=8, max_tiles=2)
    names = list(pictures())
    for start in range(0, len(names), count):
        chosen = [pictures()[name] for name in names[start : start + count]]
        messages = [user_message("what colour is it?", len(chosen))]
        content = [*({"type": "image", "image": picture} for picture in chosen), messages[0]["content"][-1]]
        expected = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
        )["input_ids"][0]
        prompt = module.expand(form.render(messages), module.preprocess(chosen, settings).grids, settings)
        assert form.encode(prompt).tolist() == expected.tolist(), names[start : start + count]


def test_a_mark_in_the_question_is_refused(family: tuple[ModuleType, Any, Any]) -> None:
    module, _, form = family
    with pytest.raises(DataError, match=f"2 '{module.IMAGE}' marks for 1 images"):
        module.expand(form.render([user_message(f"is {module.IMAGE} a picture?", 1)]), [(0, 0)], dict(image_seq_length=1, tile_features=1))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_models.llava_onevision(tmp_path_factory.mktemp("packing") / "model")
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("size", [(64, 64), (128, 64), (100, 301), (301, 100), (200, 200), (37, 5), (5, 500), (190, 60)])
@pytest.mark.parametrize("most", [1, 2, 9])
def test_packing(llava: Any, size: tuple[int, int], most: int) -> None:
    """Views of the whole and joined tiles, with and without padding to cut and features to thin out."""
    settings = dict(size={"height": 64, "width": 64}, image_grid_pinpoints=llava.config.image_grid_pinpoints, tile_features=8, max_tiles=most)
    count = llava_onevision.tile_count(size, settings)
    tiles = torch.randn(count, 64, 96, generator=torch.Generator().manual_seed(count))
    line_end = llava.model.image_newline.detach()
    (expected,), _ = llava.model.pack_image_features([tiles], [list(size)], line_end, f"anyres_max_{most}")
    given = torch.cat([tiles, line_end.expand(count, 1, -1)], dim=1).flatten(0, 1).numpy()
    found = llava_onevision.pack(given, [size], settings)
    assert len(found) == llava_onevision.token_count(size, settings)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5)
    # Between two whole ones.
    both = llava_onevision.pack(np.concatenate([given[:65], given, given[:65]]), [(0, 0), size, (0, 0)], settings)
    np.testing.assert_array_equal(both, np.concatenate([given[:65], found, given[:65]]))


def test_token_counts_for_thousands_of_sizes(llava: Any) -> None:
    """At the real sizes: tiles of 384 pixels with 27 x 27 features, at most nine of them."""
    images = LlavaOnevisionImageProcessorPil()
    processor = load_family("llava_onevision").PictureProcessor(
        images, tiny_models.chat_tokenizer(image_token="<image>", video_token="<video>"), num_image_tokens=729
    )
    settings = images.to_dict() | dict(tile_features=27, max_tiles=9)
    for height, width in np.exp(RNG.uniform(0, math.log(6000), (3000, 2))).astype(int).tolist():
        assert llava_onevision.token_count((height, width), settings) == processor._get_number_of_features(height, width, 384, 384), (height, width)


@pytest.mark.parametrize(("size", "wanted"), [((9, 13), (4, 5)), ((16, 16), (11, 11)), ((3, 50), (2, 49)), ((5, 5), (1, 1))])
def test_resampling_equals_torch(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    features = RNG.standard_normal((*size, 7)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(features).permute(2, 0, 1)[None], list(wanted), mode="bilinear")[0].permute(1, 2, 0)
    np.testing.assert_allclose(llava_onevision.resample(features, wanted), expected.numpy(), atol=2e-6)
