"""Magnitude masks of a teacher's linear weights: exact thresholds for every ratio from one histogram a tensor.

M_r = 1 where |w| >= lambda_r, else 0 (Masters, arXiv 2512.22238, section 3), lambda_r being the magnitude below which a fraction r of the
weights lies: of one tensor by default, of one block or of the whole model for experiments. The magnitudes of a 16-bit type have only
32,768 codes, in the order of their size, so counting codes is sorting; float32 takes a second count inside the code that a rank falls into.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, RecipeError
from ..files import read_json, write_json
from ..progress import bar
from .stored import Stored, read_tensor, stored_as

SCOPES = ("per_tensor", "per_block", "global")
CODES = 1 << 15  # magnitudes of a 16-bit float
LOWER = 1 << 16  # float32 magnitudes that share their upper 16 bits
INFINITE = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F80 << 16}  # the magnitude's bits from which on nothing is finite
CHUNK = 1 << 18  # weights counted at once: what a core's cache holds


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


def maskable(model: nn.Module, language: Sequence[str], exclude: Sequence[str] = (), include: Sequence[str] = ()) -> dict[str, Tensor]:
    """The weights to mask, by name: those of linear layers whose name contains one of `language` or matches one of `include`, and none of `exclude`.

    Embeddings, the output head, norms, biases, the vision tower and the projector lie outside a family's `language`; `include` and `exclude`
    are regular expressions. Raises ModelError if nothing is left, or if a weight is chosen that another module uses as well.
    """
    linear = {f"{name}.weight": module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    wanted = {name for name in linear if any(part in name for part in language) or any(re.search(i, name) for i in include)}
    chosen = {name: linear[name] for name in linear if name in wanted and not any(re.search(e, name) for e in exclude)}
    if not chosen:
        raise ModelError(f"no linear weight is named after {' or '.join((*language, *include))}; expected the language model's attention and MLP there")
    users: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users[id(parameter)].append(name)
    for name, weight in chosen.items():
        if shared := [other for other in users[id(weight)] if other != name]:
            raise ModelError(f"{name} is also {shared[0]}, which a mask would change too; expected a weight of one module, leave it whole by mask.exclude")
    return {name: weight.data for name, weight in chosen.items()}


def plan_masks(tensors: Mapping[str, Tensor], ratios: Iterable[float], scope: str = "per_tensor") -> list[TensorMask]:
    """Thresholds of every tensor for every ratio. Equal magnitudes are kept together, so the ratio reached can be lower than the one asked for.

    Tensors are asked for one at a time and let go, so a mapping that reads them from files needs no more memory than the largest.
    """
    if scope not in SCOPES:
        raise RecipeError(f"unknown mask scope '{scope}'; expected one of {', '.join(SCOPES)}")
    ratios = sorted(set(ratios))
    groups: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        groups[_group(name, scope)].append(name)
    found = {mask.name: mask for names in bar(groups.values(), "mask thresholds") for mask in _plan_group(tensors, names, ratios)}
    return [found[name] for name in tensors]


def keep_masks(path: Path, weights: Callable[[], Mapping[str, Tensor]], ratios: Iterable[float], scope: str) -> None:
    """Plan masks from `weights` and write them to the file at `path`, where it or one of the ratios is missing.

    Of ratio 0 alone there are none, and the weights are not asked for.
    """
    found = [TensorMask.from_json(row) for row in read_json(path)] if path.exists() else None
    known = {ratio for mask in (found or ())[:1] for ratio in mask.thresholds}
    wanted = {*ratios} | known
    if found is None or (any(wanted) and wanted != known):
        found = plan_masks(weights(), wanted, scope) if any(wanted) else []
        write_json(path, [dataclasses.asdict(mask) for mask in found])


def thresholds(tensors: Sequence[Tensor], ratios: Sequence[float]) -> list[float]:
    """lambda_r over all `tensors` together for each ratio: the magnitude of rank round(r * n), so that at most that many lie below it.

    Where that rank is n, as in a tensor of a few weights, it is the next magnitude above the largest.
    """
    named = {str(i): tensor for i, tensor in enumerate(tensors)}
    [first, *_] = _plan_group(named, list(named), ratios)
    return [first.thresholds[ratio] for ratio in ratios]


def apply_mask(tensors: Mapping[str, Tensor], masks: Sequence[TensorMask], ratio: float) -> None:
    """Zero, in place, the weights below the threshold of `ratio`. Masks are nested, so a higher ratio needs no reload; a lower one does."""
    for mask in masks:
        zero_below(tensors[mask.name], mask.thresholds[ratio])


def zero_below(weight: Tensor, threshold: float, dtype: torch.dtype = torch.float32) -> None:
    """Zero, in place, what is smaller than `threshold` as a number of type `dtype`, a few rows at a time."""
    kind = dtype if dtype.itemsize == 2 else weight.dtype
    integer, magnitude = (torch.int16, 0x7FFF) if kind.itemsize == 2 else (torch.int32, 0x7FFFFFFF)
    limit, whole = _bits(threshold, kind), torch.int16 if weight.element_size() == 2 else torch.int32
    for rows in weight.split(max(1, _chunk(weight) // max(1, weight.shape[1:].numel()))):
        # Integers all along: a comparison of magnitudes as such, and a product with 0 or 1, take a third of the time of floats and masked_fill_.
        rows.view(whole).mul_((rows.to(kind).view(integer) & magnitude) >= limit)


def restore(tensors: Mapping[str, Tensor], stored: Mapping[str, Stored], rows: Mapping[str, slice] | None = None) -> None:
    """Copy the unmasked weights back, in place, from the memory-mapped safetensors in which they are `stored`.

    `rows` says which of the stored ones each tensor is, where it is not all of them.
    """
    for name, tensor in tensors.items():
        tensor.copy_(read_tensor(stored_as(stored, name))[rows[name] if rows else slice(None)])


@dataclass(frozen=True)
class _Counts:
    """How often each magnitude occurs in a tensor: by its code, or by the upper 16 bits of a float32 and, of those that matter, the lower ones."""

    upper: Tensor
    lower: Mapping[int, Tensor]

    def below(self, bits: int) -> int:
        """How many magnitudes lie below the one with these bits."""
        if not self.lower:
            return int(self.upper[:bits].sum())
        code, low = divmod(bits, LOWER)
        return int(self.upper[:code].sum()) + (int(self.lower[code][:low].sum()) if low else 0)


def _plan_group(tensors: Mapping[str, Tensor], names: Sequence[str], ratios: Sequence[float]) -> list[TensorMask]:
    """The masks of tensors that share their thresholds."""
    group = {names[0]: tensors[names[0]]} if len(names) == 1 else tensors  # held, for a second count
    sizes, kinds = {}, set()
    for name in names:
        tensor = group[name]
        sizes[name] = tensor.numel()
        kinds.add(tensor.dtype)
    wide = kinds not in ({torch.bfloat16}, {torch.float16})  # several types have the values of float32 in common
    counts = {name: _Counts(_count_upper(group[name], wide), {}) for name in names}
    ranks = [round(ratio * sum(sizes.values())) for ratio in ratios]
    found = [_ranked(_total([c.upper for c in counts.values()]), rank) for rank in ranks]
    bits = [code for code, _ in found]
    if wide:
        codes = sorted(set(bits))
        counts = {name: _Counts(c.upper, _count_lower(group[name], codes)) for name, c in counts.items()}
        lower = {code: _total([c.lower[code] for c in counts.values()]) for code in codes}
        bits = [(code << 16) + _ranked(lower[code], rank)[0] for code, rank in found]
    kind = torch.float32 if wide else kinds.pop()
    # Where every weight lies below, the next magnitude above the largest: finite, since a file has no word for infinity.
    bits = [min(bit + (rank == sum(sizes.values())), INFINITE[kind] - 1) for bit, rank in zip(bits, ranks, strict=True)]
    limits = dict(zip(ratios, (_value(bit, kind) for bit in bits), strict=True))
    return [
        TensorMask(name, sizes[name], limits, {ratio: c.below(bit) / sizes[name] for ratio, bit in zip(ratios, bits, strict=True)})
        for name, c in counts.items()
    ]


def _group(name: str, scope: str) -> str:
    if scope == "per_tensor":
        return name
    block = re.match(r"(.*?\.\d+)\.", name)
    return block.group(1) if scope == "per_block" and block else ""


def _ranked(counts: Tensor, rank: int) -> tuple[int, int]:
    """The code of the magnitude of rank `rank`, the last one's where that is the number of all, and its rank among those of its code."""
    below = counts.cumsum(0)
    code = int(torch.searchsorted(below, torch.tensor(min(rank, int(below[-1]) - 1), device=below.device), right=True))
    return code, rank - (int(below[code - 1]) if code else 0)


def _total(counts: Sequence[Tensor]) -> Tensor:
    return torch.stack([c.to(counts[0].device) for c in counts]).sum(0)


def _count_upper(tensor: Tensor, wide: bool) -> Tensor:
    """How often each code occurs [CODES]: all bits of a 16-bit magnitude or, if `wide`, the upper 16 of the magnitude as float32."""
    if tensor.dtype not in INFINITE:
        raise ModelError(f"a weight to mask is {tensor.dtype}; expected bfloat16, float16 or float32, load the teacher unquantised")
    counts = torch.zeros(CODES, dtype=torch.long, device=tensor.device)
    for chunk in _chunks(tensor):
        counts += torch.bincount(_codes(chunk, wide), minlength=CODES)
    if bool(counts[INFINITE[torch.float32] >> 16 if wide else INFINITE[tensor.dtype] :].any()):
        raise ModelError("a weight to mask is not finite; expected a whole checkpoint, download it again")
    return counts


def _count_lower(tensor: Tensor, codes: Sequence[int]) -> dict[int, Tensor]:
    """How often each lower half occurs [LOWER] among the float32 magnitudes whose upper half is one of `codes`."""
    picked: list[Tensor] = []
    for chunk in _chunks(tensor):
        upper = _codes(chunk, wide=True)
        chosen = upper == codes[0]
        for code in codes[1:]:
            chosen |= upper == code
        picked.append(chunk.float()[chosen].view(torch.int32) & 0x7FFFFFFF)
    bits = torch.cat(picked)
    return {code: torch.bincount(bits[bits >> 16 == code] & 0xFFFF, minlength=LOWER) for code in codes}


def _chunks(tensor: Tensor) -> Iterable[Tensor]:
    return tensor.detach().flatten().split(_chunk(tensor))


def _chunk(tensor: Tensor) -> int:
    return CHUNK if tensor.device.type == "cpu" else 64 * CHUNK  # a GPU has no such cache, and waits after each


def _codes(chunk: Tensor, wide: bool) -> Tensor:
    """The magnitudes' 16-bit codes, as int16."""
    return (chunk.float().view(torch.int16)[1::2] if wide else chunk.view(torch.int16)) & 0x7FFF


def _bits(magnitude: float, kind: torch.dtype) -> int:
    """The bits of the smallest number of type `kind` that is no smaller: a threshold that several types share need not be a number of each."""
    near = torch.tensor(magnitude, dtype=torch.float64).to(kind)
    return int(near.view(torch.int32 if kind.itemsize == 4 else torch.int16)) + (float(near) < magnitude)


def _value(bits: int, kind: torch.dtype) -> float:
    if kind == torch.float32:
        return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
    return float(torch.tensor(bits, dtype=torch.int16).view(kind))
