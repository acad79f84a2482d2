"""Reading questions about images, in the formats people already have.

A sample is one question: JSONL lines and parquet rows hold id, images, question, answer, metric, choices; also read are chat
`messages`, LLaVA's `conversations` json and VLMEvalKit's TSV files. Image paths are relative to the file that names them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DataError
from .tsv import LETTERS, decode_base64, read_tsv

METRICS = ("exact", "relaxed", "anls", "choice", "contains")


@dataclass(frozen=True)
class Sample:
    """One question about images; `answers` are all accepted, the first one is what training shows."""

    id: str
    images: tuple[Path | bytes, ...]
    question: str
    answers: tuple[str, ...] = ()
    metric: str = "exact"
    choices: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """The user's text, the options of a multiple-choice question included; no chat template, no image tokens."""
        if not self.choices:
            return self.question
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False))
        return f"{self.question}\n{options}\nAnswer with the letter."


@dataclass(frozen=True)
class BadRow:
    """A row that is no question: its place in the file, counted from 1, and what is wrong with it, file and row named."""

    number: int
    message: str


def read_samples(path: Path | str, limit: int | None = None, need_answers: bool = True) -> list[Sample]:
    """Read the questions in `path`, chosen by its suffix: .jsonl, .json, .parquet or .tsv.

    Raises DataError, naming file and row, for a missing file, a row without a question or (with `need_answers`) without an
    answer, an unknown metric, choices that the answer is none of, or an id that occurs twice.
    """
    samples: list[Sample] = []
    for row in read_rows(path, need_answers):
        if isinstance(row, BadRow):
            raise DataError(row.message)
        samples.append(row)
        if limit is not None and len(samples) >= limit:
            break
    return samples


def read_rows(path: Path | str, need_answers: bool = True) -> Iterator[Sample | BadRow]:
    """Every row of `path` in its order, or what is wrong with it. Raises DataError for a file that has none or can't be read."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no file of questions at {path}; expected a .jsonl, .json, .parquet or .tsv file there")
    if path.suffix not in _READERS:
        raise DataError(f"{path} ends in '{path.suffix}'; expected one of {', '.join(_READERS)}")
    seen: set[str] = set()
    number = 0
    for number, row in enumerate(_rows(path), start=1):
        try:
            found: Sample | BadRow = _question(row, path, number, need_answers, seen)
        except DataError as error:
            found = BadRow(number, str(error))
        yield found
    if not number:
        raise DataError(f"{path} holds no questions; expected at least one row")


def _question(row: Any, path: Path, number: int, need_answers: bool, seen: set[str]) -> Sample:
    """The question in a row, its id added to those `seen`; a reader may give an error as a row."""
    if isinstance(row, DataError):
        raise row
    where = f"{path} row {number}"
    sample = _sample(row, path, number, need_answers)
    _check_choices(sample, where)
    try:
        "".join((sample.id, sample.prompt, *sample.answers)).encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: its text is not UTF-8, or holds half a character; expected whole characters in UTF-8, save it so") from None
    if sample.id in seen:
        raise DataError(f"{where}: the id '{sample.id[:80]}' occurs twice; ids name rows in caches and reports, make them distinct")
    seen.add(sample.id)
    return sample


def _rows(path: Path) -> Iterator[Any]:
    try:
        yield from _READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); expected UTF-8, save it so") from None
    except csv.Error as error:
        raise DataError(f"{path} is no tab-separated table ({error}); expected VLMEvalKit's form, write it again") from None


def sample_row(sample: Sample, folder: Path) -> dict[str, Any]:
    """The JSONL form of a sample whose images are files below `folder`."""
    images = [Path(image).relative_to(folder).as_posix() for image in sample.images if isinstance(image, Path)]
    row: dict[str, Any] = {"id": sample.id, "images": images, "question": sample.question, "answer": list(sample.answers), "metric": sample.metric}
    return row | ({"choices": list(sample.choices)} if sample.choices else {})


def _sample(row: Any, path: Path, number: int, need_answers: bool) -> Sample:
    where = f"{path} row {number}"
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {type(row).__name__}, expected an object with 'images', 'question' and 'answer'")
    if "messages" in row or "conversations" in row:
        row = _from_chat(row, where)
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: no question; expected a non-empty string under 'question'")
    choices = tuple(str(choice) for choice in _as_list(row.get("choices")))
    answers = tuple(str(answer) for answer in _as_list(row.get("answer", row.get("answers"))))
    if need_answers and not any(answer.strip() for answer in answers):
        raise DataError(f"{where}: no answer; expected a string or a list of strings under 'answer', add one or remove the row")
    metric = row.get("metric") or ("choice" if choices else "exact")
    if metric not in METRICS:
        raise DataError(f"{where}: unknown metric '{str(metric)[:40]}'; expected one of {', '.join(METRICS)}")
    images = tuple(_image(image, path, where) for image in _as_list(row.get("images", row.get("image"))))
    return Sample(str(row.get("id", number - 1)), images, question, answers, metric, choices)


def _check_choices(sample: Sample, where: str) -> None:
    if sample.metric == "choice" and not sample.choices:
        raise DataError(f"{where}: metric 'choice' without options; expected a list of them under 'choices'")
    if len(sample.choices) > len(LETTERS):
        raise DataError(f"{where}: {len(sample.choices)} choices; expected at most {len(LETTERS)}, one a letter")
    accepted = {*LETTERS[: len(sample.choices)].lower(), *(choice.lower().strip() for choice in sample.choices)}
    for answer in sample.answers if sample.metric == "choice" else ():
        if answer.lower().strip() not in accepted:
            raise DataError(f"{where}: the answer '{answer[:40]}' names none of the {len(sample.choices)} choices; expected a letter or a choice's own words")


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _image(value: Any, path: Path, where: str) -> Path | bytes:
    if isinstance(value, dict):  # the form in which HF datasets store an image
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value.startswith("data:"):
        return decode_base64(value.partition(",")[2], where)
    if isinstance(value, str) and value:
        return path.parent / value
    raise DataError(f"{where}: an image is {type(value).__name__}; expected a path relative to the file, a data: URL or bytes")


def _from_chat(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row of `messages` (OpenAI form) or `conversations` (LLaVA form): its first user turn and the answer to it."""
    turns = row["messages"] if "messages" in row else row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{where}: the conversation is no list of turns; expected objects with 'role' and 'content', or 'from' and 'value'")
    images, texts = list(_as_list(row.get("images", row.get("image")))), {"user": "", "assistant": ""}
    for turn in turns:
        role = str(turn.get("role") or turn.get("from"))
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
        if role in texts and not texts[role]:
            text, found = _content(turn.get("content", turn.get("value")), where)
            texts[role] = text.replace("<image>", "").strip()
            images += found
    if not texts["user"]:
        raise DataError(f"{where}: no user turn in the conversation; expected a question and its answer")
    return {**row, "images": images, "question": texts["user"], "answer": row.get("answer", texts["assistant"] or None)}


def _content(content: Any, where: str) -> tuple[str, list[Any]]:
    """Text and images of one chat turn, whose content is a string or a list of typed parts."""
    text, images = [], []
    for part in _as_list(content):
        match part:
            case str() | {"type": "text", "text": str()}:
                text.append(part if isinstance(part, str) else part["text"])
            case {"type": "image_url", "image_url": {"url": value}} | {"type": "image_url", "image_url": str(value)}:
                images.append(value)
            case {"type": "image", "image": value} | {"type": "image", "path": value} | {"type": "image", "url": value}:
                images.append(value)
            case {"type": "image"}:  # a placeholder: the image itself stands beside the conversation
                pass
            case _:
                raise DataError(f"{where}: a part of a turn is {str(part)[:80]!r}; expected type 'text', 'image' or 'image_url' with its content")
    return "\n".join(text), images


def _read_jsonl(path: Path) -> Iterator[Any]:
    # Bytes that are no UTF-8 are the row's trouble, not the file's.
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield DataError(f"{path} line {number} is not valid JSON ({str(error)[:120]}); expected one object a line")


def _read_json(path: Path) -> Iterable[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({str(error)[:120]}); expected a list of rows") from None
    if not isinstance(rows, list):
        raise DataError(f"{path} holds {type(rows).__name__}; expected a list of rows")
    return rows


def _read_parquet(path: Path) -> Iterator[Any]:
    from .errors import missing_extra

    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise missing_extra("pyarrow", "distill") from None
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no whole parquet file ({str(error).splitlines()[0]}); write it again") from None


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".tsv": read_tsv}
