"""Every family, built from its real configuration with random weights: the packed forward, generation and the scope of masks against transformers alone."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from masters.demo.models import build_model, build_processor, build_tokenizer
from masters.distill.attention import takes_blocks
from masters.distill.families import SUPPORTED, check_config, family_of, shares_prompts
from masters.distill.forward import Group, pack, response_states
from masters.distill.generate import GREEDY, Sampling, generate
from masters.distill.inputs import Encoder, Prompt
from masters.distill.mask import maskable
from masters.distill.models import check_pair, check_rules, freeze_vision, load_processor, without_videos
from masters.distill.objective import Heads, row_stats
from masters.distill.responses import DistinctResponse
from masters.distill.signal import CachedSignal, SignalReader, lay_out, write_head
from masters.distill.skipped import PROBES, _Lengths
from masters.errors import ModelError
from masters.samples import Sample

TOLERANCE = 1e-5
TEXT: dict[str, Any] = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.08)


def template(image: str) -> str:
    """A chat template of ChatML's form with `image` where an image stands."""
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


@dataclass(frozen=True)
class Family:
    """A processor, and how to build a model of some size for it."""

    processor: Any
    build: Callable[..., Any]


def tokenizer(*special: str) -> Any:
    found = build_tokenizer()
    found.add_special_tokens({"additional_special_tokens": list(special)})
    return found


def random_model(config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def qwen(name: str, config_type: Any, processor_type: Any, patch: int, text: dict[str, Any], vision: dict[str, Any]) -> Family:
    words = tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    side = 2 * patch
    images = Qwen2VLImageProcessorPil(patch_size=patch, size=dict(shortest_edge=side * side, longest_edge=12 * side * side))
    processor = without_videos(processor_type)(images, words, chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"))

    def build(seed: int, vocab: int = len(words), **wider: Any) -> Any:
        ids = {f"{kind}_token_id": words.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")}
        shape = {**TEXT, **wider}
        config = config_type(
            text_config={**shape, **text, "vocab_size": vocab, "pad_token_id": 0},
            vision_config={**vision, "patch_size": patch, "out_hidden_size": shape["hidden_size"]},
            **ids,
        )
        return random_model(config, seed)

    return Family(processor, build)


def qwen2_5_vl() -> Family:
    vision = dict(depth=4, hidden_size=32, intermediate_size=48, num_heads=2, window_size=56, fullatt_block_indexes=[1, 3])
    text = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]))
    return qwen("qwen2_5_vl", transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLProcessor, 14, text, vision)


def qwen3_vl() -> Family:
    vision = dict(depth=3, hidden_size=32, intermediate_size=48, num_heads=2, num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
    text = dict(head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3], mrope_interleaved=True))
    return qwen("qwen3_vl", transformers.Qwen3VLConfig, transformers.Qwen3VLProcessor, 16, text, vision)


def internvl() -> Family:
    words = tokenizer("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    named = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>")
    words._set_model_specific_special_tokens(named)
    images = GotOcr2ImageProcessorPil(size=dict(height=32, width=32), crop_to_patches=True, max_patches=4)
    processor = without_videos(transformers.InternVLProcessor)(images, words, image_seq_length=4, chat_template=template("<IMG_CONTEXT>\n"))

    def build(seed: int, vocab: int = len(words), **wider: Any) -> Any:
        vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=[32, 32], patch_size=[8, 8])
        text = {**TEXT, **wider, "model_type": "qwen3", "head_dim": 16, "vocab_size": vocab}
        return random_model(transformers.InternVLConfig(vision_config=vision, text_config=text, image_token_id=processor.image_token_id), seed)

    return Family(processor, build)


def llava_onevision() -> Family:
    words, points = tokenizer("<video>"), [[32, 32], [32, 64], [64, 32], [64, 64]]
    images = LlavaOnevisionImageProcessorPil(size=dict(height=32, width=32), image_grid_pinpoints=points)
    kind, full = without_videos(transformers.LlavaOnevisionProcessor), dict(num_image_tokens=16, vision_feature_select_strategy="full")
    processor = kind(images, words, chat_template=template("<image>\n"), **full)

    def build(seed: int, vocab: int = len(words), **wider: Any) -> Any:
        vision = dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
        vision |= dict(image_size=32, patch_size=8, vision_use_head=False)
        text = {**TEXT, **wider, "model_type": "qwen2", "vocab_size": vocab}
        marks = dict(image_token_id=processor.image_token_id, video_token_id=processor.video_token_id)
        return random_model(transformers.LlavaOnevisionConfig(vision_config=vision, text_config=text, image_grid_pinpoints=points, **marks), seed)

    return Family(processor, build)


def idefics3() -> Family:
    processor = build_processor(build_tokenizer())
    return Family(processor, lambda seed, **_: build_model("student", processor.tokenizer, seed).float().eval())


FAMILIES = {make.__name__: make for make in (idefics3, internvl, llava_onevision, qwen2_5_vl, qwen3_vl)}


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@cache
def made(name: str) -> Family:
    return FAMILIES[name]()


@cache
def student(name: str) -> Any:
    return made(name).build(seed=1)


@cache
def encoder(name: str) -> Encoder:
    return Encoder(made(name).processor, positions=family_of(name).positions)


def picture(width: int, height: int, seed: int) -> bytes:
    held = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(held, "PNG")
    return held.getvalue()


ASKED = [
    Sample("wide", (picture(128, 64, 0),), "what is the color of the triangle?"),
    Sample("none", (), "how many digits are there?"),
    Sample("two", (picture(64, 96, 1), picture(64, 64, 2)), "is there a circle? look closely."),
    Sample("tall", (picture(60, 124, 3),), "what shape?"),
]
LENGTHS = ((3, 1, 9), (4, 2), (1, 5), (2, 2, 6, 1))


@cache
def groups(name: str) -> list[Group]:
    random = torch.Generator().manual_seed(0)
    answers = [tuple(tuple(torch.randint(80, 400, (n,), generator=random).tolist()) for n in lengths) for lengths in LENGTHS]
    return [Group(encoder(name).prompt(sample), given) for sample, given in zip(ASKED, answers, strict=True)]


def separate_states(name: str, model: Any) -> Tensor:
    """The states that predict each response, by the model's own forward of prompt and response, its positions its own."""
    found = []
    for sample, group in zip(ASKED, groups(name), strict=True):
        processor = made(name).processor
        text = processor.apply_chat_template(Encoder.turns(sample), add_generation_prompt=True)
        images = [Image.open(io.BytesIO(image)) for image in sample.images]  # type: ignore[arg-type]
        inputs = dict(processor(text=[text], images=[images] if images else None, return_tensors="pt", add_special_tokens=False))
        prompt = inputs.pop("input_ids")
        inputs.pop("attention_mask")
        for response in group.responses:
            ids = torch.cat([prompt, torch.tensor([response])], dim=1)
            kinds = inputs.get("mm_token_type_ids")
            more = {} if kinds is None else {"mm_token_type_ids": torch.cat([kinds, torch.zeros(1, len(response), dtype=kinds.dtype)], dim=1)}
            found.append(model.model(input_ids=ids, use_cache=False, **(inputs | more)).last_hidden_state[0, prompt.shape[1] - 1 : -1])
    return torch.cat(found)


def outcome(model: Any, states: Tensor, teacher: Any, theirs: Tensor, packed: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    heads = Heads(states, model.get_output_embeddings().weight, theirs, teacher.get_output_embeddings().weight)
    stats = row_stats(heads, packed.tokens, packed.rows, packed.count, "jsd", "k3")
    model.zero_grad(set_to_none=True)
    (stats.divergence.sum() + (torch.linspace(-1, 1.5, packed.count) * stats.logprob).sum()).backward()
    return stats._asdict(), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["shared", "shared, FlexAttention", "unshared"])
def test_the_packed_forward_is_the_models_own(name: str, how: str, request: pytest.FixtureRequest):
    shared = how != "unshared"
    model, teacher = made(name).build(seed=1), made(name).build(seed=2, num_hidden_layers=4)
    if "Flex" in how:
        request.getfixturevalue("flex_on_cpu")
        assert takes_blocks(model, model.device)
        assert takes_blocks(teacher, model.device)
    packed = pack(groups(name), encoder(name).pad, family_of(name).collate_pixels, shared)
    assert packed.count == sum(map(len, LENGTHS))
    assert len(packed.ids) == (len(ASKED) if shared else packed.count)
    with torch.no_grad():
        theirs, theirs_apart = response_states(teacher, packed), separate_states(name, teacher)
    states, apart = response_states(model, packed), separate_states(name, student(name))
    assert ("blocks" in vars(packed), "mask" in vars(packed)) == (("Flex" in how), ("Flex" not in how)), "what the forward was given"
    worst = {"states": float((states - apart).detach().abs().max())}
    found, gradients = outcome(model, states, teacher, theirs, packed)
    expected, wanted = outcome(student(name), apart, teacher, theirs_apart, packed)
    for key in ("divergence", "logprob", "teacher_logprob", "entropy"):
        worst[key] = float((found[key] - expected[key]).detach().abs().max())
    assert float(found["divergence"].detach().std()) > 1e-3, "responses differ, so that a mix-up of rows would show"
    assert set(gradients) == set(wanted)
    assert any(part in key for key in wanted for part in family_of(name).PROJECTOR), "images matter"
    scaled = {key: float((gradients[key] - g).abs().max()) / max(1.0, float(g.abs().max())) for key, g in wanted.items()}
    worst["gradient"] = max(scaled.values())
    print(name, how, worst)
    assert all(value < TOLERANCE for value in worst.values()), worst


def test_lengths_computed_from_image_sizes_are_the_processors_own(name: str, monkeypatch: pytest.MonkeyPatch):
    """Nothing is encoded once the first lengths have proved exact, and those of other shapes are exact as well."""
    lengths = _Lengths(encoder(name))
    shapes = [(40, 40), (97, 31), (31, 97), (64, 64), (200, 20), (33, 90), (128, 64), (20, 20), (61, 59)]
    samples = [Sample(str(i), (picture(w, h, i),), "which shape is it?" * (i + 1)) for i, (w, h) in enumerate(shapes)]
    samples += [Sample(f"none {i}", (), "no image " * i) for i in range(PROBES + 2)]
    samples += [Sample(f"two {i}", (picture(50, 40, i), picture(40, 80 + i, i)), "which?") for i in range(PROBES + 2)]
    exact = [len(encoder(name).encode(sample).ids) for sample in samples]
    encoded: list[str] = []
    real = lengths.encoder.encode

    def encode(sample: Sample) -> Prompt:
        encoded.append(sample.id)
        return real(sample)

    monkeypatch.setattr(lengths.encoder, "encode", encode)
    sizes = [[Image.open(io.BytesIO(image)).size[::-1] for image in sample.images if isinstance(image, bytes)] for sample in samples]
    assert [lengths.of(sample, size) for sample, size in zip(samples, sizes, strict=True)] == exact
    few = [*map(str, range(PROBES)), *(f"none {i}" for i in range(PROBES))]
    # LLaVA-OneVision gives several images no tiles, which its rule does not know.
    assert encoded == few + [f"two {i}" for i in range(PROBES + 2 if name == "llava_onevision" else PROBES)]


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "unshared"])
def test_the_kept_signal_is_the_teachers_own_forward(name: str, shared: bool, tmp_path: Path):
    teacher = made(name).build(seed=2, num_hidden_layers=4)
    answers = {sample.id: [DistinctResponse(ids, 1, None, True, False) for ids in group.responses] for sample, group in zip(ASKED, groups(name), strict=True)}
    head, path = write_head(tmp_path, "head", 0.0, teacher, {}, ""), tmp_path / "chunk.safetensors"
    reader = SignalReader(encoder(name), family_of(name).collate_pixels, shared, torch.float32)
    reader.write(path, lay_out(ASKED, answers), ASKED, teacher, {"head": head.name, "mark": ""})
    asked = [dataclasses.replace(group, sample=sample.id) for sample, group in zip(ASKED, groups(name), strict=True)]
    states, matrix = CachedSignal([path], torch.device("cpu")).read(pack(asked, encoder(name).pad, family_of(name).collate_pixels, shared))
    with torch.no_grad():
        apart = float((states - separate_states(name, teacher)).abs().max())
    assert apart < TOLERANCE, apart
    assert torch.equal(matrix, teacher.get_output_embeddings().weight)


def test_greedy_answers_are_transformers_token_for_token(name: str):
    model, processor = student(name), made(name).processor
    found = generate(model, encoder(name), family_of(name).collate_pixels, ASKED, 1, dataclasses.replace(GREEDY, max_tokens=8))
    expected = []
    for sample, group in zip(ASKED, groups(name), strict=True):
        ids = group.prompt.ids[None]
        settings = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, eos_token_id=encoder(name).eos, pad_token_id=0)
        out = model.generate(input_ids=ids, **group.prompt.pixels, **settings, suppress_tokens=encoder(name).image_tokens)
        expected.append(out[0, ids.shape[1] :].tolist())
        assert (ids == processor.image_token_id).any() == bool(sample.images)
    assert [list(answer.ids) for [answer] in found] == expected
    assert len({answer.ids for [answer] in found}) > 1, "answers differ, so that a mix-up of rows would show"


def test_masks_fall_on_attention_and_mlp_of_the_language_model_alone(name: str):
    model = student(name)
    text = model.config.get_text_config()
    found = maskable(model, family_of(name).LANGUAGE)
    assert len(found) == 7 * text.num_hidden_layers
    kinds = {re.sub(r".*layers\.\d+\.", "", key) for key in found}
    assert kinds == {f"self_attn.{x}_proj.weight" for x in "qkvo"} | {f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 2 * text.hidden_size * head * (text.num_attention_heads + text.num_key_value_heads)
    assert sum(w.numel() for w in found.values()) == text.num_hidden_layers * (attention + 3 * text.hidden_size * text.intermediate_size)


def test_the_projector_is_trained_wherever_it_stands(name: str):
    model, family = made(name).build(seed=5), family_of(name)
    freeze_vision(model)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    rest = {key for key, _ in model.named_parameters()} - trained
    assert rest
    assert all(any(part in key for part in family.VISION) for key in rest)
    assert all(any(part in key for key in trained) for part in (*family.PROJECTOR, *family.LANGUAGE))
    assert not any(part in key for key in rest for part in (*family.PROJECTOR, *family.LANGUAGE))


def test_positions_of_three_axes_are_the_models_own():
    for family in ("qwen2_5_vl", "qwen3_vl"):
        for sample, group in zip(ASKED, groups(family), strict=True):
            prompt, model = group.prompt, student(family).model
            if not sample.images:
                assert torch.equal(prompt.places, torch.arange(len(prompt.ids)).expand(3, -1))
                continue
            expected, delta = model.get_rope_index(prompt.ids[None], prompt.pixels["mm_token_type_ids"], prompt.pixels["image_grid_thw"])
            assert torch.equal(prompt.places, expected[:, 0]), sample.id
            assert int(prompt.places.max()) + 1 == len(prompt.ids) + int(delta)
            assert int(delta) < 0, "an image takes fewer positions than tokens, so counting tokens would be wrong"


def test_vocabularies_padded_differently(tmp_path: Path):
    family = made("qwen2_5_vl")
    size = encoder("qwen2_5_vl").vocabulary
    folders = {}
    for part, vocab, depth in (("teacher", size + 40, 4), ("student", size + 8, 3)):
        folders[part] = tmp_path / part
        family.build(3, vocab, num_hidden_layers=depth).save_pretrained(folders[part])
        family.processor.save_pretrained(folders[part])
    check_pair(folders["teacher"], folders["student"])
    teacher, pupil = (transformers.AutoModelForImageTextToText.from_pretrained(folders[part]).eval() for part in ("teacher", "student"))
    packed = pack(groups("qwen2_5_vl"), 0, family_of("qwen2_5_vl").collate_pixels)
    with torch.no_grad():
        states, theirs = response_states(pupil, packed), response_states(teacher, packed)
        stats = row_stats(Heads(states, pupil.lm_head.weight, theirs, teacher.lm_head.weight), packed.tokens, packed.rows, packed.count, "jsd", "k3")
        p, q = (torch.softmax((h @ m.lm_head.weight[: size + 8].T).double(), -1) for h, m in ((theirs, teacher), (states, pupil)))
    middle = (p + q) / 2
    each = 0.5 * (p * (p / middle).log() + q * (q / middle).log()).sum(-1)
    expected = torch.stack([each[packed.rows == row].mean() for row in range(packed.count)])
    assert torch.allclose(stats.divergence.double(), expected, atol=1e-6)
    with torch.no_grad():  # a teacher that wants nothing but rows past the vocabulary
        teacher.lm_head.weight[size:] = 50 * torch.sign(teacher.lm_head.weight[size:])
        teacher.lm_head.weight[size::2] = -teacher.lm_head.weight[size + 1 :: 2]
    ids = groups("qwen2_5_vl")[1].prompt.ids[None]
    assert int(teacher(input_ids=ids).logits[0, -1].argmax()) >= size
    for sampling in (dataclasses.replace(GREEDY, max_tokens=4), Sampling(max_tokens=4)):
        answers = generate(teacher, encoder("qwen2_5_vl"), family_of("qwen2_5_vl").collate_pixels, ASKED, 2, sampling)
        assert all(i < size for found in answers for answer in found for i in answer.ids)


def test_a_vocabulary_that_its_model_lacks(tmp_path: Path):
    family = made("qwen2_5_vl")
    family.build(3, encoder("qwen2_5_vl").vocabulary - 1).save_pretrained(tmp_path)
    family.processor.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has \d+ ids for a vocabulary of \d+"):
        check_pair(tmp_path, tmp_path)


def test_processors_load_for_images_without_torchvision(name: str, tmp_path: Path):
    student(name).config.save_pretrained(tmp_path)
    made(name).processor.save_pretrained(tmp_path)
    again = Encoder(load_processor(tmp_path), positions=family_of(name).positions).encode(ASKED[2])
    prompt = groups(name)[2].prompt
    assert torch.equal(again.ids, prompt.ids)
    assert again.pixels.keys() == prompt.pixels.keys()
    assert all(torch.equal(again.pixels[key], prompt.pixels[key]) for key in prompt.pixels)


def test_what_has_no_family_file():
    assert set(FAMILIES) | {"smolvlm"} == set(SUPPORTED)
    check_config(transformers.LlavaConfig())
    assert shares_prompts(transformers.LlavaConfig())
    with pytest.raises(ModelError, match="positions of several axes"):
        check_config(transformers.Glm4vConfig())
    with pytest.raises(ModelError, match="not supported"):
        check_config(transformers.LlamaConfig())
    assert not shares_prompts(transformers.Gemma3Config()), "its layers with a window count what is not a response's own"


def test_default_rules_are_proved_before_they_are_used():
    family, kind = made("llava_onevision"), family_of("llava")
    vision = dict(
        model_type="siglip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = {**TEXT, "model_type": "qwen2", "vocab_size": len(family.processor.tokenizer)}
    mark = dict(image_token_index=family.processor.image_token_id, vision_feature_select_strategy="full")
    model = random_model(transformers.LlavaConfig(vision_config=vision | {"vision_use_head": False}, text_config=text, **mark), 0)
    ids = torch.tensor([80, *[family.processor.image_token_id] * 16, *range(90, 99)])
    prompt = Prompt(ids, {"pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))})
    check_rules(model, prompt, kind.collate_pixels, shared=True)
    with pytest.raises(ModelError, match="off its own forward"):
        check_rules(model, dataclasses.replace(prompt, positions=2 * torch.arange(len(ids))), kind.collate_pixels, shared=True)
    with pytest.raises(ModelError, match="can't read packed responses"):
        check_rules(model, dataclasses.replace(prompt, pixels=prompt.pixels | {"surprise": torch.ones(1)}), lambda rows: {"pixel_values": ids}, shared=True)
    with pytest.raises(ModelError, match="a kind for every token"):
        check_rules(model, dataclasses.replace(prompt, pixels=prompt.pixels | {"token_type_ids": ids[None]}), kind.collate_pixels, shared=True)
