"""The student that a run leaves: its trained weights in an ordinary Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from . import lora, models
from .checkpoint import read_checkpoint, set_weights
from .families import family_of
from .recipe import Recipe

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def write_model(model: Any, processor: Any, source: Path, folder: Path) -> None:
    """An ordinary Hugging Face folder with the processor files of `source`, the student's own."""
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(str(error).splitlines()[0]) from error
    processor.save_pretrained(folder)
    for name in PROCESSOR_FILES:  # as they came, settings for videos included
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def trained_student(recipe: Recipe, keep: str, adapter: Path | None = None) -> Any:
    """The 'last' or the 'best' weights of a run in bfloat16, adapters merged, and kept in the folder `adapter` if one is named."""
    student = models.load_model(recipe.student, torch.float32)
    weights = read_checkpoint(recipe.out / "checkpoints" / f"{keep}.pt")["student"]
    if not recipe.lora:
        set_weights(student, weights)
        return student.to(torch.bfloat16)
    adapted = lora.adapt(student, recipe.lora, family_of(student.config.model_type).LANGUAGE, recipe.seed)
    set_weights(student, weights)
    if adapter:
        lora.write_adapter(adapted, adapter, recipe.student)
    return adapted.merge_and_unload().to(torch.bfloat16)
