"""A teacher whose tower cuts images into other tiles and patches: each model reads its own image tokens, and the same answers are compared."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from PIL import Image

from masters.distill import models
from masters.distill.inputs import Encoder
from masters.distill.recipe import build_recipe
from masters.distill.responses import DistinctResponse
from masters.distill.signal import CachedSignal, OwnPrompts, SignalReader, lay_out, write_head
from masters.distill.skipped import DataFile, look_through
from masters.distill.stages import distill
from masters.distill.train import Trainer
from masters.errors import ModelError
from masters.samples import Sample, read_samples

# As SmolVLM2-2.2B's tiles of 384 pixels in patches of 14, 81 tokens each, beside the 256M's of 512, 16 and 64.
TEACHER = dict(side=48, patch=5, shuffle=3, tiles=2, hidden_size=128, intermediate_size=256, num_attention_heads=4)
ANSWERS = {"a": ("red", "three circles", "7"), "b": ("blue", "5"), "c": ("a square", "green")}


def changed(folder: Path, **processor: Any) -> Path:
    path = folder / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | processor))
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("pair")
    found = SimpleNamespace(teacher=tiny_models.smolvlm(folder / "teacher", **TEACHER), student=tiny_models.smolvlm(folder / "student", tiles=2))
    for made in (found.teacher, found.student):  # SmolVLM's own needs torchvision, for videos; with images it does the same
        changed(made, processor_class="Idefics3Processor")
    return found


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """One question with a picture, one with two of other shapes, one without."""
    folder = tmp_path_factory.mktemp("asked")
    for name, size in (("one.png", (90, 60)), ("two.png", (64, 200)), ("three.png", (300, 40))):
        Image.effect_noise(size, 80).convert("RGB").save(folder / name)
    rows = [
        {"id": "a", "images": ["one.png"], "question": "What is this?", "answer": "red"},
        {"id": "b", "images": ["two.png", "three.png"], "question": "How many lines?", "answer": "5"},
        {"id": "c", "images": [], "question": "Which colour?", "answer": "green"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_samples(folder / "rows.jsonl")


@pytest.fixture(scope="module")
def student_encoder(pair: Any) -> Encoder:
    return Encoder(models.load_processor(pair.student))


def groups_of(encoder: Encoder, asked: list[Sample]) -> dict[str, list[DistinctResponse]]:
    return {
        sample.id: [DistinctResponse(tuple(encoder.answer(text)), 1 + i, float(i == 0), i % 2 == 0, False) for i, text in enumerate(ANSWERS[sample.id])]
        for sample in asked
    }


def trainer_of(pair: Any, encoder: Encoder, folder: Path, **objective: Any) -> Trainer:
    raw = dict(student=str(pair.student), teachers=[dict(model=str(pair.teacher))], data=dict(train="x", validation="y"), out=str(folder), preset="paper")
    recipe = build_recipe(raw | dict(train=dict(dtype="float32"), objective=objective))
    student = models.load_model(pair.student, torch.float32)
    models.freeze_vision(student)
    return Trainer(student, encoder, recipe, 10, folder)


def alone(model: Any, processor: Any, sample: Sample, ids: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities [n, V] at an answer's tokens: the model's own processor and forward on one question and one answer, nothing shared."""
    turns = [{"role": "user", "content": [*({"type": "image"} for _ in sample.images), {"type": "text", "text": sample.prompt}]}]
    images = [Image.open(image).convert("RGB") for image in sample.images]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(text=[text], images=[images] if images else None, return_tensors="pt", add_special_tokens=False)
    prompt = inputs["input_ids"]
    pixels = {key: value for key, value in inputs.items() if key.startswith("pixel")}
    whole = torch.cat([prompt, torch.tensor([ids])], dim=1)
    logits = model(input_ids=whole, **pixels).logits[0, prompt.shape[1] - 1 : -1]
    return torch.log_softmax(logits.float(), -1)


def naive_jsd(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    middle = ((teacher.exp() + student.exp()) / 2).log()
    both = (teacher.exp() * (teacher - middle)).sum(-1) + (student.exp() * (student - middle)).sum(-1)
    return both.mean() / 2


def test_the_pair_is_one_that_reads_images_in_two_ways(pair: Any, student_encoder: Encoder, asked: list[Sample]):
    models.check_pair(pair.teacher, pair.student)
    models.check_prompts(pair.teacher, student_encoder, asked)
    reader = models.teacher_encoder(pair.teacher, student_encoder)
    assert reader is not student_encoder
    assert models.teacher_encoder(pair.student, student_encoder) is student_encoder
    counts = [[int((e.prompt(s).ids == e.image_tokens[0]).sum()) for s in asked] for e in (student_encoder, reader)]
    assert counts[0][:2] != counts[1][:2], "the two towers' tokens differ in number"
    assert counts[0][0] % 16 == 0
    assert counts[1][0] % 9 == 0
    texts = [e.prompt(asked[2]).ids.tolist() for e in (student_encoder, reader)]
    assert texts[0] == texts[1], "a question without an image is one prompt"


def test_divergence_and_gradients_are_those_of_each_model_s_own_forward(pair: Any, student_encoder: Encoder, asked: list[Sample], tmp_path: Path):
    """Packed and shared, live and from files, against a forward for every question and answer with each model's own processor."""
    groups, reader = groups_of(student_encoder, asked), models.teacher_encoder(pair.teacher, student_encoder)
    trainer, teacher = trainer_of(pair, student_encoder, tmp_path / "run", beta=0.0), models.frozen(models.load_model(pair.teacher, torch.float32))
    given = [groups[sample.id] for sample in asked]
    signal_reader = SignalReader(reader, trainer.collate, True, torch.float32)
    head, path = write_head(tmp_path, "head", 0.0, teacher, {}, "mark"), tmp_path / "states.safetensors"
    signal_reader.write(path, lay_out(asked, groups), asked, teacher, {"head": head.name, "mark": "mark"})
    found = {}
    for name, taught in (("live", OwnPrompts(teacher, reader)), ("cached", CachedSignal([path], torch.device("cpu")))):
        trainer.student.zero_grad()
        divergence = trainer._stats(asked, given, taught).divergence
        divergence.sum().backward()
        found[name] = divergence.detach(), {key: p.grad.clone() for key, p in trainer.student.named_parameters() if p.grad is not None}

    trainer.student.zero_grad()
    own, theirs = models.load_processor(pair.student), models.load_processor(pair.teacher)
    each = [
        naive_jsd(alone(teacher, theirs, sample, response.ids), alone(trainer.student, own, sample, response.ids))
        for sample in asked
        for response in groups[sample.id]
    ]
    expected = torch.stack(each)
    expected.sum().backward()
    expected = expected.detach()
    gradients = {key: p.grad for key, p in trainer.student.named_parameters() if p.grad is not None}
    assert expected.min() > 1e-4, "random models differ"
    for name, (divergence, by_packed) in found.items():
        apart = float((divergence - expected).abs().max() / expected.max())
        assert apart < 1e-4, f"{name}: divergences differ by {apart:.1e}"
        assert by_packed.keys() == gradients.keys()
        worst = max(float((by_packed[key] - gradients[key]).norm() / (gradients[key].norm() + 1e-6)) for key in gradients)
        assert worst < 1e-3, f"{name}: gradients differ by {worst:.1e}"


def test_with_the_student_s_prompts_the_teacher_would_say_something_else(pair: Any, student_encoder: Encoder, asked: list[Sample], tmp_path: Path):
    """What the encoder of its own is for: nothing would raise, and the divergence would be another."""
    teacher = models.frozen(models.load_model(pair.teacher, torch.float32))
    trainer = trainer_of(pair, student_encoder, tmp_path / "run", beta=0.0)
    given = [groups_of(student_encoder, asked)["a"]]
    seen = OwnPrompts(teacher, models.teacher_encoder(pair.teacher, student_encoder))
    right, wrong = (trainer._stats(asked[:1], given, taught).divergence.detach() for taught in (seen, teacher))
    assert ((wrong - right).abs() > 1e-3 * right).all(), "ten times what rounding moves"


def test_a_run_with_such_a_pair_ends_live_and_cached_with_one_loss(pair: Any, questions: Path, tmp_path: Path):
    losses = {}
    for signal in ("live", "cached"):
        raw: dict[str, Any] = {
            "preset": "paper",
            "student": str(pair.student),
            "teachers": [{"model": str(pair.teacher), "r_max": 0.2}],
            "data": {"train": str(questions / "train.jsonl"), "validation": str(questions / "validation.jsonl"), "limit": 3},
            "answers": {"teacher": 1, "student": 1, "batch": 3, "max_tokens": 4},
            "mask": {"enabled": False},
            "train": {"dtype": "float32", "learning_rate": 1e-4, "questions_per_step": 3},
            "teacher_signal": signal,
            "out": str(tmp_path / signal),
        }
        out = distill(build_recipe(raw))
        assert (out / "student" / "model.safetensors").exists()
        losses[signal] = [row["loss"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "step"]
    assert losses["live"] == pytest.approx(losses["cached"], rel=1e-4)


# What stays an error


def test_a_processor_whose_tokens_its_own_tower_does_not_make_is_refused(pair: Any, tmp_path: Path):
    folder = changed(Path(shutil.copytree(pair.teacher, tmp_path / "teacher")), image_seq_len=16)
    with pytest.raises(ModelError, match=r"writes 16 image tokens a tile, its model makes 9; mend its image_seq_len"):
        models.check_pair(folder, pair.student)


def test_another_template_is_refused(pair: Any, tmp_path: Path):
    folder = Path(shutil.copytree(pair.teacher, tmp_path / "teacher"))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("Assistant:", "Bot:"))
    with pytest.raises(ModelError, match=r"the chat templates of .* differ"):
        models.check_pair(folder, pair.student)


def cut(where: str) -> Any:
    """A processor that loses a part of what it is given."""

    def call(self: Any, text: list[str], images: Any = None, **more: Any) -> Any:
        if where == "image":
            text, images = [text[0].replace("<image>", "")], None
        if where == "end":
            text = [text[0].replace("Assistant:", "")]
        return kind.__call__(self, text=text, images=images, **more)

    kind: Any = type(processor_of(where))
    return type(kind.__name__, (kind,), {"__call__": call})


def processor_of(where: str) -> Any:
    return PROCESSORS[where]


PROCESSORS: dict[str, Any] = {}


@pytest.mark.parametrize("where", ["image", "end"])
def test_a_prompt_that_lacks_text_or_an_image_is_noticed(where: str, pair: Any, student_encoder: Encoder, asked: list[Sample]):
    two = Sample("two", (asked[1].images[0], asked[0].images[0]), "Compare.", ("x",))
    encoder = models.teacher_encoder(pair.teacher, student_encoder)
    assert all(models.reads_whole(encoder, sample) for sample in (*asked, two))
    broken = copy.copy(encoder)
    PROCESSORS[where] = broken.processor = copy.copy(encoder.processor)
    broken.processor.__class__ = cut(where)
    assert not models.reads_whole(broken, asked[0])


def test_a_question_that_is_too_long_for_one_of_the_models_is_left_out(pair: Any, student_encoder: Encoder, asked: list[Sample], tmp_path: Path):
    reader = models.teacher_encoder(pair.teacher, student_encoder)
    lengths = {s.id: [len(e.encode(s).ids) for e in (student_encoder, reader)] for s in asked}
    limit = max(min(pair) for pair in lengths.values())
    too_long = {name for name, found in lengths.items() if max(found) > limit}
    assert too_long, lengths
    encoders = [Encoder(e.processor, longest=limit) for e in (student_encoder, reader)]
    found = look_through(tmp_path / "skipped.jsonl", {"train": DataFile(tmp_path, asked)}, encoders, None, 0.9)
    assert {row.id for row in found} == too_long
