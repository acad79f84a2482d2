"""Families in tiles, whole: every precision is exported and proven, and bundles answer as `generate` does, for one image and for several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny_models
import torch

from masters.errors import ModelError
from masters.export import ExportConfig, export
from masters.export.awkward import awkward_images
from masters.export.parity import QUESTIONS
from masters.export.reference import encode
from masters.export.source import Source, load_source
from masters.manifest import read_manifest, verify_files
from masters.runtime import load
from masters.runtime.pictures import PictureMemory
from masters.runtime.session import Options, user_message

FAMILIES = ("smolvlm", "internvl", "llava_onevision")
SIDE = tiny_models.SIDE
Sources = Callable[[str], Source]
Bundles = Callable[[str, str], Path]


def generated(source: Source, images: list[bytes], tokens: int = 10) -> tuple[int, ...]:
    """The tokens of transformers' generate."""
    prompt = encode(source, QUESTIONS[0], images)
    ids = torch.from_numpy(prompt.ids)[None]
    with torch.no_grad():
        made = source.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **prompt.pixels, max_new_tokens=tokens, do_sample=False)
    return tuple(made[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_precision(name: str, precision: str, family_bundle: Bundles) -> None:
    """Exported, proven on every awkward image, opened again with its golden self-test, and it answers."""
    bundle = family_bundle(name, precision)
    manifest = read_manifest(bundle)
    verify_files(bundle, manifest)
    assert not [row for row in manifest.parity if row["verdict"] == "fail"]
    assert {row["image"] for row in manifest.parity if row["stage"] == "prompt"} == set(awkward_images())
    assert {row["stage"] for row in manifest.parity} >= {"pixels", "prompt", "features", "embeddings", "prefill", "decode", "tokens"}
    assert load(bundle, threads=2).answer("What is this?", [awkward_images()["grey"]], max_tokens=3).token_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_generates(name: str, family_source: Sources, family_bundle: Bundles) -> None:
    vlm, images = load(family_bundle(name, "fp32"), threads=2), awkward_images()
    asked = [[image] for image in images.values()] + [[images["plain"], images["rotated"]], [images["thin"], images["grey"], images["alpha"]], []]
    seen: set[int] = set()
    for together in asked:
        expected = generated(family_source(name), together)
        assert vlm.answer(QUESTIONS[0], together, max_tokens=10).token_ids == expected
        seen |= set(expected)
    assert len(seen) > 10, "the model repeats itself, nothing would be proven"


def test_an_image_is_remembered_as_it_was_shown(family_source: Sources, family_bundle: Bundles) -> None:
    """Alone, beside another, and alone again: LLaVA-OneVision shows it in tiles only where it is alone."""
    vlm = load(family_bundle("llava_onevision", "fp32"), threads=2)
    vlm.memory = PictureMemory(10**7)
    one, two = awkward_images()["plain"], awkward_images()["grey"]
    for images in ([one], [one, two], [one]):
        answer = vlm.reply([user_message(QUESTIONS[0], len(images))], images, Options(max_tokens=10)).answer
        assert answer.token_ids == generated(family_source("llava_onevision"), images)


def smolvlm_inputs(tiles: int) -> dict[str, torch.Tensor]:
    """Tiles of which some show only a corner of theirs."""
    mask = torch.ones(1, tiles, SIDE, SIDE, dtype=torch.bool)
    for tile, (height, width) in zip(range(tiles), ((40, 64), (64, 17), (9, 33)), strict=False):
        mask[0, tile], mask[0, tile, :height, :width] = False, True
    return {"pixel_values": random_tiles(tiles)[None], "pixel_attention_mask": mask}


def random_tiles(tiles: int) -> torch.Tensor:
    return torch.randn(tiles, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(tiles))


def theirs(name: str, source: Source, tiles: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The graph's inputs, and the features of transformers' model."""
    if name == "smolvlm":
        inputs = smolvlm_inputs(tiles)
        return inputs, source.family.image_features(source.model, inputs)
    inputs = {"pixel_values": random_tiles(tiles)}
    if name == "internvl":
        return inputs, source.family.image_features(source.model, inputs)
    # As so many images in one prompt: each is one tile with the end of a line.
    several = {"pixel_values": inputs["pixel_values"][:, None], "image_sizes": torch.full((tiles, 2), 50), "batch_num_images": torch.tensor([tiles])}
    if tiles == 1:  # one image alone is never one tile
        features = source.family.image_features(source.model, {name: value.repeat_interleave(2, 0) for name, value in several.items()} | {
            "batch_num_images": torch.tensor([2])})[:65]  # fmt: skip
        return inputs, features
    return inputs, source.family.image_features(source.model, several)


@pytest.mark.parametrize("tiles", [1, 3, 7, 13])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_graph_for_counts_of_tiles_never_traced(name: str, tiles: int, family_source: Sources, family_bundle: Bundles) -> None:
    session = onnxruntime.InferenceSession(str(family_bundle(name, "fp32") / "onnx" / "vision_encoder.onnx"))
    with torch.no_grad():
        inputs, features = theirs(name, family_source(name), tiles)
    found = session.run(["image_features"], {key: value.numpy() for key, value in inputs.items()})[0]
    assert found.shape[0] == tiles
    np.testing.assert_allclose(found.reshape(features.shape), features.numpy(), atol=2e-5 * float(features.abs().max()))


@pytest.mark.parametrize(
    "build",
    [
        lambda folder: tiny_models.internvl(folder, "qwen2", use_qk_norm=True, norm_type="rms_norm", attention_bias=True, use_mean_pooling=False),
        lambda folder: tiny_models.internvl(folder, "llama", use_absolute_position_embeddings=False),
        lambda folder: tiny_models.llava_onevision(folder, vision_feature_layer=[1, -1]),
        lambda folder: tiny_models.llava_onevision(folder, vision_feature_layer=-2, multimodal_projector_bias=False),
    ],
    ids=["internvl-6b's tower", "internvl without positions", "several layers", "an earlier layer"],
)
def test_variants_of_the_tower(build: Callable[[Path], Path], tmp_path: Path) -> None:
    """The module that is traced, beside transformers'."""
    source = load_source(build(tmp_path / "model"))
    name = source.model_type
    with torch.no_grad():
        inputs, features = theirs(name, source, 3)
        found = source.family.vision_module(source.model)(*inputs.values())
    torch.testing.assert_close(found.reshape(features.shape), features, atol=2e-5 * float(features.abs().max()), rtol=0)


def mutated(source: Source, **settings: Any) -> Any:
    """The source's processor with other settings of its own or of its image processor."""
    processor = source.family.load_processor(source.folder)
    for name, value in settings.items():
        setattr(processor if hasattr(processor, name) else processor.image_processor, name, value)
    return processor


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("smolvlm", {"image_seq_len": 9}, "9 image tokens a tile, the model has 16"),
        ("smolvlm", {"max_image_size": {"longest_edge": 32}}, "tiles of 32 pixels"),
        ("internvl", {"image_seq_length": 256}, "256 image tokens a tile, the model has 16"),
        ("internvl", {"size": {"height": 448, "width": 448}}, "tiles of"),
        ("internvl", {"image_token": "<image>"}, "expected <IMG_CONTEXT>, <img>, </img>"),
        ("llava_onevision", {"num_image_tokens": 729}, "num_image_tokens is 729; expected 64"),
        ("llava_onevision", {"vision_aspect_ratio": "anyres_max_9"}, "vision_aspect_ratio is anyres_max_9; expected anyres_max_2"),
        ("llava_onevision", {"image_grid_pinpoints": [[64, 64]]}, "image_grid_pinpoints"),
    ],
)
def test_a_processor_that_does_not_fit_is_refused(name: str, settings: dict[str, Any], words: str, family_source: Sources) -> None:
    source = family_source(name)
    with pytest.raises(ModelError, match=words):
        source.family.preprocessing(source.model, mutated(source, **settings))


@pytest.mark.parametrize("name", ["internvl", "llava_onevision"])
def test_core_ml_is_refused(name: str, family_source: Sources, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"'{name}' has no Core ML form; export it with --target onnx"):
        export(ExportConfig(family_source(name).folder, "coreml", tmp_path / "bundle", "fp16"))
    assert not list(tmp_path.iterdir())


def test_manifest_says_how_pictures_are_laid_out(family_bundle: Bundles) -> None:
    settings = {name: read_manifest(family_bundle(name, "fp32")).preprocessing for name in FAMILIES}
    assert settings["smolvlm"]["image_seq_len"] == 16
    assert settings["internvl"]["crop_to_patches"] is True  # the processor's own default goes before its image processor's
    assert (settings["llava_onevision"]["tile_features"], settings["llava_onevision"]["max_tiles"]) == (8, 2)
