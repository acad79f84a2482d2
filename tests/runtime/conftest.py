"""A bundle as `masters export` writes it, and the PyTorch model that it came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch_reference import Torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from masters.export import ExportConfig, export
from masters.runtime import Vlm, load


@pytest.fixture(scope="session")
def lively_vlm(random_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model with larger weights, so that answers vary with question and image, and with tiles: 2 x 2 and the whole."""
    model = AutoModelForImageTextToText.from_pretrained(random_vlm, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(2 if "embed_tokens" in name else 5)
    folder = tmp_path_factory.mktemp("lively_vlm") / "model"
    model.save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(random_vlm)
    processor.image_processor.do_image_splitting = True
    processor.image_processor.size = {"longest_edge": 128}
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pytorch(lively_vlm: Path) -> Torch:
    model = AutoModelForImageTextToText.from_pretrained(lively_vlm, dtype=torch.float32).eval()
    return Torch(model, AutoProcessor.from_pretrained(lively_vlm, backend="pil"))


@pytest.fixture(scope="session")
def bundle(lively_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp32 ONNX bundle; tests that change it take a copy."""
    out = tmp_path_factory.mktemp("bundles") / "fp32"
    export(ExportConfig(lively_vlm, "onnx", out))
    return out


@pytest.fixture(scope="session")
def vlm(bundle: Path) -> Vlm:
    return load(bundle, threads=2)
