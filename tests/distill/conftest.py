"""What the tests of the distill stage share: two tiny random models that fit each other, and a few questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention

from masters.demo.data import DemoSizes, build_data
from masters.demo.models import build_model, build_processor, build_tokenizer, save_model
from masters.distill import attention
from masters.distill.inputs import Encoder
from masters.samples import Sample, read_samples


@dataclass(frozen=True)
class Models:
    """Two Hugging Face folders with random weights, of one tokenizer."""

    teacher: Path
    student: Path


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlexAttention chosen on a CPU as it is on a GPU, uncompiled, its gradients, which PyTorch has but refuses there, included."""
    monkeypatch.setattr(attention, "FLEX_DEVICES", ("cpu",))
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    attention._proved.cache_clear()
    with torch.compiler.set_stance("force_eager"):
        yield
    attention._proved.cache_clear()


@pytest.fixture(scope="session")
def processor() -> Any:
    return build_processor(build_tokenizer())


@pytest.fixture(scope="session")
def models(processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    found = Models(folder / "teacher", folder / "student")
    save_model(found.teacher, build_model("teacher", processor.tokenizer, seed=1), processor)
    save_model(found.student, build_model("student", processor.tokenizer, seed=2), processor)
    return found


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl (40 questions), validation.jsonl (8) and their images."""
    folder = tmp_path_factory.mktemp("questions") / "data"
    build_data(folder, DemoSizes(train=40, validation=8, test=2, ood=2))
    return folder


@pytest.fixture(scope="session")
def samples(questions: Path) -> list[Sample]:
    return read_samples(questions / "train.jsonl")


@pytest.fixture(scope="session")
def encoder(processor: Any) -> Encoder:
    return Encoder(processor)


@pytest.fixture(scope="session")
def tiny(processor: Any) -> Any:
    """A student-sized model in float32, for reading only."""
    return build_model("student", processor.tokenizer, seed=3).to(torch.float32).eval()


@pytest.fixture(scope="session")
def tiny_teacher(processor: Any) -> Any:
    """A teacher-sized model in float32, for reading only."""
    return build_model("teacher", processor.tokenizer, seed=4).to(torch.float32).eval()


@pytest.fixture
def small_disk(disk_of: Callable[[str], Path]) -> Path:
    """A file system of 64 KiB."""
    return disk_of("64k")
