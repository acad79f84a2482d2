"""How fast memory is read here, in GB/s (10^9 bytes), which no decoder that reads its weights once a token can outrun: `python benchmarks/read_bandwidth.py`.

A loop in C that adds up a buffer in 64-byte lines, a part for each thread, compiled here; without a compiler numpy's sum, which may not reach the ceiling.
The buffer is read over and over, so one that fits a cache is read from there: a decoder's ceiling is that of a buffer of as many bytes as it reads a token.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

SIZES = (2**25, 80_000_000, 2**28, 2**29, 2**30)
ROUNDS = 25
C = """
#include <stddef.h>
#include <stdint.h>
uint64_t read_all(const uint64_t *x, size_t n) {
    uint64_t sum[32] = {0}, all = 0;
    for (size_t i = 0; i < n; i += 32)
        for (int j = 0; j < 32; j++) sum[j] ^= x[i + j];
    for (int j = 0; j < 32; j++) all ^= sum[j];
    return all;
}
"""


@functools.cache
def reader() -> tuple[str, Callable[[np.ndarray], int]]:
    """What reads, and a function that reads an array of uint64 once without holding Python's lock."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return "numpy", lambda x: int(np.bitwise_xor.reduce(x))
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "read.c", Path(folder) / "read.so"
        source.write_text(C)
        subprocess.run([compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        function = ctypes.CDLL(str(library)).read_all
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t), ctypes.c_uint64
    return "C", lambda x: int(function(x.ctypes.data, len(x)))


def read_bandwidth(threads: int, size: int) -> float:
    """GB/s at which `size` bytes are read, the best of some rounds: a ceiling is what can be reached, not what a busy moment leaves."""
    _, read = reader()
    lines = size // (256 * threads * 4)  # that a part's loop takes at a step
    memory = np.ones(lines * 32 * threads * 4, np.uint64)
    parts = np.split(memory, threads * 4)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(ROUNDS):
            start = time.perf_counter()
            list(pool.map(partial(read), parts))
            best = max(best, memory.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    for size in SIZES:
        print(f"{size / 1e6:7,.0f} MB: {read_bandwidth(options.threads, size):5.1f} GB/s read by {options.threads} threads ({reader()[0]})")


if __name__ == "__main__":
    main()
