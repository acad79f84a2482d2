"""The authored decoder beside the Hugging Face one: prompts, steps, both kinds of cache, padding, and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.testing import assert_allclose
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from masters.errors import ModelError
from masters.export.decoder import build_decoder, check_decoder
from masters.export.graph import save_graph

WIDTH, VOCABULARY, LAYERS, KV, HEAD = 64, 97, 2, 2, 16
Arrays = dict[str, np.ndarray]


ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),  # biases on queries, keys and values alone
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),  # a norm on every head of queries and keys
}


def decoder(kind: str = "llama", **changes: Any) -> Any:
    settings = dict(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=KV,
        head_dim=HEAD, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(3)
    model_class, config_class = ARCHITECTURES[kind]
    model = model_class(config_class(**(settings | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # ones and zeros would hide a norm or a bias that is left out
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def open_graph(model: LlamaForCausalLM, folder: Any, half: bool = False) -> onnxruntime.InferenceSession:
    path = folder / "decoder.onnx"
    save_graph(build_decoder(model.model, model.lm_head, half), path)
    onnx.checker.check_model(str(path))
    return onnxruntime.InferenceSession(str(path))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return decoder()


@pytest.fixture(scope="module")
def session(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> onnxruntime.InferenceSession:
    return open_graph(model, tmp_path_factory.mktemp("decoder"))


def random_embeds(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, length, WIDTH)).astype(np.float32)


def empty_cache(batch: int = 1, dtype: Any = np.float32) -> Arrays:
    names = [f"past_key_values.{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
    return {name: np.zeros((batch, KV, 0, HEAD), dtype) for name in names}


def run(session: onnxruntime.InferenceSession, embeds: np.ndarray, past: Arrays, mask: np.ndarray | None = None, keep: int = 0) -> tuple[np.ndarray, Arrays]:
    """Logits, and the cache as the next call's input."""
    start = next(iter(past.values())).shape[2]
    length = embeds.shape[1]
    positions = np.broadcast_to(np.arange(start, start + length), (len(embeds), length)).astype(np.int64)
    full = np.ones((len(embeds), start + length), np.int64) if mask is None else mask
    feeds = {"inputs_embeds": embeds, "attention_mask": full, "position_ids": positions, "num_logits_to_keep": np.array(keep)}
    logits, *present = session.run(None, feeds | past)
    return logits, dict(zip(past, present, strict=True))


def torch_logits(model: LlamaForCausalLM, embeds: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(inputs_embeds=torch.from_numpy(embeds)).logits.numpy()


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert_allclose(ours, theirs, atol=2e-5 * abs(theirs).max(), rtol=0)


@pytest.mark.parametrize("length", [1, 7, 33])
def test_prompt_equals_pytorch(model: LlamaForCausalLM, session: onnxruntime.InferenceSession, length: int) -> None:
    embeds = random_embeds(1, length)
    close(run(session, embeds, empty_cache())[0], torch_logits(model, embeds))


def test_growing_cache_equals_one_pass(model: LlamaForCausalLM, session: onnxruntime.InferenceSession) -> None:
    """A prompt, single steps, then several positions at once, as after a second turn."""
    embeds, cache, logits = random_embeds(1, 20), empty_cache(), []
    for start, stop in ((0, 9), (9, 10), (10, 11), (11, 17), (17, 20)):
        found, cache = run(session, embeds[:, start:stop], cache)
        logits.append(found)
    close(np.concatenate(logits, axis=1), torch_logits(model, embeds))


def test_one_buffer_as_past_and_present(model: LlamaForCausalLM, session: onnxruntime.InferenceSession) -> None:
    embeds, capacity, logits = random_embeds(1, 16), 24, []
    buffers = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.full((1, KV, capacity, HEAD), 7, np.float32)) for name in empty_cache()}
    for start, stop in ((0, 10), *((i, i + 1) for i in range(10, 16))):
        binding = session.io_binding()
        feeds = {"inputs_embeds": embeds[:, start:stop], "attention_mask": np.ones((1, stop), np.int64)}
        feeds |= {"position_ids": np.arange(start, stop)[None], "num_logits_to_keep": np.array(0)}
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        logits.append(binding.get_outputs()[-1].numpy())
    close(np.concatenate(logits, axis=1), torch_logits(model, embeds))


@pytest.mark.parametrize(("keep", "expected"), [(0, 8), (1, 1), (3, 3)])
def test_only_the_last_logits(model: LlamaForCausalLM, session: onnxruntime.InferenceSession, keep: int, expected: int) -> None:
    embeds = random_embeds(1, 8)
    logits, _ = run(session, embeds, empty_cache(), keep=keep)
    assert logits.shape == (1, expected, VOCABULARY)
    close(logits, torch_logits(model, embeds)[:, -expected:])


def test_a_batch_padded_on_the_right(model: LlamaForCausalLM, session: onnxruntime.InferenceSession) -> None:
    embeds = random_embeds(2, 9)
    mask = np.ones((2, 9), np.int64)
    mask[1, 6:] = 0
    logits, _ = run(session, embeds, empty_cache(2), mask)
    close(logits[0], torch_logits(model, embeds[:1])[0])
    close(logits[1, :6], torch_logits(model, embeds[1:, :6])[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 16}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}},
    ],
)  # fmt: skip
def test_variants(changes: dict[str, Any], tmp_path: Any) -> None:
    model, embeds = decoder(**changes), random_embeds(1, 30)
    heads = model.config.num_key_value_heads
    cache = {name: np.zeros((1, heads, 0, HEAD), np.float32) for name in empty_cache()}
    close(run(open_graph(model, tmp_path), embeds, cache)[0], torch_logits(model, embeds))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("half", [False, True])
def test_other_architectures(kind: str, half: bool, tmp_path: Any) -> None:
    """A prompt, then two steps through the cache."""
    model, embeds = decoder(kind), random_embeds(1, 13)
    session, cache, logits = open_graph(model, tmp_path, half), empty_cache(dtype=np.float16 if half else np.float32), []
    for start, stop in ((0, 11), (11, 12), (12, 13)):
        found, cache = run(session, embeds[:, start:stop], cache)
        logits.append(found)
    theirs = torch_logits(model, embeds)
    assert np.abs(np.concatenate(logits, axis=1) - theirs).max() < (0.02 if half else 2e-5) * np.abs(theirs).max()


def test_refuses_sliding_windows() -> None:
    with pytest.raises(ModelError, match="sliding_attention"):
        check_decoder(Qwen2Config(use_sliding_window=True, sliding_window=8, num_hidden_layers=3, max_window_layers=1))


def test_half(model: LlamaForCausalLM, tmp_path: Any) -> None:
    """float16 weights and cache behind float32 embeddings and logits."""
    session, embeds = open_graph(model, tmp_path, half=True), random_embeds(1, 12)
    assert {node.type for node in session.get_inputs() if node.name.startswith("past")} == {"tensor(float16)"}
    logits, cache = run(session, embeds[:, :11], empty_cache(dtype=np.float16))
    last, _ = run(session, embeds[:, 11:], cache)
    theirs = torch_logits(model, embeds)
    assert last.dtype == np.float32
    assert np.abs(np.concatenate([logits, last], axis=1) - theirs).max() < 0.02 * np.abs(theirs).max()


def test_interface(session: onnxruntime.InferenceSession) -> None:
    """Names, types and symbols that transformers.js goes by: it builds an empty cache from 'batch_size'."""
    inputs = {node.name: (node.type, node.shape) for node in session.get_inputs()}
    assert inputs["inputs_embeds"] == ("tensor(float)", ["batch_size", "sequence_length", WIDTH])
    assert inputs["attention_mask"] == ("tensor(int64)", ["batch_size", "total_sequence_length"])
    assert inputs["position_ids"] == ("tensor(int64)", ["batch_size", "sequence_length"])
    assert inputs["past_key_values.1.value"] == ("tensor(float)", ["batch_size", KV, "past_sequence_length", HEAD])
    assert inputs["num_logits_to_keep"] == ("tensor(int64)", [])
    assert [node.name for node in session.get_outputs()] == ["logits", *(name.replace("past_key_values", "present") for name in empty_cache())]


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"hidden_act": "gelu"}, "gelu"), ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic")],
)
def test_refuses_what_the_graph_does_not_compute(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ModelError, match=word):
        check_decoder(LlamaConfig(**changes))
