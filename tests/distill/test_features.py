"""Images are encoded once for one set of weights, whoever asks about them, and what came of them never outlives the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import ASKED, FAMILIES, encoder, family_of, picture, student
from test_stages import raw, recipe_of  # noqa: F401 - raw is a fixture

from masters.distill import features as features_module
from masters.distill import stages
from masters.distill.answers import Asking, Source, in_process
from masters.distill.families.idefics3 import LANGUAGE, collate_pixels
from masters.distill.features import Features, KeptFeatures, encode, joined, reads_features
from masters.distill.generate import GREEDY, Sampling, batches_by_length, generate
from masters.distill.inputs import Encoder, Prompt, pad_places, to_device
from masters.distill.judge import Verdict
from masters.distill.mask import maskable, plan_masks
from masters.distill.masked_teacher import MaskedTeacher, masked
from masters.distill.stages import distill
from masters.samples import Sample

# ruff: noqa: F811

SOURCE = Source("teacher0-stage0", "teacher", 0, "big", 0.2, 2)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the images were known by, each time the tower was asked."""
    seen: list[str] = []

    def noted(model: Any, collate: Any, prompt: Prompt) -> Features:
        seen.append(prompt.shown)
        return encode(model, collate, prompt)

    with monkeypatch.context() as patch:
        patch.setattr(features_module, "encode", noted)
        yield seen


def shown(prompts: Sequence[Prompt]) -> list[Prompt]:
    return [replace(prompt, shown=f"picture {i}" if prompt.pictured else "") for i, prompt in enumerate(prompts)]


def shared_images() -> list[Sample]:
    """Twelve questions about three pictures, and two about none."""
    pictures = [picture(64, 64, seed) for seed in range(3)]
    asked = [Sample(f"q{i}", (pictures[i % 3],), f"what is the color of shape {i}?") for i in range(12)]
    return [*asked, Sample("none", (), "how many digits?"), Sample("also none", (), "is there a circle?")]


def digests(samples: Sequence[Sample]) -> dict[str, str]:
    return {sample.id: str(hash(sample.images)) for sample in samples}


@pytest.mark.parametrize("name", FAMILIES)
def test_kept_features_stand_for_the_pixels_in_every_family(name: str, monkeypatch: pytest.MonkeyPatch):
    model, collate, kept = student(name), family_of(name).collate_pixels, KeptFeatures()
    assert reads_features(model)
    prompts = shown([encoder(name).prompt(sample) for sample in ASKED])
    expected = generate(model, encoder(name), collate, ASKED, 2, Sampling(max_tokens=5), prompts=prompts)
    pixels = to_device(collate([prompts[0].pixels]), model.device, model.dtype)
    with torch.no_grad(), counted(monkeypatch) as seen:
        for _ in range(2):
            assert generate(model, encoder(name), collate, ASKED, 2, Sampling(max_tokens=5), prompts=prompts, features=kept) == expected
        # In another order, and fewer: rows find their own images.
        back = list(reversed(range(len(ASKED))))[:3]
        again = generate(model, encoder(name), collate, [ASKED[i] for i in back], 2, Sampling(max_tokens=5), prompts=[prompts[i] for i in back], features=kept)
        assert again == [expected[i] for i in back]
        positions = {"position_ids": pad_places(prompts[:1])}
        theirs = model(input_ids=prompts[0].ids[None], **positions, **pixels).logits
        ours = model(input_ids=prompts[0].ids[None], **positions, **kept.inputs(model, collate, prompts[:1])).logits
        blind = {"mm_encoder_outputs": {"image": joined([blank(encode(model, collate, prompts[0]))])}}
        unseen = model(input_ids=prompts[0].ids[None], **positions, **blind).logits
    assert seen == [prompt.shown for prompt in prompts if prompt.pictured], "each question's images once"
    worst = float((ours - theirs).abs().max())
    assert worst < 1e-5 < 1e-3 < float((unseen - theirs).abs().max()), worst


def blank(features: Features) -> Features:
    zeros = [[torch.zeros_like(image) for image in layer] for layer in features.deepstack_features]
    pooled = features.pooler_output
    return Features(torch.zeros_like(pooled) if isinstance(pooled, torch.Tensor) else [torch.zeros_like(image) for image in pooled], zeros)


def test_an_image_of_many_questions_is_encoded_once(tiny: Any, monkeypatch: pytest.MonkeyPatch, encoder: Encoder, tmp_path: Path):
    samples = shared_images()
    known = digests(samples)
    asking = Asking(tmp_path, Sampling(max_tokens=3), 0, 4, lambda sample, text: Verdict(None, ""))
    batches = list(batches_by_length(samples, 4, known))
    with counted(monkeypatch) as seen:
        engine = in_process(tiny, encoder, collate_pixels, SOURCE, asking, 0, known)
        found = dict(engine(batches))
    assert sorted(seen) == sorted({known[sample.id] for sample in samples if sample.images})
    towers: list[int] = []
    with counted(monkeypatch), tower_counts(tiny, towers):
        unkept = {
            s.id: a
            for batch in batches
            for s, a in zip(batch, generate(tiny, encoder, collate_pixels, batch, 2, Sampling(max_tokens=3), 0, SOURCE.weights), strict=True)
        }
    assert sum(towers) == 12, "as many as there are questions about one, were nothing kept"
    assert {sample.id: answers for sample, answers in found.items()} == unkept


@contextmanager
def tower_counts(model: Any, seen: list[int]) -> Iterator[None]:
    hook = model.model.vision_model.register_forward_hook(lambda module, given, kwargs, out: seen.append(len(out.last_hidden_state)), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def test_questions_about_one_image_are_neighbours_where_their_lengths_allow():
    pictures = [picture(8, 8, seed) for seed in range(2)]
    lengths = {"a": (5, 0), "b": (6, 1), "c": (7, 0), "d": (7, 1), "e": (30, 0), "f": (20, 1), "g": (31, 1)}
    samples = [Sample(name, (pictures[which],), "x" * length) for name, (length, which) in lengths.items()]
    samples.append(Sample("h", (), "x" * 6))
    known = {sample.id: str(hash(sample.images)) for sample in samples}
    assert ["".join(s.id for s in batch) for batch in batches_by_length(samples, 3, known)] == ["acb", "dhf", "ge"]
    assert ["".join(s.id for s in batch) for batch in batches_by_length(samples, 3)] == ["abh", "cdf", "eg"], "by length alone"


def test_what_is_kept_is_bounded_in_bytes_and_the_latest(tiny: Any, encoder: Encoder, monkeypatch: pytest.MonkeyPatch):
    prompts = [replace(encoder.encode(Sample(str(i), (picture(64, 64, i),), "what?")), shown=str(i)) for i in range(4)]
    with torch.no_grad(), counted(monkeypatch) as seen:
        each = encode(tiny, collate_pixels, prompts[0]).bytes
        kept = KeptFeatures(most=2 * each + each // 2)
        for i in (0, 1, 0, 2, 0, 1, 2):
            kept.inputs(tiny, collate_pixels, [prompts[i]])
            assert kept.bytes <= kept.most
        assert seen == ["0", "1", "2", "1", "2"], "the one not used for longest went"
        kept.inputs(tiny, collate_pixels, prompts)  # one batch of more than are kept
        assert kept.bytes == 2 * each
        seen.clear()
        kept.inputs(tiny, collate_pixels, [replace(prompts[0], shown=""), replace(prompts[0], shown="")])
        assert seen == ["", ""], "what is not known is never taken for another"
        kept.clear()
        assert kept.bytes == 0


def masks_of(model: Any, include: tuple[str, ...]) -> Any:
    return plan_masks(maskable(model, LANGUAGE, include=include), (0.0, 0.3, 0.6))


@pytest.mark.parametrize(("include", "times"), [((), 1), ((r"vision_model.*fc1",), 3), ((r"connector",), 3)], ids=["language", "tower", "projector"])
def test_features_outlive_a_ratio_only_where_the_mask_leaves_the_tower_alone(
    include: tuple[str, ...], times: int, models: Any, tiny_teacher: Any, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
):
    teacher = MaskedTeacher(models.teacher, masks_of(stages.models.load_model(models.teacher, torch.float32), include), torch.float32, False)
    prompts = [replace(encoder.encode(Sample(str(i), (picture(64, 64, i),), "what?")), shown=str(i)) for i in range(2)]
    made = []
    with torch.no_grad(), counted(monkeypatch) as seen:
        for ratio in (0.6, 0.3, 0.3, 0.0):
            with masked(lambda: teacher, ratio) as model:
                given = model.features.inputs(model.model, collate_pixels, prompts)["mm_encoder_outputs"]["image"]
                anew = joined([encode(model.model, collate_pixels, prompt) for prompt in prompts])
                assert all(torch.equal(ours, theirs) for ours, theirs in zip(given.pooler_output, anew.pooler_output, strict=True)), ratio
                made.append(given.pooler_output[0])
    assert seen == ["0", "1"] * times
    assert torch.equal(made[0], made[1]) == (times == 1), "a mask of the tower shows"


TOWER: dict[str, Any] = {"mask__include": [r"vision_model.*fc1"]}
TRAINED: dict[str, Any] = {"answers__refresh": "stage", "train__freeze_vision": False, "train__learning_rate": 1e-2}


# Two pictures: once of the teacher, or once a mask of its tower; once of the student, or, trained between two rounds, once a round, the teacher loaded anew.
@pytest.mark.parametrize(("changes", "times"), [({}, 2 + 2), (TOWER, 4 + 2), (TRAINED, 4 + 4)], ids=["tower left alone", "tower masked", "tower trained"])
def test_no_features_of_other_weights_are_used_in_a_whole_run(
    changes: dict[str, Any], times: int, raw: dict[str, Any], questions: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Whatever is used is what the weights of that moment make of the image."""
    rows = [json.loads(line) for line in (questions / "train.jsonl").read_text().splitlines()[:12]]
    pictures = [str(questions / row["images"][0]) for row in rows[:2]]
    (tmp_path / "shared.jsonl").write_text("".join(json.dumps(row | {"images": [pictures[i % 2]]}) + "\n" for i, row in enumerate(rows)))
    used: list[tuple[int, str]] = []
    real = KeptFeatures.inputs

    def checked(self: KeptFeatures, model: Any, collate: Any, prompts: Sequence[Prompt]) -> dict[str, Any]:
        given = real(self, model, collate, prompts)
        anew = [encode(model, collate, prompt) for prompt in prompts if prompt.pictured]
        assert all(
            torch.equal(ours, theirs) for ours, theirs in zip(given["mm_encoder_outputs"]["image"].pooler_output, joined(anew).pooler_output, strict=True)
        )
        used.extend((id(self), prompt.shown) for prompt in prompts)
        return given

    monkeypatch.setattr(KeptFeatures, "inputs", checked)
    data = raw["data"] | {"train": str(tmp_path / "shared.jsonl")}
    recipe = recipe_of(raw, data=data, answers__teacher=2, answers__student=2, answers__batch=2, **changes)
    with counted(monkeypatch) as seen:
        distill(recipe, until="train" if changes is TRAINED else "answers")
    assert len(used) == 12 * 2
    assert len({key for _, key in used}) == 2
    assert len(seen) == times


def test_an_unknown_family_gets_its_pixels(tiny: Any, encoder: Encoder, samples: list[Sample], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(features_module, "SUPPORTED", ())
    prompts = [encoder.prompt(sample) for sample in samples[:2]]
    kept = KeptFeatures()
    assert kept.inputs(tiny, collate_pixels, prompts).keys() == {"pixel_values", "pixel_attention_mask"}
    assert kept.bytes == 0
    assert generate(tiny, encoder, collate_pixels, samples[:2], 1, GREEDY, features=kept) == generate(tiny, encoder, collate_pixels, samples[:2], 1, GREEDY)
