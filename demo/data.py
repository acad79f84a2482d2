"""The demo's questions: EasyVQA's pictures and strings of handwritten digits, from installed packages, nothing downloaded.

Splits are by image and by digit, never by row: `train` and `validation` use EasyVQA's training pictures and one part of the
digits, `test` its test pictures and another part. `ood` holds what training never shows: two colour-shape combinations, and six digits.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import whole_folder, write_text
from ..samples import LETTERS, Sample, sample_row

SPLITS = ("train", "validation", "test", "ood")
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
UNSEEN = {("teal", "triangle"), ("red", "circle")}
SIDE = 64  # pixels
LONGEST = 5  # digits in a string; ood has one more

READ, COUNT = "read the digits.", "how many digits are there?"
DIGIT_PARTS = {"train": (0, 1200), "validation": (1200, 1350), "test": (1350, 1797), "ood": (1350, 1797)}


@dataclass(frozen=True)
class DemoSizes:
    """Questions per split."""

    train: int = 8000
    validation: int = 600
    test: int = 2000
    ood: int = 600


@dataclass(frozen=True)
class Picture:
    """One EasyVQA image, what it shows, and its questions with their answers."""

    path: Path
    colour: str
    shape: str
    questions: tuple[tuple[str, str], ...]


def build_data(folder: Path, sizes: DemoSizes, seed: int = 0) -> dict[str, Path]:
    """Write one JSONL file a split with its images below `folder`, and return their paths; a finished folder is kept."""
    paths = {split: folder / f"{split}.jsonl" for split in SPLITS}
    if not folder.exists():
        with whole_folder(folder) as part:
            for split in SPLITS:
                _write_split(part, split, getattr(sizes, split), seed)
    return paths


def _write_split(folder: Path, split: str, count: int, seed: int) -> None:
    rng = random.Random(f"{seed}/{split}")
    samples = [*picture_samples(split, count // 2, rng), *digit_samples(split, count - count // 2, rng, folder)]
    rng.shuffle(samples)
    (folder / "images").mkdir(exist_ok=True)
    rows = []
    for number, sample in enumerate(samples):
        source = sample.images[0]
        assert isinstance(source, Path)
        # EasyVQA numbers both of its parts from 0; their folders tell them apart.
        origin = "" if source.is_relative_to(folder) else f"{source.parent.parent.name}-"
        target = folder / "images" / f"{split}-{origin}{source.name}"
        if not target.exists():
            shutil.copyfile(source, target)
        rows.append(sample_row(Sample(f"{split}-{number:05d}", (target,), sample.question, sample.answers, sample.metric, sample.choices), folder))
    shutil.rmtree(folder / "drawn", ignore_errors=True)
    write_text(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


# EasyVQA


def picture_samples(split: str, count: int, rng: random.Random) -> list[Sample]:
    """`count` questions about pictures: half yes/no, the rest open answers and 4-way choices in equal parts.

    Half of the yes/no questions name what the picture shows. As EasyVQA has them it is one in seven, and a model that never looks scores 0.82.
    """
    half, quarter = count // 2, count // 4
    wanted = {"shown": quarter, "absent": half - quarter, "open": count - half}
    picked = [row for kind, number in wanted.items() for row in rng.sample(_asked(split, kind), number)]
    return [_picture_sample(picture, question, answer, rng) for picture, question, answer in picked]


def questions_about_one_picture(split: str, count: int, rng: random.Random) -> list[Sample]:
    """About `count` of the questions about one picture: half yes/no in the balance of `picture_samples`, the others both open and as a choice."""
    picture = rng.choice(pictures(split))
    asked = rng.sample(picture.questions, len(picture.questions))
    kinds = {kind: [pair for pair in asked if _kind(picture, *pair) == kind][: count // 4] for kind in ("shown", "absent", "open")}
    samples = [Sample("", (picture.path,), question, (answer,)) for pairs in kinds.values() for question, answer in pairs]
    return samples + [_as_choice(picture, question, answer, rng) for question, answer in kinds["open"]]


def _picture_sample(picture: Picture, question: str, answer: str, rng: random.Random) -> Sample:
    if answer in ("yes", "no") or rng.random() < 0.5:
        return Sample("", (picture.path,), question, (answer,))
    return _as_choice(picture, question, answer, rng)


def _as_choice(picture: Picture, question: str, answer: str, rng: random.Random) -> Sample:
    """The question with four options to choose from."""
    same = SHAPES if answer in SHAPES else COLOURS
    other = [word for word in same if word != answer]
    # There are only three shapes, so a colour fills the fourth place.
    wrong = rng.sample(other, 3) if len(other) >= 3 else [*other, rng.choice(COLOURS)]
    choices = [answer, *wrong]
    rng.shuffle(choices)
    return Sample("", (picture.path,), question, (LETTERS[choices.index(answer)],), "choice", tuple(choices))


@cache
def _asked(split: str, kind: str) -> list[tuple[Picture, str, str]]:
    """Every question of a split of one kind, with its picture and answer."""
    asked = [(picture, question, answer) for picture in pictures(split) for question, answer in picture.questions]
    return [row for row in asked if _kind(*row) == kind]


def _kind(picture: Picture, question: str, answer: str) -> str:
    """'open', or, of a yes/no question, whether what it names is 'shown' or 'absent'."""
    if answer not in ("yes", "no"):
        return "open"
    words = question.rstrip("?").split()
    return "shown" if picture.colour in words or picture.shape in words else "absent"


@cache
def pictures(split: str) -> tuple[Picture, ...]:
    """The pictures of a split, in the order of EasyVQA's numbers."""
    train, test = _pictures("train"), _pictures("test")
    if split == "ood":
        return tuple(p for p in train + test if (p.colour, p.shape) in UNSEEN)
    if split == "test":
        return tuple(p for p in test if (p.colour, p.shape) not in UNSEEN)
    known = [p for p in train if (p.colour, p.shape) not in UNSEEN]
    held_out = len(known) // 10
    return tuple(known[:held_out] if split == "validation" else known[held_out:])


@cache
def _pictures(part: str) -> tuple[Picture, ...]:
    import easy_vqa

    texts, answers, images = getattr(easy_vqa, f"get_{part}_questions")()
    paths = getattr(easy_vqa, f"get_{part}_image_paths")()
    asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for text, answer, image in zip(texts, answers, images, strict=True):
        asked[image].append((text, answer))
    found = (Picture(Path(paths[i]), _shown(asked[i], COLOURS), _shown(asked[i], SHAPES), tuple(asked[i])) for i in sorted(asked))
    # What a picture shows is known from its questions alone; where they leave it open, it could be an unseen combination.
    return tuple(p for p in found if p.colour and p.shape)


def _shown(questions: list[tuple[str, str]], words: tuple[str, ...]) -> str:
    """Which of `words` a picture shows, by its own questions: the answer, or the word that an affirmed question names."""
    votes: Counter[str] = Counter()
    for question, answer in questions:
        named = [word for word in words if word in question.split() or f"{word}?" in question.split()]
        denied = (answer == "no") != (" not " in question or " no " in question)
        if answer in words:
            votes[answer] += 1
        elif named and (answer not in ("yes", "no") or not denied):
            votes[named[0]] += 1
    return votes.most_common(1)[0][0] if votes else ""


# Digits


def digit_samples(split: str, count: int, rng: random.Random, folder: Path) -> list[Sample]:
    """`count` questions about strings of handwritten digits, three in five to be read, the others to be counted, drawn below `folder`."""
    drawn = folder / "drawn"
    drawn.mkdir(parents=True, exist_ok=True)
    samples = []
    for number in range(count):
        image, question, answer = digit_question(split, LONGEST + 1 if split == "ood" else rng.randint(1, LONGEST), rng)
        path = drawn / f"digits-{number:05d}.png"
        image.save(path)
        samples.append(Sample("", (path,), question, (answer,)))
    return samples


def digit_question(split: str, length: int, rng: random.Random) -> tuple[Image.Image, str, str]:
    """A picture of `length` digits, a question about it, and the answer."""
    image, text = draw_digits(split, length, rng)
    return (image, READ, text) if rng.random() < 0.6 else (image, COUNT, str(length))


def draw_digits(split: str, length: int, rng: random.Random) -> tuple[Image.Image, str]:
    """A 64 x 64 picture of `length` handwritten digits in a row, slightly shaken, and the digits as text."""
    pixels, labels = _digits()
    start, stop = DIGIT_PARTS[split]
    paper = tuple(rng.randint(225, 255) for _ in range(3))
    ink = tuple(rng.randint(0, 90) for _ in range(3))
    image = Image.new("RGB", (SIDE, SIDE), paper)
    pitch = SIDE / (LONGEST + 1) if length > LONGEST else SIDE / LONGEST - 0.8
    left, top, text = rng.uniform(0, 1.5), rng.uniform(18, 28), ""
    for place in range(length):
        index = rng.randrange(start, stop)
        size = (rng.randint(9, 11), rng.randint(14, 18))
        mask = Image.fromarray(pixels[index]).resize(size, Image.Resampling.BICUBIC)
        image.paste(ink, (round(left + place * pitch), round(top + rng.uniform(-1, 1))), mask)
        text += str(labels[index])
    return image, text


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits (UCI optical recognition): uint8 [n, 8, 8] and their labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return (bunch.images * 15.9).astype(np.uint8), bunch.target


def texts() -> Iterator[str]:
    """Every kind of text the demo shows a model, for training its tokenizer."""
    for picture in _pictures("train"):
        for question, answer in picture.questions:
            yield question
            yield answer
    yield from 20 * [READ, COUNT, "Answer with the letter."]
    yield from (f"\n{letter}. {colour}" for letter in "ABCD" for colour in COLOURS + SHAPES)
