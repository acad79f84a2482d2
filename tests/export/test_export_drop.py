"""The score of a bundle beside PyTorch's on the same questions, and the gate on their difference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from masters.errors import ParityError
from masters.export.awkward import awkward_images
from masters.export.drop import measure_drop
from masters.export.reference import encode, greedy
from masters.export.source import Source
from masters.runtime import load

WORDS = ("colour", "shape", "number", "picture", "corner", "edge")


@pytest.fixture
def questions(lively_source: Source, tmp_path: Path) -> Path:
    """Questions to which PyTorch's own answers are the right ones, so that it scores 1."""
    image = awkward_images()["plain"]
    (tmp_path / "plain.png").write_bytes(image)
    rows = []
    for number, word in enumerate(WORDS):
        question = f"Which {word} do you see?"
        tokens, _ = greedy(lively_source, encode(lively_source, question, [image]), 64)
        answer = lively_source.processor.tokenizer.decode(tokens.tolist(), skip_special_tokens=True).strip()
        rows.append({"id": str(number), "images": ["plain.png"], "question": question, "answer": answer})
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_fp32_loses_nothing(bundle_of: Callable[[str], Path], lively_source: Source, questions: Path) -> None:
    found = measure_drop(load(bundle_of("fp32")), lively_source, questions, max_drop=0.0)
    assert (found["bundle"]["mean"], found["pytorch"]["mean"], found["difference"]["low"]) == (1.0, 1.0, 0.0)
    assert (found["data"], found["difference"]["count"]) == ("questions.jsonl", len(WORDS))


def test_a_drop_over_the_limit_fails(bundle_of: Callable[[str], Path], lively_source: Source, questions: Path) -> None:
    """int4 changes long answers of a random model: with a limit it fails, and says by how much; without, it is reported."""
    vlm = load(bundle_of("int4"))
    found = measure_drop(vlm, lively_source, questions, max_drop=None)
    assert found["difference"]["mean"] < -0.3
    with pytest.raises(ParityError, match=r"at most 0\.1 below zero") as caught:
        measure_drop(vlm, lively_source, questions, max_drop=0.1)
    assert f"{found['difference']['mean']:.3f}" in str(caught.value)
