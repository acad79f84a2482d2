"""Towers over packed patches beside PyTorch's: grids that no trace ever saw, several images and frames at once, windows, stretched positions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from masters.errors import ModelError
from masters.export.graph import save_graph
from masters.export.packed_vision import PackedTower
from masters.export.source import Source
from masters.export.vision import build_vision

GRIDS = {
    "one cell": [[1, 2, 2]],
    "one window": [[1, 4, 4]],
    "windows cut on both sides": [[1, 10, 6]],
    "a row": [[1, 2, 18]],
    "three images": [[1, 6, 14], [1, 4, 4], [1, 2, 18]],
    "frames": [[3, 4, 6], [1, 8, 2]],
    "large": [[1, 46, 34]],
}


@pytest.fixture(scope="module")
def session_of(qwen_source: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], onnxruntime.InferenceSession]:
    folder = tmp_path_factory.mktemp("towers")

    def opened(family: str, half: bool = False) -> onnxruntime.InferenceSession:
        path = folder / f"{family}{half}.onnx"
        if not path.exists():
            source = qwen_source(family)
            save_graph(build_vision(source.model, source.family, half), path)
            onnx.checker.check_model(str(path))
        return onnxruntime.InferenceSession(str(path))

    return opened


def both(source: Source, session: onnxruntime.InferenceSession, grids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    sizes = torch.tensor(grids)
    pixels = torch.randn(int(sizes.prod(1).sum()), session.get_inputs()[0].shape[1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = source.family.image_features(source.model, {"pixel_values": pixels, "image_grid_thw": sizes}).numpy()
    (ours,) = session.run(["image_features"], {"pixel_values": pixels.numpy(), "image_grid_thw": sizes.numpy()})
    return ours, theirs


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_features_equal_pytorch(
    family: str, name: str, qwen_source: Callable[[str], Source], session_of: Callable[[str], onnxruntime.InferenceSession]
) -> None:
    ours, theirs = both(qwen_source(family), session_of(family), GRIDS[name])
    assert ours.shape == theirs.shape
    largest = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert largest < 2e-5, f"largest difference {largest} of the largest feature"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_half(family: str, qwen_source: Callable[[str], Source], session_of: Callable[[str, bool], onnxruntime.InferenceSession]) -> None:
    ours, theirs = both(qwen_source(family), session_of(family, True), GRIDS["three images"])
    assert ours.dtype == np.float32
    assert np.linalg.norm(ours - theirs) < 0.01 * np.linalg.norm(theirs)


def test_images_do_not_see_each_other(session_of: Callable[[str], onnxruntime.InferenceSession]) -> None:
    for family in ("qwen2_5_vl", "qwen3_vl"):
        session, sizes = session_of(family), np.array(GRIDS["three images"])
        pixels = np.random.default_rng(0).standard_normal((int(sizes.prod(1).sum()), session.get_inputs()[0].shape[1])).astype(np.float32)
        (together,) = session.run(None, {"pixel_values": pixels, "image_grid_thw": sizes})
        ends = sizes.prod(1).cumsum()
        alone = [
            session.run(None, {"pixel_values": pixels[end - size.prod() : end], "image_grid_thw": size[None]})[0] for end, size in zip(ends, sizes, strict=True)
        ]
        np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5 * np.abs(together).max())


def test_interface(session_of: Callable[[str], onnxruntime.InferenceSession]) -> None:
    inputs = {node.name: (node.type, node.shape) for node in session_of("qwen2_5_vl").get_inputs()}
    assert inputs == {"pixel_values": ("tensor(float)", ["num_patches", 1176]), "image_grid_thw": ("tensor(int64)", ["num_images", 3])}
    assert [(node.name, node.shape) for node in session_of("qwen2_5_vl").get_outputs()] == [("image_features", ["num_image_tokens", 96])]
    assert session_of("qwen3_vl").get_inputs()[0].shape == ["num_patches", 1536]
    assert session_of("qwen3_vl").get_outputs()[0].shape == ["num_image_tokens", 3 * 96]


def test_refuses_an_activation_it_does_not_know(qwen_source: Callable[[str], Source]) -> None:
    import onnx_ir as ir

    tower = PackedTower(ir.DataType.FLOAT, 12, 2, 2)
    with pytest.raises(ModelError, match="'relu'"):
        tower.activation(tower.pixels, "relu")


def test_an_image_processor_of_another_patch_size_is_refused(qwen_source: Callable[[str], Source], tmp_path: Path) -> None:
    source = qwen_source("qwen2_5_vl")
    processor = source.family.load_processor(source.folder)
    processor.image_processor.patch_size = 16
    with pytest.raises(ModelError, match="patch_size is 16"):
        source.family.preprocessing(source.model, processor)
