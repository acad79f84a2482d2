"""What masking a teacher costs, from its configuration alone: bytes to read and to write, and seconds at a throughput measured on this machine."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..files import whole_file, write_json
from . import models
from .families import family_of
from .mask import apply_mask, maskable, plan_masks
from .recipe import Mask

TIMED_WEIGHTS = 1 << 23
TIMED_FILE = 1 << 25  # bytes
TIMED_RATIOS = (0.0, 0.05, 0.1, 0.15, 0.2)


@dataclass(frozen=True)
class Throughput:
    """Bytes a second: of weights whose thresholds are found and of weights that are masked, both in memory, and of a disk."""

    count: float
    zero: float
    read: float
    write: float


@dataclass(frozen=True)
class Cost:
    """Bytes from and to the disk, and seconds, in which one thing waits for the other."""

    read_bytes: int
    write_bytes: int
    seconds: float


@dataclass(frozen=True)
class RatioCost:
    """One mask ratio: how many weights it zeroes, in place when the ratio falls to it from the one before, and as a checkpoint of its own."""

    ratio: float
    zeroed: int
    in_place: Cost
    materialized: Cost


@dataclass(frozen=True)
class MaskCost:
    """A teacher's masks: `weights` of `tensors` matrices, `bytes` of the checkpoint's `total_bytes`; `thresholds` are found once for all ratios."""

    tensors: int
    weights: int
    bytes: int
    total_bytes: int
    largest_bytes: int  # of one tensor: what planning and materialising hold in memory
    thresholds: Cost
    ratios: tuple[RatioCost, ...]
    throughput: Throughput


def mask_cost(config: Any, mask: Mask, ratios: Iterable[float], throughput: Throughput, dtype: torch.dtype | None = None) -> MaskCost:
    """The cost of `ratios` for a model of this configuration, stored as `dtype` (by default the configuration's own). No weights are needed.

    In place: the first and highest ratio masks what was loaded anyway; every lower one reads the masked matrices from the disk again.
    """
    model = models.skeleton(config)
    size = (dtype or config.dtype or torch.float32).itemsize
    chosen = maskable(model, family_of(config.model_type).LANGUAGE, mask.exclude, mask.include)
    weights, total = sum(t.numel() for t in chosen.values()), size * sum(p.numel() for p in model.parameters())
    part, found = size * weights, []
    for place, ratio in enumerate(sorted(set(ratios), reverse=True)):
        again, zero = part * (place > 0), part / throughput.zero * (ratio > 0)
        in_place = Cost(again, 0, again / throughput.read + zero)
        written = Cost(total, total, total / throughput.read + total / throughput.write + zero)
        found.append(RatioCost(ratio, sum(round(ratio * t.numel()) for t in chosen.values()), in_place, written))
    thresholds = Cost(part, 0, part / throughput.read + part / throughput.count)
    largest = size * max(t.numel() for t in chosen.values())
    return MaskCost(len(chosen), weights, part, total, largest, thresholds, tuple(found), throughput)


def write_costs(path: Path, teachers: Sequence[tuple[Path, Sequence[float]]], mask: Mask, dtype: torch.dtype) -> None:
    """Write what the masks of some teachers (folder and ratios) take on this machine, with `path`'s disk."""
    throughput = measure_throughput(path.parent, dtype)
    rows = [{"teacher": str(folder)} | dataclasses.asdict(mask_cost(models.read_config(folder), mask, ratios, throughput)) for folder, ratios in teachers]
    write_json(path, rows)


@cache
def measure_throughput(disk: Path, dtype: torch.dtype = torch.bfloat16) -> Throughput:
    """What this machine does with weights of `dtype`, and the disk that holds `disk`, whose cache is asked to forget what is read. Takes about a second."""
    weights = {"w": torch.randn(TIMED_WEIGHTS, generator=torch.Generator().manual_seed(0)).to(dtype)}
    plans = plan_masks(weights, TIMED_RATIOS)
    size = TIMED_WEIGHTS * dtype.itemsize
    count = _seconds(lambda: plan_masks(weights, TIMED_RATIOS))
    zero = _seconds(lambda: apply_mask(weights, plans, TIMED_RATIOS[-1]))
    path, content = disk / ".throughput.part", os.urandom(TIMED_FILE)  # a name that a run removes, should this be killed
    try:
        write = _seconds(lambda: _write(path, content), times=1)
        read = _seconds(lambda: _read(path))
    finally:
        with suppress(OSError):
            path.unlink()
    return Throughput(size / count, size / zero, TIMED_FILE / read, TIMED_FILE / write)


def _seconds(work: Callable[[], Any], times: int = 3) -> float:
    """The median."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def _write(path: Path, content: bytes) -> None:
    with whole_file(path) as part:  # which waits for the disk
        part.write_bytes(content)


def _read(path: Path) -> None:
    with open(path, "rb", buffering=0) as handle:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while handle.read(1 << 20):
            pass
