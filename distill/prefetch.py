"""Prompts of the next batches, their images decoded and preprocessed in processes of their own while the model is busy.

A photograph becomes up to a hundred megabytes of tensors, for which a pipe takes as long as a quarter of reading it: they cross in memory that the
processes share by being forked, which no limit of /dev/shm concerns and which is gone when they are.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import MastersError, RunError
from ..samples import Sample
from .inputs import Encoder, Prompt

CHUNK = 8  # questions that a process encodes at once, fewer where they are large
AHEAD = 2  # chunks that wait in each process: at most processes * AHEAD * CHUNK prompts are held
HELD = 2 << 30  # bytes of them, where that leaves a question to each chunk
LINE = 64  # bytes to which arrays are aligned
WORTH = 256  # questions with images from which starting processes pays
MOST = 8
EVERY = 0.5  # seconds between two looks whether the parent is there


def process_count(samples: Sequence[Sample], wanted: int | None) -> int:
    """How many processes encode `samples`: as many as `wanted` or, if that is None, one a core but one, where there are enough images to gain by it."""
    if wanted is not None:
        return wanted
    pictured = sum(bool(sample.images) for sample in samples)
    return min(MOST, len(os.sched_getaffinity(0)) - 1) if pictured >= WORTH else 0


def read_prompts(encoder: Encoder, batches: Sequence[Sequence[Sample]], processes: int) -> Iterator[list[Prompt | MastersError]]:
    """The prompts of each batch in turn, with the error in the place of one that can't be read. Without `processes` they are encoded here, when asked for."""
    if not processes:
        for batch in batches:
            yield [_prompt(encoder.prompt, sample) for sample in batch]
        return
    samples = [sample for batch in batches for sample in batch]
    context: Any = multiprocessing.get_context("fork")  # the encoder and the questions are there at once, and no main module is run again
    room = _room(encoder, samples)
    chunk = max(1, min(CHUNK, HELD // (processes * AHEAD * room)))
    slots = _Slots(context, processes * AHEAD * chunk, room)
    common: dict[str, Any] = {"collate_fn": list, "multiprocessing_context": context, "worker_init_fn": partial(_begin, os.getpid())}
    loader = DataLoader(_Prompts(encoder, samples, slots), chunk, num_workers=processes, prefetch_factor=AHEAD, **common)
    held: list[Prompt | MastersError] = []
    chunks = iter(loader)
    for batch in batches:
        while len(held) < len(batch):
            held += [_unpacked(item, slots) for item in next(chunks)]
        yield held[: len(batch)]
        held = held[len(batch) :]


@contextmanager
def reading() -> Iterator[None]:
    """Say in one line if a process that reads ends while this block works, wherever the block is: torch raises it from a signal's handler."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        found = " ".join(str(error).split())[:120]
        raise RunError(
            f"a process that reads images was ended ({found}), as for want of memory; finished answers are kept, run again, or with fewer by answers.processes"
        ) from None


def _room(encoder: Encoder, samples: Sequence[Sample]) -> int:
    """Bytes for one prompt: twice those of the first one with an image, since pictures differ. What needs more goes through the pipe."""
    read = (_prompt(encoder.encode, sample) for sample in samples if sample.images)
    first = next((prompt for prompt in read if isinstance(prompt, Prompt)), None)
    return -(-2 * (first.bytes if first else mmap.PAGESIZE) // mmap.PAGESIZE) * mmap.PAGESIZE


class _Slots:
    """Memory in equal slots, shared with the processes that are forked from here: as many as prompts are under way, so that nobody waits for one."""

    def __init__(self, context: Any, count: int, size: int) -> None:
        self.size = size
        self._memory = mmap.mmap(-1, count * size)  # of no file; pages that nobody wrote to take no room
        self._free = context.SimpleQueue()
        for slot in range(count):
            self._free.put(slot)

    def put(self, arrays: Sequence[np.ndarray]) -> Any:
        """Copy `arrays` into a free slot; what `take` needs to find them, or the arrays themselves where they are too large."""
        ends = np.cumsum([-(-array.nbytes // LINE) * LINE for array in arrays])
        if ends[-1] > self.size:
            return None, arrays
        slot = self._free.get()
        places = [(array.dtype.str, array.shape, int(end) - -(-array.nbytes // LINE) * LINE) for array, end in zip(arrays, ends, strict=True)]
        for array, place in zip(arrays, places, strict=True):
            self._array(slot, *place)[...] = array
        return slot, places

    def take(self, slot: int | None, places: Sequence[Any]) -> Sequence[np.ndarray]:
        """A copy of the arrays that were put, whose slot is free again."""
        if slot is None:
            return places
        arrays = [self._array(slot, *place).copy() for place in places]
        self._free.put(slot)
        return arrays

    def _array(self, slot: int, kind: str, shape: tuple[int, ...], offset: int) -> np.ndarray:
        return np.ndarray(shape, kind, self._memory, slot * self.size + offset)


class _Prompts(Dataset[Any]):
    def __init__(self, encoder: Encoder, samples: Sequence[Sample], slots: _Slots) -> None:
        self.encoder, self.samples, self.slots = encoder, samples, slots

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return _packed(_prompt(self.encoder.encode, self.samples[index]), self.slots)


def _prompt(encode: Any, sample: Sample) -> Prompt | MastersError:
    try:
        found: Prompt = encode(sample)
    except MastersError as error:
        return error
    return found


def _packed(prompt: Prompt | MastersError, slots: _Slots) -> Any:
    if isinstance(prompt, MastersError):
        return prompt
    tensors = [prompt.ids, *prompt.pixels.values(), *([] if prompt.positions is None else [prompt.positions])]
    return list(prompt.pixels), slots.put([tensor.numpy() for tensor in tensors])


def _unpacked(item: Any, slots: _Slots) -> Prompt | MastersError:
    if isinstance(item, MastersError):
        return item
    names, put = item
    ids, *others = map(torch.from_numpy, slots.take(*put))
    return Prompt(ids, dict(zip(names, others, strict=False)), others[len(names)] if len(others) > len(names) else None)


def _begin(parent: int, _: int) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process once its parent is gone, however it went: what nobody reads any more would hold it for ever."""
    while os.getppid() == parent:
        time.sleep(EVERY)
    os._exit(1)
