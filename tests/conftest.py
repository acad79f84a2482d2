"""Fixtures that every folder of tests shares, and the thread counts: two busy pools on two cores waste both."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def random_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Idefics3 of the demo's student size with random weights, as an ordinary Hugging Face folder."""
    from masters.demo.models import build_model, build_processor, build_tokenizer, save_model

    folder = tmp_path_factory.mktemp("random_vlm") / "model"
    tokenizer = build_tokenizer()
    save_model(folder, build_model("student", tokenizer), build_processor(tokenizer))
    return folder


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a file system of a given size ('256k', '2m'), which a test can fill for real."""
    made: list[Path] = []

    def make(size: str) -> Path:
        place = tmp_path / f"disk{len(made)}"
        place.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "masters-test", str(place)], capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"can't mount a small file system here: {mounted.stderr.strip()}")
        made.append(place)
        return place

    yield make
    for place in made:
        subprocess.run(["umount", "-l", str(place)], check=True)
