"""A page that opens from disk anywhere: sections, tables of texts, and a gallery of questions with their answers.

No script, no font, no file and no address outside the page: images are data URLs, charts are inline SVG (charts.py), and the page's own
policy forbids the rest. Every text that comes from outside is escaped.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .charts import markers, safe
from .images import open_image
from .page_style import STYLE

IMAGE_SIDE = 256  # pixels of an embedded image's longer side
SMALL_SIDE = 128  # an image up to this is shown enlarged, its pixels as they are
TRUE_COLOUR_BYTES = 32_768  # a larger PNG is stored with 256 colours: a page of photographs stays a few megabytes
LONGEST_TEXT = 600  # characters of a question or an answer
VERDICTS = {"pass": ' class="pass"', "fail": ' class="fail"'}


@dataclass(frozen=True)
class Example:
    """A question, about an image or none, and what each model said: name -> (text, whether it is right)."""

    image: Path | bytes | None
    question: str
    truth: str
    answers: Mapping[str, tuple[str, bool]]


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names its rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def whole_page(title: str, sections: Mapping[str, str]) -> str:
    links = "".join(f'<li><a href="#{name.lower()}">{name}</a></li>' for name in sections)
    contents = f'<nav aria-label="Contents"><ul>{links}</ul></nav>' if len(sections) > 1 else ""
    body = "".join(
        f'<section id="{name.lower()}" aria-labelledby="{name.lower()}-title"><h2 id="{name.lower()}-title">{name}</h2>{content}</section>'
        for name, content in sections.items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Should a text ever slip through unescaped, it still can't load or run anything.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{safe(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{markers()}\n"
        f"<header><h1>{safe(title)}</h1>{contents}</header>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def draw_table(table: Table) -> str:
    numeric = [column > 0 and _numeric([row[column] for row in table.rows]) for column in range(len(table.columns))]
    kinds = [' class="number"' if is_numeric else "" for is_numeric in numeric]
    head = "".join(f'<th scope="col"{kind}>{safe(column)}</th>' for column, kind in zip(table.columns, kinds, strict=True))
    rows = "".join(
        f'<tr><th scope="row">{safe(row[0])}</th>' + "".join(_cell(cell, kind) for cell, kind in zip(row[1:], kinds[1:], strict=True)) + "</tr>"
        for row in table.rows
    )
    note = f'<p class="note">{safe(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{safe(table.title)}"><table><caption>{safe(table.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}"
    )


def _cell(text: str, kind: str) -> str:
    """A cell; a verdict wears its colour."""
    return f"<td{VERDICTS.get(text, kind)}>{safe(text)}</td>"


def _numeric(cells: Sequence[str]) -> bool:
    """Whether a column reads as numbers: every cell begins like one ('0.81 [0.79, 0.83]', '−3 ms'), or says that there is none."""
    return all(re.match(r"[<>≤≥≈~+−-]?\s*[\d.]*\d|[–—-]?$|n/a$", cell.strip()) for cell in cells)


def gallery(examples: Sequence[Example]) -> str:
    cards = "".join(f"<li>{_example(example, place)}</li>" for place, example in enumerate(examples, start=1))
    return f'<ul class="gallery">{cards}</ul>'


def _example(example: Example, place: int) -> str:
    question, _, more = example.question.strip().partition("\n")
    choices = f'<p class="choices" dir="auto">{safe(more, LONGEST_TEXT)}</p>' if more else ""
    answers = "".join(_answer(name, text, right) for name, (text, right) in example.answers.items())
    return (
        f'<article aria-label="Example {place}">{_picture(example, place)}'
        f'<h3 class="question" dir="auto">{safe(question, LONGEST_TEXT)}</h3>{choices}'
        f'<p class="truth"><span class="who">truth</span> <span dir="auto">{safe(example.truth, LONGEST_TEXT)}</span></p>'
        f'<ul class="answers">{answers}</ul></article>'
    )


def _picture(example: Example, place: int) -> str:
    if example.image is None:
        return ""
    image = open_image(example.image)
    size = f"{image.width} × {image.height}"
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.LANCZOS)
    kind = ' class="small"' if max(image.size) <= SMALL_SIDE else ""
    shown = f'alt="Image of example {place}, {size} pixels" width="{image.width}" height="{image.height}"'
    return f'<div class="picture"><img{kind} src="{_png_url(image)}" {shown}></div>'


def _answer(name: str, text: str, right: bool) -> str:
    word, shape = ("right", "M2.5 8.5l4 4 7-9") if right else ("wrong", "M3.5 3.5l9 9m0-9l-9 9")
    sign = f'<svg class="sign" role="img" aria-label="{word}" viewBox="0 0 16 16"><path d="{shape}"/></svg>'
    said = f'<span class="said" dir="auto">{safe(text, LONGEST_TEXT)}</span>' if text.strip() else '<span class="said empty">no answer</span>'
    return f'<li class="{word}">{sign}<span class="who">{safe(name)}</span> {said}</li>'


def _png_url(image: Image.Image) -> str:
    data = _png(image)
    if len(data) > TRUE_COLOUR_BYTES:
        data = min(data, _png(image.quantize(256)), key=len)
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
