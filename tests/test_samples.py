"""Reading questions: every format gives the same samples, and every bad row is one line that names file, row and remedy."""

from __future__ import annotations

import base64
import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from masters.errors import DataError
from masters.images import open_image
from masters.samples import METRICS, BadRow, Sample, read_rows, read_samples, sample_row

COLOURS = {"red": (220, 0, 0), "blue": (0, 0, 220)}


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), COLOURS[colour]).save(buffer, "PNG")
    return buffer.getvalue()


def shown(sample: Sample) -> list[str]:
    """The colours of a sample's images, as decoded."""
    names: dict[object, str] = {value: name for name, value in COLOURS.items()}
    return [names[open_image(image).getpixel((0, 0))] for image in sample.images]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for colour in COLOURS:
        (tmp_path / "pictures" / f"{colour}.png").write_bytes(png(colour))
    return tmp_path


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ROW = {"id": "a", "images": ["pictures/red.png"], "question": "which colour?", "answer": "red"}


def test_jsonl_row_as_documented(folder: Path) -> None:
    row = {**ROW, "images": ["pictures/red.png", "pictures/blue.png"], "answer": ["red", "crimson"], "metric": "anls"}
    [sample] = read_samples(write_jsonl(folder / "q.jsonl", row))
    assert (sample.id, sample.question, sample.answers, sample.metric) == ("a", "which colour?", ("red", "crimson"), "anls")
    assert shown(sample) == ["red", "blue"]


def test_choices_stand_in_the_prompt_and_set_the_metric(folder: Path) -> None:
    [sample] = read_samples(write_jsonl(folder / "q.jsonl", {**ROW, "answer": "B", "choices": ["blue", "red"]}))
    assert sample.metric == "choice"
    assert sample.prompt == "which colour?\nA. blue\nB. red\nAnswer with the letter."


def test_blank_lines_and_absent_ids(folder: Path) -> None:
    anonymous = {key: value for key, value in ROW.items() if key != "id"}
    path = folder / "q.jsonl"
    path.write_text("\n".join(["", json.dumps(anonymous), "", json.dumps(anonymous), ""]))
    assert [sample.id for sample in read_samples(path)] == ["0", "1"]


@pytest.mark.parametrize("name", ["q.jsonl", "q.json"])
def test_byte_order_mark_of_a_windows_editor(folder: Path, name: str) -> None:
    (folder / name).write_text(json.dumps(ROW if name.endswith("l") else [ROW]), encoding="utf-8-sig")
    assert [sample.id for sample in read_samples(folder / name)] == ["a"]


def test_limit_stops_before_later_rows(folder: Path) -> None:
    path = folder / "q.jsonl"
    path.write_text(json.dumps(ROW) + "\nnot json\n")
    assert [sample.id for sample in read_samples(path, limit=1)] == ["a"]


def test_no_answer_is_fine_where_none_is_needed(folder: Path) -> None:
    path = write_jsonl(folder / "q.jsonl", {"question": "what is this?", "images": "pictures/blue.png"})
    [sample] = read_samples(path, need_answers=False)
    assert sample.answers == ()
    assert shown(sample) == ["blue"]


def test_json_holds_a_list_of_rows(folder: Path) -> None:
    (folder / "q.json").write_text(json.dumps([ROW, {**ROW, "id": "b"}]))
    assert [sample.id for sample in read_samples(folder / "q.json")] == ["a", "b"]


def test_row_round_trip(folder: Path) -> None:
    images = (folder / "pictures" / "red.png", folder / "pictures" / "blue.png")
    sample = Sample("x", images, "which?", ("A",), "choice", ("red", "blue"))
    assert read_samples(write_jsonl(folder / "q.jsonl", sample_row(sample, folder))) == [sample]


@pytest.mark.parametrize("stored", ["path", "bytes", "hf-bytes", "hf-path", "data-url"])
def test_parquet_and_every_form_of_an_image(folder: Path, stored: str) -> None:
    raw = png("blue")
    image: Any = {
        "path": "pictures/blue.png",
        "bytes": raw,
        "hf-bytes": {"bytes": raw, "path": None},
        "hf-path": {"bytes": None, "path": "pictures/blue.png"},
        "data-url": "data:image/png;base64," + base64.b64encode(raw).decode(),
    }[stored]
    rows = [
        {"id": "1", "images": [image], "question": "colour?", "answer": ["blue"]},
        {"id": "2", "images": [image, image], "question": "q", "answer": ["b", "c"]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "q.parquet")
    one, two = read_samples(folder / "q.parquet")
    assert (shown(one), shown(two)) == (["blue"], ["blue", "blue"])
    assert (one.answers, two.answers) == (("blue",), ("b", "c"))


def test_chat_messages(folder: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(png("red")).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "image", "image": "pictures/blue.png"}, {"type": "text", "text": "which colours?"}]
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "red and blue"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    [sample] = read_samples(write_jsonl(folder / "q.jsonl", {"messages": turns}))
    assert (sample.question, sample.answers) == ("which colours?", ("red and blue",))
    assert shown(sample) == ["red", "blue"]


def test_text_only_messages_with_images_beside_them(folder: Path) -> None:
    turns = [{"role": "user", "content": "<image>\ncolour?"}, {"role": "assistant", "content": "red"}]
    [sample] = read_samples(write_jsonl(folder / "q.jsonl", {"messages": turns, "images": ["pictures/red.png"]}))
    assert (sample.question, sample.answers, shown(sample)) == ("colour?", ("red",), ["red"])


def test_llava_conversations(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "Blue."}, {"from": "human", "value": "Sure?"}]
    (folder / "q.json").write_text(json.dumps([{"id": 7, "image": "pictures/blue.png", "conversations": turns}]))
    [sample] = read_samples(folder / "q.json")
    assert (sample.id, sample.question, sample.answers, shown(sample)) == ("7", "Which colour?", ("Blue.",), ["blue"])


def write_tsv(path: Path, *rows: dict[str, str]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, ["index", "image", "question", "A", "B", "C", "answer"], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_vlmevalkit_tsv_with_a_shared_image(folder: Path) -> None:
    red, blue = (base64.b64encode(png(colour)).decode() for colour in COLOURS)
    options = {"A": "red", "B": "blue"}
    path = write_tsv(
        folder / "q.tsv",
        {"index": "10", "image": red, "question": "which\tcolour?", **options, "answer": "A"},
        {"index": "11", "image": "10", "question": "again?", **options, "C": "none", "answer": "A"},
        {"index": "12", "image": blue, "question": "open?", "answer": "blue"},
        {"index": "13", "image": "11", "question": "a reference to a reference?", "answer": "red"},
    )
    samples = read_samples(path)
    assert [shown(sample) for sample in samples] == [["red"], ["red"], ["blue"], ["red"]]
    assert [sample.choices for sample in samples] == [("red", "blue"), ("red", "blue", "none"), (), ()]
    assert [sample.metric for sample in samples] == ["choice", "choice", "exact", "exact"]
    assert samples[0].question == "which\tcolour?"


def test_tsv_cell_longer_than_csv_allows_by_default(folder: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((600, 600), 90).save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    assert len(encoded) > 131_072
    [sample] = read_samples(write_tsv(folder / "q.tsv", {"index": "0", "image": encoded, "question": "noise?", "answer": "yes"}))
    assert open_image(sample.images[0]).size == (600, 600)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in ROW.items() if key not in keys}


BAD: dict[str, tuple[str, Callable[[Path], Path], list[str]]] = {
    "missing file": ("q.jsonl", lambda p: p, ["no file of questions at", "expected a .jsonl"]),
    "a folder": ("q.jsonl", make_folder, ["no file of questions at"]),
    "unknown suffix": ("q.xlsx", lambda p: write(p, "x"), ["ends in '.xlsx'", ".parquet"]),
    "empty file": ("q.jsonl", lambda p: write(p, ""), ["holds no questions", "at least one row"]),
    "broken line": ("q.jsonl", lambda p: write(p, json.dumps(ROW) + '\n{"id": '), ["line 2 is not valid JSON", "one object a line"]),
    "half a character": ("q.jsonl", lambda p: write_jsonl(p, {**ROW, "question": "\ud83d?"}), ["row 1", "UTF-8", "half a character"]),
    "a number without end": ("q.jsonl", lambda p: write(p, '{"id": ' + "9" * 5000 + "}"), ["line 1 is not valid JSON"]),
    "nested without end": ("q.jsonl", lambda p: write(p, "[" * 100_000), ["line 1 is not valid JSON"]),
    "nested json without end": ("q.json", lambda p: write(p, "[" * 100_000), ["is not valid JSON", "a list of rows"]),
    "no UTF-8": ("q.jsonl", lambda p: write(p, b'{"question": "\xff\xfe", "answer": "a"}\n'), ["row 1", "UTF-8"]),
    "no UTF-8 json": ("q.json", lambda p: write(p, b'[{"question": "\xff\xfe"}]'), ["UTF-8"]),
    "broken json": ("q.json", lambda p: write(p, "[{]"), ["is not valid JSON", "a list of rows"]),
    "json object": ("q.json", lambda p: write(p, "{}"), ["holds dict", "a list of rows"]),
    "row is a list": ("q.jsonl", lambda p: write_jsonl(p, [1]), ["row 1", "found list", "expected an object"]),
    "no question": ("q.jsonl", lambda p: write_jsonl(p, ROW, without("question")), ["row 2", "no question"]),
    "blank question": ("q.jsonl", lambda p: write_jsonl(p, {**ROW, "question": "  "}), ["row 1", "no question"]),
    "no answer": ("q.jsonl", lambda p: write_jsonl(p, ROW, {**without("answer"), "id": "b"}), ["row 2", "no answer", "add one or remove the row"]),
    "null answer": ("q.jsonl", lambda p: write_jsonl(p, {**ROW, "answer": None}), ["row 1", "no answer"]),
    "blank answers": ("q.jsonl", lambda p: write_jsonl(p, {**ROW, "answer": ["", " "]}), ["row 1", "no answer"]),
    "unknown metric": ("q.jsonl", lambda p: write_jsonl(p, {**ROW, "metric": "bleu"}), ["row 1", "unknown metric 'bleu'", ", ".join(METRICS)]),
    "same id twice": ("q.jsonl", lambda p: write_jsonl(p, ROW, ROW), ["row 2", "id 'a' occurs twice"]),
    "number as image": ("q.jsonl", lambda p: write_jsonl(p, {**ROW, "images": [3]}), ["row 1", "an image is int", "expected a path"]),
    "bad base64": ("q.jsonl", lambda p: write_jsonl(p, {**ROW, "images": ["data:image/png;base64,@@@"]}), ["row 1", "no valid base64"]),
    "too many choices": ("q.jsonl", lambda p: write_jsonl(p, {**ROW, "choices": [str(i) for i in range(27)], "answer": "A"}), ["row 1", "27 choices", "26"]),
    "choice beyond the last": (
        "q.jsonl",
        lambda p: write_jsonl(p, {**ROW, "choices": ["x", "y"], "answer": "C"}),
        ["row 1", "'C'", "names none of the 2 choices"],
    ),
    "choice metric without choices": ("q.jsonl", lambda p: write_jsonl(p, {**ROW, "metric": "choice"}), ["row 1", "'choice'", "'choices'"]),
    "no user turn": ("q.jsonl", lambda p: write_jsonl(p, {"messages": [{"role": "assistant", "content": "hi"}]}), ["row 1", "no user turn"]),
    "empty messages": ("q.jsonl", lambda p: write_jsonl(p, {"messages": []}), ["row 1", "no user turn"]),
    "messages are text": ("q.jsonl", lambda p: write_jsonl(p, {"messages": "hello"}), ["row 1", "list of turns"]),
    "image_url is text": (
        "q.jsonl",
        lambda p: write_jsonl(
            p, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": 3}, {"type": "text", "text": "q"}]}], "answer": "a"}
        ),
        ["row 1", "image_url"],
    ),
    "no UTF-8 tsv": ("q.tsv", lambda p: write(p, b"index\timage\tquestion\tanswer\n0\tAAAA\t\xff\ta\n"), ["row 1", "UTF-8"]),
    "no parquet": ("q.parquet", lambda p: write(p, b"PAR1 nothing"), ["no whole parquet file", "write it again"]),
    "tsv, bad image": ("q.tsv", lambda p: write_tsv(p, {"index": "0", "image": "99", "question": "q", "answer": "a"}), ["row 1", "base64"]),
    "tsv, no image": ("q.tsv", lambda p: write_tsv(p, {"index": "0", "image": "", "question": "q", "answer": "a"}), ["row 1", "no image"]),
    "tsv, no answer": (
        "q.tsv",
        lambda p: write_tsv(p, {"index": "0", "image": base64.b64encode(png("red")).decode(), "question": "q"}),
        ["row 1", "no answer"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(tmp_path: Path, case: str) -> None:
    name, make, expected = BAD[case]
    with pytest.raises(DataError) as caught:
        read_samples(make(tmp_path / name))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    assert name in message
    for words in expected:
        assert words in message


def test_good_rows_are_read_whatever_stands_between_them(folder: Path) -> None:
    path = folder / "q.jsonl"
    between = ['{"id": ', json.dumps(without("question")), json.dumps(ROW), "7", '{"question": "\\ud800", "answer": "x", "images": []}']
    lines: list[bytes] = [json.dumps(ROW).encode()]
    for number, line in enumerate(between):
        lines += [line.encode(), json.dumps({**ROW, "id": str(number)}).encode()]
    lines += [b'{"question": "\xff", "answer": "x", "images": []}', json.dumps({**ROW, "id": "last"}).encode()]
    path.write_bytes(b"\n".join(lines))
    rows = list(read_rows(path))
    assert [row.id for row in rows if isinstance(row, Sample)] == ["a", "0", "1", "2", "3", "4", "last"]
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert [row.number for row in bad] == [2, 4, 6, 8, 10, 12]
    for row, words in zip(bad, ("not valid JSON", "no question", "id 'a' occurs twice", "found int", "half a character", "UTF-8"), strict=True):
        assert words in row.message
        assert f"{path} " in row.message
        assert f" {row.number}" in row.message


def test_a_bad_image_in_a_table_is_its_rows_trouble(folder: Path) -> None:
    good, row = base64.b64encode(png("red")).decode(), {"question": "q", "answer": "a"}
    path = write_tsv(folder / "q.tsv", {"index": "0", "image": "@", **row}, {"index": "1", "image": good, **row}, {"index": "2", "image": "0", **row})
    first, sample, third = read_rows(path)
    assert isinstance(sample, Sample)
    assert shown(sample) == ["red"]
    for bad in (first, third):  # the third shares the first one's image
        assert isinstance(bad, BadRow)
        assert "base64" in bad.message


def test_rows_of_anything_are_questions_or_bad(folder: Path) -> None:
    rng = random.Random(0)
    words = ["images", "image", "question", "answer", "choices", "metric", "id", "messages", "conversations", "role", "from", "content", "type", "text", "user"]

    plain = (None, 3, 0.5, True, "", "exact", "text", "\x00", "data:,", "\udc80")

    def anything(depth: int) -> Any:
        kind = rng.randrange(3 if depth else 1)
        if kind == 0:
            return rng.choice(plain)
        held = [anything(depth - 1) for _ in range(rng.randrange(4))]
        return held if kind == 1 else {rng.choice(words): value for value in held}

    rows = [{**ROW, "id": str(i), **{word: anything(4) for word in rng.sample(words[:9], rng.randrange(1, 4))}} for i in range(3000)]
    path = folder / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(read_rows(path))
    assert len(found) == 3000
    bad = [row for row in found if isinstance(row, BadRow)]
    assert 300 < len(bad) < 2700
    assert all("\n" not in row.message and "; " in row.message for row in bad)


def test_truncated_parquet(folder: Path) -> None:
    pq.write_table(pa.Table.from_pylist(100 * [ROW]), folder / "q.parquet")
    whole = (folder / "q.parquet").read_bytes()
    (folder / "q.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="no whole parquet file"):
        read_samples(folder / "q.parquet")
