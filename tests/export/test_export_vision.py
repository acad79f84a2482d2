"""The vision graph beside PyTorch's get_image_features, for other counts of tiles, masks and paddings than it was traced with."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from numpy.testing import assert_allclose

from masters.export.graph import save_graph
from masters.export.source import Source
from masters.export.vision import build_vision


@pytest.fixture(scope="module")
def session(lively_source: Source, tmp_path_factory: pytest.TempPathFactory) -> onnxruntime.InferenceSession:
    path = tmp_path_factory.mktemp("vision") / "vision_encoder.onnx"
    save_graph(build_vision(lively_source.model, lively_source.family), path)
    return onnxruntime.InferenceSession(str(path))


def seen(shape: tuple[int, int, int], *regions: tuple[int, int]) -> torch.Tensor:
    """A mask for rows of tiles in which the first tiles show only the top left `regions` (height, width)."""
    mask = torch.ones(shape[0] * shape[1], shape[2], shape[2], dtype=torch.bool)
    for tile, (height, width) in enumerate(regions):
        mask[tile] = False
        mask[tile, :height, :width] = True
    return mask.reshape(*shape[:2], shape[2], shape[2])


@pytest.mark.parametrize(
    ("batch", "tiles", "regions", "padding"),
    [
        (1, 1, (), ()),
        (1, 5, (), ()),
        (3, 2, (), ()),
        (1, 1, ((64, 8),), ()),  # one column of patches
        (1, 4, ((40, 64), (64, 17), (9, 33), (64, 64)), ()),
        (2, 3, ((50, 50), (64, 30)), (2, 4, 5)),  # rows padded with tiles of zeros
    ],
)
def test_features_equal_pytorch(
    lively_source: Source, session: onnxruntime.InferenceSession, batch: int, tiles: int, regions: tuple[tuple[int, int], ...], padding: tuple[int, ...]
) -> None:
    pixels = torch.randn(batch, tiles, 3, 64, 64, generator=torch.Generator().manual_seed(tiles))
    mask = seen((batch, tiles, 64), *regions)
    for tile in padding:
        pixels.view(-1, 3, 64, 64)[tile] = 0
        mask.view(-1, 64, 64)[tile] = False
    with torch.no_grad():
        theirs = lively_source.family.image_features(lively_source.model, {"pixel_values": pixels, "pixel_attention_mask": mask}).numpy()
    (ours,) = session.run(["image_features"], {"pixel_values": pixels.numpy(), "pixel_attention_mask": mask.numpy()})
    assert ours.shape == (batch * tiles - len(padding), 16, lively_source.model.config.text_config.hidden_size)
    assert_allclose(ours.reshape(theirs.shape), theirs, atol=2e-5 * abs(theirs).max())


def test_the_mask_matters(session: onnxruntime.InferenceSession) -> None:
    pixels = torch.randn(1, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).numpy()
    whole, part = (
        session.run(None, {"pixel_values": pixels, "pixel_attention_mask": mask.numpy()})[0] for mask in (seen((1, 1, 64)), seen((1, 1, 64), (32, 64)))
    )
    assert abs(whole - part).max() > 0.01


def test_interface(session: onnxruntime.InferenceSession) -> None:
    inputs = {node.name: (node.type, node.shape) for node in session.get_inputs()}
    assert inputs["pixel_values"] == ("tensor(float)", ["batch_size", "num_tiles", 3, 64, 64])
    assert inputs["pixel_attention_mask"] == ("tensor(bool)", ["batch_size", "num_tiles", 64, 64])
    assert [node.name for node in session.get_outputs()] == ["image_features"]
