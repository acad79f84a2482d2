"""A random model whose answers vary, and its bundles, exported once a precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from masters.demo.models import build_model, build_processor, build_tokenizer, save_model
from masters.export import ExportConfig, export
from masters.export.source import Source, load_source


@pytest.fixture(scope="session")
def lively_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's student with wide random weights: near-zero ones repeat one token for ever, and a broken cache would go unseen."""
    folder = tmp_path_factory.mktemp("lively_vlm") / "model"
    tokenizer = build_tokenizer()
    model = build_model("student", tokenizer, seed=5)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.5 if "vision" in name else 6.0 / weight.shape[-1] ** 0.5
            if weight.ndim >= 2 and "embed" not in name:
                weight.normal_(0, min(scale, 0.25), generator=generator)
            elif "embed_tokens" in name or "bias" in name or "position" in name:
                weight.normal_(0, 0.3, generator=generator)
    save_model(folder, model, build_processor(tokenizer))
    return folder


@pytest.fixture(scope="session")
def lively_source(lively_vlm: Path) -> Source:
    return load_source(lively_vlm)


@pytest.fixture(scope="session")
def bundle_of(lively_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """bundle_of(precision): the folder of an ONNX bundle."""
    folder = tmp_path_factory.mktemp("bundles")

    @cache
    def exported(precision: str) -> Path:
        out = folder / precision
        export(ExportConfig(lively_vlm, "onnx", out, precision))
        return out

    return exported
