"""Constrained answers: whatever a model with random weights would rather say, it says a valid value."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models
from torch_reference import picture

from masters.cli import main
from masters.errors import DataError, RecipeError
from masters.runtime import Vlm
from masters.runtime.constraint import ChoiceGuide, Constraint, Vocabulary
from masters.runtime.grammar import check_grammar

QUESTION = "what colour is the shape?"
CHOICES = ["car", "cartoon", "cart", "é", "💡 lamp", "数字"]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "count": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["é", "y 💡", None]},
        "places": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "count", "kind", "places"],
    "additionalProperties": False,
}
PATTERNS = [r"\d{2}(é|x)/[a-z]{0,3}", r"(yes|no)(, (yes|no)){0,2}", r"[\u4e00-\u4e10💡]{2}", r"^#?[0-9a-f]{6}$", r" ?[A-Z] [A-Z]", r"\s[xyz]{1,3}"]


@pytest.fixture(scope="module")
def vocabulary(vlm: Vlm) -> Vocabulary:
    return Vocabulary(vlm.format.tokenizer, vlm.manifest.decoder.vocab_size, vlm.manifest.generation["eos_token_ids"])


def asked(vlm: Vlm, **constraint: Any) -> list[str]:
    """Greedy and sampled answers, whole by themselves."""
    settings: list[dict[str, Any]] = [{}, {"repetition_penalty": 1.5}, *({"temperature": 3.0, "top_p": 0.95, "seed": seed} for seed in range(6))]
    found = [vlm.answer(QUESTION, [picture(1)], max_tokens=150, **constraint, **one) for one in settings]
    assert {answer.finish_reason for answer in found} == {"stop"}
    return [answer.text for answer in found]


def test_choices_are_answered_exactly(vlm: Vlm) -> None:
    said = asked(vlm, choices=CHOICES)
    assert set(said) <= set(CHOICES)
    assert len(set(said)) > 1
    assert set(asked(vlm, choices=["one and the same"])) == {"one and the same"}
    assert set(asked(vlm, choices=[" spaced", "x"])) <= {" spaced", "x"}


def sayings(choices: list[str], vocabulary: Vocabulary, tokens: tuple[int, ...] = ()) -> set[bytes]:
    """All that a guide lets an answer be, by walking every way."""
    guide = ChoiceGuide(choices, vocabulary)
    for token in tokens:
        guide.push(token)
    found = set()
    for token in map(int, np.flatnonzero(guide.allowed())):
        if token in vocabulary.ends:
            found.add(b"".join(vocabulary.spelt[one] for one in tokens))
        else:
            found |= sayings(choices, vocabulary, (*tokens, token))
    return found


def test_every_choice_can_be_said_and_nothing_else(vocabulary: Vocabulary) -> None:
    """A choice that is the beginning of another may end there or go on."""
    found = {text.decode().removeprefix(" ") for text in sayings(CHOICES, vocabulary)}
    assert found == set(CHOICES)
    assert sayings([" a", "b"], vocabulary) == {b" a", b"b"}, "a space that is part of a choice is no lead"


def test_a_character_over_several_tokens(vocabulary: Vocabulary) -> None:
    """The lamp is four bytes and no token of this vocabulary holds it: each step allows the next byte alone."""
    guide = ChoiceGuide(["💡", "💢"], vocabulary)
    said = b""
    for byte in "💡".encode():
        allowed = {vocabulary.spelt[token] for token in np.flatnonzero(guide.allowed())}
        assert allowed <= {b" ", b"\xf0", b"\x9f", b"\x92", b"\xa1", b"\xa2"}
        guide.push(vocabulary.by_bytes[bytes([byte])][0])
        said += bytes([byte])
    assert guide.done
    assert said.decode() == "💡"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_is_matched_whole(pattern: str, vlm: Vlm) -> None:
    said = asked(vlm, pattern=pattern)
    assert [text for text in said if not re.fullmatch(pattern, text)] == []
    assert len(set(said)) > 1


def test_json_is_valid_against_its_schema(vlm: Vlm) -> None:
    said = asked(vlm, json_schema=SCHEMA)
    for text in said:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(said)) > 3
    for text in asked(vlm, json_schema=json.dumps({"type": "string", "maxLength": 3})):
        assert len(json.loads(text)) <= 3


def test_a_free_answer_is_no_valid_one(vlm: Vlm) -> None:
    """Without the constraint this model says none of it: the tests above show something."""
    text = vlm.answer(QUESTION, [picture(1)], max_tokens=64).text
    assert text not in CHOICES
    assert not any(re.fullmatch(pattern, text) for pattern in PATTERNS)
    with pytest.raises(ValueError, match=r"Expecting|Extra data"):
        json.loads(text)


def test_streams_chats_limits_and_stop_strings(vlm: Vlm) -> None:
    stream = vlm.stream(QUESTION, [picture(1)], max_tokens=150, json_schema=SCHEMA)
    pieces = list(stream)
    assert len(pieces) > 5
    jsonschema.validate(json.loads("".join(pieces)), SCHEMA)
    assert stream.answer.text == "".join(pieces)
    chat = vlm.chat("Be brief.")
    first = chat.answer(QUESTION, [picture(1)], choices=["red", "green"])
    second = chat.answer("sure?", pattern="(yes|no)!")
    assert first.text in ("red", "green")
    assert second.text in ("yes!", "no!")
    assert chat.messages[-1]["content"][0]["text"] == second.text
    free = vlm.answer("hi", max_tokens=12).token_ids
    assert chat.answer("hi", max_tokens=12).token_ids, "the next turn is free again"
    assert vlm.answer("hi", max_tokens=12).token_ids == free
    cut = vlm.answer(QUESTION, max_tokens=3, pattern="[a-z]{40}")
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 3)
    assert vlm.answer(QUESTION, choices=["left, right"], stop=[","]).text == "left"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"choices": []}, "choices holds nothing"),
        ({"choices": ["a", ""]}, "choices holds an empty text"),
        ({"choices": "yes"}, "choices is no list of texts"),
        ({"choices": ["a"], "pattern": "a"}, "constrained by choices and pattern"),
        ({"pattern": "[a"}, "regular expression can't be used .unclosed character class"),
        ({"pattern": "(?=a)b"}, "look-around.* is not supported"),
        ({"pattern": "[a&&b]"}, "nothing satisfies it"),
        ({"json_schema": {"type": "colour"}}, "JSON schema can't be used .Invalid type: colour"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, r"minimum \(5\) is greater than maximum \(3\)"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "Unimplemented keys.*uniqueItems"),
        ({"json_schema": {"$ref": "http://127.0.0.1:9/x"}}, "does not fetch"),
        ({"json_schema": False}, "nothing satisfies"),
        ({"json_schema": "{"}, "json_schema is no JSON"),
        ({"json_schema": "3"}, "json_schema is int"),
    ],
)
def test_what_can_not_be_met_is_refused_in_one_line(wrong: dict[str, Any], message: str, vlm: Vlm) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        vlm.answer(QUESTION, **wrong)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 330


def test_grammars_are_read_without_a_model() -> None:
    check_grammar(Constraint(json_schema=json.dumps(SCHEMA)))
    with pytest.raises(RecipeError, match="unclosed"):
        check_grammar(Constraint(pattern="(a"))


def test_choices_that_a_vocabulary_can_not_spell_are_refused() -> None:
    tokenizer = Tokenizer(models.BPE({"▁a": 0, "a": 1, "b": 2, "</s>": 3}, []))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    words = Vocabulary(tokenizer, 6, [3])
    guide = ChoiceGuide(["ab", "aé"], words)
    assert np.flatnonzero(guide.allowed()).tolist() == [0, 1]
    guide.push(0)
    assert np.flatnonzero(guide.allowed()).tolist() == [2]
    with pytest.raises(DataError, match="no token of this model spells"):
        ChoiceGuide(["é"], words).allowed()


WITHOUT = """
import sys
sys.modules["llguidance"] = None  # importing it raises ImportError
from masters.errors import MissingExtraError
from masters.runtime import load
vlm = load(sys.argv[1], threads=1)
print(vlm.answer("what is it?", choices=["a", "b"]).text)
try:
    vlm.answer("what is it?", pattern="a|b")
except MissingExtraError as error:
    print(error)
"""


def test_choices_need_no_extra(bundle: Path) -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT, str(bundle)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    said, refused = run.stdout.splitlines()
    assert said in ("a", "b")
    assert "pip install 'masters[grammar]'" in refused


def test_the_command_line_asks_for_values(bundle: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "integer", "minimum": 3, "maximum": 5}))
    for asked, allowed in (
        (["--choice", "red", "--choice", "green"], "red|green"),
        (["--pattern", "[a-c]{3}"], "[a-c]{3}"),
        (["--json-schema", str(schema)], "[345]"),
    ):
        found = CliRunner().invoke(main, ["run", str(bundle), "what is it?", "--threads", "1", *asked])
        assert re.fullmatch(allowed, found.stdout.strip()), found.output
    refused = CliRunner().invoke(main, ["run", str(bundle), "what is it?", "--threads", "1", "--pattern", "a", "--choice", "a"])
    assert refused.exit_code == 2
    assert "constrained by choices and pattern" in refused.output
