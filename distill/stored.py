"""A checkpoint's weights by the names that the model gives them, read one at a time from memory-mapped safetensors.

Files may store a weight under another name than the module has it: transformers renames on loading, and its own mapping is asked here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from ..errors import ModelError
from ..files import read_json

INDEX = "model.safetensors.index.json"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # a quantised type stays what it is, for the caller to refuse


@dataclass(frozen=True)
class Stored:
    """Where a weight lies: its file, its name there, its type as safetensors spells it, its shape, and its bytes from `start` to `stop`."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class StoredTensors(Mapping[str, Tensor]):
    """Weights read when they are asked for, as the model computes with them; none is held, so that one tensor at a time is in memory.

    A model of float32 keeps 16-bit weights exactly, so these stay narrow; otherwise they are rounded to `dtype`, as loading the model would.
    """

    def __init__(self, stored: Mapping[str, Stored], names: Iterable[str], dtype: torch.dtype = torch.float32) -> None:
        """Raises ModelError if a name is not stored one to one."""
        self.stored, self.dtype = {name: stored_as(stored, name) for name in names}, dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = read_tensor(self.stored[name])
        narrow = self.dtype == torch.float32 and tensor.dtype in (torch.bfloat16, torch.float16)
        return tensor.to(self.dtype) if tensor.dtype in _FLOATS and not narrow else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index or, without one, all. Raises ModelError where there are none."""
    index = folder / INDEX
    files = {folder / name for name in read_json(index)["weight_map"].values()} if index.is_file() else set(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds a configuration but no weights; expected *.safetensors files beside it")
    return sorted(files)


def stored_weights(folder: Path, model: nn.Module) -> dict[str, Stored]:
    """Where the weights of `model` (one without weights will do) lie in `folder`, by the model's names for them.

    Weights that are put together from several stored ones are left out: there is no one place for them.
    """
    mapping = get_model_conversion_mapping(model)
    converters = [change for change in mapping if isinstance(change, WeightConverter)]
    renamings = [change for change in mapping if not isinstance(change, WeightConverter)]
    state, prefix = model.state_dict(), str(model.base_model_prefix)
    found = {}
    for file in weight_files(folder):
        for place in read_header(file):
            name, converted = rename_source_key(place.key, renamings, converters, prefix, state)
            if converted is None and name in state and tuple(state[name].shape) == place.shape:
                found[name] = place
    return found


def stored_as(stored: Mapping[str, Stored], name: str) -> Stored:
    """The place of one weight. Raises ModelError where the checkpoint has none."""
    if name not in stored:
        folder = next(iter(stored.values())).file.parent if stored else "the checkpoint"
        raise ModelError(f"{folder} stores no tensor {name} as the model holds it; expected the teacher's own checkpoint, or name it in mask.exclude")
    return stored[name]


def read_header(file: Path) -> list[Stored]:
    """What a safetensors file holds, from its header alone. Raises ModelError, naming the file, where it is missing or cut."""
    try:
        with safe_open(file, framework="pt"):  # proves header, offsets and length
            pass
        with open(file, "rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            header: dict[str, Any] = json.loads(handle.read(size))
    except (OSError, SafetensorError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ModelError(f"the weights in {file} can't be read ({reason}); expected a whole checkpoint, download it again") from None
    return [
        Stored(file, key, entry["dtype"], tuple(entry["shape"]), *(8 + size + offset for offset in entry["data_offsets"]))
        for key, entry in header.items()
        if key != "__metadata__"
    ]


def read_tensor(place: Stored) -> Tensor:
    """The stored weight, memory-mapped: its pages are read when they are used, and belong to the file."""
    with safe_open(place.file, framework="pt") as stored:
        tensor: Tensor = stored.get_tensor(place.key)
    return tensor
