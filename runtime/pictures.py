"""Images once they have been encoded, and a memory of the last ones: a conversation that is sent whole shows the same image turn after turn."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from ..images import ImageSource
from .pixels import Grid

_keys = itertools.count(-1, -1)


@dataclass(frozen=True)
class Picture:
    """An image once it has been encoded: how it was tiled, and its features float32 [n_tokens, hidden]."""

    key: int  # negative and never given twice: stands for the image where prompts are compared
    grid: Grid
    features: np.ndarray


def new_picture(grid: Grid, features: np.ndarray) -> Picture:
    """A picture under a key of its own."""
    return Picture(next(_keys), grid, features)


class PictureMemory:
    """The last `room` pictures that came as encoded bytes, by those bytes' SHA-256 and whether they were alone in their prompt, which some families
    show otherwise; threads may share it. Features are exact: answers don't change."""

    def __init__(self, room: int = 0) -> None:
        self.room = room
        self._pictures: OrderedDict[tuple[bytes, bool], Picture] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, image: ImageSource, alone: bool = True) -> Picture | None:
        if not self.room or not isinstance(image, bytes):
            return None
        name = (hashlib.sha256(image).digest(), alone)
        with self._lock:
            if name in self._pictures:
                self._pictures.move_to_end(name)
            return self._pictures.get(name)

    def keep(self, image: ImageSource, picture: Picture, alone: bool = True) -> None:
        if not self.room or not isinstance(image, bytes):
            return
        with self._lock:
            self._pictures[hashlib.sha256(image).digest(), alone] = picture
            while len(self._pictures) > self.room:
                self._pictures.popitem(last=False)
