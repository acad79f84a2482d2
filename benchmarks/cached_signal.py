"""What keeping the teacher's signal saves and costs, against the teacher in memory on the same responses.

    python benchmarks/cached_signal.py [--questions 96]

Two measurements. Sharing: on the demo's trained models, how many states its responses need where equal beginnings share theirs. Training: a random
teacher of 64 M parameters and the demo's student, every training in a process of its own on answers and signal that are there already; prints the median
step, the peak memory (Linux), and the largest difference between the losses.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

THREADS = 2
MIB = 2**20
LARGE = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12, num_key_value_heads=4, head_dim=64)


def build(folder: Path, questions: int) -> None:
    """The demo's questions, its student, and a large random teacher that reads the same prompts."""
    from masters.demo.data import DemoSizes, build_data
    from masters.demo.models import TEXT, build_model, build_processor, build_tokenizer, save_model

    build_data(folder / "data", DemoSizes(train=questions, validation=8, test=2, ood=2))
    TEXT["teacher"] = LARGE
    tokenizer = build_tokenizer()
    save_model(folder / "large", build_model("teacher", tokenizer), build_processor(tokenizer))


def recipe(folder: Path, teacher: str, out: str, signal: str) -> dict[str, Any]:
    demo = Path(__file__).resolve().parents[1] / "demo"
    return {
        "preset": "paper",
        "student": str(demo / "student"),
        "teachers": [{"model": str(demo / "teacher" if teacher == "demo" else folder / teacher), "r_max": 0.2}],
        "data": {"train": str(folder / "data" / "train.jsonl"), "validation": str(folder / "data" / "validation.jsonl")},
        "answers": {"max_tokens": 8, "batch": 64},
        "mask": {"step": 0.2},
        "train": {"dtype": "float32", "questions_per_step": 8},
        "teacher_signal": signal,
        "buffer": str(folder / f"buffer-{teacher}"),
        "out": str(folder / out),
    }


def work(values: dict[str, Any], until: str) -> dict[str, float]:
    """Run a recipe in this process, which should be a fresh one: its peak memory is reported."""
    import torch

    from masters.distill.recipe import build_recipe
    from masters.distill.stages import distill

    torch.set_num_threads(THREADS)
    started = time.perf_counter()
    distill(build_recipe(values), until)
    # Not getrusage's peak, which a process takes over from the one that started it.
    [peak] = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return {"seconds": time.perf_counter() - started, "peak": int(peak) / 1024}


def apart(values: dict[str, Any], until: str) -> dict[str, float]:
    """`work` in a process of its own."""
    command = [sys.executable, __file__, "--work", json.dumps([values, until])]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(THREADS)})
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def stored(buffer: Path) -> tuple[int, int, int]:
    """Response tokens, states kept for them, and the bytes of these files."""
    from safetensors import safe_open

    tokens, states, size = 0, 0, 0
    for path in sorted((buffer / "teacher").glob("*stage*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tokens += file.get_slice("tokens").get_shape()[0]
            states += file.get_slice("states").get_shape()[0]
        size += path.stat().st_size
    return tokens, states, size


def steps(folder: Path, out: str) -> list[dict[str, float]]:
    return [row for row in map(json.loads, (folder / out / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "step"]


def measure(folder: Path, questions: int) -> None:
    build(folder, questions)
    apart(recipe(folder, "demo", "sharing", "cached"), "signal")
    tokens, states, size = stored(folder / "buffer-demo")
    print(f"sharing, demo's models: {tokens:,} tokens of distinct responses, {states:,} states kept ({states / tokens:.0%}), {size / MIB:.2f} MiB")

    apart(recipe(folder, "large", "prepare", "cached"), "answers")
    signal = apart(recipe(folder, "large", "prepare", "cached"), "signal")
    tokens, states, size = stored(folder / "buffer-large")
    print(f"signal of the 64 M teacher: {signal['seconds']:.1f} s with loading, {states:,} states for {tokens:,} tokens, {size / MIB:.1f} MiB")
    peaks = {kind: apart(recipe(folder, "large", kind, kind), "train")["peak"] for kind in ("live", "cached")}
    rows = {kind: steps(folder, kind) for kind in peaks}
    seconds = {kind: statistics.median(row["seconds"] for row in found[2:]) for kind, found in rows.items()}
    for kind, peak in peaks.items():
        print(f"{kind:7} {seconds[kind]:.2f} s a step of 8 questions (median of {len(rows[kind]) - 2}), peak {peak:,.0f} MiB")
    print(f"cached takes {seconds['cached'] / seconds['live']:.2f} of live's time and {peaks['cached'] / peaks['live']:.2f} of its memory")
    differences = [abs(a["loss"] - b["loss"]) for a, b in zip(rows["live"], rows["cached"], strict=True)]
    print(f"largest difference of the losses over {len(differences)} steps: {max(differences):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(work(*json.loads(arguments.work))))
        return
    print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {THREADS} threads, float32")
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), arguments.questions)


if __name__ == "__main__":
    main()
