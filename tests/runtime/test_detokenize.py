"""Streamed text: the same as decoding at once, in whole characters, never past a stop string."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from masters.runtime.detokenize import TextStream

TEXTS = ["plain words, then some", "naïve café 漢字仮名 🙂👩‍👩‍👧 end", "tabs\tand\n\nlines  and   spaces ", "🙂" * 5, "ünïcödé"]


@pytest.fixture(scope="module")
def tokenizer(random_vlm: Path) -> Tokenizer:
    """Byte-level: one character is often several tokens."""
    return Tokenizer.from_file(str(random_vlm / "tokenizer.json"))


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    """SentencePiece's way, which drops the space at a text's start."""
    vocabulary = {"<unk>": 0} | {piece: i for i, piece in enumerate(["▁plain", "▁words", ",", "▁then", "▁so", "me"], start=1)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


def stream(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    text = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            break
    return [*pieces, text.finish()], text


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_text_in_whole_characters(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text).ids
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 3, "nothing was streamed before the end"


def test_words_keep_the_space_between_them(metaspace: Tokenizer) -> None:
    ids = [1, 2, 3, 4, 5, 6]
    pieces, _ = stream(metaspace, ids)
    assert "".join(pieces) == metaspace.decode(ids) == "plain words, then some"
    assert pieces[1] == " words"


def test_special_tokens_and_leading_space_are_not_shown(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id("<end_of_utterance>")
    assert end is not None
    pieces, _ = stream(tokenizer, [end, *tokenizer.encode(" \n yes ").ids, end])
    assert "".join(pieces) == "yes "


def test_a_character_cut_short_is_dropped(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🙂").ids
    assert len(ids) > 2
    assert "".join(stream(tokenizer, ids[:-1])[0]) == "a"


def test_any_ids_at_all(tokenizer: Tokenizer) -> None:
    """Random ids make impossible byte sequences; the pieces still add up to what the decoder says of the whole."""
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(rng.randrange(1, 30))]
        whole = tokenizer.decode(ids).lstrip()
        assert whole.rstrip("\ufffd") == "".join(stream(tokenizer, ids)[0]).rstrip("\ufffd")


@pytest.mark.parametrize(
    ("stop", "expected", "stopped"),
    [
        (("then",), "plain words, ", True),
        (("words", "in w"), "pla", True),
        (("some more",), "plain words, then some", False),
        (("some!", "e s", "xyz"), "plain words, then some", False),
        (("p",), "", True),
        (("",), "plain words, then some", False),
    ],
)
def test_stop_strings(stop: tuple[str, ...], expected: str, stopped: bool, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(letter).ids[0] for letter in "plain words, then some"]
    pieces, text = stream(tokenizer, ids, stop)
    assert "".join(pieces) == expected
    assert text.stopped == stopped
