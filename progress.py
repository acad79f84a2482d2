"""Progress on stderr: a bar for anything that takes over two seconds, so that results on stdout stay clean."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

_FIRST = os.environ.get("RANK", "0") == "0"  # of the processes of one run, which all have the same to tell


def bar(items: Iterable[Item], label: str, total: int | None = None, done: int = 0, status: Callable[[], str] | None = None) -> Iterator[Item]:
    """Iterate over `items` with a bar that appears after two seconds; `done` of `total` count as finished before, `status` tells what stands behind it."""
    # Into a file or a log, redrawing ten times a second would be noise.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    shown = tqdm(items, disable=not _FIRST, desc=label, total=total, initial=done, delay=2, mininterval=interval, dynamic_ncols=True, file=sys.stderr)
    for item in shown:
        yield item
        if status:
            shown.set_postfix_str(status(), refresh=False)


def say(message: str) -> None:
    """One line of news on stderr."""
    if _FIRST:
        tqdm.write(message, file=sys.stderr)
