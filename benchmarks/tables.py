"""The tables of the README, of docs/export.md and of docs/speed.md that come from results: rewritten between their markers.

python benchmarks/tables.py [--check] [--root FOLDER]     with --check nothing is written, and the exit code is 1 where a file differs
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from runtime_table import read_rows, speed_tables, summary_table

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "internvl": "InternVL",
    "llava_onevision": "LLaVA-OneVision",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
}
SAME = {"smolvlm": "idefics3"}  # its distillation and its Core ML parts are the other's, imported
SHAPES = {"256m": "SmolVLM-256M", "500m": "SmolVLM-500M", "2b": "Qwen3-VL-2B"}
PRECISIONS = ("fp32", "fp16", "int8", "int4")
LOADERS = ("transformers.js", "onnxruntime-genai")


def families_table(results: dict[str, Any]) -> str:
    """A row a family: what tests on small random models have shown."""
    lines = ["| family | distill | onnx | loads in, with PyTorch's tokens | coreml | runtime |", "|---|---|---|---|---|---|"]
    found = results["families"]
    for family, name in NAMES.items():
        distilled, core_ml = shown(found, family, "distill"), shown(found, family, "coreml")
        loaders = ", ".join(loader for loader in LOADERS if found[family].get(loader)) or "–"
        onnx, runtime = found[family].get("onnx", {}), found[family].get("runtime", {})
        lines.append(f"| {name} | {yes(distilled)} | {precisions(onnx)} | {loaders} | {precisions(core_ml)} | {yes(runtime)} |")
    note = f"(`benchmarks/families.py`, {results['date']}: what tests on small random models of each family's real classes have shown.)"
    return "\n".join([*lines, "", note])


def shown(found: dict[str, Any], family: str, column: str) -> dict[str, int]:
    """What tests showed of the family, or of the one that it is but for its name."""
    result: dict[str, int] = found[family].get(column) or found[SAME.get(family, family)].get(column, {})
    return result


def precisions(found: dict[str, int]) -> str:
    return " ".join(word for word in PRECISIONS if word in found) or "–"


def yes(found: dict[str, int]) -> str:
    return "yes" if found else "–"


def costs_table(rows: list[dict[str, Any]]) -> str:
    """A row an export at a real shape."""
    lines = ["| shape | precision | seconds | peak memory, of fp32's size | MB | bytes a parameter | data files | features / logits off by |"]
    lines.append("|" + "---|" * 8)
    ordered = [row for shape in SHAPES for word in PRECISIONS for row in rows if (row["shape"], row["precision"], row["target"]) == (shape, word, "onnx")]
    for row in ordered:
        errors = " / ".join(f"{row['errors'][stage]:.0e}" for stage in ("features", "prefill"))
        lines.append(
            f"| {SHAPES[row['shape']]}, {row['parameters'] / 1e6:,.0f} M | {row['precision']} | {row['seconds']:.0f} | {row['peak_mib']:,.0f} MiB, "
            f"{row['peak_mib'] / row['fp32_mib']:.2f}x | {row['bundle_mib'] * 2**20 / 1e6:,.0f} | {row['bytes_a_parameter']:.2f} "
            f"| {row['data_files']} | {errors} |"
        )
    machines = sorted({row["machine"] for row in ordered})
    return "\n".join([*lines, "", *(f"Machine: {machine}." for machine in machines)])


def rewritten(text: str, name: str, table: str) -> str:
    """`text` with `table` between the markers of that name."""
    start, end = f"<!-- {name}: written by benchmarks/tables.py -->", f"<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise SystemExit(f"expected '{start}' and '{end}' once each; put them where the table is to stand")
    before, rest = text.split(start)
    return f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--root", type=Path, default=ROOT)
    options = parser.parse_args()
    results = options.root / "benchmarks" / "results"
    families = families_table(json.loads((results / "families.json").read_text()))
    measured = results / "export.json"
    costs = costs_table(json.loads(measured.read_text())) if measured.is_file() else "Not measured yet."
    rows = read_rows(json.loads((results / "runtime.json").read_text()))
    different = []
    tables = (("README.md", "families", families), ("README.md", "speed", summary_table(rows)), ("docs/export.md", "costs", costs))
    for file, name, table in (*tables, ("docs/speed.md", "speed", speed_tables(rows))):
        path = options.root / file
        text = path.read_text(encoding="utf-8")
        if rewritten(text, name, table) != text:
            different.append(file)
            if not options.check:
                path.write_text(rewritten(text, name, table), encoding="utf-8")
    print(f"{'differs' if options.check else 'rewritten'}: {', '.join(different) or 'nothing'}")
    sys.exit(1 if options.check and different else 0)


if __name__ == "__main__":
    main()
