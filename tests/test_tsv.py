"""VLMEvalKit's files as they are published: columns of the benchmarks that people know, written by pandas as VLMEvalKit writes them."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pandas
import pytest
from PIL import Image

from masters.errors import DataError
from masters.images import open_image
from masters.samples import Sample, read_samples

COLOURS = {"red": (220, 0, 0), "blue": (0, 0, 220)}


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), COLOURS[colour]).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(colour: str) -> str:
    return base64.b64encode(png(colour)).decode()


def shown(sample: Sample) -> list[str]:
    names: dict[object, str] = {value: name for name, value in COLOURS.items()}
    return [names[open_image(image).getpixel((0, 0))] for image in sample.images]


def write_tsv(path: Path, *rows: dict[str, str]) -> Path:
    pandas.DataFrame(rows).to_csv(path, sep="\t", index=False)
    return path


def read_row(path: Path, **row: str) -> Sample:
    (sample,) = read_samples(write_tsv(path, {"index": "1", "image": encoded("red"), **row}))
    return sample


@pytest.mark.parametrize(
    ("name", "answer", "metric", "accepted"),
    [
        ("ChartQA_TEST.tsv", "0.57", "relaxed", ("0.57",)),
        ("DocVQA_VAL.tsv", "['0.28', '28 %']", "anls", ("0.28", "28 %")),
        ("InfoVQA_VAL.tsv", '["it\'s", "two"]', "anls", ("it's", "two")),
        ("OCRBench.tsv", "['CENTRE']", "contains", ("CENTRE",)),
        ("POPE.tsv", "Yes", "contains", ("Yes",)),
        ("mine.tsv", "[no list", "exact", ("[no list",)),
        ("mine.tsv", "[1, 2]", "exact", ("[1, 2]",)),
    ],
)
def test_published_tsv_files_are_scored_as_published(name: str, answer: str, metric: str, accepted: tuple[str, ...], tmp_path: Path) -> None:
    sample = read_row(tmp_path / name, question="what?", answer=answer)
    assert (sample.metric, sample.answers) == (metric, accepted)
    assert sample.question == "what?" + ("\nAnswer the question using a single word or phrase." if name[0] in "CDI" else "")


def test_mmbench_rows_bring_a_hint_and_options_whatever_their_name_says(tmp_path: Path) -> None:
    row = {
        "question": "which?",
        "hint": "It is warm.",
        "A": "red",
        "B": "None",
        "C": "",
        "D": "",
        "answer": "B",
        "category": "colour",
        "l2-category": "x",
        "split": "dev",
    }
    sample = read_row(tmp_path / "MMBench_DEV_EN.tsv", **row)
    assert sample.prompt == "Hint: It is warm.\nwhich?\nA. red\nB. None\nAnswer with the letter."
    assert (sample.metric, sample.choices, sample.answers) == ("choice", ("red", "None"), ("B",))
    assert read_row(tmp_path / "MME-RealWorld.tsv", **row).metric == "choice"


def test_a_metric_of_its_own_comes_before_the_files_name(tmp_path: Path) -> None:
    assert read_row(tmp_path / "ChartQA_TEST.tsv", question="?", answer="5", metric="exact").metric == "exact"


def test_several_images_of_one_row(tmp_path: Path) -> None:
    both = [encoded(colour) for colour in COLOURS]
    path = write_tsv(
        tmp_path / "MMMU_DEV_VAL.tsv",
        {"index": "1", "image": str(both), "question": "these?", "answer": "x"},
        {"index": "2", "image": "1", "question": "again?", "answer": "x"},
    )
    assert [shown(sample) for sample in read_samples(path)] == [["red", "blue"]] * 2


def test_images_beside_the_table(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for colour in COLOURS:
        (tmp_path / "pictures" / f"{colour}.png").write_bytes(png(colour))
    path = write_tsv(
        tmp_path / "q.tsv",
        {"index": "1", "image_path": "pictures/red.png", "question": "this?", "answer": "x"},
        {"index": "2", "image_path": "['pictures/red.png', 'pictures/blue.png']", "question": "these?", "answer": "x"},
    )
    assert [shown(sample) for sample in read_samples(path)] == [["red"], ["red", "blue"]]


def test_options_with_a_gap_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"q\.tsv row 1: options under A, C; expected them without a gap"):
        read_row(tmp_path / "q.tsv", question="?", A="red", B="", C="blue", answer="C")
