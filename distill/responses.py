"""The buffer of pre-generated responses: parquet files written whole, so that a killed run keeps every one that was finished."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import RunError
from ..files import whole_file


@dataclass(frozen=True)
class Response:
    """One answer to one question, with who gave it and how it was judged."""

    sample: str
    source: str  # teacher, student or truth
    model: str
    ratio: float  # the teacher's mask ratio, 0 for the others
    seed: int
    text: str
    ids: tuple[int, ...]  # the tokens that were sampled, end token included
    finish: str  # stop, length or, for the reason given, failed
    verdict: float | None  # 1 right, 0 wrong, None not judged
    judge: str
    reason: str
    key: str = ""  # what the row follows from: see buffer.py


SCHEMA = pa.schema(
    [
        ("sample", pa.string()),
        ("source", pa.string()),
        ("model", pa.string()),
        ("ratio", pa.float64()),
        ("seed", pa.int64()),
        ("text", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("finish", pa.string()),
        ("verdict", pa.float64()),
        ("judge", pa.string()),
        ("reason", pa.string()),
        ("key", pa.string()),
    ]
)


def write_responses(path: Path, responses: Sequence[Response]) -> None:
    """Write a whole parquet file, or nothing."""
    table = pa.Table.from_pylist([asdict(response) for response in responses], schema=SCHEMA)
    with whole_file(path) as part:
        pq.write_table(table, part)


def read_responses(paths: Iterable[Path]) -> list[Response]:
    """The rows of several files. Raises RunError, naming the file, for one that is damaged."""
    rows: list[Response] = []
    for path in paths:
        try:
            rows += [Response(**{**row, "ids": tuple(row["ids"])}) for row in pq.read_table(path, schema=SCHEMA).to_pylist()]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RunError(f"{path} is damaged ({str(error).splitlines()[0][:120]}); remove it, and the run generates its answers again") from None
    return rows


@dataclass(frozen=True)
class DistinctResponse:
    """A response that occurs `count` times in its group; equal ids mean equal divergence, likelihood and verdict."""

    ids: tuple[int, ...]
    count: int
    verdict: float | None
    from_teacher: bool
    from_truth: bool


def distinct(responses: Sequence[Response]) -> list[DistinctResponse]:
    """One group's responses without repetitions and failed ones, in the order of first appearance."""
    by_ids: dict[tuple[int, ...], list[Response]] = {}
    for response in responses:
        if response.finish == "failed":
            continue
        by_ids.setdefault(response.ids, []).append(response)
    return [
        DistinctResponse(ids, len(same), same[0].verdict, any(r.source == "teacher" for r in same), any(r.source == "truth" for r in same))
        for ids, same in by_ids.items()
    ]
