"""`materialize(config)`: a teacher's checkpoint with its mask written into the weights, an ordinary Hugging Face folder for engines that know no masks.

Each file is copied and then masked in place, one weight at a time, so that one file is open and one weight in memory whatever the model's size.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

import torch

from ..errors import MastersError, ModelError, RecipeError
from ..files import whole_folder, write_json
from ..progress import bar
from . import models
from .mask import TensorMask, plan_masks, zero_below
from .recipe import Recipe
from .stored import Stored, stored_as, stored_weights, weight_files

# What a checkpoint folder may hold besides the files in use: the same weights in other forms, and what a download left.
OTHERS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", ".*")
TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class MaterializeConfig:
    """Which of a recipe's teachers to write out, at which mask ratio, and where."""

    recipe: Recipe
    ratio: float
    out: Path
    teacher: int = 0
    force: bool = False


def materialize(config: MaterializeConfig) -> Path:
    """Write the teacher's masked checkpoint to `out`, with mask.json beside the weights, and return that folder.

    The mask is that of a run with this recipe. Raises RecipeError for a ratio or a teacher that can't be, ModelError for an incomplete checkpoint,
    and MastersError where `out` exists or can't be written; nothing half-written is left.
    """
    recipe = config.recipe
    if not 0 <= config.ratio < 1:
        raise RecipeError(f"the mask ratio is {config.ratio}; expected at least 0 and less than 1")
    if not 0 <= config.teacher < len(recipe.teachers):
        raise RecipeError(f"the recipe has no teacher {config.teacher}; expected a number from 0 to {len(recipe.teachers) - 1}")
    if config.out.exists() and not config.force:
        raise MastersError(f"{config.out} exists already; choose another output folder, or pass --force to replace it")
    source, dtype = recipe.teachers[config.teacher].model, getattr(torch, recipe.train.dtype)
    weights = models.weights_to_mask(source, recipe.mask, dtype)
    return write_masked(source, config.out, plan_masks(weights, [config.ratio], recipe.mask.scope), config.ratio, dtype, config.force)


def write_masked(source: Path, out: Path, masks: Sequence[TensorMask], ratio: float, dtype: torch.dtype = torch.float32, replace: bool = False) -> Path:
    """Copy the checkpoint in `source` to `out` with the weights below the thresholds of `ratio` set to zero.

    `dtype` is the type for which the masks were planned: weights stored wider are compared as it rounds them, and stay as wide as they are.
    """
    stored = stored_weights(source, models.skeleton(models.read_config(source)))
    work: dict[Path, list[tuple[Stored, TensorMask]]] = defaultdict(list)
    for mask in masks:
        place = stored_as(stored, mask.name)
        work[place.file].append((place, mask))
    with whole_folder(out, replace) as part:
        for file in _other_files(source):
            _copy(file, part / file.relative_to(source))
        for file in bar(weight_files(source), f"masking {source.name} at {ratio:g}"):
            _write_shard(file, part / file.relative_to(source), work[file], ratio, dtype)
        write_json(part / "mask.json", {"ratio": ratio, "tensors": [_at(mask, ratio) for mask in masks]})
    return out


def _other_files(folder: Path) -> list[Path]:
    """Configuration, tokenizer, processor and whatever else is no weights."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return [file for file in files if not any(fnmatch(name, other) for name in file.relative_to(folder).parts for other in OTHERS)]


def _copy(source: Path, target: Path) -> None:
    """The contents alone: a link in a download's cache becomes a file, and one that can't be written to becomes one that can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)  # by the kernel: nothing of it passes through this process


def _write_shard(source: Path, target: Path, work: Sequence[tuple[Stored, TensorMask]], ratio: float, dtype: torch.dtype) -> None:
    _copy(source, target)
    with open(target, "r+b") as handle:
        for place, mask in work:
            _zero_in(handle, place, mask.thresholds[ratio], dtype)


def _zero_in(handle: BinaryIO, place: Stored, threshold: float, dtype: torch.dtype) -> None:
    """Set to zero, in the file, what lies below `threshold` in one weight."""
    if place.dtype not in TYPES:
        raise ModelError(f"{place.file} stores {place.key} as {place.dtype}; expected one of {', '.join(TYPES)}, use an unquantised checkpoint")
    handle.seek(place.start)
    held = bytearray(handle.read(place.stop - place.start))
    zero_below(torch.frombuffer(held, dtype=TYPES[place.dtype]), threshold, dtype)
    handle.seek(place.start)
    handle.write(held)


def _at(mask: TensorMask, ratio: float) -> Mapping[str, object]:
    return dataclasses.asdict(mask) | {"thresholds": {ratio: mask.thresholds[ratio]}, "reached": {ratio: mask.reached[ratio]}}
