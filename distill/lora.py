"""Low-rank adapters by peft: trained in place of the student's weights, and merged into them at the end."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import RecipeError
from ..files import whole_folder
from .recipe import Lora


def adapt(student: Any, lora: Lora, language: Sequence[str], seed: int) -> Any:
    """Put adapters on the student's linear layers, in place, and leave nothing else to train; returns peft's view of it.

    Without `lora.targets` they are all linear layers whose name contains one of `language`; otherwise those that one of these regular expressions is found in.
    """
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets(student, lora, language))
    with torch.random.fork_rng():  # they begin alike in every process, and after every interruption
        torch.manual_seed(seed)
        return peft.get_peft_model(student, config)


def targets(student: Any, lora: Lora, language: Sequence[str]) -> list[str]:
    """The names of the linear layers that get adapters, the output matrix not being one. Raises RecipeError if there is none."""
    head = student.get_output_embeddings()  # read as a matrix, past whatever its layer would add
    linear = [name for name, module in student.named_modules() if isinstance(module, nn.Linear) and module is not head]
    if lora.targets:
        found = [name for name in linear if any(re.search(expression, name) for expression in lora.targets)]
    else:
        found = [name for name in linear if any(part in f"{name}." for part in language)]
    if not found:
        raise RecipeError(f"'lora.targets' matches no linear layer of the student; expected some, such as {linear[0]}")
    return found


@contextmanager
def without_adapters(student: nn.Module) -> Iterator[None]:
    """The student as it was before training, for as long as this is open."""
    layers = [module for module in student.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def write_adapter(adapted: Any, folder: Path, base: Path) -> None:
    """The adapters by themselves, in peft's form, for the model in the folder `base`."""
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    with whole_folder(folder, replace=True) as part:
        adapted.save_pretrained(part)
