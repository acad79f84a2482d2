"""Rows that can't be used: which are found and why, what is never encoded for it, and that the decision is taken once."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from masters.distill import skipped
from masters.distill.inputs import Encoder
from masters.distill.skipped import DataFile, Skipped, counted, counts, look_through, read_file, without, write_skipped
from masters.errors import DataError, RunError
from masters.samples import Sample


def hostile(samples: list[Sample], folder: Path) -> dict[str, tuple[Sample, str]]:
    """Rows that can't be used, each broken for real, with the reason that is expected."""
    good = samples[0].images[0]
    assert isinstance(good, Path)
    files = {name: folder / f"{name}.png" for name in ("cut", "empty", "text", "absent", "bomb", "pixel")}
    files["cut"].write_bytes(good.read_bytes()[:-40])
    files["empty"].write_bytes(b"")
    files["text"].write_text("<svg/>")
    Image.new("1", (11_000, 10_000)).save(files["bomb"])
    Image.new("RGB", (1, 1)).save(files["pixel"])
    rows: dict[str, tuple[Sample, str]] = {
        name: (dataclasses.replace(samples[0], id=name, images=(file,)), "missing image" if name == "absent" else "damaged image")
        for name, file in files.items()
    }
    rows["bytes"] = dataclasses.replace(samples[0], id="bytes", images=(good.read_bytes()[:100],)), "damaged image"
    rows["second"] = dataclasses.replace(samples[0], id="second", images=(good, files["cut"])), "damaged image"
    rows["long"] = dataclasses.replace(samples[0], id="long", question="which colour? " * 400), "too long"
    rows["token"] = dataclasses.replace(samples[0], id="token", question="what is <image> here?"), "refused by the processor"
    return rows


def look(encoder: Encoder, path: Path, train: list[Sample], validation: list[Sample], longest: int | None = None, most: float = 0.9) -> list[Skipped]:
    files = {"train": DataFile(path / "train.jsonl", train), "validation": DataFile(path / "validation.jsonl", validation)}
    return look_through(path / "skipped.jsonl", files, [encoder], longest, most)


def noted(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, calls: list[Any]) -> None:
    """Let `calls` hold what the function `name` of `place` is called with."""
    real = getattr(place, name)

    def call(argument: Any) -> Any:
        calls.append(argument)
        return real(argument)

    monkeypatch.setattr(place, name, call)


def test_every_kind_of_bad_row_is_found_with_its_reason(processor: Any, samples: list[Sample], tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    bad = hostile(samples, tmp_path)
    mixed = [sample for pair in zip(samples, (sample for sample, _ in bad.values()), strict=False) for sample in pair]
    encoder = Encoder(processor, longest=400)
    found = look(encoder, tmp_path, mixed, [*samples[20:], bad["absent"][0]])
    assert [(row.file, row.id, row.reason) for row in found] == [
        *(("train", name, reason) for name, (_, reason) in bad.items()),
        ("validation", "absent", "missing image"),
    ]
    assert all("\n" not in row.message and row.message for row in found)
    assert "takes" in next(row.message for row in found if row.id == "long")
    for sample, _ in bad.values():
        with pytest.raises(DataError):
            encoder.encode(sample)
    assert [sample.id for sample in without(mixed, "train", found)] == [sample.id for sample in mixed if sample.id not in bad]
    assert counts(found) == {"missing image": 2, "damaged image": 7, "too long": 1, "refused by the processor": 1}
    told = capfd.readouterr().err
    assert f"10 of {len(mixed)} train questions are skipped: missing image 1, damaged image 7, too long 1, refused by the processor 1; their ids" in told
    assert "1 of 21 validation questions are skipped: missing image 1; their ids" in told


def test_the_limit_is_exact_to_the_token(processor: Any, samples: list[Sample], tmp_path: Path):
    lengths = [len(Encoder(processor).encode(sample).ids) for sample in samples]
    limit = sorted(lengths)[len(lengths) // 2]
    found = look(Encoder(processor, longest=limit), tmp_path, samples, [])
    assert [row.id for row in found] == [sample.id for sample, length in zip(samples, lengths, strict=True) if length > limit]
    assert len(found) > 2


def test_an_answer_to_train_on_counts_as_well(processor: Any, samples: list[Sample], tmp_path: Path):
    encoder = Encoder(processor, longest=400)
    wordy = dataclasses.replace(samples[1], id="wordy", answers=("very long " * 300,))
    assert look(encoder, tmp_path, [samples[0], wordy], [wordy]) == [], "it is no response, and validation shows it to no model"
    [found] = look(encoder, tmp_path, [samples[0], wordy], [wordy], longest=464)
    assert (found.file, found.id, found.reason) == ("train", "wordy", "too long")
    total = len(encoder.encode(wordy).ids) + len(encoder.answer(wordy.answers[0]))
    assert look(encoder, tmp_path, [samples[0], wordy], [], longest=total) == []
    assert len(look(encoder, tmp_path, [samples[0], wordy], [], longest=total - 1)) == 1


def test_an_image_is_decoded_once_and_few_prompts_are_encoded(processor: Any, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encoder = Encoder(processor, longest=4096)
    opened: list[Any] = []
    encoded: list[Sample] = []
    rows = [dataclasses.replace(samples[i % 5], id=str(i)) for i in range(300)]
    noted(monkeypatch, skipped, "open_image", opened)
    noted(monkeypatch, encoder, "encode", encoded)
    assert look(encoder, tmp_path, rows, []) == []
    assert len(opened) == 5
    assert encoded == rows[:4]


def test_lengths_are_not_computed_where_the_processor_errs(processor: Any, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A processor that says less than an image takes is found out on the first rows, and every prompt is encoded instead."""
    encoder = Encoder(processor, longest=120)
    long = dataclasses.replace(samples[9], id="long", question="which colour? " * 40)
    wrong = dataclasses.replace(processor._get_num_multimodal_tokens(image_sizes=[(64, 64)]), num_image_tokens=[-500])
    monkeypatch.setattr(type(processor), "_get_num_multimodal_tokens", lambda self, **sizes: wrong)
    assert [row.id for row in look(encoder, tmp_path, [*samples[:8], long], [])] == ["long"]


def test_too_many_bad_rows_are_refused_with_their_reasons(processor: Any, samples: list[Sample], tmp_path: Path):
    absent = [dataclasses.replace(sample, images=(tmp_path / "absent.png",)) for sample in samples[:4]]
    encoder = Encoder(processor)
    assert len(look(encoder, tmp_path, absent + samples[4:40], [], most=0.1)) == 4
    with pytest.raises(DataError, match=r"4 of 39 questions in \S+train.jsonl can't be used \(missing image 4\); at most 10% .*absent.png") as caught:
        look(encoder, tmp_path, absent + samples[4:39], [], most=0.1)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"4 of 4 questions in \S+validation.jsonl"):
        look(encoder, tmp_path, samples, absent, most=1.0)
    with pytest.raises(DataError, match=r"1 of 40 .*at most 0%"):
        look(encoder, tmp_path, absent[:1] + samples[1:], [], most=0.0)


def test_rows_that_are_no_questions_are_counted_with_the_others(processor: Any, questions: Path, tmp_path: Path):
    lines = (questions / "train.jsonl").read_text().splitlines()[:6]
    rows = [json.loads(line) | {"images": []} for line in lines]
    spoilt = ['{"id": ', *map(json.dumps, rows), json.dumps(rows[2]), json.dumps(rows[0] | {"id": "blank", "question": " "})]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(spoilt))
    file = read_file(path)
    assert ([sample.id for sample in file.samples], [row.number for row in file.bad]) == ([row["id"] for row in rows], [1, 8, 9])
    assert [len(read_file(path, limit).bad) for limit in (1, 6)] == [1, 1], "what stands behind the limit is not looked at"
    found = look_through(tmp_path / "skipped.jsonl", {"train": file}, [Encoder(processor)], None, 0.4)
    assert [(row.id, row.reason) for row in found] == [("row 1", "malformed row"), ("row 8", "malformed row"), ("row 9", "malformed row")]
    assert counts(found) == {"malformed row": 3}
    # The second of two rows with one id goes, the first stays.
    assert without(file.samples, "train", [*found, Skipped("train", rows[5]["id"], "too long", "")]) == file.samples[:5]
    with pytest.raises(DataError, match=r"3 of 9 questions in \S+ can't be used \(malformed row 3\); at most 30% .*train.jsonl line 1 is not valid JSON"):
        look_through(tmp_path / "skipped.jsonl", {"train": file}, [Encoder(processor)], None, 0.3)
    path.write_text("{}\n[]\n")
    with pytest.raises(DataError, match=r"2 of 2 questions in \S+ can't be used"):
        look_through(tmp_path / "skipped.jsonl", {"train": read_file(path)}, [Encoder(processor)], None, 1.0)


def test_text_in_place_of_a_path_is_a_missing_image(processor: Any, samples: list[Sample], tmp_path: Path):
    """A picture's base64 without 'data:' before it, as some files have it, is a path longer than any."""
    rows = [dataclasses.replace(samples[0], id=name, images=(tmp_path / name,)) for name in ("A" * 70_000, "nul\0", "half\ud800")]
    found = look(Encoder(processor), tmp_path, [*samples, *rows], [])
    assert [row.reason for row in found] == ["missing image"] * 3
    assert all(len(row.message) < 500 for row in found)


def test_what_was_decided_stays(processor: Any, samples: list[Sample], tmp_path: Path):
    image = tmp_path / "later.png"
    row = dataclasses.replace(samples[0], id="later ☃", images=(image,))
    found = look(Encoder(processor), tmp_path, [row, *samples], [])
    write_skipped(tmp_path / "skipped.jsonl", found)
    original = samples[0].images[0]
    assert isinstance(original, Path)
    shutil.copyfile(original, image)
    assert look(Encoder(processor), tmp_path, [row, *samples], []) == found, "the row stays out though its image has come"
    assert json.loads((tmp_path / "skipped.jsonl").read_text())["id"] == "later ☃"
    assert counted(found) == "missing image 1"
    (tmp_path / "skipped.jsonl").write_text('{"file": "train"')
    with pytest.raises(RunError, match=r"skipped\.jsonl is damaged .*remove it"):
        look(Encoder(processor), tmp_path, [row, *samples], [])
    (tmp_path / "skipped.jsonl").write_text("")
    assert look(Encoder(processor), tmp_path, [row, *samples], []) == []
    write_skipped(tmp_path / "skipped.jsonl", found)
    assert (tmp_path / "skipped.jsonl").read_text() == "", "what a run has decided is not written over"
