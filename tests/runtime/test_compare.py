"""Two real reports beside each other, and reports whose difference is planted."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from torch_reference import picture

from masters.bootstrap import median_ratio
from masters.cli import main
from masters.errors import DataError
from masters.runtime.check import CheckConfig, check
from masters.runtime.compare import Change, Comparison, compare, comparison_text

QUESTIONS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    rows = []
    for i in range(QUESTIONS):
        picture(i).save(folder / f"{i}.png")
        rows.append({"id": f"q{i}", "images": [f"{i}.png"], "question": "what colour is it?", "answer": "teal"})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


@pytest.fixture(scope="module")
def report(bundle: Path, data: Path) -> dict[str, Any]:
    config = CheckConfig(bundle, data, threads=1, max_tokens=4, min_count=30, min_seconds=0, cold_starts=1, sustained_seconds=0.3)
    found: dict[str, Any] = json.loads(json.dumps(check(config).to_json()))
    return found


def beside(folder: Path, a: dict[str, Any], b: dict[str, Any]) -> Comparison:
    for name, report in (("a", a), ("b", b)):
        (folder / f"{name}.json").write_text(json.dumps(report))
    return compare(folder / "a.json", folder / "b.json")


def by_name(found: Comparison) -> dict[str, Change]:
    return {change.what.split(",")[0]: change for change in found.changes}


def test_a_report_beside_itself_has_not_changed(tmp_path: Path, report: dict[str, Any]) -> None:
    found = beside(tmp_path, report, report)
    assert found.differing == ()
    assert {change.verdict for change in found.changes} == {"no clear change", ""}
    accuracy = by_name(found)["accuracy"]
    assert accuracy.interval is not None
    assert (accuracy.interval.low, accuracy.interval.high) == (0, 0)


def test_planted_changes_are_found_and_their_sign_is_right(tmp_path: Path, report: dict[str, Any]) -> None:
    other = copy.deepcopy(report)
    for i, answer in enumerate(report["accuracy"]["answers"]):
        answer["score"], other["accuracy"]["answers"][i]["score"] = float(i % 4 == 0), float(i % 2 == 0)
    other["latency"]["first_tokens"] = [2 * value for value in report["latency"]["first_tokens"]]
    other["threads"] = 7
    found = beside(tmp_path, report, other)
    accuracy, first, decode = (by_name(found)[name] for name in ("accuracy", "first token", "decode per token"))
    assert (accuracy.a, accuracy.b, accuracy.verdict) == (0.25, 0.5, "changed")
    assert accuracy.interval is not None
    assert 0 < accuracy.interval.low < 0.25 < accuracy.interval.high
    assert first.verdict == "changed"
    assert first.interval is not None
    assert first.interval.mean == pytest.approx(2)
    assert decode.verdict == "no clear change"
    assert found.differing == (f"threads ({report['threads']} and 7)",)
    assert "Not alike: threads" in comparison_text(found)


def test_only_common_questions_are_compared(tmp_path: Path, report: dict[str, Any]) -> None:
    other = copy.deepcopy(report)
    other["accuracy"]["answers"] = other["accuracy"]["answers"][10:]
    found = beside(tmp_path, report, other)
    assert found.changes[0].what == f"accuracy, {QUESTIONS - 10} questions"
    assert any("questions" in what for what in found.differing)
    other["accuracy"]["answers"] = [answer | {"id": f"other {i}"} for i, answer in enumerate(other["accuracy"]["answers"])]
    with pytest.raises(DataError, match="no question in common"):
        beside(tmp_path, report, other)


def test_what_is_no_report_is_refused_in_one_line(tmp_path: Path, report: dict[str, Any]) -> None:
    (tmp_path / "good.json").write_text(json.dumps(report))
    for text in ("", "[1]", "{}", '{"accuracy": 3, "device": {}}'):
        (tmp_path / "bad.json").write_text(text)
        done = CliRunner().invoke(main, ["check", "--compare", str(tmp_path / "good.json"), str(tmp_path / "bad.json")])
        assert done.exit_code == 2
        assert done.output.count("\n") == 1
        assert "bad.json" in done.output
    assert CliRunner().invoke(main, ["check"]).exit_code == 2


def test_the_command_prints_text_and_json(tmp_path: Path, report: dict[str, Any]) -> None:
    (tmp_path / "a.json").write_text(json.dumps(report))
    arguments = ["check", "--compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")]
    assert "no clear change" in CliRunner().invoke(main, arguments).output
    printed = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).output)
    assert printed["changes"][0]["what"].startswith("accuracy")


def test_the_interval_of_a_ratio_of_medians_covers_the_truth() -> None:
    """95% intervals over samples drawn with a known ratio of medians hold it about 95 times in 100; 100 draws, so 88 at least."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        found = median_ratio(3 * rng.lognormal(size=60), 2 * rng.lognormal(size=80))
        held += found.low <= 1.5 <= found.high
    assert 88 <= held <= 100
