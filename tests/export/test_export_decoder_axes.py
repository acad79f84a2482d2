"""The authored decoder beside those of Qwen's vision models: positions of three axes, vectors added to the first layers' outputs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.testing import assert_allclose
from transformers import Qwen2_5_VLTextConfig, Qwen3VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from masters.export.decoder import build_decoder
from masters.export.graph import save_graph

WIDTH, VOCABULARY, LAYERS, KV, HEAD = 64, 97, 3, 2, 16
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=KV,
    max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0, initializer_range=0.3,
)  # fmt: skip
AXES = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])


def text_model(name: str) -> tuple[Any, torch.nn.Linear]:
    """The decoder and its head, every norm and bias away from ones and zeros."""
    torch.manual_seed(3)
    if name == "qwen2_5_vl":
        model = Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**SHAPE, rope_parameters=AXES))
    else:
        model = Qwen3VLTextModel(Qwen3VLTextConfig(**SHAPE, head_dim=HEAD, rope_parameters=AXES | dict(mrope_interleaved=True)))
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if "norm" in part or "bias" in part:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval(), head.eval()


def open_graph(name: str, folder: Path, half: bool = False, injected: int = 0) -> tuple[Any, torch.nn.Linear, onnxruntime.InferenceSession]:
    model, head = text_model(name)
    path = folder / "decoder.onnx"
    save_graph(build_decoder(model, head, half, injected=injected), path)
    onnx.checker.check_model(str(path))
    return model, head, onnxruntime.InferenceSession(str(path))


def run(session: onnxruntime.InferenceSession, embeds: np.ndarray, positions: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
    """Logits [1, S, V] of a prompt, three single steps and a second prompt through the growing cache; positions [1, S] or [3, 1, S]."""
    length, logits = embeds.shape[1], []
    past = {f"past_key_values.{layer}.{kind}": np.zeros((1, KV, 0, HEAD), dtype) for layer in range(LAYERS) for kind in ("key", "value")}
    cuts = [0, length - 7, length - 6, length - 5, length - 4, length]
    for start, stop in itertools.pairwise(cuts):
        feeds = {"inputs_embeds": embeds[:, start:stop], "attention_mask": np.ones((1, stop), np.int64)}
        feeds |= {"position_ids": positions[..., start:stop], "num_logits_to_keep": np.array(0)}
        found, *present = session.run(None, feeds | past)
        logits.append(found)
        past = dict(zip(past, present, strict=True))
    return np.concatenate(logits, axis=1)


def picture_positions(length: int) -> np.ndarray:
    """Text, a picture of 3 x 4, text after its longest side."""
    t, h, w = (axis.ravel() + 5 for axis in np.meshgrid([0], np.arange(3), np.arange(4), indexing="ij"))
    picture = np.stack([np.full_like(h, 5) if t.size == 1 else t, h, w])
    text = [np.broadcast_to(np.arange(start, stop), (3, stop - start)) for start, stop in ((0, 5), (9, 9 + length - 17))]
    return np.concatenate([text[0], picture, text[1]], axis=1)[:, None].astype(np.int64)


def random_embeds(length: int, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, length, width)).astype(np.float32)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_three_axes_equal_pytorch(name: str, tmp_path: Path) -> None:
    model, head, session = open_graph(name, tmp_path)
    embeds, positions = random_embeds(40), picture_positions(40)
    with torch.no_grad():
        theirs = head(model(inputs_embeds=torch.from_numpy(embeds), position_ids=torch.from_numpy(positions)).last_hidden_state).numpy()
        flat = head(model(inputs_embeds=torch.from_numpy(embeds)).last_hidden_state).numpy()
    assert_allclose(run(session, embeds, positions), theirs, atol=2e-5 * abs(theirs).max(), rtol=0)
    assert abs(flat - theirs).max() > 0.01 * abs(theirs).max(), "the axes make no difference, nothing would be proven"
    assert {node.name: node.shape for node in session.get_inputs()}["position_ids"] == [3, "batch_size", "sequence_length"]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_rows_of_a_batch_have_positions_of_their_own(name: str, tmp_path: Path) -> None:
    """Three rows of other lengths, padded on the right, their pictures at other places: each row as it is alone."""
    _, _, session = open_graph(name, tmp_path)
    lengths, longest = (40, 29, 18), 40
    embeds = np.random.default_rng(1).standard_normal((3, longest, WIDTH)).astype(np.float32)
    positions = np.stack([np.pad(picture_positions(length)[:, 0], ((0, 0), (0, longest - length))) + 2 * row for row, length in enumerate(lengths)], axis=1)
    mask = (np.arange(longest) < np.array(lengths)[:, None]).astype(np.int64)
    past = {f"past_key_values.{layer}.{kind}": np.zeros((3, KV, 0, HEAD), np.float32) for layer in range(LAYERS) for kind in ("key", "value")}
    feeds = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, "num_logits_to_keep": np.array(0)}
    together = session.run(["logits"], feeds | past)[0]
    for row, length in enumerate(lengths):
        alone = run(session, embeds[row : row + 1, :length], positions[:, row : row + 1, :length])
        assert_allclose(together[row, :length], alone[0], atol=2e-5 * abs(alone).max(), rtol=0)


def test_vectors_for_the_first_layers(tmp_path: Path) -> None:
    """They stand behind each row's embedding, zeros where a token has none."""
    model, head, session = open_graph("qwen3_vl", tmp_path, injected=2)
    rows, positions = random_embeds(40, 3 * WIDTH), picture_positions(40)
    seen = np.zeros((1, 40), bool)
    seen[:, 5:17] = True
    rows[~seen, WIDTH:] = 0
    embeds, *deep = (torch.from_numpy(part.copy()) for part in np.split(rows, 3, axis=-1))
    mask = torch.from_numpy(seen)
    with torch.no_grad():
        out = model(inputs_embeds=embeds, position_ids=torch.from_numpy(positions), visual_pos_masks=mask, deepstack_visual_embeds=[d[mask] for d in deep])
        theirs = head(out.last_hidden_state).numpy()
    assert_allclose(run(session, rows, positions), theirs, atol=2e-5 * abs(theirs).max(), rtol=0)
    rows[..., WIDTH:] = 0
    assert abs(run(session, rows, positions) - theirs).max() > 0.01 * abs(theirs).max()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_half(name: str, tmp_path: Path) -> None:
    model, head, session = open_graph(name, tmp_path, half=True)
    embeds, positions = random_embeds(40), picture_positions(40)
    with torch.no_grad():
        theirs = head(model(inputs_embeds=torch.from_numpy(embeds), position_ids=torch.from_numpy(positions)).last_hidden_state).numpy()
    assert np.abs(run(session, embeds, positions, np.float16) - theirs).max() < 0.02 * np.abs(theirs).max()
