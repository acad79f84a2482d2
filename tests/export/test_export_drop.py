"""The score of a bundle beside PyTorch's on the same questions, and the gate on their difference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from masters.errors import ParityError
from masters.export import drop
from masters.export.awkward import awkward_images
from masters.export.drop import measure_drop
from masters.export.reference import encode, greedy
from masters.export.source import Source
from masters.runtime import load
from masters.runtime.check import CheckConfig, check

WORDS = ["colour", "shape", "number", "picture", "corner", "edge", "digit", "circle", "line", "letter", "side", "top", "bottom", "middle", "name", "size"]
TOKENS = 2


@pytest.fixture
def questions(lively_source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Questions to which PyTorch's own answers are the right ones, so that it scores 1; only answers that are words, a random model gives others too."""
    monkeypatch.setattr(drop, "MAX_TOKENS", TOKENS)
    image = awkward_images()["plain"]
    (tmp_path / "plain.png").write_bytes(image)
    rows = []
    for number, word in enumerate(WORDS):
        question = f"Which {word} do you see?"
        tokens, _ = greedy(lively_source, encode(lively_source, question, [image]), TOKENS)
        answer = lively_source.processor.tokenizer.decode(tokens.tolist(), skip_special_tokens=True).strip()
        if answer and answer.isascii() and answer.isprintable():
            rows.append({"id": str(number), "images": ["plain.png"], "question": question, "answer": answer})
    assert len(rows) >= 4
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_fp32_loses_nothing(bundle_of: Callable[[str], Path], lively_source: Source, questions: Path) -> None:
    found = measure_drop(load(bundle_of("fp32")), lively_source, questions, max_drop=0.0)
    assert (found["bundle"]["mean"], found["pytorch"]["mean"], found["difference"]["low"]) == (1.0, 1.0, 0.0)
    assert (found["data"], found["difference"]["count"]) == ("questions.jsonl", len(questions.read_text().splitlines()))


def test_a_drop_over_the_limit_fails(bundle_of: Callable[[str], Path], lively_source: Source, questions: Path) -> None:
    """A bundle that sees every image in negative loses answers: reported without a limit, with one it fails and says by how much."""
    vlm = load(bundle_of("fp32"))
    vlm.manifest.preprocessing["image_std"] = [-0.5, -0.5, -0.5]
    found = measure_drop(vlm, lively_source, questions, max_drop=None)
    assert found["difference"]["mean"] < -0.2
    with pytest.raises(ParityError, match=r"at most 0\.1 below zero") as caught:
        measure_drop(vlm, lively_source, questions, max_drop=0.1)
    assert f"{found['difference']['mean']:.3f}" in str(caught.value)


def test_a_check_takes_the_answers_that_the_export_kept(bundle_of: Callable[[str], Path], lively_source: Source, questions: Path, tmp_path: Path) -> None:
    """The road of a device without PyTorch: the same comparison from the stored answers alone."""
    vlm, kept = load(bundle_of("int4")), tmp_path / "kept" / "pytorch.jsonl"
    found = measure_drop(vlm, lively_source, questions, max_drop=None, answers=kept)
    config = CheckConfig(vlm.folder, questions, reference=kept, max_tokens=TOKENS, min_count=1, min_seconds=0, cold_starts=0, sustained_seconds=0)
    accuracy = check(config, vlm).accuracy
    assert accuracy.reference is not None
    assert accuracy.reference.mean == found["pytorch"]["mean"] == 1.0
    assert accuracy.difference is not None
    assert accuracy.difference.mean == found["difference"]["mean"]


def test_answers_are_kept_although_the_gate_fails(bundle_of: Callable[[str], Path], lively_source: Source, questions: Path, tmp_path: Path) -> None:
    vlm = load(bundle_of("fp32"))
    vlm.manifest.preprocessing["image_std"] = [-0.5, -0.5, -0.5]
    with pytest.raises(ParityError):
        measure_drop(vlm, lively_source, questions, max_drop=0.0, answers=tmp_path / "pytorch.jsonl")
    ids = [json.loads(line)["id"] for line in questions.read_text().splitlines()]
    assert [json.loads(line)["id"] for line in (tmp_path / "pytorch.jsonl").read_text().splitlines()] == ids
