"""VLMEvalKit's TSV files, read as they are published: AI2D, MMBench, ChartQA, DocVQA, OCRBench and the like.

What such a file leaves to the program (which metric, which words follow the question) follows from its name, as it does there
(vlmeval/dataset/image_vqa.py, image_yorn.py, image_mcq.py).
"""

from __future__ import annotations

import ast
import base64
import csv
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# A cell this short is another row's index; no encoded image is.
LONGEST_INDEX = 64
BRIEFLY = "\nAnswer the question using a single word or phrase."
# How files whose name begins so are scored, and what follows each question. TextVQA's votes of ten people are read as ten accepted answers.
PUBLISHED = {
    "ChartQA": ("relaxed", BRIEFLY),
    "DocVQA": ("anls", BRIEFLY),
    "InfoVQA": ("anls", BRIEFLY),
    "TextVQA": ("exact", BRIEFLY),
    "OCRVQA": ("exact", BRIEFLY),
    "GQA": ("exact", BRIEFLY),
    "OCRBench": ("contains", ""),
    "POPE": ("contains", ""),
    "MME": ("contains", ""),
    "HallusionBench": ("contains", ""),
}


def read_tsv(path: Path) -> Iterator[dict[str, Any] | DataError]:
    """The rows as `read_samples` takes them: id, images (bytes or paths), question, answer, choices, metric.

    Columns read: index; image (base64, a list of them, or the index of the row that holds it) or image_path; hint; question; A, B, C …; answer (a
    string or a list of accepted ones); metric. A row with an image that is no base64, or with options with a gap, is given as the error that names it.
    """
    csv.field_size_limit(sys.maxsize)
    seen: dict[str, list[bytes]] = {}
    # Bytes that are no UTF-8 are the row's trouble, not the file's.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines, delimiter="\t"), start=1):
            try:
                yield _row(row, row.get("index") or str(number - 1), seen, path, f"{path} row {number}")
            except DataError as error:
                yield error


def _row(row: Mapping[str, Any], index: str, seen: dict[str, list[bytes]], path: Path, where: str) -> dict[str, Any]:
    metric, instruction = next((value for name, value in PUBLISHED.items() if path.name.startswith(name)), (None, ""))
    choices = _choices(row, where)
    return {
        "id": index,
        "images": _images(row, index, seen, where),
        "question": _question(row, "" if choices else instruction),
        "answer": _listed(row.get("answer")),
        "choices": choices,
        "metric": row.get("metric") or (None if choices else metric),
    }


def decode_base64(text: str, where: str) -> bytes:
    """The bytes of an encoded image; `where` names the row in the DataError raised for anything else."""
    if not text:
        raise DataError(f"{where}: no image; expected a base64-encoded one, or the index of an earlier row that holds it")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise DataError(f"{where}: the image is no valid base64; expected a whole encoded image") from None


def _question(row: Mapping[str, Any], instruction: str) -> str | None:
    question, hint = row.get("question"), row.get("hint")
    if not question:
        return None
    return f"Hint: {hint}\n{question}{instruction}" if hint else f"{question}{instruction}"


def _choices(row: Mapping[str, Any], where: str) -> list[str]:
    filled = [letter for letter in LETTERS if row.get(letter)]
    if filled != list(LETTERS[: len(filled)]):
        raise DataError(f"{where}: options under {', '.join(filled)}; expected them without a gap, or their letters would not be theirs")
    return [row[letter] for letter in filled]


def _images(row: Mapping[str, Any], index: str, seen: dict[str, list[bytes]], where: str) -> list[bytes] | list[str]:
    """The row's images; `seen` holds those of earlier rows by index, since a shared image is stored once."""
    cell = row.get("image") or ""
    if not cell and row.get("image_path"):
        return [str(place) for place in _listed(row["image_path"])]
    if len(cell) <= LONGEST_INDEX and cell in seen:
        seen[index] = seen[cell]
    else:
        seen[index] = [decode_base64(image, where) for image in _listed(cell)]
    return seen[index]


def _listed(cell: str | None) -> list[str]:
    """A cell that holds one string, or several written as a Python list."""
    text = (cell or "").strip()
    if text.startswith("[") and text.endswith("]"):
        try:
            values = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [text]
        if values and all(isinstance(value, str) for value in values):
            return values
    return [cell or ""]
