"""Fixtures that every folder of tests shares, and the thread counts: two busy pools on two cores waste both."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

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
