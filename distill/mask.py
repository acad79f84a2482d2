"""Magnitude masks of a teacher's linear weights: exact thresholds for every ratio from one histogram a tensor.

M_r = 1 where |w| >= lambda_r, else 0 (Masters, arXiv 2512.22238, section 3), lambda_r being the magnitude below which a fraction r of the
weights lies: of one tensor by default, of one block or of the whole model for experiments. The magnitudes of a 16-bit type have only
32,768 codes, in the order of their size, so counting codes is sorting; float32 takes a second count inside the code that a rank falls into.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import ModelError, RecipeError

SCOPES = ("per_tensor", "per_block", "global")
CODES = 1 << 15  # magnitudes of a 16-bit float
CHUNK = 1 << 24  # weights counted at once: the counter works on wider integers


@dataclass(frozen=True)
class TensorMask:
    """One tensor's thresholds and the share of its weights that each of them zeroes, both by ratio."""

    name: str
    weights: int
    thresholds: dict[float, float]
    reached: dict[float, float]

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> TensorMask:
        """The inverse of `dataclasses.asdict` followed by JSON, which turns the ratios into strings."""
        thresholds, reached = ({float(ratio): value for ratio, value in row[key].items()} for key in ("thresholds", "reached"))
        return TensorMask(row["name"], row["weights"], thresholds, reached)


def maskable(model: nn.Module, language: Sequence[str], exclude: Sequence[str] = ()) -> dict[str, Tensor]:
    """The weights to mask, by name: those of linear layers whose name contains one of `language` and matches none of `exclude` (regular expressions).

    Embeddings, the output head, norms, biases, the vision tower and the projector lie outside a family's `language`.
    """
    linear = {f"{name}.weight": module.weight.data for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = {name: w for name, w in linear.items() if any(part in name for part in language) and not any(re.search(e, name) for e in exclude)}
    if not chosen:
        raise ModelError(f"no linear weight is named after {' or '.join(language)}; expected the language model's attention and MLP there")
    return chosen


def plan_masks(tensors: Mapping[str, Tensor], ratios: Iterable[float], scope: str = "per_tensor") -> list[TensorMask]:
    """Thresholds of every tensor for every ratio. Equal magnitudes are kept together, so the ratio reached can be lower than the one asked for."""
    if scope not in SCOPES:
        raise RecipeError(f"unknown mask scope '{scope}'; expected one of {', '.join(SCOPES)}")
    ratios = sorted(set(ratios))
    groups: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        groups[_group(name, scope)].append(name)
    found = {}
    for names in groups.values():
        limits = dict(zip(ratios, thresholds([tensors[name] for name in names], ratios), strict=True))
        found.update(dict.fromkeys(names, limits))
    return [_tensor_mask(name, tensor, found[name]) for name, tensor in tensors.items()]


def thresholds(tensors: Sequence[Tensor], ratios: Sequence[float]) -> list[float]:
    """lambda_r over all `tensors` together for each ratio: the magnitude of rank round(r * n), so that at most that many lie below it."""
    total = sum(t.numel() for t in tensors)
    ranks = [round(ratio * total) for ratio in ratios]
    high = sum(_count(t, level=0) for t in tensors)
    assert isinstance(high, Tensor)
    below = high.cumsum(0)
    codes = torch.searchsorted(below, torch.tensor(ranks, device=below.device), right=True).tolist()
    if all(t.element_size() == 2 for t in tensors):
        return [_from_code(code, tensors[0].dtype) for code in codes]
    return [_refine(tensors, code, rank - (int(below[code - 1]) if code else 0)) for code, rank in zip(codes, ranks, strict=True)]


def apply_mask(tensors: Mapping[str, Tensor], masks: Sequence[TensorMask], ratio: float) -> None:
    """Zero, in place, the weights below the threshold of `ratio`. Masks are nested, so a higher ratio needs no reload; a lower one does."""
    for mask in masks:
        weight = tensors[mask.name]
        weight.masked_fill_(weight.abs() < mask.thresholds[ratio], 0)


def restore(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Copy the unmasked weights back, in place, from the memory-mapped safetensors in `folder`."""
    missing = set(tensors)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in missing.intersection(stored.keys()):
                tensors[name].copy_(stored.get_tensor(name))
            missing.difference_update(stored.keys())
    if missing:
        raise ModelError(f"{folder} stores no tensor {sorted(missing)[0]}; expected the checkpoint from which the teacher was loaded")


def _group(name: str, scope: str) -> str:
    if scope == "per_tensor":
        return name
    block = re.match(r"(.*?\.\d+)\.", name)
    return block.group(1) if scope == "per_block" and block else ""


def _tensor_mask(name: str, tensor: Tensor, limits: dict[float, float]) -> TensorMask:
    magnitudes = tensor.abs()
    reached = {ratio: int((magnitudes < limit).sum()) / tensor.numel() for ratio, limit in limits.items()}
    return TensorMask(name, tensor.numel(), limits, reached)


def _count(tensor: Tensor, level: int, code: int = 0) -> Tensor:
    """How often each code occurs: the upper 16 bits of the magnitude at level 0; at level 1 the lower 16 bits of those whose upper are `code`."""
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ModelError(f"a weight to mask is {tensor.dtype}; expected bfloat16, float16 or float32, load the teacher unquantised")
    counts = torch.zeros(CODES if level == 0 else 1 << 16, dtype=torch.long, device=tensor.device)
    for chunk in tensor.detach().flatten().split(CHUNK):
        if not chunk.isfinite().all():
            raise ModelError("a weight to mask is not finite; expected a whole checkpoint, download it again")
        if chunk.element_size() == 2:
            codes = chunk.view(torch.int16) & 0x7FFF
        else:
            bits = chunk.view(torch.int32) & 0x7FFFFFFF
            codes = bits >> 16 if level == 0 else bits[bits >> 16 == code] & 0xFFFF
        counts += torch.bincount(codes, minlength=len(counts))
    return counts


def _refine(tensors: Sequence[Tensor], code: int, rank: int) -> float:
    """The float32 magnitude of rank `rank` among those whose upper 16 bits are `code`; infinity past the last one."""
    if code >= CODES:
        return float("inf")
    counts = sum(_count(t, level=1, code=code) for t in tensors)
    assert isinstance(counts, Tensor)
    low = int(torch.searchsorted(counts.cumsum(0), torch.tensor(rank, device=counts.device), right=True))
    return float(torch.tensor((code << 16) | low, dtype=torch.int32).view(torch.float32))


def _from_code(code: int, dtype: torch.dtype) -> float:
    return float(torch.tensor(code, dtype=torch.int16).view(dtype)) if code < CODES else float("inf")
