"""Which family does what: the tests that show it are run, and what passed goes into results/families.json.

    python benchmarks/families.py [--junit FILE]      with FILE: a report that pytest wrote already, nothing is run

`python benchmarks/tables.py` then puts it into the README.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "families.json"
FAMILIES = ("idefics3", "smolvlm", "internvl", "llava_onevision", "qwen2_5_vl", "qwen3_vl")
PRECISIONS = ("fp32", "fp16", "int8", "int4")
DEFAULT = "idefics3"  # the family of tests that name none: the demo's
# Column, file, test. What a test shows is named by its parameters: a family, a precision.
SHOWN = (
    ("distill", "tests/distill/test_families.py", "test_the_packed_forward_is_the_models_own"),
    ("onnx", "tests/export/test_export_bundle.py", "test_bundle"),
    ("onnx", "tests/export/test_export_families.py", "test_every_precision"),
    ("onnx", "tests/export/test_export_qwen.py", "test_bundle"),
    ("runtime", "tests/export/test_export_bundle.py", "test_fp32_answers_are_pytorchs"),
    ("runtime", "tests/export/test_export_families.py", "test_answers_are_generates"),
    ("runtime", "tests/export/test_export_qwen.py", "test_fp32_answers_are_pytorchs"),
    ("transformers.js", "tests/export/test_export_transformers_js.py", "test_every_greedy_token_is_pytorchs"),
    ("transformers.js", "tests/export/test_export_transformers_js.py", "test_every_greedy_token_of_qwen_is_pytorchs"),
    ("transformers.js", "tests/export/test_export_transformers_js.py", "test_every_greedy_token_of_families_in_tiles_is_pytorchs"),
    ("onnxruntime-genai", "tests/export/test_export_genai.py", "test_every_greedy_token_is_pytorchs"),
    ("coreml", "tests/export/test_coreml.py", "test_half_precision_gives_pytorchs_tokens"),
    ("coreml", "tests/export/test_coreml.py", "test_only_weights_are_compressed"),
)
UNNAMED = {"test_half_precision_gives_pytorchs_tokens": "fp16"}


def run(report: Path) -> None:
    tests = sorted({f"{file}::{test}" for _, file, test in SHOWN})
    subprocess.run([sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *tests], cwd=ROOT, check=False)


def read(report: Path) -> dict[str, dict[str, dict[str, int]]]:
    """family -> column -> {precision or 'yes': tests that passed}; what one test failed or skipped is not there."""
    columns = {(file.removesuffix(".py").replace("/", "."), test): column for column, file, test in SHOWN}
    passed: dict[tuple[str, str, str], int] = defaultdict(int)
    missed = set()
    for case in ET.parse(report).getroot().iter("testcase"):
        test, _, parameters = case.attrib["name"].partition("[")
        column = columns.get((case.attrib["classname"], test))
        if column is None:
            continue
        family = next((name for name in FAMILIES if name in parameters), DEFAULT)
        words = [word for word in PRECISIONS if re.search(rf"\b{word}\b", parameters)] or [UNNAMED.get(test, "yes")]
        key = (family, column, words[-1] if column in ("onnx", "coreml") else "yes")
        if len(case):  # a failure, an error or a skip stands inside
            missed.add(key)
        passed[key] += 1
    found: dict[str, dict[str, dict[str, int]]] = {family: defaultdict(dict) for family in FAMILIES}
    for (family, column, word), count in sorted(passed.items()):
        if (family, column, word) not in missed:
            found[family][column][word] = count
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--junit", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = options.junit or Path(folder) / "report.xml"
        if options.junit is None:
            run(report)
        found = read(report)
    from masters.runtime.device import this_device

    result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "machine": str(this_device()), "families": found}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
