"""Operations by formula against those that PyTorch's own counter sees in the real forward, backward and generation of tiny models."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qwen_models
import tiny_models
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from masters.demo.models import build_model, build_processor, build_tokenizer, save_model
from masters.distill import flops, models, reading
from masters.distill.families import family_of
from masters.distill.forward import Group, pack, response_states
from masters.distill.generate import Sampling, generate
from masters.distill.inputs import Encoder, to_device
from masters.samples import Sample


def demo(folder: Path) -> Path:
    words = build_tokenizer()
    save_model(folder, build_model("student", words), build_processor(words))
    return folder


BUILDERS = {
    "idefics3": demo,
    "internvl": tiny_models.internvl,
    "llava_onevision": tiny_models.llava_onevision,
    "qwen2_5_vl": partial(qwen_models.build, "qwen2_5_vl"),
    "qwen3_vl": partial(qwen_models.build, "qwen3_vl"),
}


def picture(width: int, height: int) -> bytes:
    held = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)).save(held, "PNG")
    return held.getvalue()


SAMPLE = Sample("q", (picture(128, 96),), "How many lines are there in this picture?", ("3",))


@pytest.fixture(scope="module", params=BUILDERS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that computes attention as plain products, which the counter sees on every device, and its encoder."""
    folder = BUILDERS[request.param](tmp_path_factory.mktemp("model") / request.param)
    model = models.load_model(folder, torch.float32).eval()
    model.set_attn_implementation("eager")
    return model, Encoder(models.load_processor(folder), positions=family_of(model.config.model_type).positions)


def counted(call: Any) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def close(formula: float, seen: float, within: float, what: str) -> None:
    assert abs(formula / seen - 1) < within, f"{what}: {formula:.4e} by formula, {seen:.4e} counted, {formula / seen:.3f}"


def test_a_forward_takes_what_the_counter_sees(family: Any):
    model, encoder = family
    prompt, collate = encoder.prompt(SAMPLE), family_of(model.config.model_type).collate_pixels
    read, shape = reading.prompt_reading(prompt, model.config), flops.shape_of(model.config)
    inputs = dict(input_ids=prompt.ids[None], position_ids=prompt.places.unsqueeze(-2), **to_device(collate([prompt.pixels]), model.device, model.dtype))
    with torch.no_grad():
        seen = counted(lambda: model(**inputs, logits_to_keep=3))
    assert read.patches > 40
    # Rotary tables, and the pooling of LLaVA's tower, are products too.
    close(flops.forward(shape, read + reading.Reading(logits=3)), seen, 0.03, "forward")
    assert flops.forward(shape, reading.Reading(patches=read.patches, patch_pairs=read.patch_pairs)) > 0.2 * seen, "the tower has its weight in the sum"


def test_generation_reads_a_prompt_once_and_every_token_alone(family: Any):
    model, encoder = family
    collate = family_of(model.config.model_type).collate_pixels
    found: list[Any] = []
    seen = counted(lambda: found.append(generate(model, encoder, collate, [SAMPLE], 3, Sampling(max_tokens=12), seed=4)))
    lengths = [len(answer.ids) for answer in found[0][0]]
    # A row that has ended is computed on with the others until the last one ends.
    read = reading.answered(reading.prompt_reading(encoder.prompt(SAMPLE), model.config), [max(lengths)] * 3)
    close(flops.forward(flops.shape_of(model.config), read), seen, 0.03, "generation")


def test_the_gradients_take_what_the_counter_sees(family: Any, monkeypatch: pytest.MonkeyPatch):
    """Of the language model and the projector, the tower frozen: four products of attention, as plain attention keeps its scores."""
    monkeypatch.setattr(flops, "ATTENTION_BACK", 2.0)
    model, encoder = family
    models.freeze_vision(model)
    responses = ((5, 9, 11, 2, 7, 30, 12, 8),)
    batch = pack([Group(encoder.prompt(SAMPLE), responses)], encoder.pad, family_of(model.config.model_type).collate_pixels)
    states: list[torch.Tensor] = []
    seen_forward = counted(lambda: states.append(response_states(model, batch)))
    seen_backward = counted(lambda: states[0].sum().backward())
    model.zero_grad()
    shape = flops.shape_of(model.config)
    read = reading.packed(reading.prompt_reading(encoder.prompt(SAMPLE), model.config), map(len, responses))
    length = batch.ids.shape[1]
    assert read.tokens == length
    plain = reading.Reading(read.tokens, length**2, 0, read.patches, read.patch_pairs)  # a dense mask computes what it hides
    close(flops.forward(shape, plain), seen_forward, 0.03, "forward")
    close(flops.backward(shape, plain), seen_backward, 0.03, "backward")
    assert read.pairs < length**2


def test_a_language_model_has_a_shape_too():
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        seen = counted(lambda: model(input_ids=torch.arange(40)[None]))
    close(flops.forward(flops.shape_of(config), reading.Reading(40, 1600, 40)), seen, 0.01, "a judge's forward")


def test_answers_behind_one_prompt_are_cheaper_than_apart():
    shape, prompt = flops.Shape(10_000, 500, 2, 64), reading.Reading(100, 10_000)
    together = flops.forward(shape, reading.packed(prompt, [11] * 8))
    apart = 8 * flops.forward(shape, reading.packed(prompt, [11]))
    assert together == pytest.approx(2 * 10_000 * 180 + 4 * 2 * 64 * (10_000 + 8 * 10 * 110) + 2 * 500 * 88)
    assert together < apart / 4
