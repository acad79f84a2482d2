"""Model folders: whole ones load, anything else is one line before any work, and so is a pair that does not fit."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.normalizers import Lowercase
from transformers import AutoModelForImageTextToText, LlamaConfig

from masters.demo.models import build_model, save_model
from masters.distill.models import check_pair, check_prompts, count_weights, freeze_vision, frozen, load_model, load_processor, longest_prompt, read_config
from masters.errors import MastersError, RecipeError


@pytest.fixture
def folder(models: Any, tmp_path: Path) -> Path:
    """A copy of the student's folder, to damage."""
    return Path(shutil.copytree(models.student, tmp_path / "student"))


def refusal(call: Callable[[], Any], expected: str) -> None:
    with pytest.raises(MastersError, match=expected) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def sharded(folder: Path) -> list[Path]:
    """Rewrite the checkpoint as several files with an index, as large ones come."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    return shards


# Loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_folder_loads_in_the_type_asked_for(models: Any, dtype: torch.dtype):
    model = load_model(models.student, dtype)
    stored = load_file(models.student / "model.safetensors")
    named = dict(model.named_parameters())
    assert set(stored) <= set(named)
    for name, tensor in stored.items():
        assert named[name].dtype == dtype
        assert torch.equal(named[name], tensor.to(dtype)), name


def test_weights_are_counted_from_headers_whole_or_sharded(models: Any, folder: Path):
    expected = sum(p.numel() for p in load_model(models.student, torch.bfloat16).parameters())
    assert count_weights(models.student) == expected
    sharded(folder)
    assert count_weights(folder) == expected
    assert torch.equal(load_model(folder, torch.bfloat16).lm_head.weight, load_model(models.student, torch.bfloat16).lm_head.weight)


def test_no_folder_no_configuration_no_weights(folder: Path, tmp_path: Path):
    refusal(lambda: load_model(tmp_path / "absent", torch.float32), r"no model in .*absent; expected a Hugging Face folder")
    (folder / "model.safetensors").unlink()
    refusal(lambda: load_model(folder, torch.float32), "a configuration but no weights")
    (folder / "config.json").unlink()
    refusal(lambda: load_model(folder, torch.float32), r"no model in .*config\.json")


@pytest.mark.parametrize("text", ["{", "", '{"model_type": "idefics4"}', "{}"])
def test_a_configuration_that_says_nothing(folder: Path, text: str):
    (folder / "config.json").write_text(text)
    refusal(lambda: read_config(folder), r"config\.json can't be read|not supported")


def test_a_language_model_is_no_vision_language_model(tmp_path: Path):
    LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50).save_pretrained(tmp_path)
    refusal(lambda: read_config(tmp_path), "the model type 'llama' is not supported; expected one of idefics3, internvl, llava_onevision")


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, 600_000])
def test_a_truncated_checkpoint(folder: Path, keep: int):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refusal(lambda: load_model(folder, torch.float32), r"the weights in .*model\.safetensors can't be read .*download it again")


def test_a_missing_shard_is_named(folder: Path):
    shards = sharded(folder)
    shards[1].unlink()
    refusal(lambda: load_model(folder, torch.float32), shards[1].name)


def test_a_missing_weight_is_named(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    lost = tensors.pop("model.text_model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refusal(lambda: load_model(folder, torch.float32), r"lacks the weight model\.text_model\.layers\.1\.mlp\.up_proj\.weight")
    tensors["model.text_model.layers.1.mlp.up_proj.weight"] = lost[:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refusal(lambda: load_model(folder, torch.float32), "can't be loaded")


def test_folders_without_a_whole_processor(folder: Path):
    (folder / "chat_template.jinja").unlink()
    refusal(lambda: load_processor(folder), "no chat template")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refusal(lambda: load_processor(folder), "processor")


def test_the_vision_tower_is_left_as_it_is(processor: Any):
    model = build_model("student", processor.tokenizer)
    freeze_vision(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "vision_model" not in name}
    assert any("connector" in name for name in trained)
    still = frozen(model)
    assert not still.training
    assert not any(p.requires_grad for p in still.parameters())


# Pairs


def test_a_pair_that_fits(models: Any):
    check_pair(models.teacher, models.student)
    check_pair(models.student, models.student)  # a teacher of the student's own size teaches by its mask alone


def test_a_teacher_smaller_than_its_student(models: Any):
    refusal(lambda: check_pair(models.student, models.teacher), r"\(\d{3},\d{3} weights\) is smaller than the student .*swap them")


def test_size_is_counted_in_weights_and_not_in_bytes(models: Any, tmp_path: Path, processor: Any):
    # A student in float32 takes more bytes than a slightly larger teacher in bfloat16.
    student = tmp_path / "exact"
    build_model("student", processor.tokenizer).to(torch.float32).save_pretrained(student)
    processor.save_pretrained(student)
    teacher = tmp_path / "teacher"
    save_model(teacher, build_model("student", processor.tokenizer), processor)
    assert (student / "model.safetensors").stat().st_size > (teacher / "model.safetensors").stat().st_size
    check_pair(teacher, student)


def test_damaged_weights_are_found_before_any_work(models: Any, folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refusal(lambda: check_pair(models.teacher, folder), r"model\.safetensors can't be read")


def test_models_of_two_families(models: Any, folder: Path):
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "smolvlm"
    (folder / "config.json").write_text(json.dumps(config))
    refusal(lambda: check_pair(models.teacher, folder), "is a idefics3, .* a smolvlm; expected teacher and student of one family")


def test_other_tokenizers_templates_and_image_settings(models: Any, processor: Any, tmp_path: Path):
    def variant(name: str, change: Callable[[Any], None]) -> Path:
        folder = Path(shutil.copytree(models.student, tmp_path / name))
        other = copy.deepcopy(processor)
        change(other)
        other.save_pretrained(folder)
        return folder

    def more_words(other: Any) -> None:
        other.tokenizer.add_tokens(["quux"])

    def another_greeting(other: Any) -> None:
        other.chat_template = other.chat_template.replace("Assistant:", "Bot:")

    for change, message in ((more_words, "tokenizers"), (another_greeting, "chat templates")):
        refusal(partial(check_pair, models.teacher, variant(change.__name__, change)), rf"the {message} of .* differ")


def test_a_teacher_whose_own_files_make_another_prompt(models: Any, processor: Any, encoder: Any, samples: Any, tmp_path: Path):
    """Vocabulary, template and image settings are equal in all of these: only what comes out tells."""

    def variant(name: str, change: Callable[[Any], None]) -> Path:
        folder = Path(shutil.copytree(models.teacher, tmp_path / name))
        other = copy.deepcopy(processor)
        change(other)
        other.save_pretrained(folder)
        check_pair(folder, models.student)
        return folder

    def other_pieces(other: Any) -> None:
        other.tokenizer.backend_tokenizer.normalizer = Lowercase()

    def another_end(other: Any) -> None:
        other.tokenizer.eos_token = other.tokenizer.convert_ids_to_tokens(5)

    check_prompts(models.teacher, encoder, samples)
    shouting = [dataclasses.replace(samples[0], question="WHAT IS IT?"), *samples[1:]]
    for change, asked, message in (
        (other_pieces, shouting, "split 'WHAT IS IT[?]' differently; expected the same ids"),
        (another_end, samples, "ends its answers with the id 5, the student with"),
    ):
        refusal(partial(check_prompts, variant(change.__name__, change), encoder, asked), message)


def test_a_teacher_whose_image_processor_is_another_program(models: Any, encoder: Any, samples: Any, monkeypatch: pytest.MonkeyPatch):
    """As where one of the two folders asks for a slower or faster implementation, whose resizing differs in the last digits."""
    encoder.prompt(samples[0])  # remembered, as the run's own is
    kind = type(encoder.processor.image_processor)
    original = kind.__call__

    def brighter(self: Any, *given: Any, **named: Any) -> Any:
        found = original(self, *given, **named)
        found["pixel_values"] = [t + 0.01 for t in found["pixel_values"]]
        return found

    monkeypatch.setattr(kind, "__call__", brighter)
    refusal(lambda: check_prompts(models.teacher, encoder, samples), "make different tensors of question '.*'; expected the same image")


def test_a_prompt_leaves_room_for_an_answer_in_the_shortest_context(models: Any):
    configs = [read_config(models.student), read_config(models.teacher)]
    assert [config.get_text_config().max_position_embeddings for config in configs] == [512, 512]
    assert longest_prompt(configs, 4096, 64) == 448
    assert longest_prompt(configs, 100, 64) == 100
    with pytest.raises(RecipeError, match=r"'answers.max_tokens' is 512, and the models read 512 tokens in all"):
        longest_prompt(configs, 4096, 512)
