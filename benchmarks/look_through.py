"""What it costs to find the rows that can't be used before a run: `python benchmarks/look_through.py [--images 200] [--side 1024]`.

Photographs of one megapixel, three questions each, a SmolVLM-shaped processor. Compared in one run: decoding every image once and computing
lengths from image sizes (what `masters distill` does), the same in one thread, and encoding every prompt in full, which finds the same rows.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image

from masters.demo.models import build_processor, build_tokenizer
from masters.distill.inputs import Encoder
from masters.distill.skipped import DataFile, look_through
from masters.errors import DataError
from masters.samples import Sample

ROUNDS = 3


def photographs(folder: Path, count: int, side: int) -> list[Path]:
    """JPEG files with the detail of photographs: noise at several scales."""
    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        layers = [Image.fromarray(rng.integers(0, 256, (s, s, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC) for s in (8, 64, side // 4)]
        picture = np.mean([np.asarray(layer, dtype=np.float32) for layer in layers], axis=0)
        data = io.BytesIO()
        Image.fromarray(picture.astype(np.uint8)).save(data, "JPEG", quality=88)
        paths.append(folder / f"{number}.jpg")
        paths[-1].write_bytes(data.getvalue())
    return paths


def encode_all(samples: list[Sample], encoder: Encoder) -> list[str]:
    """The ids of the samples that can't be encoded."""
    found = []
    for sample in samples:
        try:
            encoder.encode(sample)
        except DataError:
            found.append(sample.id)
    return found


def timed(work: Callable[[], list[str]]) -> tuple[float, float, list[str]]:
    """Seconds on the clock, seconds of processor time over all threads, and what was found."""
    clock, processor = time.perf_counter(), time.process_time()
    found = work()
    return time.perf_counter() - clock, time.process_time() - processor, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--side", type=int, default=1024)
    chosen = parser.parse_args()
    encoder = Encoder(build_processor(build_tokenizer()), longest=448)
    with tempfile.TemporaryDirectory() as name:
        paths = photographs(Path(name), chosen.images, chosen.side)
        paths[7].write_bytes(paths[7].read_bytes()[:5000])
        samples = [Sample(f"{i}/{j}", (path,), f"what is shown at place {j}?") for i, path in enumerate(paths) for j in range(3)]
        files = {"train": DataFile(Path(name) / "train.jsonl", samples)}

        def look() -> list[str]:
            return [row.id for row in look_through(Path(name) / "skipped.jsonl", files, [encoder], None, 0.5)]

        def look_alone() -> list[str]:
            with patch("os.cpu_count", return_value=1):
                return look()

        ways = {"looked through": look, "in one thread": look_alone, "encoded in full": lambda: encode_all(samples, encoder)}
        runs = {way: [timed(work) for _ in range(ROUNDS)] for way, work in ways.items()}
    assert all(found == ["7/0", "7/1", "7/2"] for way in runs.values() for _, _, found in way)
    print(f"{platform.machine()}, {os.cpu_count()} cores; {len(samples)} questions about {chosen.images} JPEGs of side {chosen.side}; medians of {ROUNDS}")
    for way, times in runs.items():
        clock, processor = (1e3 * statistics.median(seconds) / len(samples) for seconds in ([run[0] for run in times], [run[1] for run in times]))
        print(f"{way:16s} {clock:6.2f} ms a question, {processor:6.2f} ms of processor time")


if __name__ == "__main__":
    main()
