"""Images once they have been encoded, and a memory of the last ones: a conversation that is sent whole shows the same image turn after turn."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..images import ImageSource, open_image
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
    """The pictures used last, as many as fit into `room` bytes of features, by their content; threads may share it. Features are exact: answers don't change.

    A picture's name is the SHA-256 of its file's bytes, or of its pixels where it came decoded, and whether it was alone in its prompt, which some
    families show otherwise.
    """

    def __init__(self, room: int = 0) -> None:
        self.room = room
        self._pictures: OrderedDict[bytes, Picture] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def name(self, image: ImageSource, alone: bool = True) -> bytes | None:
        """What `find` and `keep` know the image by; None where nothing is remembered, or the file can't be read."""
        if not self.room:
            return None
        digest = hashlib.sha256(b"alone" if alone else b"")
        try:
            digest.update(image if isinstance(image, bytes) else Path(image).read_bytes() if isinstance(image, str | Path) else _pixels(image))
        except OSError:
            return None  # whoever opens it says what is wrong
        return digest.digest()

    def find(self, name: bytes | None) -> Picture | None:
        with self._lock:
            if name is None or name not in self._pictures:
                return None
            self._pictures.move_to_end(name)
            return self._pictures[name]

    def keep(self, name: bytes | None, picture: Picture) -> None:
        """Remember `picture` and forget those unused for longest that no longer fit."""
        with self._lock:
            if name is None or name in self._pictures or picture.features.nbytes > self.room:
                return
            self._pictures[name] = picture
            self._bytes += picture.features.nbytes
            while self._bytes > self.room:
                self._bytes -= self._pictures.popitem(last=False)[1].features.nbytes


def _pixels(image: Image.Image | np.ndarray) -> bytes:
    """What the model is shown of a decoded image, with its size; apart from any file's bytes."""
    opened = open_image(image)
    return b"%d x %d pixels " % opened.size + opened.tobytes()
