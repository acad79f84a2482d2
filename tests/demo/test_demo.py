"""`masters demo --fast` for real: killed in the middle, continued, and read as a user reads it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from masters.demo.demo import BUNDLES, PRESETS
from masters.demo.results import compare
from masters.files import sha256_file
from masters.manifest import read_manifest, verify_files
from masters.samples import read_samples

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def start(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "masters.cli", "demo", "--fast", "--out", str(out)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=out.parent)


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 300) -> None:
    ends = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, f"the demo ended before {path.name} was there"
        assert time.monotonic() < ends, f"no {path.name} after {seconds} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[Path, str]]:
    """A demo that was killed while its third run trained, then run to its end; its folder, what it printed, and the hashes of what stood before."""
    out = tmp_path_factory.mktemp("demo") / "out"
    killed = start(out)
    wait_for(out / "runs" / "paper" / "metrics.jsonl", killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = {path: sha256_file(path) for path in [*out.rglob("*.parquet"), *out.rglob("model.safetensors")]}
    continued = start(out)
    printed, errors = continued.communicate(timeout=600)
    assert continued.returncode == 0, errors[-3000:]
    return out, printed, before


def test_what_was_finished_is_kept(finished: tuple[Path, str, dict[Path, str]]) -> None:
    _, _, before = finished
    assert len(before) >= 4
    assert {path: sha256_file(path) for path in before} == before


def test_nothing_half_written_is_left(finished: tuple[Path, str, dict[Path, str]]) -> None:
    assert [path for path in finished[0].rglob("*") if ".part" in path.name or ".old" in path.name] == []


def test_table_has_every_model_and_its_scores_are_those_of_the_files(finished: tuple[Path, str, dict[Path, str]]) -> None:
    out, printed, _ = finished
    for name in ("teacher", "student", *PRESETS):
        scores = json.loads((out / "scores" / f"{name}.json").read_text())["test"]
        assert len(scores) == len(read_samples(out / "data" / "test.jsonl"))
        assert re.search(rf"^{name} .* {sum(scores) / len(scores):.3f} \[", printed, re.MULTILINE), printed
    for target, precision in BUNDLES:
        assert f"default, {target}-{precision} " in printed


def test_every_comparison_is_a_sentence(finished: tuple[Path, str, dict[Path, str]]) -> None:
    out, printed, _ = finished
    test = {name: json.loads((out / "scores" / f"{name}.json").read_text())["test"] for name in ("student", *PRESETS)}
    for sentence in compare(test, PRESETS):
        assert sentence in printed


def test_sentences_follow_the_scores() -> None:
    better, worse = [1.0] * 90 + [0.0] * 10, [1.0] * 50 + [0.0] * 50
    [first, *_] = compare({"student": worse, "kd": better, "sft": worse}, ("kd", "sft"))
    assert first.startswith("kd beats the untouched student by 40.0 points")
    [first, *_] = compare({"student": better, "kd": worse, "sft": worse}, ("kd", "sft"))
    assert first.startswith("the untouched student beats kd by 40.0 points")
    assert "can't be told apart" in compare({"student": worse, "kd": better, "sft": better}, ("kd", "sft"))[-1]


def test_bundles_are_whole_and_report_is_there(finished: tuple[Path, str, dict[Path, str]]) -> None:
    out = finished[0]
    for target, precision in BUNDLES:
        folder = out / "bundles" / f"{target}-{precision}"
        manifest = read_manifest(folder)
        verify_files(folder, manifest)
        assert manifest.target == target
        assert {row["verdict"] for row in manifest.parity} <= {"pass", "ambiguous", "reported"}
    page = (out / "report.html").read_text()
    assert all(word in page for word in ("Validation accuracy", "Mask ratio", *PRESETS))
    assert page.count("data:image/png;base64,") >= 24


def test_a_finished_demo_prints_the_same_at_once(finished: tuple[Path, str, dict[Path, str]]) -> None:
    out, printed, _ = finished
    again, _ = start(out).communicate(timeout=120)
    assert again == printed
