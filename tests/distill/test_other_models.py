"""Models without a family file, and language models that no mask can tell what to see: whole runs on them, from check to student."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_families import TEXT, made
from test_stages import rows_of
from transformers import AutoModelForImageTextToText

from masters.distill.families import SUPPORTED, family_of, shares_prompts
from masters.distill.forward import packing_error
from masters.distill.generate import GREEDY, generate
from masters.distill.inputs import Encoder
from masters.distill.models import load_model
from masters.distill.recipe import build_recipe
from masters.distill.stages import distill
from masters.samples import Sample

SIDE, PATCH = 32, 8


def recurrent(processor: Any, depth: int, seed: int) -> Any:
    """Idefics3 around Lfm2, whose convolutions run over time: every second layer reads what stands before, whatever a mask says."""
    words = processor.tokenizer
    kinds = ["conv", "full_attention"] * (depth // 2)
    text = dict(TEXT, num_hidden_layers=depth, model_type="lfm2", layer_types=kinds, vocab_size=len(words), block_multiple_of=8, tie_word_embeddings=True)
    text |= dict(pad_token_id=words.pad_token_id, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id)
    demo = made("idefics3").build(seed=1).config
    torch.manual_seed(seed)
    config = transformers.Idefics3Config(
        text_config=text, vision_config=demo.vision_config, scale_factor=demo.scale_factor, image_token_id=demo.image_token_id, tie_word_embeddings=True
    )
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def llava(processor: Any, depth: int, seed: int) -> Any:
    """A model that transformers loads and no file here names."""
    vision = dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    vision |= dict(image_size=SIDE, patch_size=PATCH, vision_use_head=False)
    text = {**TEXT, "num_hidden_layers": depth, "model_type": "qwen2", "vocab_size": len(processor.tokenizer), "tie_word_embeddings": True}
    torch.manual_seed(seed)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=processor.image_token_id, vision_feature_select_strategy="full", tie_word_embeddings=True
    )
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def llava_processor() -> Any:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    base = made("llava_onevision").processor
    images = SiglipImageProcessorPil(size=dict(height=SIDE, width=SIDE))
    settings = dict(patch_size=PATCH, vision_feature_select_strategy="full", num_additional_image_tokens=0)
    return transformers.LlavaProcessor(images, base.tokenizer, chat_template=base.chat_template, image_token="<image>", **settings)


@pytest.fixture(scope="module", params=["lfm2 in idefics3", "llava"])
def raw(request: pytest.FixtureRequest, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of 6 questions, 2 mask stages and 2 updates."""
    folder = tmp_path_factory.mktemp(str(request.param).split()[0])
    processor, build = (llava_processor(), llava) if request.param == "llava" else (made("idefics3").processor, recurrent)
    for part, depth in (("teacher", 4), ("student", 2)):
        build(processor, depth, depth).save_pretrained(folder / part)
        processor.save_pretrained(folder / part)
    return {
        "student": str(folder / "student"),
        "teachers": [{"model": str(folder / "teacher"), "r_max": 0.2}],
        "data": {"train": str(questions / "train.jsonl"), "validation": str(questions / "validation.jsonl"), "limit": 6},
        "answers": {"teacher": 2, "student": 2, "max_tokens": 3},
        "mask": {"step": 0.2},
        "track": [],
        "train": {"dtype": "float32", "learning_rate": 1e-3, "questions_per_step": 3, "evaluate_batch": 8},
        "out": str(folder / "run"),
    }


def encoder_of(raw: dict[str, Any]) -> Encoder:
    return Encoder(transformers.AutoProcessor.from_pretrained(raw["student"]))


def test_a_whole_run(raw: dict[str, Any], capfd: pytest.CaptureFixture[str]):
    out = distill(build_recipe(raw))
    model_type = json.loads((out / "student" / "config.json").read_text())["model_type"]
    alone = model_type in SUPPORTED
    assert ("idefics3 has recurrent or windowed layers: every response is read with a prompt of its own" in capfd.readouterr().err) == alone
    assert shares_prompts(load_model(Path(raw["student"]), torch.float32).config) != alone
    steps = rows_of(out, "step")
    assert [row["ratio"] for row in steps] == [0.2, 0.0]
    assert all(row["divergence"] > 0 and row["grad_norm"] > 0 for row in steps)
    before, after = (load_model(folder, torch.float32).state_dict() for folder in (Path(raw["student"]), out / "student"))
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name].bfloat16().float())}
    language = family_of(model_type).LANGUAGE
    assert any(part in name for name in changed for part in language)
    assert not any("vision" in name for name in changed)


def test_packed_responses_are_the_models_own_reading(raw: dict[str, Any], samples: list[Sample]):
    model, encoder = load_model(Path(raw["student"]), torch.float32).eval(), encoder_of(raw)
    collate, shared = family_of(model.config.model_type).collate_pixels, shares_prompts(model.config)
    assert packing_error(model, encoder.prompt(samples[0]), collate, shared) < 1e-5
    if not shared:
        assert packing_error(model, encoder.prompt(samples[0]), collate, True) > 1e-3, "one prompt for all would be wrong"


def test_greedy_answers_of_a_batch_are_transformers_own(raw: dict[str, Any], samples: list[Sample]):
    model, encoder = load_model(Path(raw["student"]), torch.float32).eval(), encoder_of(raw)
    asked = [samples[i] for i in (0, 3, 5)]
    found = generate(model, encoder, family_of(model.config.model_type).collate_pixels, asked, 1, dataclasses.replace(GREEDY, max_tokens=6))
    for sample, [answer] in zip(asked, found, strict=True):
        prompt = encoder.prompt(sample)
        ids = prompt.ids[None]
        settings = dict(do_sample=False, max_new_tokens=6, eos_token_id=encoder.eos, pad_token_id=0, suppress_tokens=encoder.image_tokens)
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **prompt.pixels, **settings)
        assert list(answer.ids) == out[0, ids.shape[1] :].tolist()
