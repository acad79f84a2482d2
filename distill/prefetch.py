"""Prompts of the next batches, their images decoded and preprocessed in processes of their own while the model is busy."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import MastersError, RunError
from ..samples import Sample
from .inputs import Encoder, Prompt

CHUNK = 8  # questions that a process encodes at once
AHEAD = 2  # chunks that wait in each process: at most processes * AHEAD * CHUNK prompts are held
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
    common: dict[str, Any] = {"collate_fn": list, "multiprocessing_context": context, "worker_init_fn": partial(_begin, os.getpid())}
    loader = DataLoader(_Prompts(encoder, samples), CHUNK, num_workers=processes, prefetch_factor=AHEAD, **common)
    held: list[Prompt | MastersError] = []
    chunks = iter(loader)
    for batch in batches:
        while len(held) < len(batch):
            held += [_unpacked(item) for item in next(chunks)]
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


class _Prompts(Dataset[Any]):
    def __init__(self, encoder: Encoder, samples: Sequence[Sample]) -> None:
        self.encoder, self.samples = encoder, samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return _packed(_prompt(self.encoder.encode, self.samples[index]))


def _prompt(encode: Any, sample: Sample) -> Prompt | MastersError:
    try:
        found: Prompt = encode(sample)
    except MastersError as error:
        return error
    return found


def _packed(prompt: Prompt | MastersError) -> Any:
    """As arrays, which travel by value: tensors would take a file descriptor each, of which a process has few."""
    if isinstance(prompt, MastersError):
        return prompt
    places = None if prompt.positions is None else prompt.positions.numpy()
    return prompt.ids.numpy(), {name: tensor.numpy() for name, tensor in prompt.pixels.items()}, places


def _unpacked(item: Any) -> Prompt | MastersError:
    if isinstance(item, MastersError):
        return item
    ids, pixels, places = item
    return Prompt(
        torch.from_numpy(ids), {name: torch.from_numpy(array) for name, array in pixels.items()}, None if places is None else torch.from_numpy(places)
    )


def _begin(parent: int, _: int) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process once its parent is gone, however it went: what nobody reads any more would hold it for ever."""
    while os.getppid() == parent:
        time.sleep(EVERY)
    os._exit(1)
