"""The packed forward against one forward a response, for a batch with everything that could go wrong in it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from masters.distill.families.idefics3 import collate_pixels
from masters.distill.forward import Group, move, pack, response_states
from masters.distill.inputs import Encoder
from masters.distill.objective import Heads, row_stats
from masters.samples import Sample

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def groups(encoder: Encoder, samples: list[Sample]) -> list[Group]:
    """Groups of 1 to 5 responses of 1 to 9 tokens, on prompts of different lengths, one of them without an image and one with two."""
    random = torch.Generator().manual_seed(0)
    longer = dataclasses.replace(
        samples[1], id="longer", question=samples[1].question + " look closely, then answer.", images=samples[1].images + samples[2].images
    )
    asked = [samples[0], Sample("no image", (), "how many digits are there?"), longer, samples[3]]

    def responses(*lengths: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(torch.randint(80, 400, (n,), generator=random).tolist()) for n in lengths)

    answers = [responses(3, 1, 9), responses(4, 2), responses(1), responses(2, 2, 5, 1, 7)]
    return [Group(encoder.prompt(sample), given) for sample, given in zip(asked, answers, strict=True)]


def separate_states(model: Any, group: Group) -> list[Tensor]:
    """The states that predict each response, by an ordinary forward of prompt and response alone."""
    found = []
    for response in group.responses:
        ids = torch.cat([group.prompt.ids, torch.tensor(response)])[None]
        hidden = model.model(input_ids=ids, use_cache=False, **group.prompt.pixels).last_hidden_state[0]
        found.append(hidden[len(group.prompt.ids) - 1 : -1])
    return found


def test_the_batch_really_is_awkward(groups: list[Group]):
    packed = pack(groups, 0, collate_pixels)
    assert len({len(g.prompt.ids) for g in groups}) >= 3, "prompts of different lengths, so some are padded"
    assert len({len(g.responses) for g in groups}) == 4
    assert any(not g.prompt.pixels for g in groups)
    assert packed.pixels["pixel_values"].shape[:2] == (4, 2)
    assert packed.ids.shape[1] == max(len(g.prompt.ids) + sum(len(r) - 1 for r in g.responses) for g in groups)
    assert packed.count == 11
    assert packed.tokens.tolist() == [t for g in groups for r in g.responses for t in r]


def test_states_equal_those_of_separate_forwards(tiny: Any, groups: list[Group]):
    packed = pack(groups, 0, collate_pixels)
    with torch.no_grad():
        found = response_states(tiny, packed)
        expected = torch.cat([states for group in groups for states in separate_states(tiny, group)])
    assert found.shape == expected.shape == (len(packed.tokens), tiny.config.text_config.hidden_size)
    apart = float((found - expected).abs().max())
    assert apart < TOLERANCE, f"{apart} from separate forwards, of values up to {float(expected.abs().max())}"


def statistics_and_gradients(
    model: Any, teacher: Any, states: Tensor, theirs: Tensor, tokens: Tensor, rows: Tensor, count: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    heads = Heads(states, model.get_output_embeddings().weight, theirs, teacher.get_output_embeddings().weight)
    stats = row_stats(heads, tokens, rows, count, "jsd", "k3")
    weights = torch.linspace(-1, 1.5, count)
    model.zero_grad(set_to_none=True)
    (stats.divergence.sum() + (weights * stats.logprob).sum()).backward()
    return stats._asdict(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_divergences_log_probabilities_and_every_gradient_equal_the_unshared_forward(tiny: Any, tiny_teacher: Any, groups: list[Group]):
    student = copy.deepcopy(tiny).train()
    packed = pack(groups, 0, collate_pixels)
    with torch.no_grad():
        theirs = response_states(tiny_teacher, packed)
        theirs_apart = torch.cat([s for group in groups for s in separate_states(tiny_teacher, group)])
    stats, gradients = statistics_and_gradients(student, tiny_teacher, response_states(student, packed), theirs, packed.tokens, packed.rows, packed.count)

    tokens = torch.tensor([t for g in groups for r in g.responses for t in r])
    rows = torch.tensor([j for j, r in enumerate(r for g in groups for r in g.responses) for _ in r])
    states = torch.cat([s for group in groups for s in separate_states(student, group)])
    expected, wanted = statistics_and_gradients(student, tiny_teacher, states, theirs_apart, tokens, rows, 11)

    for name in ("divergence", "logprob", "teacher_logprob", "entropy"):
        assert float((stats[name] - expected[name]).detach().abs().max()) < TOLERANCE, name
    assert float(stats["divergence"].detach().std()) > 1e-3, "responses differ, so that a mix-up of rows would show"
    assert set(gradients) == set(wanted) == {name for name, _ in student.named_parameters()}, "every parameter, the vision tower's included"
    for name, gradient in gradients.items():
        apart = float((gradient - wanted[name]).abs().max()) / max(1.0, float(wanted[name].abs().max()))
        assert apart < TOLERANCE, f"the gradient of {name} is {apart} off"


def test_responses_are_blind_to_each_other_and_to_their_order(tiny: Any, groups: list[Group]):
    group = groups[3]
    order = (4, 2, 0, 3, 1)
    shuffled = dataclasses.replace(group, responses=tuple(group.responses[i] for i in order))
    with torch.no_grad():
        found = response_states(tiny, pack([shuffled], 0, collate_pixels)).split([len(r) for r in shuffled.responses])
        expected = response_states(tiny, pack([group], 0, collate_pixels)).split([len(r) for r in group.responses])
    for place, i in enumerate(order):
        assert float((found[place] - expected[i]).abs().max()) < TOLERANCE


def test_the_batch_around_a_question_changes_nothing(tiny: Any, groups: list[Group]):
    packed = pack(groups, 0, collate_pixels)
    first = sum(len(r) for r in groups[0].responses)
    with torch.no_grad():
        alone = response_states(tiny, pack(groups[:1], 0, collate_pixels))
        among = response_states(tiny, packed)[:first]
        other_padding = response_states(tiny, pack(groups, 7, collate_pixels))[:first]
    assert float((alone - among).abs().max()) < TOLERANCE
    assert float((other_padding - among).abs().max()) < TOLERANCE


def test_a_batch_without_any_image(tiny: Any, groups: list[Group]):
    with torch.no_grad():
        found = response_states(tiny, pack(groups[1:2], 0, collate_pixels))
        expected = torch.cat(separate_states(tiny, groups[1]))
    assert float((found - expected).abs().max()) < TOLERANCE


def test_positions_continue_the_prompt_in_every_response(groups: list[Group]):
    packed = pack(groups, 0, collate_pixels)
    group, prompt = groups[3], len(groups[3].prompt.ids)
    expected = [*range(prompt), *(prompt + i for r in group.responses for i in range(len(r) - 1))]
    assert packed.positions[3, : len(expected)].tolist() == expected
    assert packed.rows.tolist() == [j for j, r in enumerate(r for g in groups for r in g.responses) for _ in r]


def test_moving_a_batch_keeps_every_tensor(groups: list[Group]):
    packed = pack(groups, 0, collate_pixels)
    moved = move(packed, torch.device("cpu"))
    for item in dataclasses.fields(packed):
        one, other = getattr(packed, item.name), getattr(moved, item.name)
        if isinstance(one, Tensor):
            assert torch.equal(one, other), item.name
    assert set(moved.pixels) == set(packed.pixels)
    assert moved.count == packed.count
