"""The teacher's last hidden states at response positions, computed once and kept, so that training needs no teacher in memory.

Times the output matrix, which is kept too, they are the teacher's logits, in hidden / vocabulary of their space. A state depends on the prompt and
on the response's tokens before it alone, so responses that begin alike share the states of what they have in common.

One safetensors file a chunk of Q questions with J distinct responses in all: `states` [N, hidden] in the teacher's type; `rows` int32 [Q], how many
states are each question's; `responses` int32 [Q], how many responses; `lengths` int32 [J] of them; `tokens` int32, theirs one after the other; as
metadata the questions' ids, the name of the file with the output matrix, and a mark of the recipe and the teacher.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import RunError
from ..files import whole_file
from ..samples import Sample
from . import ranks
from .forward import Group, PackedBatch, move, pack, response_states
from .inputs import CollatePixels, Encoder
from .parallel import STAND_IN, Hooked, head_of, own, within
from .reading import Reading, behind, prompt_reading, total
from .responses import DistinctResponse

FORWARD_TOKENS = 1 << 14  # padded tokens that the teacher reads at once
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32"}
INDEX = ("rows", "responses", "lengths", "tokens")

Response = tuple[int, ...]
Rows = dict[tuple[int, int], int]


@dataclass(frozen=True)
class Layout:
    """What a file holds states of: the questions' ids, in its order, and the distinct responses to each."""

    samples: tuple[str, ...]
    responses: tuple[tuple[Response, ...], ...]

    def index(self) -> dict[str, np.ndarray]:
        """The file's tensors but for the states."""
        lengths = [len(ids) for group in self.responses for ids in group]
        tokens = [token for group in self.responses for ids in group for token in ids]
        values = [1 + len(prefixes(group)) for group in self.responses], [len(group) for group in self.responses], lengths, tokens
        return {name: np.asarray(v, dtype="<i4") for name, v in zip(INDEX, values, strict=True)}


def prefixes(responses: Iterable[Sequence[int]]) -> Rows:
    """The row of every distinct beginning of one question's responses, by the row of what is one token shorter and that token; the empty one is row 0."""
    rows: Rows = {}
    for ids in responses:
        row = 0
        for token in ids[:-1]:
            row = rows.setdefault((row, token), len(rows) + 1)
    return rows


def walk(rows: Rows, ids: Sequence[int]) -> list[int]:
    """The rows whose states predict each token of a response. Raises KeyError if it begins as none of those that `rows` were made of."""
    found = [0]
    for token in ids[:-1]:
        found.append(rows[found[-1], token])
    return found


def lay_out(samples: Sequence[Sample], responses: Mapping[str, Sequence[DistinctResponse]]) -> Layout:
    """A chunk of questions, those without a response left out, in an order in which little of a batch is padding."""
    order = sorted((s for s in samples if responses.get(s.id)), key=lambda sample: (len(sample.prompt), sample.id))
    return Layout(tuple(s.id for s in order), tuple(tuple(r.ids for r in responses[s.id]) for s in order))


@dataclass(frozen=True)
class SignalReader:
    """How a teacher reads questions with their responses: as in training."""

    encoder: Encoder
    collate: CollatePixels
    shared: bool  # whether responses share a prompt
    dtype: torch.dtype

    def write(self, path: Path, layout: Layout, samples: Sequence[Sample], teacher: Any, metadata: Mapping[str, str]) -> Reading:
        """Write the states of a chunk of questions, whole or not at all; those of one forward are the most that is in memory. Returns what was read.

        Raises RunError, before any work, where the disk is too full for them.
        """
        index, by_id = layout.index(), {sample.id: sample for sample in samples}
        head = head_of(teacher)
        states = (head.dtype, (int(index["rows"].sum()), head.shape[1]))
        shapes = {name: (torch.int32, values.shape) for name, values in index.items()} | {"states": states}
        groups = (Group(self.encoder.prompt(by_id[name]), ids, name) for name, ids in zip(layout.samples, layout.responses, strict=True))
        found = self._all_states(teacher, groups)
        if not ranks.is_main():
            for _ in found:
                pass
            return Reading()
        with whole_file(path) as part, open(part, "wb") as handle:
            _check_space(path, shapes)
            handle.write(header(shapes, {"samples": json.dumps(layout.samples), **metadata}))
            for values in index.values():
                handle.write(values.tobytes())
            for computed in found:
                handle.write(_bytes(computed.to("cpu", head.dtype)))
        prompts = {name: prompt_reading(self.encoder.prompt(by_id[name]), teacher.config) for name in layout.samples}
        read = (behind(prompts[name], [len(ids) for ids in group], self.shared) for name, group in zip(layout.samples, layout.responses, strict=True))
        return dataclasses.replace(total(list(read)), logits=0)  # states are kept, logits come in training

    def _all_states(self, teacher: Any, groups: Iterable[Group]) -> Iterator[Tensor]:
        """The distinct states of all groups in their order, to the main process; of as many batches as there are processes each computes one."""
        for batches in _at_a_time(_batches(groups, FORWARD_TOKENS), ranks.count()):
            mine = batches[ranks.index()] if ranks.index() < len(batches) else []
            shown = any(group.prompt.pictured for group in mine) or ranks.count() == 1
            # Weights in shares need every process: one without a batch, or a picture, looks at the stand-in.
            looked_at = mine if shown else [*mine, Group(self.encoder.prompt(STAND_IN), ((self.encoder.eos,),))]
            computed = self.states(teacher, looked_at)
            tokens = sum(len(ids) for group in mine for ids in group.responses)
            parts = ranks.gathered_by_main(_distinct(mine, computed[:tokens]).cpu() if mine else None)
            yield from (part for part in parts if part is not None)

    @torch.no_grad()
    def states(self, teacher: Any, batch: Sequence[Group]) -> Tensor:
        """The states [n, hidden] of all response tokens of some questions."""
        packed = move(pack(batch, self.encoder.pad, self.collate, self.shared), ranks.device())
        with torch.autocast(ranks.device().type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            found: Tensor = within(teacher, response_states, packed)
            return found


def write_head(folder: Path, name: str, ratio: float, teacher: Any, masked: Mapping[str, Tensor], mark: str) -> Path:
    """Write the output matrix [V, hidden] as the tensor `head`, where it is not there yet: once a teacher, or once a ratio if it is among the `masked`."""
    head, matrix = head_of(teacher).detach(), own((teacher.model if isinstance(teacher, Hooked) else teacher).get_output_embeddings().weight)
    changes = any(tensor.data_ptr() == matrix.data_ptr() for tensor in masked.values())
    path = folder / f"{name}{f'-{ratio:g}' if changes else ''}.safetensors"
    if ranks.is_main() and not path.exists():
        shapes = {"head": (head.dtype, tuple(head.shape))}
        with whole_file(path) as part, open(part, "wb") as handle:
            _check_space(path, shapes)
            handle.write(header(shapes, {"mark": mark}))
            for rows in head.split(1 << 14):
                handle.write(_bytes(rows.cpu()))
    return path


def check_signal(path: Path, layout: Layout, mark: str) -> None:
    """Raise RunError unless the file at `path` is whole and holds what would be written there: `mark` says with which recipe and teacher."""
    file = _File(path)
    same = file.samples == layout.samples and all(np.array_equal(file.index(name), values) for name, values in layout.index().items())
    if not same or file.mark != mark:
        found = "another recipe, teacher or buffer" if same else "other responses"
        raise RunError(f"{path} was computed with {found}; remove the folder {path.parent}, and the run computes it again")


def header(shapes: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file; the tensors' bytes follow in the order of `shapes`, so that what no memory holds can be streamed."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for name, (dtype, shape) in shapes.items():
        end = place + math.prod(shape) * dtype.itemsize
        fields[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def holds(path: Path, layout: Layout) -> bool:
    """Whether the file at `path` is whole and was written for `layout`."""
    file = _File(path)
    return file.samples == layout.samples and all(np.array_equal(file.index(name), values) for name, values in layout.index().items())


class CachedSignal:
    """A teacher's states in memory-mapped files, for the responses of packed batches."""

    def __init__(self, paths: Sequence[Path], device: torch.device) -> None:
        self.device = device
        self._files = [_File(path) for path in paths]
        self._places = {sample: (file, number) for file in self._files for number, sample in enumerate(file.samples)}
        self._head: tuple[Path, Tensor] | None = None

    def read(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """The states [N, hidden] that predict the batch's response tokens, and the output matrix [V, hidden] that they go with.

        Raises RunError for a response that the teacher has not read.
        """
        states, heads = [], set()
        for sample, responses in itertools.groupby(batch.responses, key=lambda response: response[0]):
            if sample == STAND_IN.id:  # nothing is learned from it: any state does
                states.append(self._files[0].states(0, [()]))
                continue
            try:
                file, number = self._places[sample]
                states.append(file.states(number, [ids for _, ids in responses]))
            except KeyError:
                folder = self._files[0].path.parent if self._files else "its folder"
                raise RunError(f"the teacher's signal in {folder} lacks a response to question '{sample}'; remove it, and it is computed again") from None
            heads.add((file.head, file.mark))
        [(head, mark)] = heads or {(self._files[0].head, self._files[0].mark)}  # one mask stage, one head
        return torch.cat(states).to(self.device), self._head_in(head, mark)

    @property
    def head_size(self) -> int:
        """Of the output matrix that was read last."""
        return self._head[1].numel() if self._head else 0

    def _head_in(self, path: Path, mark: str) -> Tensor:
        if self._head is None or self._head[0] != path:
            stored = _opened(path)
            if stored.metadata()["mark"] != mark:
                raise RunError(f"{path} is not of the states beside it; remove the folder {path.parent}, and the run computes it again")
            self._head = path, stored.get_tensor("head").to(self.device)
        return self._head[1]


def teacher_states(teacher: Any, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """The states [N, hidden] at a batch's response tokens and the output matrix [V, hidden], of a cached teacher or of one in memory."""
    if isinstance(teacher, CachedSignal):
        return teacher.read(batch)
    return within(teacher, response_states, batch), head_of(teacher)


@dataclass(frozen=True)
class OwnPrompts:
    """A teacher in memory that reads questions through an encoder of its own, since its tower cuts images otherwise than the student's."""

    model: Any
    encoder: Encoder


class _File:
    """One chunk's file, open: its index of questions in memory, its tokens and states on disk."""

    def __init__(self, path: Path) -> None:
        self.path, self.stored = path, _opened(path)
        metadata = self.stored.metadata()
        self.samples = tuple(json.loads(metadata["samples"]))
        self.head, self.mark = path.parent / metadata["head"], metadata["mark"]
        self._rows, self._responses, self._ends = (_starts(self.index(name)) for name in INDEX[:3])

    def index(self, name: str) -> np.ndarray:
        return np.asarray(self.stored.get_tensor(name).numpy())

    def states(self, number: int, wanted: Iterable[Response]) -> Tensor:
        """The states [n, hidden] of some responses to the question at place `number`."""
        first, last = self._responses[number], self._responses[number + 1]
        tokens = self.stored.get_slice("tokens")[int(self._ends[first]) : int(self._ends[last])].tolist()
        ends = self._ends[first : last + 1] - self._ends[first]
        known = prefixes(tokens[start:end] for start, end in itertools.pairwise(ends.tolist()))
        chosen = [row for ids in wanted for row in walk(known, ids)]
        states: Tensor = self.stored.get_slice("states")[int(self._rows[number]) : int(self._rows[number + 1])][chosen]
        return states


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} is damaged ({str(error).splitlines()[0][:120]}); remove it, and the run computes it again") from None


def _check_space(path: Path, shapes: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> None:
    needed, free = sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values()), shutil.disk_usage(path.parent).free
    if needed > free:
        advice = "free some, choose another 'out' or 'buffer', or set teacher_signal=live"
        raise RunError(f"{path.name} of the teacher's signal takes {needed / 1e6:,.1f} MB and {path.parent} has {free / 1e6:,.1f} MB left; {advice}")


def _starts(sizes: np.ndarray) -> np.ndarray:
    """Where each of several runs of these sizes begins, and the last one ends."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _batches(groups: Iterable[Group], tokens: int) -> Iterator[list[Group]]:
    """Runs of groups whose rows, padded to the longest, take at most `tokens`; a longer one stands alone."""
    batch: list[Group] = []
    longest = 0
    for group in groups:
        size = len(group.prompt.ids) + sum(map(len, group.responses))
        if batch and max(longest, size) * (len(batch) + 1) > tokens:
            yield batch
            batch, longest = [], 0
        batch.append(group)
        longest = max(longest, size)
    if batch:
        yield batch


def _at_a_time(batches: Iterator[list[Group]], count: int) -> Iterator[list[list[Group]]]:
    while found := list(itertools.islice(batches, count)):
        yield found


def _distinct(batch: Sequence[Group], states: Tensor) -> Tensor:
    """One state for each distinct beginning, of the states [n, hidden] of all response tokens of a batch."""
    chosen, start = [], 0
    for group in batch:
        rows = prefixes(group.responses)
        numbers = [row for ids in group.responses for row in walk(rows, ids)]
        chosen.append(start + np.unique(numbers, return_index=True)[1])
        start += len(numbers)
    return states[torch.from_numpy(np.concatenate(chosen)).to(states.device)]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data
