"""The demo's questions, checked from outside: what a picture shows is measured in its pixels, not asked of the code that wrote the answer."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from masters.demo import data
from masters.demo.data import COLOURS, COUNT, DIGIT_PARTS, LONGEST, READ, SHAPES, SPLITS, UNSEEN, DemoSizes, build_data, draw_digits
from masters.files import sha256_folder
from masters.images import open_image
from masters.samples import LETTERS, Sample, read_samples

SIZES = DemoSizes(train=900, validation=240, test=400, ood=240)
RGB = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("demo") / "data"
    build_data(place, SIZES)
    return place


@pytest.fixture(scope="module")
def splits(folder: Path) -> dict[str, list[Sample]]:
    return {split: read_samples(folder / f"{split}.jsonl") for split in SPLITS}


def picture_path(sample: Sample) -> Path:
    [path] = sample.images
    assert isinstance(path, Path)
    return path


def is_digits(sample: Sample) -> bool:
    return sample.question in (READ, COUNT)


def measured(path: Path) -> tuple[str, str]:
    """Colour and shape by pixels: EasyVQA paints one shape in a pure colour; its share of its bounding box tells which (1, pi / 4 or a half)."""
    pixels = np.asarray(open_image(path))
    masks = {name: (pixels == value).all(-1) for name, value in RGB.items()}
    colour = max(masks, key=lambda name: masks[name].sum())
    rows, columns = np.nonzero(masks[colour])
    share = len(rows) / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
    return colour, "rectangle" if share > 0.9 else "circle" if share > 0.66 else "triangle"


def pictures(splits: dict[str, list[Sample]]) -> Iterator[tuple[str, Sample, str, str]]:
    for split, samples in splits.items():
        for sample in samples:
            if not is_digits(sample):
                yield split, sample, *measured(picture_path(sample))


def test_sizes_metrics_and_ids(splits: dict[str, list[Sample]]) -> None:
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 900, "validation": 240, "test": 400, "ood": 240}
    every = [sample for samples in splits.values() for sample in samples]
    assert len({sample.id for sample in every}) == len(every)
    for samples in splits.values():
        kinds = Counter("digits" if is_digits(sample) else sample.metric for sample in samples)
        assert kinds["digits"] == len(samples) // 2
        assert kinds["choice"] > len(samples) * 0.06
        assert kinds["exact"] > len(samples) * 0.3


def test_no_picture_in_two_splits(splits: dict[str, list[Sample]]) -> None:
    """By their bytes, so that a copy under another name counts."""
    hashes = {split: {hashlib.sha256(picture_path(sample).read_bytes()).digest() for sample in samples} for split, samples in splits.items()}
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not hashes[one] & hashes[other], (one, other)


def test_unseen_combinations_are_unseen_and_ood_shows_nothing_else(splits: dict[str, list[Sample]]) -> None:
    shown: dict[str, Counter[tuple[str, str]]] = {split: Counter() for split in SPLITS}
    for split, _, colour, shape in pictures(splits):
        shown[split][colour, shape] += 1
    for split in ("train", "validation", "test"):
        unseen = sum(shown[split][pair] for pair in UNSEEN)
        # Where a shape is a few pixels wide, a slanted edge makes the measure of a triangle that of a circle; the colour is exact.
        assert unseen <= 0.01 * shown[split].total(), (split, shown[split])
        assert len(shown[split]) >= len(COLOURS) * len(SHAPES) - len(UNSEEN)
    assert set(shown["ood"]) <= UNSEEN | {("teal", "circle"), ("red", "triangle")}
    assert sum(shown["ood"][pair] for pair in UNSEEN) >= 0.99 * shown["ood"].total()
    assert all(shown["ood"][pair] > 10 for pair in UNSEEN)


def expected_answer(question: str, colour: str, shape: str) -> str:
    """The answer from what the picture shows and the words of the question alone."""
    words = question.rstrip("?").split()
    if words[0] in ("what", "which"):
        return colour if "color" in words else shape
    named = [word for word in words if word in COLOURS + SHAPES]
    assert len(named) == 1, question
    negated = "not" in words or "no" in words
    return "yes" if (named[0] in (colour, shape)) != negated else "no"


def test_answers_about_pictures_are_true(splits: dict[str, list[Sample]]) -> None:
    wrong, checked = [], Counter[str]()
    for _, sample, colour, shape in pictures(splits):
        [given] = sample.answers
        answer = sample.choices[LETTERS.index(given)] if sample.choices else given
        checked["choice" if sample.choices else answer if answer in ("yes", "no") else "open"] += 1
        if answer != expected_answer(sample.question, colour, shape):
            wrong.append((sample.question, answer, colour, shape))
    assert min(checked[kind] for kind in ("choice", "yes", "no", "open")) > 50, checked
    assert len(wrong) <= 0.01 * checked.total(), wrong
    # Colours are measured exactly, so there no answer may differ.
    assert not [row for row in wrong if row[1] in COLOURS]


def test_choices_are_four_and_distinct_and_no_letter_is_favoured(splits: dict[str, list[Sample]]) -> None:
    asked = [sample for samples in splits.values() for sample in samples if sample.choices]
    assert all(len(set(sample.choices)) == 4 for sample in asked)
    letters = Counter(sample.answers[0] for sample in asked)
    assert set(letters) == set("ABCD")
    assert max(letters.values()) < 0.4 * len(asked), letters


class Watched:
    """An array that remembers which of its rows were read."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.read = rows, list[int]()

    def __getitem__(self, index: int) -> np.ndarray:
        self.read.append(index)
        return np.asarray(self.rows[index])


@pytest.mark.parametrize("split", SPLITS)
def test_digits_come_from_the_splits_own_part_and_the_text_names_them(monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    from sklearn.datasets import load_digits

    pixels, labels = data._digits()
    watched = Watched(pixels)
    monkeypatch.setattr(data, "_digits", lambda: (watched, labels))
    rng, truth = random.Random(0), load_digits().target
    for length in range(1, LONGEST + 2):
        for _ in range(60):
            watched.read.clear()
            image, text = draw_digits(split, length, rng)
            assert image.size == (64, 64)
            assert text == "".join(str(truth[index]) for index in watched.read)
            assert len(text) == length
            assert all(DIGIT_PARTS[split][0] <= index < DIGIT_PARTS[split][1] for index in watched.read)


def test_training_digits_are_never_tested() -> None:
    """By their pixels: no handwritten digit of training or validation occurs in test or ood, and training shares none with validation."""
    pixels, _ = data._digits()
    parts = {split: {row.tobytes() for row in pixels[slice(*DIGIT_PARTS[split])]} for split in SPLITS}
    assert not parts["train"] & parts["validation"]
    assert not (parts["train"] | parts["validation"]) & (parts["test"] | parts["ood"])
    assert all(len(part) >= 150 for part in parts.values())


def ink_columns(path: Path) -> np.ndarray:
    """How dark each column of a digits picture is, 0 to 1."""
    grey = np.asarray(open_image(path).convert("L"), dtype=float)
    return (grey.max() - grey.min(axis=0)) / 255


def test_digit_answers(splits: dict[str, list[Sample]]) -> None:
    for split, samples in splits.items():
        read = [sample.answers[0] for sample in samples if sample.question == READ]
        counted = [int(sample.answers[0]) for sample in samples if sample.question == COUNT]
        assert all(answer.isdigit() for answer in read)
        lengths = {len(answer) for answer in read} | set(counted)
        assert lengths == ({LONGEST + 1} if split == "ood" else set(range(1, LONGEST + 1)))
        assert 0.3 < len(counted) / (len(read) + len(counted)) < 0.5


def test_counted_digits_are_in_the_picture(splits: dict[str, list[Sample]]) -> None:
    """The inked width of a picture grows with the answer: the count is of digits that are there, none of them cut off at the edge."""
    widths: dict[int, list[int]] = {}
    for samples in splits.values():
        for sample in samples:
            if sample.question == COUNT:
                inked = np.flatnonzero(ink_columns(picture_path(sample)) > 0.15)
                widths.setdefault(int(sample.answers[0]), []).append(int(np.ptp(inked)) + 1)
    assert sorted(widths) == list(range(1, LONGEST + 2))
    # Six stand closer together than up to five do.
    mean = [float(np.mean(widths[count])) for count in range(1, LONGEST + 1)]
    steps = np.diff(mean)
    assert (steps > 6).all(), mean
    assert mean[-1] < 64


def test_same_seed_same_files_and_a_finished_folder_is_kept(folder: Path, tmp_path: Path) -> None:
    small = DemoSizes(40, 20, 20, 20)
    paths = build_data(tmp_path / "one", small)
    build_data(tmp_path / "two", small)
    assert sha256_folder(tmp_path / "one") == sha256_folder(tmp_path / "two")
    build_data(tmp_path / "three", small, seed=1)
    assert sha256_folder(tmp_path / "one") != sha256_folder(tmp_path / "three")
    stamp = paths["train"].stat().st_mtime_ns
    assert build_data(tmp_path / "one", small) == paths
    assert paths["train"].stat().st_mtime_ns == stamp


def test_tokenizer_texts_cover_every_question_and_answer(splits: dict[str, list[Sample]]) -> None:
    """Else the demo's tokenizer would spell a test question in other tokens than those it trained on."""
    known = {word for text in data.texts() for word in text.replace("\n", " ").split()}
    for samples in splits.values():
        for sample in samples:
            words = set(sample.prompt.split()) - ({word for word in sample.prompt.split() if word.rstrip("?.").isdigit()})
            assert words <= known, words - known
