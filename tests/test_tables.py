"""The README's table of families, the costs of exports and the speed of the runtime say what the results say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tables(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--root", str(root), *options], capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What the tables are made of, and the files that they stand in."""
    for name in ("README.md", "docs/export.md", "docs/speed.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    return tmp_path


def test_the_files_are_what_the_results_say() -> None:
    done = tables(ROOT, "--check")
    assert done.returncode == 0, f"{done.stdout}: run python benchmarks/tables.py"


def test_every_family_with_a_file_has_a_row() -> None:
    families = {file.stem for file in (ROOT / "export" / "families").glob("*.py") if file.stem != "__init__"}
    results = json.loads((ROOT / "benchmarks" / "results" / "families.json").read_text())["families"]
    assert set(results) == families
    assert (ROOT / "README.md").read_text().split("<!-- families")[1].split("<!-- /families")[0].count("\n| ") == len(families) + 1


def test_a_changed_result_changes_the_row_and_a_changed_row_is_found(copy: Path) -> None:
    place = copy / "benchmarks" / "results" / "families.json"
    results = json.loads(place.read_text())
    results["families"]["internvl"]["onnx"].pop("int4")
    results["families"]["qwen3_vl"].pop("onnxruntime-genai")
    place.write_text(json.dumps(results))
    assert tables(copy, "--check").returncode == 1
    assert tables(copy).returncode == 0
    rows = {line.split(" | ")[0]: line for line in (copy / "README.md").read_text().splitlines()}
    assert "| fp32 fp16 int8 |" in rows["| InternVL"]
    assert "genai" not in rows["| Qwen3-VL"]
    assert tables(copy, "--check").returncode == 0
    (copy / "README.md").write_text((copy / "README.md").read_text().replace("| Qwen3-VL | yes", "| Qwen3-VL | no"))
    assert tables(copy, "--check").stdout == "differs: README.md\n"


def test_missing_markers_are_named(copy: Path) -> None:
    (copy / "README.md").write_text("nothing")
    done = tables(copy)
    assert done.returncode == 1
    assert "families: written by benchmarks/tables.py" in done.stderr
