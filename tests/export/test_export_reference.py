"""The reference is transformers' model as it stands: remembering the tower's features changes nothing but the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from masters.export.awkward import awkward_images
from masters.export.golden import LIGHT, lightest, smallest
from masters.export.reference import Reference, encode, greedy, refer
from masters.export.source import Source

QUESTION = "What is in the picture?"


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "internvl", "llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_the_tower_runs_once_a_prompt_and_gives_the_same(
    name: str, lively_source: Source, family_source: Callable[[str], Source], qwen_source: Callable[[str], Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = lively_source if name == "idefics3" else (qwen_source if "qwen" in name else family_source)(name)
    calls: list[int] = []
    compute = type(source.model.model).get_image_features

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return compute(*arguments, **options)

    monkeypatch.setattr(type(source.model.model), "get_image_features", counted)
    for image in (awkward_images()["plain"], awkward_images()["thin"]):
        prompt = encode(source, QUESTION, [image])
        tokens, logits = greedy(source, prompt, 6)
        calls.clear()
        reference = refer(source, "plain", image, QUESTION, prompt, 6)
        assert len(calls) == 1
        np.testing.assert_array_equal(reference.tokens, tokens)
        np.testing.assert_array_equal(reference.logits, logits)
    assert "get_image_features" not in vars(source.model.model)


def test_the_golden_image_is_the_smallest_that_decodes_alike_everywhere(lively_source: Source) -> None:
    image = awkward_images()["plain"]
    plain = refer(lively_source, "plain", image, QUESTION, encode(lively_source, QUESTION, [image]), 1)
    pixels = {"pixel_values": plain.prompt.pixels["pixel_values"].repeat(1, 2, 1, 1, 1)}
    larger = replace(plain, name="larger", prompt=replace(plain.prompt, pixels=pixels))
    photo = replace(plain, name="photo", image=awkward_images()["cmyk"])
    assert smallest([larger, photo, plain]).name == "plain"
    assert smallest([photo, larger]).name == "larger"
    assert smallest([photo]).name == "photo"


def test_a_large_models_second_check_takes_the_lightest_images(lively_source: Source) -> None:
    image = awkward_images()["plain"]
    plain = refer(lively_source, "plain", image, QUESTION, encode(lively_source, QUESTION, [image]), 1)

    def of(share: float) -> Reference:
        return replace(plain, name=f"{share}", prompt=replace(plain.prompt, pixels={"pixel_values": torch.empty(int(share * LIGHT), device="meta")}))

    assert [reference.name for reference in lightest([of(0.9), of(0.5), of(0.2), of(0.3)])] == ["0.2", "0.3", "0.5"]
    assert [reference.name for reference in lightest([of(3), of(2)])] == ["2"]
    assert len(lightest([plain] * 9)) == 9
