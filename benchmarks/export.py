"""What an export costs: seconds, peak memory, bytes per parameter and parity at real shapes with random weights, each export in a process of its own.

    python benchmarks/export.py --shape tiny|256m|500m|2b [--precision fp32,fp16,int8,int4] [--target onnx|coreml] [--keep]

256m and 500m are SmolVLM's, 2b is Qwen3-VL-2B's. With --keep the rows go into results/export.json, in place of older ones of the same shape,
precision and target; `python benchmarks/tables.py` then puts them into the README.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from random_models import BUILT

RESULTS = Path(__file__).parent / "results" / "export.json"
MIB = 2**20
COLUMNS = "| shape | precision | parameters | seconds | processor s | peak MiB | of fp32 | MiB | bytes a parameter | features / logits | verdicts |"


@dataclass(frozen=True)
class Cost:
    """One export. `errors` are relative, the largest over the images; `fp32_mib` is what the weights take as float32, in memory."""

    shape: str
    target: str
    precision: str
    parameters: int
    seconds: float
    processor_seconds: float
    peak_mib: float
    fp32_mib: float
    bundle_mib: float
    bytes_a_parameter: float
    data_files: int
    errors: dict[str, float]
    verdicts: dict[str, int]
    machine: str
    date: str


def measure(shape: str, model: Path, target: str, precision: str, out: Path) -> Cost:
    """Export in this process, which should be a fresh one: its peak memory is reported."""
    import torch

    from masters.export import ExportConfig, export
    from masters.manifest import stored_bytes
    from masters.runtime.device import this_device
    from masters.runtime.memory import MB, peak_rss_mb

    torch.set_num_threads(2)
    start, worked = time.perf_counter(), time.process_time()
    # Random weights have no answers to protect: what quantisation does to them is printed, not judged.
    manifest = export(ExportConfig(model, target, out, precision, allow_mismatch=True))
    size = stored_bytes(manifest.files)
    verdicts = [row["verdict"] for row in manifest.parity]
    return Cost(
        shape=shape,
        target=target,
        precision=precision,
        parameters=manifest.parameters,
        seconds=round(time.perf_counter() - start, 1),
        processor_seconds=round(time.process_time() - worked, 1),
        peak_mib=round((peak_rss_mb() or 0) * MB / MIB),
        fp32_mib=round(4 * manifest.parameters / MIB),
        bundle_mib=round(size / MIB, 1),
        bytes_a_parameter=round(size / manifest.parameters, 3),
        data_files=sum("_data" in name for name in manifest.files),
        errors={stage: float(f"{largest(manifest.parity, stage):.1e}") for stage in ("features", "prefill")},
        verdicts={verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))},
        machine=str(this_device()),
        date=datetime.date.today().isoformat(),
    )


def largest(parity: list[dict[str, Any]], stage: str) -> float:
    """The largest relative error of a stage; what quantisation lost counts where both are there."""
    return max(row["difference"] for row in parity if row["stage"] == stage and row["measure"] == "relative error" and row["difference"] is not None)


def keep(cost: Cost) -> None:
    """Put a row into the results, in place of the one that it renews."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    key = ("shape", "target", "precision")
    new = asdict(cost)
    rows = [row for row in rows if any(row[name] != new[name] for name in key)] + [new]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(sorted(rows, key=lambda row: [row[name] for name in key]), indent=1) + "\n")


def row(cost: Cost) -> str:
    errors = " / ".join(f"{cost.errors[stage]:.0e}" for stage in ("features", "prefill"))
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in cost.verdicts.items())
    return (
        f"| {cost.shape} | {cost.precision} | {cost.parameters:,} | {cost.seconds:.1f} | {cost.processor_seconds:.1f} | {cost.peak_mib:,.0f} "
        f"| {cost.peak_mib / cost.fp32_mib:.2f}x | {cost.bundle_mib:,.1f} | {cost.bytes_a_parameter:.2f} | {errors} | {verdicts} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=BUILT, default="tiny")
    parser.add_argument("--precision", default="fp32,fp16,int8,int4")
    parser.add_argument("--target", choices=("onnx", "coreml"), default="onnx")
    parser.add_argument("--keep", action="store_true", help="Put the rows into results/export.json.")
    parser.add_argument("--model", type=Path, help="A folder for the random model, used again if it is there.")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        return step(options.shape, options.target, *options.step)
    print(COLUMNS + "\n" + "|---" * COLUMNS.count(" |") + "|")
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or Path(folder) / "model"
        if not model.exists():
            in_own_process(options, "build", str(model))
        for precision in options.precision.split(","):
            out = in_own_process(options, "export", str(model), precision, f"{folder}/{precision.replace(',', '_')}")
            cost = Cost(**json.loads(out.splitlines()[-1]))
            print(row(cost), flush=True)
            if options.keep:
                keep(cost)


def in_own_process(options: argparse.Namespace, *words: str) -> str:
    command = [sys.executable, __file__, "--shape", options.shape, "--target", options.target, "--step", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"}).stdout


def step(shape: str, target: str, what: str, model: str, *rest: str) -> None:
    if what == "build":
        BUILT[shape](Path(model))
        return
    precision, out = rest
    print(json.dumps(asdict(measure(shape, Path(model), target, precision, Path(out)))))


if __name__ == "__main__":
    main()
