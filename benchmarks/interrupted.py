"""Answers under `kill -9`: `python benchmarks/interrupted.py [--questions 2000] [--kills 5] [--seed N]`.

`masters distill --until answers` on the demo's two models, every question with a picture: once unbroken, and once killed at random moments while it
answers and started again each time. Prints what each life kept, and fails unless the rows in the end are those of the unbroken run, none of them lost
or made twice.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from masters import demo
from masters.demo.data import DemoSizes, build_data

MODELS = Path(demo.__file__).parent


def recipe(folder: Path, data: dict[str, Path], name: str, batch: int) -> Path:
    """A recipe file for a run in `folder`/`name`: two masks of the teacher, two answers of it and two of the student."""
    values = {
        "student": str(MODELS / "student"),
        "teachers": [{"model": str(MODELS / "teacher"), "r_max": 0.2}],
        "data": {"train": str(data["train"]), "validation": str(data["validation"])},
        "answers": {"teacher": 2, "student": 2, "batch": batch, "max_tokens": 8},
        "mask": {"step": 0.2},
        "train": {"dtype": "float32"},
        "out": str(folder / name),
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder / f"{name}.yaml"


def start(path: Path) -> subprocess.Popen[bytes]:
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "masters.cli", "distill", str(path), "--until", "answers"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end; a failure is shown."""
    said = process.communicate()[1]
    if process.returncode:
        sys.exit(said.decode()[-2000:])


def rows(out: Path) -> dict[str, Any]:
    """All rows on disk by their keys; the same key in a part and in the whole file must hold the same row."""
    found: dict[str, Any] = {}
    for path in (out / "responses").rglob("[!.]*.parquet"):
        for row in pq.read_table(path).to_pylist():
            assert found.setdefault(row["key"], row) == row, f"{row['key']} was made twice"
    return found


def files(out: Path) -> int:
    """How many files of rows there are, while somebody works there."""
    return sum(1 for _ in (out / "responses").rglob("[!.]*.parquet")) if out.exists() else 0


def live(path: Path, out: Path, seconds: float) -> float | None:
    """Start a run, wait until it has kept something new, and kill it up to `seconds` later; the seconds that it lived, None if it ended first."""
    before, begun = files(out), time.perf_counter()
    process = start(path)
    while files(out) <= before and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.uniform(0, seconds))
    process.kill()
    process.communicate()
    return time.perf_counter() - begun if process.returncode == -9 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    chosen = parser.parse_args()
    random.seed(chosen.seed)
    print(f"{platform.machine()}, {os.cpu_count()} cores; {chosen.questions} questions, batches of {chosen.batch}, seed {chosen.seed}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = build_data(folder / "data", DemoSizes(train=chosen.questions, validation=8, test=2, ood=2))
        whole, broken = (recipe(folder, data, kind, chosen.batch) for kind in ("whole", "broken"))
        begun = time.perf_counter()
        process = start(whole)
        while not files(folder / "whole") and process.poll() is None:
            time.sleep(0.01)
        first = time.perf_counter() - begun  # until the first batch is kept: models and imports, which every life pays for
        finish(process)
        unbroken, expected = time.perf_counter() - begun, rows(folder / "whole")
        print(f"unbroken: {len(expected)} rows in {unbroken:.1f} s")
        kept: dict[str, Any] = {}
        lives = []
        for number in range(chosen.kills):
            lived = live(broken, folder / "broken", (unbroken - first) / (chosen.kills + 1))
            if lived is None:
                sys.exit("it ended before it could be killed; take more questions or fewer kills")
            lives.append(lived)
            now = rows(folder / "broken")
            changed = sum(now.get(key) != row for key, row in kept.items())
            print(f"life {number + 1}: killed after {lived:.1f} s; {len(now)} rows kept, {len(now) - len(kept)} of them new, {changed} lost or changed")
            assert not changed
            kept = now
        begun = time.perf_counter()
        finish(start(broken))
        last, found = time.perf_counter() - begun, rows(folder / "broken")
        print(f"last life: {last:.1f} s, {len(found) - len(kept)} rows new; all lives {sum(lives) + last:.1f} s, {(sum(lives) + last) / unbroken:.2f} x")
        differing = sum(found.get(key) != row for key, row in expected.items())
        print(f"{len(found)} rows against {len(expected)}, {differing} differ")
        assert found == expected


if __name__ == "__main__":
    main()
