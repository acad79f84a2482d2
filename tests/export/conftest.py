"""A random model whose answers vary, and its bundles, exported once a precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tiny_models
import torch
from int4_weights import level_of, with_int4_weights
from qwen_models import build
from vision_once import reuse_vision

from masters.demo.models import build_model, build_processor, build_tokenizer, save_model
from masters.export import ExportConfig, export
from masters.export.awkward import awkward_images
from masters.export.parity import QUESTIONS
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
def int4_source(lively_source: Source) -> Source:
    """The same in PyTorch with the weights that 'decoder=int4,embed=int4' stores: what such a bundle must compute exactly."""
    return with_int4_weights(lively_source)


@pytest.fixture(scope="session")
def bundle_of(lively_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """bundle_of(precision): the folder of an ONNX bundle. fp32, fp16 and int4 trace the vision tower, the others start from fp32's graph."""
    folder = tmp_path_factory.mktemp("bundles")

    @cache
    def exported(precision: str) -> Path:
        out = folder / precision.replace("=", "-").replace(",", "_")  # transformers.js takes it for a repository name
        with pytest.MonkeyPatch.context() as patch:
            if precision not in ("fp32", "fp16", "int4"):
                reuse_vision(patch, exported("fp32"))
            export(ExportConfig(lively_vlm, "onnx", out, precision, accuracy_level=level_of(precision)))
        return out

    return exported


@pytest.fixture(scope="session")
def qwen_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    """qwen_source(model_type): a tiny random Qwen model."""
    folder = tmp_path_factory.mktemp("qwen")
    return cache(lambda family: load_source(build(family, folder / family)))


@pytest.fixture(scope="session")
def qwen_bundle(qwen_source: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """qwen_bundle(model_type, precision): the folder of its ONNX bundle."""
    folder = tmp_path_factory.mktemp("qwen_bundles")

    @cache
    def exported(family: str, precision: str) -> Path:
        out = folder / f"{family}-{precision}".replace("=", "-").replace(",", "_")
        export(ExportConfig(qwen_source(family).folder, "onnx", out, precision, accuracy_level=level_of(precision)))
        return out

    return exported


@pytest.fixture(scope="session")
def family_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    """family_source(model_type): a tiny random model of tests/tiny_models.py."""
    return cache(lambda name: load_source(getattr(tiny_models, name)(tmp_path_factory.mktemp(name) / "model")))


@pytest.fixture(scope="session")
def family_bundle(family_source: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """family_bundle(model_type, precision): its ONNX bundle; int8 and int4 start from fp32's vision graph."""

    @cache
    def exported(name: str, precision: str) -> Path:
        out = tmp_path_factory.mktemp("bundles") / f"{name}-{precision}"
        with pytest.MonkeyPatch.context() as patch:
            if precision in ("int8", "int4"):
                reuse_vision(patch, exported(name, "fp32"))
            export(ExportConfig(family_source(name).folder, "onnx", out, precision))
        return out

    return exported


@pytest.fixture(scope="session")
def questions_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four questions without answers, about awkward images."""
    folder = tmp_path_factory.mktemp("questions")
    rows: list[str] = []
    for name in ("plain", "grey", "alpha", "rotated"):
        (folder / name).write_bytes(awkward_images()[name])
        rows.append(json.dumps({"id": name, "images": [name], "question": QUESTIONS[len(rows) % 2]}))
    (folder / "questions.jsonl").write_text("\n".join(rows))
    return folder / "questions.jsonl"
