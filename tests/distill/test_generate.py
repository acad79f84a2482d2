"""Generation against transformers' own `generate`, token for token, and sampling against the probabilities it draws from."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from masters.distill.families.idefics3 import collate_pixels
from masters.distill.generate import GREEDY, Sampling, batches_by_length, draw, generate
from masters.distill.inputs import Encoder
from masters.samples import Sample


@pytest.fixture(scope="module")
def asked(samples: list[Sample]) -> list[Sample]:
    """Prompts of different lengths, with one image, none and two."""
    two = dataclasses.replace(samples[2], id="two", images=samples[2].images + samples[3].images)
    return [*samples[:4], Sample("none", (), "what is the color of the triangle?"), two]


def reference(model: Any, encoder: Encoder, sample: Sample, **settings: Any) -> list[int]:
    """transformers' answer to one prompt alone."""
    prompt = encoder.encode(sample)
    with torch.no_grad():
        ids = model.generate(input_ids=prompt.ids[None], attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.long), **prompt.pixels, **settings)
    return ids[0, len(prompt.ids) :].tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_answers_are_transformers_token_for_token(tiny: Any, encoder: Encoder, asked: list[Sample], penalty: float):
    sampling = dataclasses.replace(GREEDY, max_tokens=8, repetition_penalty=penalty)
    found = generate(tiny, encoder, collate_pixels, asked, 1, sampling)
    expected = [reference(tiny, encoder, s, do_sample=False, max_new_tokens=8, repetition_penalty=penalty, suppress_tokens=encoder.image_tokens) for s in asked]
    assert [list(answer.ids) for [answer] in found] == expected
    assert len({answer.ids for [answer] in found}) > 1, "answers differ, so that a mix-up of rows would show"


def test_the_penalty_does_not_see_the_padding(tiny: Any, encoder: Encoder, asked: list[Sample], processor: Any):
    """Where the pad token is one that a model wants to say, as the end token of many models is."""
    sampling = dataclasses.replace(GREEDY, max_tokens=4, repetition_penalty=1.5)
    shortest = min(asked, key=lambda sample: len(encoder.prompt(sample).ids))
    expected = generate(tiny, encoder, collate_pixels, [shortest], 1, sampling)
    padding = Encoder(processor)
    padding.pad = expected[0][0].ids[0]
    assert padding.pad not in encoder.prompt(shortest).ids
    together = generate(tiny, padding, collate_pixels, asked, 1, sampling)
    assert together[asked.index(shortest)] == expected[0]


def test_questions_with_the_same_prompt_draw_differently(tiny: Any, encoder: Encoder, asked: list[Sample]):
    twins = [dataclasses.replace(asked[0], id=name) for name in ("one", "two")]
    one, two = generate(tiny, encoder, collate_pixels, twins, 4, Sampling(max_tokens=6))
    assert {answer.ids for answer in one}.isdisjoint({answer.ids for answer in two})


def test_an_answer_does_not_depend_on_its_batch(tiny: Any, encoder: Encoder, asked: list[Sample]):
    sampling = Sampling(max_tokens=6)
    together = dict(zip([s.id for s in asked], generate(tiny, encoder, collate_pixels, asked, 3, sampling, seed=5, key="teacher/0.2"), strict=True))
    backwards = list(reversed(asked))
    for batch in (backwards[:2], backwards[2:3], backwards[3:]):
        for sample, answers in zip(batch, generate(tiny, encoder, collate_pixels, batch, 3, sampling, seed=5, key="teacher/0.2"), strict=True):
            assert answers == together[sample.id]
    fewer = generate(tiny, encoder, collate_pixels, asked[:1], 2, sampling, seed=5, key="teacher/0.2")
    assert fewer[0] == together[asked[0].id][:2], "nor on how many answers are wanted"


def test_seed_key_and_place_all_change_what_is_drawn(tiny: Any, encoder: Encoder, asked: list[Sample]):
    def answers(seed: int, key: str) -> list[tuple[int, ...]]:
        [found] = generate(tiny, encoder, collate_pixels, asked[:1], 3, Sampling(max_tokens=6), seed=seed, key=key)
        return [answer.ids for answer in found]

    base = answers(0, "teacher/0.2")
    assert answers(0, "teacher/0.2") == base
    assert len(set(base)) == 3
    assert answers(1, "teacher/0.2") != base
    assert answers(0, "teacher/0.15") != base
    assert answers(0, "student/0.0") != base


def test_draws_follow_the_distribution():
    random = np.random.default_rng(0)
    scores = torch.tensor([[2.0, -1.0, 0.5, float("-inf"), 1.5, 0.0]])
    probabilities = torch.softmax(scores.double(), -1)[0]
    uniform = torch.from_numpy(random.random(20_000))
    drawn = draw(scores.expand(len(uniform), -1), uniform)
    counts = torch.bincount(drawn, minlength=6).numpy()
    assert counts[3] == 0, "what a warper has excluded is never drawn"
    possible = [0, 1, 2, 4, 5]
    assert chisquare(counts[possible], 20_000 * probabilities[possible].numpy()).pvalue > 0.01
    wrong = np.roll(probabilities[possible].numpy(), 1)
    assert chisquare(counts[possible], 20_000 * wrong).pvalue < 1e-6, "the test tells distributions apart"


def test_the_ends_of_the_unit_interval():
    scores = torch.tensor([[float("-inf"), 1.0, 2.0, float("-inf")]])
    assert draw(scores, torch.tensor([0.0])).tolist() == [1]
    assert draw(scores, torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [2]
    share = float(torch.softmax(scores.double(), -1)[0, 1])
    assert draw(scores.expand(2, -1), torch.tensor([share - 1e-9, share + 1e-9], dtype=torch.float64)).tolist() == [1, 2]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(top_p=1.0), Sampling(top_k=0), Sampling(temperature=0.3, top_p=0.5, top_k=5), Sampling(repetition_penalty=2.0)], ids=str
)
def test_scores_are_warped_as_transformers_generate_does(tiny: Any, encoder: Encoder, asked: list[Sample], sampling: Sampling):
    prompt = encoder.encode(asked[1])
    with torch.no_grad():
        logits = tiny(input_ids=prompt.ids[None], **prompt.pixels).logits[:, -1]
        out = tiny.generate(
            input_ids=prompt.ids[None],
            attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.long),
            **prompt.pixels,
            do_sample=True,
            max_new_tokens=1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            suppress_tokens=encoder.image_tokens,
            output_scores=True,
            return_dict_in_generate=True,
        )
    found = sampling.warpers(encoder.image_tokens)(prompt.ids[None], logits.float())
    expected = out.scores[0]
    assert torch.equal(found.isinf(), expected.isinf()), "the same ids are left to draw from"
    assert torch.allclose(found[~found.isinf()], expected[~expected.isinf()], atol=1e-5)


def test_image_tokens_are_never_drawn(encoder: Encoder, asked: list[Sample], processor: Any):
    from masters.demo.models import build_model

    model = build_model("student", processor.tokenizer, seed=3).eval()
    head = torch.nn.Linear(64, len(processor.tokenizer), bias=False)
    head.weight.data = model.lm_head.weight.data.clone()
    model.lm_head = head
    with torch.no_grad():  # a model that wants nothing but images
        bias = torch.zeros(len(processor.tokenizer))
        bias[encoder.image_tokens] = 50.0
        model.lm_head.bias = torch.nn.Parameter(bias)
    for sampling in (dataclasses.replace(GREEDY, max_tokens=4), Sampling(max_tokens=4)):
        prompt = encoder.encode(asked[0])
        assert int(model(input_ids=prompt.ids[None], **prompt.pixels).logits[0, -1].argmax()) in encoder.image_tokens
        for answers in generate(model, encoder, collate_pixels, asked[:2], 4, sampling):
            assert not any(i in encoder.image_tokens for answer in answers for i in answer.ids)


def test_an_answer_ends_with_its_first_end_token(tiny: Any, encoder: Encoder, asked: list[Sample], processor: Any):
    greedy = dataclasses.replace(GREEDY, max_tokens=6)
    before = [list(answer.ids) for [answer] in generate(tiny, encoder, collate_pixels, asked, 1, greedy)]
    assert all(answer.finish == "length" for [answer] in generate(tiny, encoder, collate_pixels, asked, 1, greedy)), "this random model does not stop by itself"
    # Another encoder takes the second token of the first answer for the end.
    stopping = Encoder(processor)
    stopping.eos = before[0][1]
    for ids, [answer] in zip(before, generate(tiny, stopping, collate_pixels, asked, 1, greedy), strict=True):
        end = ids.index(stopping.eos) + 1 if stopping.eos in ids else len(ids)
        assert list(answer.ids) == ids[:end], "rows that go on are not changed by those that have stopped"
        assert answer.finish == ("stop" if stopping.eos in ids else "length")
        assert answer.text == stopping.text(ids[:end])


def test_generation_leaves_a_model_ready_to_train_as_it_was(tiny: Any, encoder: Encoder, asked: list[Sample]):
    before = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    generate(tiny, encoder, collate_pixels, asked[:2], 2, Sampling(max_tokens=3))
    assert all(torch.equal(p, before[name]) for name, p in tiny.named_parameters())
    assert all(p.requires_grad for p in tiny.parameters())


def test_batches_hold_every_question_once_and_similar_lengths_together(samples: list[Sample]):
    batches = list(batches_by_length(samples, 7))
    assert sorted(s.id for batch in batches for s in batch) == sorted(s.id for s in samples)
    assert [len(batch) for batch in batches] == [7] * 5 + [5]
    lengths = [len(s.prompt) for batch in batches for s in batch]
    assert lengths == sorted(lengths)
    again = list(batches_by_length(list(reversed(samples)), 7))
    assert again == batches, "whatever the order that they come in"
