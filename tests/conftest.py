"""Fixtures that every folder of tests shares, and the thread counts: two busy pools on two cores waste both."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(2)

# Without what it declares: of all that its API model and its metrics need these alone are not installed here.
LMMS_EVAL = (
    "lmms-eval==0.7.3", "loguru==0.7.3", "python-dotenv==1.2.4", "evaluate==0.4.6", "pytz==2026.6",
    "tenacity==9.2.1", "sacrebleu==2.6.0", "portalocker==4.4.2", "colorama==0.4.6", "tabulate==0.10.0", "lxml==6.1.3",
)  # fmt: skip


@pytest.fixture(scope="session")
def lmms_eval() -> Path:
    """A folder outside the repository with an evaluation suite that we did not write; installed once a machine."""
    from masters.files import whole_folder

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "masters-tests"
    folder = cache / f"lmms_eval-{hashlib.sha256(' '.join(LMMS_EVAL).encode()).hexdigest()[:12]}"
    if not folder.exists():
        with whole_folder(folder) as part:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(part), *LMMS_EVAL]
            subprocess.run(command, check=True, timeout=300)
    return folder


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
