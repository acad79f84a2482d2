"""Prompts and answers as the processor itself gives them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from masters.distill.families.idefics3 import collate_pixels
from masters.distill.inputs import Encoder, Prompt, pad_left, to_device
from masters.errors import DataError, ImageError, ModelError
from masters.samples import Sample


def test_a_prompt_is_what_the_processor_gives_for_the_same_chat(encoder: Encoder, processor: Any, samples: list[Sample]):
    for sample in samples[:6]:
        prompt = encoder.encode(sample)
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.prompt}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        expected = processor(text=text, images=[Image.open(sample.images[0]).convert("RGB")], return_tensors="pt")
        assert torch.equal(prompt.ids, expected["input_ids"][0])
        assert set(prompt.pixels) == {"pixel_values", "pixel_attention_mask"}
        for name, tensor in prompt.pixels.items():
            assert torch.equal(tensor, expected[name]), name
        assert int((prompt.ids == processor.image_token_id).sum()) == 16
        assert processor.tokenizer.decode(prompt.ids).endswith("Assistant:")


def test_an_answer_continues_the_prompt_as_the_template_would(encoder: Encoder, processor: Any):
    for text in ("yes", "83", "a teal triangle", "B"):
        chat = [{"role": "user", "content": [{"type": "text", "text": "which?"}]}]
        start = processor.apply_chat_template(chat, add_generation_prompt=True)
        whole = processor.apply_chat_template([*chat, {"role": "assistant", "content": [{"type": "text", "text": text}]}])
        prompt, ids = processor.tokenizer(start).input_ids, encoder.answer(text)
        assert processor.tokenizer(whole.rstrip("\n")).input_ids == prompt + ids
        assert ids[-1] == encoder.eos
        assert encoder.text(ids) == text


def test_a_template_whose_answers_are_no_continuation_is_refused(processor: Any):
    class Elsewhere:
        tokenizer = processor.tokenizer

        def apply_chat_template(self, turns: Any, add_generation_prompt: bool = False) -> str:
            # An assistant's turn begins otherwise than the generation prompt says.
            return "User: q\n" + ("Assistant:" if add_generation_prompt else "<bot>ANSWER</bot>" if len(turns) > 1 else "")

    with pytest.raises(ModelError, match="chat template"):
        Encoder(Elsewhere())


def test_a_prompt_is_never_cut(processor: Any, samples: list[Sample]):
    size = len(Encoder(processor).encode(samples[0]).ids)
    assert len(Encoder(processor, longest=size).encode(samples[0]).ids) == size
    with pytest.raises(DataError, match=rf"'{samples[0].id}' takes {size} tokens.*at most {size - 1}"):
        Encoder(processor, longest=size - 1).encode(samples[0])


def test_bad_images_are_errors_that_name_the_file(processor: Any, samples: list[Sample], tmp_path: Path):
    cut = tmp_path / "cut.png"
    whole = samples[0].images[0]
    assert isinstance(whole, Path)
    cut.write_bytes(whole.read_bytes()[:200])
    for image in (cut, tmp_path / "absent.png"):
        with pytest.raises(ImageError, match=image.name):
            Encoder(processor).encode(dataclasses.replace(samples[0], images=(image,)))


def test_the_cache_holds_no_more_than_its_bytes(processor: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch):
    size = max(Encoder(processor).encode(sample).bytes for sample in samples[:4])
    encoder = Encoder(processor, cache_bytes=2 * size)
    encoded: list[str] = []
    original = encoder.encode

    def encode(sample: Sample) -> Prompt:
        encoded.append(sample.id)
        return original(sample)

    monkeypatch.setattr(encoder, "encode", encode)
    a, b, c = samples[:3]
    for sample in (a, b, a, c, a, b):  # c displaces b, the one not used for longest; then b is encoded again
        assert torch.equal(encoder.prompt(sample).ids, original(sample).ids)
    assert encoded == [a.id, b.id, c.id, b.id]
    assert sum(prompt.bytes for prompt in encoder._cache.values()) <= 2 * size
    tiny = Encoder(processor, cache_bytes=10)
    assert len(tiny.prompt(a).ids) == len(tiny.prompt(a).ids) > 0, "a prompt larger than the whole cache still works"
    assert not tiny._cache


def test_a_prompt_remembered_by_generation_can_be_trained_on(processor: Any, samples: list[Sample]):
    encoder = Encoder(processor)
    with torch.inference_mode():
        prompt = encoder.prompt(samples[0])
    assert not any(tensor.is_inference() for tensor in (prompt.ids, *prompt.pixels.values()))


def test_two_files_of_questions_may_use_the_same_ids(processor: Any, samples: list[Sample]):
    """Training and validation questions without ids are both numbered from 0."""
    encoder = Encoder(processor)
    other = dataclasses.replace(samples[1], id=samples[0].id)
    assert not torch.equal(encoder.encode(samples[0]).ids, encoder.encode(other).ids)
    for sample in (samples[0], other, samples[0]):
        prompt, expected = encoder.prompt(sample), encoder.encode(sample)
        assert torch.equal(prompt.ids, expected.ids)
        assert torch.equal(prompt.pixels["pixel_values"], expected.pixels["pixel_values"])


def test_image_tokens_are_known(encoder: Encoder, processor: Any):
    assert encoder.image_tokens == [processor.tokenizer.convert_tokens_to_ids("<image>")]


def test_rows_are_padded_on_the_left():
    ids, mask = pad_left([torch.tensor([5, 6, 7]), torch.tensor([8])], 9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_pixels_of_unequal_prompts_as_one_batch():
    def tiles(count: int, height: int, width: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.rand(1, count, 3, height, width), "pixel_attention_mask": torch.ones(1, count, height, width, dtype=torch.long)}

    rows = [tiles(1, 4, 6), {}, tiles(3, 5, 2)]
    batch = collate_pixels(rows)
    assert batch["pixel_values"].shape == (3, 3, 3, 5, 6)
    assert batch["pixel_attention_mask"].dtype == torch.bool
    assert torch.equal(batch["pixel_values"][0, :1, :, :4, :6], rows[0]["pixel_values"][0])
    assert torch.equal(batch["pixel_values"][2, :3, :, :5, :2], rows[2]["pixel_values"][0])
    assert float(batch["pixel_values"].sum()) == pytest.approx(sum(float(r["pixel_values"].sum()) for r in rows if r)), "the rest is zero"
    assert int(batch["pixel_attention_mask"].sum()) == 4 * 6 + 3 * 5 * 2
    assert collate_pixels([{}, {}]) == {}


def test_masks_keep_their_type_and_pixels_take_the_models():
    moved = to_device(
        {"pixel_values": torch.rand(2), "mask": torch.ones(2, dtype=torch.bool), "grid": torch.ones(2, dtype=torch.long)}, torch.device("cpu"), torch.bfloat16
    )
    assert [moved[name].dtype for name in ("pixel_values", "mask", "grid")] == [torch.bfloat16, torch.bool, torch.long]
