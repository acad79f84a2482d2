"""The processes of one run, as `accelerate launch` or `torchrun` started them. Alone, every function here is a no-op.

The main process writes files and holds the run folder; all read. Whatever decides what is done next must be agreed, or the others wait for ever.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor
from torch import distributed as dist

Item = TypeVar("Item")

# Others wait while the main process reads a teacher's weights for its masks, or writes a student: longer than NCCL's ten minutes.
PATIENCE = timedelta(hours=4)


def _state() -> PartialState:
    """accelerate's state; processes without a GPU talk through gloo."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or ("LOCAL_RANK" in os.environ and not torch.accelerator.is_available())
    return PartialState(cpu, timeout=PATIENCE)


def join() -> None:
    """Meet the other processes, before anything asks for them."""
    _state()


def device() -> torch.device:
    """Where this process computes."""
    found = _state().device
    assert isinstance(found, torch.device)
    return found


def count() -> int:
    return int(_state().num_processes)


def index() -> int:
    return int(_state().process_index)


def is_main() -> bool:
    return index() == 0


def wait() -> None:
    """Return when all processes have come here."""
    if count() > 1:
        dist.barrier(device_ids=[device().index] if device().type == "cuda" else None)


def agreed(value: Item) -> Item:
    """The main process's `value`."""
    box = [value]
    if count() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def once(function: Callable[..., None], *args: Any) -> None:
    """Let the main process call `function`; all go on when it has."""
    if is_main():
        function(*args)
    wait()


def gathered(value: Item) -> list[Item]:
    """Every process's `value`, in their order."""
    if count() == 1:
        return [value]
    found: list[Item | None] = [None] * count()
    dist.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def gathered_by_main(value: Item) -> list[Item]:
    """Every process's `value` in the main one; nothing in the others."""
    if count() == 1:
        return [value]
    found: list[Item | None] | None = [None] * count() if is_main() else None
    dist.gather_object(value, found)
    return found or []  # type: ignore[return-value]


def total(values: Tensor) -> Tensor:
    """The sum of all processes' `values`."""
    if count() > 1:
        values = values.to(device())
        dist.all_reduce(values)
    return values


def all_true(flag: Tensor) -> bool:
    """Whether a bool tensor is all true in every process."""
    if count() == 1:
        return bool(flag.all())
    return float(total((~flag).any().float())) == 0


@contextmanager
def in_turn() -> Iterator[None]:
    """Let one process of each machine after the other do what follows: what all load at once, the machine's memory must hold as often."""
    for turn in range(int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if count() > 1 else 1):
        if turn == int(_state().local_process_index):
            yield
        wait()
