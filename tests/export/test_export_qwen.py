"""Whole exports of Qwen2.5-VL and Qwen3-VL: every precision, answers from the image file on, several images, chats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from int4_weights import with_int4_weights

from masters.export import ExportConfig, export
from masters.export.awkward import awkward_images
from masters.export.parity import QUESTIONS
from masters.export.reference import encode, greedy
from masters.export.source import Source
from masters.manifest import read_manifest
from masters.runtime import load

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
Bundles = Callable[[str, str], Path]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bundle(family: str, precision: str, qwen_bundle: Bundles) -> None:
    """Exported with its parity passed on every awkward image, and opened by the runtime, its golden self-test included."""
    bundle = qwen_bundle(family, precision)
    manifest = read_manifest(bundle)
    assert manifest.model_type == family
    assert not [row for row in manifest.parity if row["verdict"] == "fail"]
    assert {row["stage"] for row in manifest.parity} - {"weights"} == {"pixels", "prompt", "features", "embeddings", "prefill", "decode", "tokens"}
    assert {row["image"] for row in manifest.parity if row["stage"] == "tokens"} == set(awkward_images())
    assert load(bundle).answer("What is this?", [awkward_images()["plain"]], max_tokens=3).token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_answers_are_pytorchs(family: str, qwen_source: Callable[[str], Source], qwen_bundle: Bundles) -> None:
    """One image, two, none; from the files to the last token."""
    vlm, source, images = load(qwen_bundle(family, "fp32")), qwen_source(family), awkward_images()
    seen = set()
    for shown in ([images["plain"]], [images["rotated"], images["grey"]], [images["thin"]], []):
        tokens, _ = greedy(source, encode(source, QUESTIONS[0], shown), 16)
        assert vlm.answer(QUESTIONS[0], shown, max_tokens=16).token_ids == tuple(tokens)
        seen |= set(tokens.tolist())
    assert len(seen) > 15, "the model repeats itself, nothing would be proven"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_goes_on_where_the_picture_ended(family: str, qwen_bundle: Bundles) -> None:
    """After a picture positions lag behind the count of tokens, from turn to turn as in a conversation that is given whole."""
    vlm, images = load(qwen_bundle(family, "fp32")), awkward_images()
    chat = vlm.chat()
    for question, shown in (("What is it?", [images["plain"]]), ("And this one?", [images["rotated"]]), ("Which is larger?", [])):
        chat.answer(question, shown, max_tokens=6)
    whole = vlm.reply(chat.messages[:-1], [images["plain"], images["rotated"]]).answer
    again = chat.messages[-1]["content"][0]["text"]
    assert whole.text.startswith(again)


@pytest.mark.parametrize("family", FAMILIES)
def test_int4_answers_are_pytorchs_with_the_same_weights(family: str, qwen_source: Callable[[str], Source], qwen_bundle: Bundles) -> None:
    """What int4 changes is the weights, and nothing else."""
    source = with_int4_weights(qwen_source(family))
    vlm, image = load(qwen_bundle(family, "decoder=int4,embed=int4")), awkward_images()["plain"]
    tokens, _ = greedy(source, encode(source, QUESTIONS[1], [image]), 16)
    assert vlm.answer(QUESTIONS[1], [image], max_tokens=16).token_ids == tuple(tokens)


def test_features_of_middle_layers_reach_the_decoder(qwen_source: Callable[[str], Source], qwen_bundle: Bundles) -> None:
    """Left out, they change the logits far beyond any tolerance: a bundle that drops them would not pass."""
    vlm, source, image = load(qwen_bundle("qwen3_vl", "fp32")), qwen_source("qwen3_vl"), awkward_images()["plain"]
    prompt = encode(source, QUESTIONS[0], [image])
    _, logits = greedy(source, prompt, 1)
    pixels = vlm.see([image])[0]
    features = vlm.parts.encode_images(pixels)
    found = []
    for kept in (features, np.where(np.arange(features.shape[1]) < 96, features, 0).astype(np.float32)):
        embeds = vlm.parts.embed(prompt.ids).copy()
        embeds[prompt.ids == vlm.manifest.generation["image_token_id"]] = kept
        found.append(vlm.parts.decode(embeds, vlm.parts.new_cache(len(prompt.ids)), vlm.positions(prompt.ids, pixels.grids)))
    errors = [float(np.linalg.norm(one - logits[0]) / np.linalg.norm(logits[0])) for one in found]
    assert errors[0] < 1e-5
    assert errors[1] > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_input_gives_the_same_bytes(family: str, qwen_source: Callable[[str], Source], qwen_bundle: Bundles, tmp_path: Path) -> None:
    export(ExportConfig(qwen_source(family).folder, "onnx", tmp_path / "again", "int4"))
    ours, theirs = read_manifest(tmp_path / "again"), read_manifest(qwen_bundle(family, "int4"))
    assert ours.files == theirs.files
    assert replace(ours, notes=[]) == replace(theirs, notes=[])
