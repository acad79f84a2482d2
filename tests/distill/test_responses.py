"""The buffer of responses: what is written is what is read, and nothing damaged passes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from masters.distill.responses import SCHEMA, DistinctResponse, Response, distinct, read_responses, write_responses
from masters.errors import RunError

ROWS = [
    Response("a", "teacher", "big", 0.2, 3, "blau — 蓝", (5, 6, 2), "stop", 1.0, "rules", "exact 1.00"),
    Response("a", "student", "small", 0.0, 3, "", (2,), "stop", 0.0, "rules", "empty"),
    Response("b", "teacher", "big", 0.15, 3, "eine 'Zeile\"\n\tund noch eine", tuple(range(70)), "length", None, "rules", "no ground truth"),
]


def test_what_is_written_is_read_in_order(tmp_path: Path):
    write_responses(tmp_path / "one.parquet", ROWS[:2])
    write_responses(tmp_path / "two.parquet", ROWS[2:])
    assert read_responses([tmp_path / "one.parquet", tmp_path / "two.parquet"]) == ROWS
    assert read_responses([tmp_path / "two.parquet", tmp_path / "one.parquet"]) == ROWS[2:] + ROWS[:2]
    assert read_responses([]) == []


def test_anyone_can_read_the_files(tmp_path: Path):
    write_responses(tmp_path / "one.parquet", ROWS)
    table = pq.read_table(tmp_path / "one.parquet")
    assert table.schema.equals(SCHEMA)
    assert table.column_names == [field.name for field in dataclasses.fields(Response)]
    assert table.column("verdict").to_pylist() == [1.0, 0.0, None], "a missing verdict is null, not a number"
    assert table.column("ids")[0].as_py() == [5, 6, 2]


def test_a_file_without_rows(tmp_path: Path):
    write_responses(tmp_path / "none.parquet", [])
    assert read_responses([tmp_path / "none.parquet"]) == []


@pytest.mark.parametrize("cut", [0, 3, 50, -1, -10])
def test_a_cut_file_is_named(tmp_path: Path, cut: int):
    path = tmp_path / "answers.parquet"
    write_responses(path, ROWS)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(RunError, match=r"answers\.parquet is damaged .*remove it") as caught:
        read_responses([path])
    assert "\n" not in str(caught.value)


def test_another_programs_file_is_no_buffer(tmp_path: Path):
    path = tmp_path / "answers.parquet"
    pq.write_table(pa.table({"sample": ["a"], "text": ["yes"]}), path)
    with pytest.raises(RunError, match="damaged"):
        read_responses([path])
    with pytest.raises(RunError, match=r"absent\.parquet"):
        read_responses([tmp_path / "absent.parquet"])


def test_repetitions_stand_once_with_their_count():
    def row(ids: tuple[int, ...], source: str, verdict: float | None) -> Response:
        return dataclasses.replace(ROWS[0], ids=ids, source=source, verdict=verdict)

    group = [
        row((7, 2), "teacher", 1.0),
        row((8, 2), "teacher", 0.0),
        row((7, 2), "teacher", 1.0),
        row((9, 2), "student", None),
        row((7, 2), "student", 1.0),
        row((4, 2), "truth", 1.0),
    ]
    assert distinct(group) == [
        DistinctResponse((7, 2), 3, 1.0, from_teacher=True, from_truth=False),
        DistinctResponse((8, 2), 1, 0.0, from_teacher=True, from_truth=False),
        DistinctResponse((9, 2), 1, None, from_teacher=False, from_truth=False),
        DistinctResponse((4, 2), 1, 1.0, from_teacher=False, from_truth=True),
    ]
    assert sum(r.count for r in distinct(group)) == len(group)
    assert distinct([]) == []
