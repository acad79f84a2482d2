"""Qwen2.5-VL's and Qwen3-VL's preprocessing, prompts and positions against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from qwen_models import TEMPLATE, config, tokenizer
from test_idefics3_runtime import AWKWARD, noise, picture
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from masters.errors import DataError
from masters.export.families.qwen2_5_vl import without_videos
from masters.images import open_image
from masters.runtime.families import qwen2_5_vl, qwen3_vl

FAMILIES = {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2.5": {},
    "qwen3": dict(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, size=dict(shortest_edge=65536, longest_edge=262144)),
    "small": dict(patch_size=14, size=dict(shortest_edge=28 * 28, longest_edge=12 * 28 * 28)),
    "cells of 3, unnormalised": dict(patch_size=8, merge_size=3, do_normalize=False, size=dict(shortest_edge=576, longest_edge=57600)),
    "levels, bilinear": dict(do_rescale=False, do_normalize=False, resample=2, temporal_patch_size=1, size=dict(shortest_edge=3136, longest_edge=50176)),
}
CASES = [(name, settings) for name in AWKWARD for settings in SETTINGS if name != "very large" or settings in ("qwen2.5", "small")]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_pixels_and_grids_equal_transformers(name: str, settings: str, tmp_path: Path) -> None:
    file = tmp_path / "picture"
    file.write_bytes(picture(name))
    reference = Qwen2VLImageProcessorPil(**SETTINGS[settings])
    theirs = reference([load_image(str(file))], return_tensors="np")
    ours = qwen2_5_vl.preprocess([open_image(file)], reference.to_dict())
    assert ours.values.shape == theirs["pixel_values"].shape
    assert ours.values.dtype == np.float32
    largest = float(np.abs(ours.values - theirs["pixel_values"]).max())
    assert largest <= 1e-5 * max(1.0, float(np.abs(theirs["pixel_values"]).max())), f"largest pixel difference {largest}"
    np.testing.assert_array_equal(ours.tensors["image_grid_thw"], theirs["image_grid_thw"])
    assert ours.grids == (tuple(theirs["image_grid_thw"][0]),)


@pytest.mark.parametrize(("cell", "least", "most"), [(28, 56 * 56, 28 * 28 * 1280), (32, 65536, 16777216), (28, 784, 9408)])
def test_sizes_equal_transformers(cell: int, least: int, most: int) -> None:
    random = np.random.default_rng(1)
    for width, height in [*random.integers(1, 4000, (3000, 2)).tolist(), *random.integers(1, 60, (3000, 2)).tolist(), (42, 70), (14, 28), (1, 200)]:
        if max(width, height) <= 200 * min(width, height):
            assert qwen2_5_vl.fitting_size((width, height), cell, least, most)[::-1] == smart_resize(height, width, cell, least, most), (width, height)


def test_refuses_a_picture_like_a_line() -> None:
    with pytest.raises(DataError, match="200 times"):
        qwen2_5_vl.preprocess([Image.new("RGB", (201, 1))], Qwen2VLImageProcessorPil().to_dict())


def test_refuses_a_size_it_may_not_change() -> None:
    with pytest.raises(DataError, match="multiples of 28"):
        qwen2_5_vl.preprocess([Image.new("RGB", (57, 56))], Qwen2VLImageProcessorPil(do_resize=False).to_dict())


def test_several_images_are_their_patches_in_order() -> None:
    settings = Qwen2VLImageProcessorPil(**SETTINGS["small"]).to_dict()
    images = [noise(90, 40), noise(33, 120), noise(70, 70)]
    together, alone = qwen2_5_vl.preprocess(images, settings), [qwen2_5_vl.preprocess([image], settings) for image in images]
    np.testing.assert_array_equal(together.values, np.concatenate([pixels.values for pixels in alone]))
    assert together.grids == tuple(pixels.grids[0] for pixels in alone)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("names", [["plain"], ["tall", "plain", "grey"], ["1 x N", "N x 1"], []])
def test_prompts_and_positions_equal_transformers(family: str, names: list[str]) -> None:
    """The processor's ids, and get_rope_index of the model, for none, one and several images between texts."""
    words = tokenizer()
    images = Qwen2VLImageProcessorPil(patch_size=14, size=dict(shortest_edge=28 * 28, longest_edge=30 * 28 * 28))
    kind = transformers.Qwen2_5_VLProcessor if family == "qwen2_5_vl" else transformers.Qwen3VLProcessor
    processor = without_videos(kind)(images, words, chat_template=TEMPLATE)
    shown = [open_image(picture(name)) for name in names]
    content = [part for name in names for part in ({"type": "image"}, {"type": "text", "text": f"that was {name}, "})]
    prompt = processor.apply_chat_template([{"role": "user", "content": [*content, {"type": "text", "text": "what is it?"}]}], add_generation_prompt=True)
    theirs = processor(text=[prompt], images=[shown] if shown else None, return_tensors="pt")
    settings = images.to_dict()
    pixels = FAMILIES[family].preprocess(shown, settings)
    ids = np.array(words(FAMILIES[family].expand(prompt, pixels.grids, settings))["input_ids"])
    np.testing.assert_array_equal(ids, theirs["input_ids"][0].numpy())
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config(family, words))
    expected, delta = model.model.get_rope_index(theirs["input_ids"], theirs["mm_token_type_ids"], theirs.get("image_grid_thw"))
    positions = FAMILIES[family].positions(ids, pixels.grids, settings, config(family, words).image_token_id)
    np.testing.assert_array_equal(positions, expected[:, 0].numpy())
    assert positions.max() + 1 - len(ids) == int(delta[0, 0])


def test_expansion_refuses_marks_without_images() -> None:
    with pytest.raises(DataError, match="marks for 1 images"):
        qwen2_5_vl.expand("<|image_pad|> is <|image_pad|>?", [(1, 4, 4)], {"merge_size": 2})
