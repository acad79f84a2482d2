"""Tokens of a server's answers: told by it in any of three ways, or tokenised again where nothing is lost by it."""

from __future__ import annotations

from typing import Any

from scripted_server import completion

from masters.distill.inputs import Encoder
from masters.distill.sampled import read_choices
from masters.samples import Sample

SAMPLE = Sample("a", (), "what is the color of the circle?")


def read(body: dict[str, Any], encoder: Encoder, count: int = 1) -> Any:
    found = read_choices(body, count, SAMPLE, encoder)
    assert len(found) == count
    return found[0] if count == 1 else found


def test_the_three_ways_of_telling_ids(encoder: Encoder):
    ids = encoder.answer("teal")
    named = [{"token": encoder.tokenizer.decode([i]), "id": i, "logprob": -1.0} for i in ids]
    numbered = [{"token": f"token_id:{i}", "logprob": -1.0} for i in ids]
    for more in ({"token_ids": ids}, {"logprobs": {"content": named}}, {"logprobs": {"content": numbered}}):
        found = read(completion("teal", **more), encoder)
        assert (found.text, list(found.ids), found.finish, found.told) == ("teal", ids, "stop", True)


def test_an_end_token_that_the_server_keeps_to_itself_is_put_back_and_none_is_made_up(encoder: Encoder):
    *ids, end = encoder.answer("teal")
    assert list(read(completion("teal", token_ids=ids), encoder).ids) == [*ids, end]
    cut = read(completion("teal", token_ids=ids, finish="length"), encoder)
    assert (list(cut.ids), cut.finish) == (ids, "length")
    assert list(read(completion("teal", token_ids=[*ids, end, end, 7]), encoder).ids) == [*ids, end]
    assert list(read(completion("", token_ids=[]), encoder).ids) == [end]


def test_tokens_that_can_not_be_trained_on_are_failures(encoder: Encoder):
    *ids, end = encoder.answer("teal")
    for wrong, reason in (
        ([*ids, encoder.vocabulary, end], "outside the vocabulary"),
        ([-1, end], "outside the vocabulary"),
        ([*ids, encoder.image_tokens[0], end], "image token"),
        (encoder.answer("red"), "spell 'red', the answer says 'teal'"),
        (["1"], "no list of whole numbers"),
        ([True], "no list of whole numbers"),
    ):
        found = read(completion("teal", token_ids=wrong), encoder)
        assert (found.finish, found.ids) == ("failed", ())
        assert reason in found.reason


def test_text_alone_is_tokenised_as_the_template_continues(encoder: Encoder):
    for text in ("teal", " teal", "yes", "83", "a teal triangle"):
        found = read(completion(text), encoder)
        assert (found.text, list(found.ids), found.told) == (text.strip(), encoder.answer(text.strip()), False)
    assert list(read(completion(""), encoder).ids) == [encoder.eos]
    cut = read(completion("a teal", finish="length"), encoder)
    assert list(cut.ids) == encoder.answer("a teal")[:-1]


def test_the_servers_count_of_tokens_tells_forms_of_one_text_apart(encoder: Encoder):
    with_space, without = encoder.answer("7"), [*encoder.tokenizer("7", add_special_tokens=False).input_ids, encoder.eos]
    assert len(with_space) == len(without) + 1, "a digit is a token of its own, and so is the space before it"
    body = completion("7")
    assert list(read(body, encoder).ids) == with_space, "what the template says, where nothing else is known"
    body["usage"]["completion_tokens"] = len(without)
    assert list(read(body, encoder).ids) in (with_space, without)
    body["usage"]["completion_tokens"] = 1
    assert list(read(body, encoder).ids) == without
    body["usage"]["completion_tokens"] = 9
    assert "as many as were sampled" in read(body, encoder).reason


def test_text_that_does_not_come_back_is_a_failure(encoder: Encoder):
    for text in ("half a \ufffd", "<image>", "yes<end_of_utterance>", "<|im_start|>"):
        found = read(completion(text), encoder)
        assert found.finish == "failed", text
        assert "\n" not in found.reason


def test_all_sorts_of_nonsense_are_failures(encoder: Encoder):
    bodies: list[dict[str, Any]] = [{}, {"choices": []}, {"choices": None}, {"choices": "x"}, {"choices": [None]}, {"choices": [{}]}, {"error": "x"}]
    bodies += [{"choices": [{"message": {"content": 7}, "finish_reason": "stop"}]}, completion("x", finish="content_filter"), completion("x", finish="abort")]
    bodies += [completion("x", logprobs={"content": 3}) | {"choices": [{"message": "x", "finish_reason": "stop"}]}]
    for body in bodies:
        found = read(body, encoder)
        assert (found.text, found.ids, found.finish) == ("", (), "failed"), body
        assert found.reason


def test_fewer_answers_than_asked_for_say_what_to_set_and_more_are_left(encoder: Encoder):
    few = read(completion("yes", "no"), encoder, count=4)
    assert [a.finish for a in few] == ["stop", "stop", "failed", "failed"]
    assert "2 of 4 answers; set answers.endpoint.per_request to 2" in few[2].reason
    assert [a.text for a in read(completion("yes", "no", "7"), encoder, count=2)] == ["yes", "no"]
