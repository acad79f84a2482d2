"""Checks of a real bundle: figures recomputed by other means, verdicts on both sides of a limit, and the report."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch_reference import picture

from masters.errors import BundleError, DataError, MastersError, RecipeError
from masters.runtime import Vlm
from masters.runtime.answer import Timings
from masters.runtime.budget import WHAT, Budget, judge, read_budget
from masters.runtime.check import CheckConfig, CheckReport, check, figures
from masters.runtime.check_page import write_page
from masters.runtime.device import this_device
from masters.runtime.latency import Sustained, measure_cold_start, spread, summarise
from masters.runtime.memory import peak_rss_mb
from masters.runtime.report import number, report_text
from masters.samples import Sample, read_samples

QUESTIONS = 8


@pytest.fixture(scope="module")
def data(vlm: Vlm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of which the model answers the even ones 'rightly': their answer is what it says."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i in range(QUESTIONS):
        picture(i).save(folder / f"{i}.png")
        question = f"what colour is shape {i}?"
        said = vlm.answer(question, [folder / f"{i}.png"], max_tokens=6).text
        rows.append({"id": f"q{i}", "images": [f"{i}.png"], "question": question, "answer": said if i % 2 == 0 else "never said"})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


def stored(path: Path, data: Path, right: set[int]) -> Path:
    """Another model's answers: right for the questions in `right`."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    path.write_text("".join(json.dumps({"id": row["id"], "text": row["answer"] if i in right else "wrong"}) + "\n" for i, row in enumerate(rows)))
    return path


@pytest.fixture(scope="module")
def report(bundle: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> CheckReport:
    folder = tmp_path_factory.mktemp("check")
    (folder / "budget.yaml").write_text(
        "min_accuracy: 0.4\nmax_drop: 0.01\nfirst_token_p90_ms: 10000\ndecode_p50_ms: 0.000001\npeak_rss_mb: 4000\nbundle_mb: 100\ncold_start_ms: 60000\n"
    )
    config = CheckConfig(
        bundle,
        data,
        folder / "budget.yaml",
        stored(folder / "reference.jsonl", data, {0, 2, 4, 5, 6, 7}),
        threads=2,
        max_tokens=6,
        min_count=5,
        min_seconds=0.3,
        cold_starts=1,
        sustained_seconds=1.0,
    )
    return check(config)


def test_accuracy_is_the_share_of_right_answers(report: CheckReport) -> None:
    accuracy = report.accuracy
    assert [answer.score for answer in accuracy.answers] == [1.0, 0.0] * (QUESTIONS // 2)
    assert accuracy.mean.mean == 0.5
    assert accuracy.mean.low < 0.5 < accuracy.mean.high
    assert accuracy.reference is not None
    assert accuracy.reference.mean == 0.75
    assert accuracy.difference is not None
    assert accuracy.difference.mean == -0.25


def test_each_limit_has_its_verdict(report: CheckReport) -> None:
    verdicts = {gate.name: gate.verdict for gate in report.gates}
    assert set(verdicts) == set(WHAT)
    assert verdicts.pop("max_drop") == "fail"
    assert verdicts.pop("decode_p50_ms") == "fail"
    assert set(verdicts.values()) == {"pass"}
    assert not report.passed
    drop = next(gate for gate in report.gates if gate.name == "max_drop")
    assert report.accuracy.difference is not None
    assert drop.measured == -report.accuracy.difference.low >= 0.25


def test_latency_covers_count_and_time(report: CheckReport) -> None:
    latency = report.latency
    assert latency.answers >= 5
    assert latency.seconds >= 0.3
    assert latency.decode is not None
    # Five steps an answer of six tokens, unless a random answer ends early.
    assert latency.decode.count == 5 * latency.answers
    assert latency.image_encode.p50 + latency.prefill.p50 <= latency.first_token.p50 * 1.05
    assert latency.first_token.p50 <= latency.first_token.p90 <= latency.total.p90 * 1.001
    assert latency.seconds * 1000 >= latency.total.p50 * latency.answers * 0.5


def test_sustained_speed_is_that_of_the_ends(report: CheckReport) -> None:
    sustained = report.sustained
    assert sustained is not None
    assert sustained.seconds >= 1.0
    assert list(sustained.ends) == sorted(sustained.ends)
    assert len(sustained.ends) == len(sustained.totals)
    slowing = Sustained(10.0, tuple(float(i) for i in range(1, 11)), (100.0,) * 5 + (200.0,) * 5)
    assert (slowing.burst, slowing.steady) == (10.0, 5.0)
    # A time too short for one answer takes the nearest one.
    assert Sustained(10.0, (5.0,), (250.0,)).burst == 4.0


def test_the_page_holds_verdicts_figures_and_failures(report: CheckReport, data: Path, tmp_path: Path) -> None:
    samples = [dataclasses.replace(sample, question="<script>alert(1)</script>") for sample in read_samples(data)]
    write_page(tmp_path / "check.html", report, samples)
    text = (tmp_path / "check.html").read_text()
    assert "<script" not in text
    body = re.sub(r"<img([^>]*)>", r"<img\1/>", text[text.index("<body>") : text.index("</html>")])
    root = ElementTree.fromstring(body)
    titles = [node.text for node in root.iter("h2")]
    assert titles == ["Verdict", "Figures", "Speed", "Failures"]
    assert len(root.findall(".//article")) == QUESTIONS // 2
    assert len([node for node in root.iter("svg") if node.get("class") == "chart"]) == 3
    assert "2 of 7 limits missed" in text
    assert [node.text for node in root.iter("td") if node.get("class") == "fail"] == ["fail", "fail"]
    assert [node.text for node in root.iter("td") if node.get("class") == "pass"] == ["pass"] * 5


def test_a_full_disk_leaves_no_half_page(report: CheckReport, data: Path, disk_of: Callable[[str], Path]) -> None:
    disk = disk_of("16k")
    with pytest.raises(MastersError, match="No space left on device") as caught:
        write_page(disk / "check.html", report, read_samples(data))
    assert "\n" not in str(caught.value)
    assert list(disk.iterdir()) == []


def test_memory_size_and_cold_start(report: CheckReport, bundle: Path) -> None:
    files = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    assert report.bundle_mb == pytest.approx(files / 1e6)
    cold = report.cold_start
    assert cold is not None
    assert cold.peak_rss_mb is not None
    assert report.peak_rss_mb is not None
    # This process holds torch, the cold one must not.
    assert 30 < cold.peak_rss_mb < 250 < report.peak_rss_mb
    assert 0 < cold.load < cold.first_token < 60_000
    assert figures(report)["peak_rss_mb"] == cold.peak_rss_mb
    assert figures(dataclasses.replace(report, cold_start=None))["peak_rss_mb"] == report.peak_rss_mb


def test_report_text_and_json(report: CheckReport) -> None:
    text = report_text(report)
    version = report.device.libraries["onnxruntime"]
    for part in ("on provider 'cpu', 2 threads", "0.500 [", "decode per token", "2 of 7 limits missed", f"onnxruntime {version}"):
        assert part in text
    assert text.count(" fail") == 2
    read_back = json.loads(json.dumps(report.to_json()))
    assert read_back["passed"] is False
    assert read_back["accuracy"]["mean"]["mean"] == 0.5
    assert [gate["name"] for gate in read_back["gates"]] == list(WHAT)


def test_an_open_model_is_checked_as_it_is(vlm: Vlm, bundle: Path, data: Path) -> None:
    """Parts of another engine have no bundle that a fresh process could load."""

    class Other:
        def __getattr__(self, name: str) -> object:
            return "interpreter" if name == "provider" else getattr(vlm.parts, name)

    config = CheckConfig(bundle, data, limit=3, max_tokens=2, min_count=1, min_seconds=0, sustained_seconds=0)
    found = check(config, Vlm(vlm.manifest, vlm.folder, Other()))  # type: ignore[arg-type]
    assert found.provider == "interpreter"
    assert found.cold_start is None
    assert found.accuracy.mean.count == 3
    assert found.passed, "without a budget there is nothing to miss"
    assert "not measured" in report_text(found)


def test_a_reference_must_hold_every_question(vlm: Vlm, bundle: Path, data: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference.jsonl"
    reference.write_text('{"id": "q0", "text": "red"}\n')
    with pytest.raises(DataError, match="no answer for the question 'q1'"):
        check(CheckConfig(bundle, data, reference=reference), vlm)
    reference.write_text('{"id": "q0", "text": "red"}\n{"text": "blue"}\n')
    with pytest.raises(DataError, match="row 2 is no stored answer"):
        check(CheckConfig(bundle, data, reference=reference), vlm)
    with pytest.raises(DataError, match="can't read stored answers"):
        check(CheckConfig(bundle, data, reference=tmp_path / "missing.jsonl"), vlm)
    (tmp_path / "budget.yaml").write_text("max_drop: 0.02")
    with pytest.raises(RecipeError, match="max_drop without anything to compare with"):
        check(CheckConfig(bundle, data, budget=tmp_path / "budget.yaml"), vlm)


def test_a_row_without_an_answer_stops_the_check(vlm: Vlm, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"question": "what?"}\n')
    with pytest.raises(DataError, match="no answer"):
        check(CheckConfig(bundle, tmp_path / "data.jsonl"), vlm)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("min_acuracy: 0.5", "unknown key 'min_acuracy'; expected keys of min_accuracy, max_drop"),
        ("min_accuracy: high", "min_accuracy: 'high'; expected a number"),
        ("bundle_mb: true", "expected a number"),
        ("- 1", "holds list"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_wrong_budget_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "budget.yaml").write_text(content)
    with pytest.raises(RecipeError) as caught:
        read_budget(tmp_path / "budget.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_limits_are_inclusive_and_a_missing_figure_does_not_pass() -> None:
    gates = judge(Budget(min_accuracy=0.5, bundle_mb=10, decode_p50_ms=1), {"min_accuracy": 0.5, "bundle_mb": 10.0, "decode_p50_ms": None})
    assert {gate.name: gate.verdict for gate in gates} == {"min_accuracy": "pass", "bundle_mb": "pass", "decode_p50_ms": "not measured"}
    assert [gate.verdict for gate in judge(Budget(min_accuracy=0.5, bundle_mb=10), {"min_accuracy": 0.49, "bundle_mb": 10.1})] == ["fail", "fail"]
    assert judge(Budget(), {"bundle_mb": 1.0}) == ()


def test_spread_and_summary_against_numpy() -> None:
    values = np.random.default_rng(0).exponential(5, 101)
    found = spread(values)
    assert found.count == 101
    assert found.p50 == pytest.approx(np.median(values))
    assert found.p90 == pytest.approx(np.sort(values)[90])
    timings = [Timings(1, 2, 3, 10 + i, 1.0, 20, (1.0 + i, 2.0 + i)) for i in range(3)]
    latency = summarise(timings, 1.5)
    assert latency.decode is not None
    assert (latency.decode.count, latency.decode.p50, latency.first_token.p50) == (6, 2.5, 11)
    assert summarise([Timings(1, 2, 3, 4, None, 5)], 1.0).decode is None


def test_a_cold_start_that_fails_says_why(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"a fresh process could not .*no masters\.json in"):
        measure_cold_start(tmp_path, "cpu", 1, Sample("a", (), "hi"), 2, runs=1)


def test_peak_memory_is_this_process_alone() -> None:
    """A small process started from this large one reports its own memory."""
    code = "from masters.runtime.memory import peak_rss_mb; a = peak_rss_mb(); b = b'x' * 80_000_000; print(a, peak_rss_mb())"
    before, after = map(float, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert before < 150
    assert 75 < after - before < 90
    own = peak_rss_mb()
    assert own is not None
    assert own > before


def test_the_device_is_described() -> None:
    device = this_device()
    assert device.cpu
    assert device.cores >= 1
    assert f"onnxruntime {device.libraries['onnxruntime']}" in str(device)


@pytest.mark.parametrize(("value", "text"), [(None, "not measured"), (0.12345, "0.123"), (99.94, "99.9"), (1234.5, "1,234"), (-0.25, "-0.250")])
def test_numbers_in_tables(value: float | None, text: str) -> None:
    assert number(value) == text


def test_settings_out_of_range_are_named(bundle: Path) -> None:
    with pytest.raises(RecipeError, match="min_count is 0; expected at least 1"):
        CheckConfig(bundle, Path("x.jsonl"), min_count=0)
    with pytest.raises(RecipeError, match="limit is 0; expected at least 1"):
        CheckConfig(bundle, Path("x.jsonl"), limit=0)


def test_the_embedding_example_runs(bundle: Path, data: Path, vlm: Vlm) -> None:
    example = Path(__file__).parents[2] / "examples" / "embed_python.py"
    image, question = data.parent / "0.png", "what colour is it?"
    run = subprocess.run([sys.executable, str(example), str(bundle), str(image), question], capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()
    assert run.stdout.decode() == vlm.answer(question, [image]).text + "\n"
    code = example.read_text().split('"""')[2]
    assert sum(bool(line.strip()) and not line.startswith(("import", "from")) for line in code.splitlines()) <= 5
