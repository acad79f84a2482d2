"""Runs of `distill` in processes of their own, which can be killed as a real one can; the imports are paid for once."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

QUESTIONS_PER_FILE = 4
REFUSED = 2

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "masters.distill.stages",
        "transformers.models.idefics3.modeling_idefics3",
        "transformers.models.idefics3.processing_idefics3",
        "transformers.models.idefics3.image_processing_pil_idefics3",
    ]
)


def start(values: dict[str, Any], complaint: Path, until: str = "student") -> BaseProcess:
    """Begin `distill` on a recipe's plain values; a refusal is written to `complaint`, as the command line would print it."""
    process = context.Process(target=_work, args=(values, complaint, until), daemon=True)
    process.start()
    return process


def run(values: dict[str, Any], complaint: Path, seconds: float = 300, until: str = "student") -> None:
    """Run to the end."""
    process = start(values, complaint, until)
    process.join(seconds)
    assert process.exitcode == 0, complaint.read_text() if complaint.exists() else f"exit code {process.exitcode}"


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file, of a part that is being written none."""
    found: list[dict[str, Any]] = [] if path.name.startswith(".") else pq.read_table(path).to_pylist()
    return found


def kill_when(process: BaseProcess, reached: Callable[[], bool], delay: float, seconds: float = 300) -> None:
    """SIGKILL the process `delay` seconds after `reached` first holds."""
    end = time.monotonic() + seconds
    while not reached():
        assert process.is_alive(), f"ended with {process.exitcode} before it could be killed"
        assert time.monotonic() < end, "the moment to kill it never came"
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -9, "it was to be killed, and had ended by itself"


def _work(values: dict[str, Any], complaint: Path, until: str) -> None:
    import torch

    from masters.distill import stages
    from masters.distill.recipe import build_recipe
    from masters.errors import MastersError

    torch.set_num_threads(1)
    stages.QUESTIONS_PER_FILE = QUESTIONS_PER_FILE
    try:
        stages.distill(build_recipe(values), until)
    except MastersError as error:
        complaint.write_text(f"{type(error).__name__}: {error}")
        os._exit(REFUSED)
