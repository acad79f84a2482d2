"""The recipes in examples/: each resolves and is planned from configurations of the models' published sizes alone, and fits the hardware that it names."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from masters.demo.models import TEMPLATE, build_tokenizer
from masters.distill import models, plan
from masters.distill.recipe import read_recipe
from masters.errors import RecipeError

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(EXAMPLES.glob("*.yaml"))
SIDE, ROWS = 896, 54  # a square picture in each question

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def text(*sizes: int, **more: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return dict(zip(names, sizes, strict=True)) | more


def qwen2_5(inner: int, *shape: int) -> Any:
    vision = dict(depth=32, hidden_size=1280, intermediate_size=inner, num_heads=16, out_hidden_size=shape[0])
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
    return transformers.Qwen2_5_VLConfig(text_config=text(*shape, 152064, rope_parameters=rope), vision_config=vision, tie_word_embeddings=False)


def qwen3(vision: dict[str, Any], tied: bool, *shape: int) -> Any:
    rope = dict(rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20], mrope_interleaved=True)
    words = text(*shape, 151936, head_dim=128, rope_parameters=rope, tie_word_embeddings=tied)
    return transformers.Qwen3VLConfig(text_config=words, vision_config=vision | dict(out_hidden_size=shape[0], num_heads=16), tie_word_embeddings=tied)


def internvl(*shape: int, large: bool = False) -> Any:
    sizes = (3200, 12800, 45, 25) if large else (1024, 4096, 24, 16)
    vision = dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), sizes, strict=True))
    words = text(*shape, 151936, head_dim=128, model_type="qwen3", tie_word_embeddings=False)
    return transformers.InternVLConfig(text_config=words, vision_config=vision | dict(image_size=[448, 448], patch_size=[14, 14]), tie_word_embeddings=False)


def smol(*shape: int, large: bool = False) -> Any:
    sizes = (1152, 4304, 27, 16, 384, 14) if large else (768, 3072, 12, 12, 512, 16)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    words = text(*shape, 49280, head_dim=64, model_type="llama", tie_word_embeddings=False)
    vision = dict(zip(names, sizes, strict=True))
    return transformers.SmolVLMConfig(text_config=words, vision_config=vision, scale_factor=3 if large else 4, tie_word_embeddings=False)


# The sizes on the models' pages, in billions of weights, beside their configurations.
PUBLISHED: dict[str, tuple[float, Any]] = {
    "Qwen2.5-VL-7B-Instruct": (8.29, lambda: qwen2_5(3420, 3584, 18944, 28, 28, 4)),
    "Qwen2.5-VL-32B-Instruct": (33.5, lambda: qwen2_5(3456, 5120, 27648, 64, 40, 8)),
    "Qwen2.5-VL-72B-Instruct": (73.4, lambda: qwen2_5(3456, 8192, 29568, 80, 64, 8)),
    "Qwen3-VL-2B-Instruct": (
        2.13,
        lambda: qwen3(dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17]), True, 2048, 6144, 28, 16, 8),
    ),
    "Qwen3-VL-32B-Instruct": (
        33.4,
        lambda: qwen3(dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24]), False, 5120, 25600, 64, 64, 8),
    ),
    "InternVL3_5-2B-HF": (2.3, lambda: internvl(2048, 6144, 28, 16, 8)),
    "InternVL3_5-4B-HF": (4.7, lambda: internvl(2560, 9728, 36, 32, 8)),
    "InternVL3_5-8B-HF": (8.5, lambda: internvl(4096, 12288, 36, 32, 8)),
    "InternVL3_5-14B-HF": (15.1, lambda: internvl(5120, 17408, 40, 40, 8)),
    "InternVL3_5-38B-HF": (38.4, lambda: internvl(5120, 25600, 64, 64, 8, large=True)),
    "SmolVLM2-256M-Video-Instruct": (0.256, lambda: smol(576, 1536, 30, 9, 3)),
    "SmolVLM2-2.2B-Instruct": (2.25, lambda: smol(2048, 8192, 24, 32, 32, large=True)),
}


def processor(config: Any) -> Any:
    """The family's own, with its real sizes of images, and a small tokenizer."""
    words, kind = build_tokenizer(), config.model_type
    if kind == "smolvlm":
        side = config.vision_config.image_size
        images = Idefics3ImageProcessorPil(size={"longest_edge": 4 * side}, max_image_size={"longest_edge": side})
        count = {384: 81, 512: 64}[side]
        return transformers.Idefics3Processor(images, words, image_seq_len=count, chat_template=TEMPLATE)  # SmolVLM's own needs torchvision, for videos
    if kind == "internvl":
        words.add_special_tokens({"additional_special_tokens": ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"]})
        named = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>")
        words._set_model_specific_special_tokens(named)
        images = GotOcr2ImageProcessorPil(size=dict(height=448, width=448), crop_to_patches=True, max_patches=12)
        template = CHATML.replace("IMAGE", "<IMG_CONTEXT>\n")
        return models.without_videos(transformers.InternVLProcessor)(images, words, image_seq_length=256, chat_template=template)
    words.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]})
    images = Qwen2VLImageProcessorPil(patch_size=14 if kind == "qwen2_5_vl" else 16)
    own = transformers.Qwen2_5_VLProcessor if kind == "qwen2_5_vl" else transformers.Qwen3VLProcessor
    return models.without_videos(own)(images, words, chat_template=CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"))


@pytest.fixture
def laid_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the examples with questions, and with every model's configuration and processor, but no weights."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    folder = tmp_path / "examples"
    (folder / "data").mkdir()
    Image.effect_noise((SIDE, SIDE), 60).convert("RGB").save(folder / "data" / "one.png")
    row = {"images": ["one.png"], "question": "How many circles are there in this picture?", "answer": "3"}
    for name, count in (("train", ROWS), ("validation", 2)):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps({"id": str(i), **row}) + "\n" for i in range(count)))
    monkeypatch.setattr(plan, "PROBED", 2)
    return folder


def add_models(folder: Path, recipe: Path) -> None:
    for name in re.findall(r"models/([\w.-]+)", recipe.read_text()):
        config = PUBLISHED[name][1]()
        config.save_pretrained(folder / "models" / name)
        processor(config).save_pretrained(folder / "models" / name)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_an_example_is_planned_from_configurations_alone_and_fits_what_it_names(recipe: Path, laid_out: Path, monkeypatch: pytest.MonkeyPatch):
    add_models(laid_out, recipe)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2 * 10**12, 0, 2 * 10**12))
    read = read_recipe(laid_out / recipe.name)
    found = plan.plan(read)
    gigabytes = round(found.memory.memory.total / 1e9)
    assert found.hours
    needs = next(line for line in recipe.read_text().splitlines() if "GB in each" in line)
    hours = round(found.hours * found.devices * 100_000 / ROWS, -1)
    expected = f"{gigabytes} GB in each of {found.devices}", f"{hours:,.0f} device-hours"
    assert all(part in needs for part in expected), f"{expected}: {needs}"
    assert not read.out.exists()
    with pytest.raises(RecipeError, match="GB in each process"):
        plan.plan(read_recipe(laid_out / recipe.name, [f"machine.memory_gb={gigabytes * 0.8}"]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_configurations_have_the_published_sizes(name: str):
    billions, config = PUBLISHED[name]
    assert sum(p.numel() for p in models.skeleton(config()).parameters()) / 1e9 == pytest.approx(billions, rel=0.03)
