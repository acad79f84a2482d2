"""report.html: parsed back with the standard library's parser and compared with the rows, questions and images that went in."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from masters.distill.report import METRICS, read_run, write_report
from masters.errors import ImageError, RunError
from masters.page import Example, Table

VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """A page as a list of elements (tag, attributes, text inside), failing on any end tag that closes another element than the innermost."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.open: list[int] = []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.close()
        assert self.open == [], "unclosed elements"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in {tag}"
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        place = self.open.pop()
        assert self.elements[place][0] == tag, f"</{tag}> closes {self.elements[place]}"

    def handle_data(self, data: str) -> None:
        for place in self.open:
            self.elements[place][2].append(data)

    def texts(self, tag: str, **attributes: str) -> list[str]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return ["".join(text) for name, attrs, text in self.elements if name == tag and wanted.items() <= attrs.items()]

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attrs[name] for found, attrs, _ in self.elements if found == tag and name in attrs]


def _rows(steps: int, seed: int = 0, masked: bool = True) -> list[dict]:
    """Rows with the keys that train.py writes."""
    rng = np.random.default_rng(seed)
    rows: list[dict] = [{"kind": "evaluation", "step": -1, "stage": 0, "ratio": 0.2 * masked, "validation_accuracy": 0.71}]
    for step in range(steps):
        stage = step * 5 // steps
        pairs = int(rng.integers(0, 9))
        row = {"kind": "step", "step": step, "stage": stage, "ratio": round(0.2 - 0.05 * stage, 2) * masked, "loss": float(rng.normal(0.1, 0.05))}
        row |= {"loss_distill": float(rng.random() / 20), "grad_norm": float(rng.lognormal()), "kl": 0.001 * step * masked, "entropy": float(rng.random())}
        row |= {"reward_accuracy": float(rng.random()), "reward_distillation": float(rng.random()) * masked, "pairs": pairs, "seconds": 0.5, "questions": 4}
        row |= {"reward_expected": float(rng.random()) * masked}
        row |= {"right_outranks_distillation": pairs // 2 * masked, "right_outranks_total": pairs * 3 // 4 * masked}
        row |= {"divergence": float(rng.random()), "zero_spread": float(rng.random()), "response_tokens": 3 + float(rng.random())}
        if step % 20 == 0:
            row |= {"grad_norm_distill": float(rng.lognormal() / 10), "grad_norm_policy": float(rng.lognormal())}
        rows.append(row)
        if step + 1 == steps or (step + 1) * 5 // steps > stage:
            rows.append({"kind": "evaluation", "step": step, "stage": stage, "ratio": 0.0, "validation_accuracy": 0.71 + 0.01 * stage})
    return rows


def _write_run(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _photo(side: int = 300, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _embedded(page: Page) -> list[Image.Image]:
    sources = page.attributes("img", "src")
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


def _check_references(page: Page) -> None:
    """Ids once each, and every reference inside the page to one of them; none to anywhere else."""
    ids = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs, _ in page.elements:
        for name, value in attrs.items():
            if name == "href":
                assert value.startswith("#")
            if name in ("href", "aria-describedby", "aria-labelledby"):
                assert value.lstrip("#") in ids
            if name in ("src", "srcset", "action", "data", "poster"):
                assert value.startswith("data:")
            assert not name.startswith("on")
    assert not {tag for tag, _, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "base"}
    assert not re.search(r"https?:|//\w+\.|url\(|@import", re.sub(r'src="data:[^"]*"', "", page.html))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Four runs of 500 steps, two tables and 24 photographs of noise, which no format makes small."""
    folder = tmp_path_factory.mktemp("four")
    runs = {
        name: _write_run(folder / name, _rows(500, seed, masked=name in ("paper", "default"))) for seed, name in enumerate(("sft", "kd", "paper", "default"))
    }
    table = Table("Accuracy", ("Model", "Test", "Verdict"), (("teacher", "0.863 [0.848, 0.878]", "pass"), ("student", "–", "fail")), "Of 2,000 questions.")
    answers = {"teacher": ("circle", True), "untouched": ("blue", False), "default": ("", False)}
    examples = [Example(_photo(seed=i), f"what is this?\nA. one\nB. {i}", "circle", answers) for i in range(24)]
    write_report(folder / "report.html", "Four ways to learn", runs, [table, table], ["One beats another.", "A second sentence."], examples)
    return Page(folder / "report.html")


def test_the_page_is_well_formed_holds_all_it_needs_and_stays_small(four: Page) -> None:
    _check_references(four)
    assert four.html.startswith("<!DOCTYPE html>")
    assert len(four.html.encode()) < 3_000_000
    assert four.attributes("html", "lang") == ["en"]
    assert any("width=device-width" in content for content in four.attributes("meta", "content"))
    assert "prefers-color-scheme:dark" in four.html


def test_headings_go_down_one_level_at_a_time_and_tables_have_headers(four: Page) -> None:
    levels = [int(tag[1]) for tag, _, _ in four.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))
    assert four.texts("h2") == ["Summary", "Findings", "Results", "Training", "Answers"]
    assert four.texts("th", scope="col")[:3] == ["Model", "Test", "Verdict"]
    assert four.texts("th", scope="row")[:2] == ["teacher", "student"]
    assert four.texts("caption") == ["Accuracy", "Accuracy", "Runs and their validation accuracy"]
    # Numbers, and the dash for none, are aligned as numbers; words are not.
    assert four.texts("td", class_="number")[:2] == ["0.863 [0.848, 0.878]", "–"]
    assert "One beats another." in four.texts("p")


def test_every_metric_has_a_chart_for_every_run_that_has_it(four: Page) -> None:
    names = [name for name in four.attributes("svg", "aria-label") if ", " in name]
    common = ("loss", "rewards", "norms", "entropy", "divergence", "spread", "length")
    everywhere = [f"{metric.title}, {run}" for metric in METRICS if metric.key in common for run in ("sft", "kd", "paper", "default")]
    masked = [f"{metric.title}, {run}" for metric in METRICS if metric.key in ("outranks", "mask", "kl") for run in ("paper", "default")]
    assert sorted(names) == sorted(everywhere + masked)
    assert four.texts("p", class_="note").count("not part of this run") == 6


def test_charts_say_their_numbers(four: Page) -> None:
    rows = _rows(500, 2)
    steps = [row for row in rows if row["kind"] == "step"]
    words = {attrs["id"]: "".join(text) for tag, attrs, text in four.elements if tag == "desc"}
    assert f"last {steps[-1]['loss']:.3g} at step 499".replace("-", "−") in words["loss-2-text"]
    assert f"first {steps[0]['reward_accuracy']:.3g} at step 0" in words["rewards-2-text"]
    assert "mask ratio: 500 values between 0 and 0.2, first 0.2 at step 0, last 0 at step 499" in words["mask-2-text"]
    counted = [row for row in steps if row["pairs"]]
    share = counted[-1]["right_outranks_total"] / counted[-1]["pairs"]
    assert f"total reward: {len(counted)} values" in words["outranks-2-text"]
    assert f"last {share:.3g} at step {counted[-1]['step']}" in words["outranks-2-text"]
    assert "policy: 25 values" in words["norms-2-text"]
    # An evaluation after step n is one of n + 1 steps; -1 is before the first.
    assert "paper: 6 values between 0.71 and 0.75, first 0.71 at step 0, last 0.75 at step 500." in words["validation-text"]


def test_the_overview_table_sums_the_rows(four: Page) -> None:
    cells = four.texts("td", class_="number")[-8:]
    steps = [row for row in _rows(500, 3) if row["kind"] == "step"]
    ranked = [sum(row[f"right_outranks_{name}"] for row in steps) / sum(row["pairs"] for row in steps) for name in ("distillation", "total")]
    assert cells == ["500", "2,000", "4 min", "0.710", "0.750", "0.750", *(f"{share:.0%}" for share in ranked)]


def test_answers_are_marked_by_words_as_well_as_by_colour(four: Page) -> None:
    signs = [(attrs["aria-label"], attrs["role"]) for tag, attrs, _ in four.elements if tag == "svg" and attrs.get("class") == "sign"]
    assert signs == [("right", "img"), ("wrong", "img"), ("wrong", "img")] * 24
    assert four.texts("li", class_="right")[0].split() == ["teacher", "circle"]
    assert "no answer" in four.texts("li", class_="wrong")[1]
    assert four.texts("h3", class_="question")[3] == "what is this?"
    assert four.texts("p", class_="choices")[3] == "A. one\nB. 3"


def test_images_are_small_png_files_with_an_alternative_text(four: Page) -> None:
    images = _embedded(four)
    assert len(images) == 24
    assert all(image.format == "PNG" and max(image.size) == 256 for image in images)
    assert four.attributes("img", "alt")[0] == "Image of example 1, 300 × 300 pixels"


def test_a_small_image_keeps_its_pixels_and_nothing_else_of_the_file(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x010E] = "a secret description"
    Image.fromarray(pixels).save(tmp_path / "small.png", exif=exif)
    write_report(tmp_path / "report.html", "One", {}, [], [], [Example(tmp_path / "small.png", "q", "a", {})])
    page = Page(tmp_path / "report.html")
    (image,) = _embedded(page)
    assert np.array_equal(np.asarray(image.convert("RGB")), pixels)
    assert b"secret" not in base64.b64decode(page.attributes("img", "src")[0].partition(",")[2])
    assert page.attributes("img", "class") == ["small"]
    assert "img.small{image-rendering:pixelated}" in page.html


def test_hostile_text_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    hostile = "\"></h3></script><script>alert('1')</script><img src=x onerror=alert(2)><svg onload=alert(3)>&amp;&#60;b <!-- ]]> {x} \u202e"
    run = _write_run(tmp_path / "run", _rows(60))
    table = Table(hostile, (hostile, "b"), ((hostile, hostile),), hostile)
    example = Example(_photo(20), hostile, hostile, {hostile: (hostile, True)})
    write_report(tmp_path / "report.html", hostile, {hostile: run, "b" + hostile: run}, [table], [hostile, "\x00\ud800 half"], [example])
    page = Page(tmp_path / "report.html")
    _check_references(page)
    for tag, attributes in [
        ("title", {}),
        ("h1", {}),
        ("p", {}),
        ("caption", {}),
        ("th", {"scope": "col"}),
        ("td", {}),
        ("figcaption", {}),
        ("h3", {"class": "question"}),
    ]:
        assert hostile in page.texts(tag, **attributes), tag
    assert page.texts("span", class_="who")[-1] == page.texts("span", class_="said")[0] == hostile
    assert "�� half" in page.texts("p")
    assert f"Loss, {hostile}" in page.attributes("svg", "aria-label")


def test_one_run_alone_makes_a_page(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", "A run", {"default": _write_run(tmp_path / "run", _rows(120))}, [], [], [])
    page = Page(tmp_path / "report.html")
    _check_references(page)
    assert page.texts("h2") == ["Findings", "Training"]
    assert any(text.startswith("None of the known failures was found") for text in page.texts("p"))
    assert page.texts("figcaption") == []  # no need to name the one run above every chart
    assert [title for title in page.texts("h3") if title != "Validation accuracy"] == [metric.title for metric in METRICS]


@pytest.mark.parametrize("rows", [[], _rows(1), _rows(1)[:1], _rows(2)[:2]], ids=["nothing", "one step", "an evaluation", "a step unevaluated"])
def test_a_run_that_has_hardly_begun_makes_a_page(tmp_path: Path, rows: list[dict]) -> None:
    write_report(tmp_path / "report.html", "Begun", {"a": _write_run(tmp_path / "run", rows)}, [], [], [])
    page = Page(tmp_path / "report.html")
    _check_references(page)
    assert page.texts("th", scope="row") == ["a"]
    steps = [row for row in rows if row["kind"] == "step"]
    assert ("Loss, a" in page.attributes("svg", "aria-label")) == bool(steps)
    assert ("No evaluation yet." in page.texts("p")) == (not rows)
    if steps:
        assert f"loss: {steps[0]['loss']:.3g} at step 0." in page.texts("desc", id="loss-0-text")[0]


def test_values_that_are_no_numbers_are_left_out_and_spikes_are_told(tmp_path: Path) -> None:
    rows = [row for row in _rows(200) if row["kind"] == "step"]
    rows[50]["loss"], rows[60]["kl"], rows[70]["grad_norm"] = float("nan"), 300.0, float("inf")
    write_report(tmp_path / "report.html", "Spikes", {"a": _write_run(tmp_path / "run", rows)}, [], [], [])
    page = Page(tmp_path / "report.html")
    assert "loss: 199 values" in page.texts("desc", id="loss-0-text")[0]
    assert "total: 199 values" in page.texts("desc", id="norms-0-text")[0]
    assert page.texts("p", class_="note outside") == ["1 value beyond the chart (averaged as its edge): 300"]
    assert not re.search(r"\b(nan|inf)\b", page.html, re.IGNORECASE)


def test_missing_metrics_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        write_report(tmp_path / "report.html", "None", {"a": tmp_path / "absent"}, [], [], [])
    assert str(caught.value) == f"no metrics.jsonl in {tmp_path / 'absent'}; expected a run folder that 'masters distill' has trained in"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", ["{not json", '["a list"]', '{"kind": "step"}', '{"step": 3}', '{"kind": "step", "step": "3"}'])
def test_a_damaged_line_is_named_and_an_unfinished_last_one_forgiven(tmp_path: Path, line: str) -> None:
    whole = '{"kind": "step", "step": 0, "loss": 1.0}\n'
    run = _write_run(tmp_path / "run", [])
    (run / "metrics.jsonl").write_text(whole + line + "\n" + whole)
    with pytest.raises(RunError, match=r"metrics\.jsonl line 2 is .*expected an object with 'kind' and 'step'") as caught:
        read_run(run)
    assert "\n" not in str(caught.value)
    (run / "metrics.jsonl").write_text(whole + line)
    assert read_run(run) == [{"kind": "step", "step": 0, "loss": 1.0}]


def test_an_image_that_cannot_be_read_leaves_the_report_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("before")
    with pytest.raises(ImageError):
        write_report(tmp_path / "report.html", "Broken", {}, [], [], [Example(_photo()[:500], "q", "a", {})])
    assert (tmp_path / "report.html").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_rows_that_a_real_run_writes_fill_every_chart(tmp_path: Path, random_vlm: Path) -> None:
    from masters.distill.recipe import build_recipe
    from masters.distill.stages import distill

    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(tmp_path / "grey.png")
    rows = [{"id": str(i), "images": ["grey.png"], "question": "what colour?", "answer": ["gray"]} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw: dict[str, Any] = {"preset": "paper", "student": str(random_vlm), "teachers": [{"model": str(random_vlm), "r_max": 0.05}], "out": str(tmp_path / "run")}
    raw |= {"data": {"train": str(tmp_path / "data.jsonl"), "validation": str(tmp_path / "data.jsonl")}, "answers": {"max_tokens": 3}}
    distill(build_recipe(raw | {"train": {"learning_rate": 1e-2, "dtype": "float32", "questions_per_step": 2}}))
    write_report(tmp_path / "report.html", "A real run", {"paper": tmp_path / "run"}, [], [], [])
    page = Page(tmp_path / "report.html")
    words = {attrs["id"]: "".join(text) for tag, attrs, text in page.elements if tag == "desc"}
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in metrics if row["kind"] == "step"][-1]
    # A random model is never right, so there are no pairs of a right and a wrong answer: that chart alone may be absent.
    assert {f"{metric.key}-0-text" for metric in METRICS} - set(words) <= {"outranks-0-text"}
    assert f"last {last['entropy']:.3g} at step {last['step']}" in words["entropy-0-text"]
    assert "policy:" in words["norms-0-text"]
    assert "paper: 3 values" in words["validation-text"]
