"""A teacher whose mask changes while it stays loaded, whole in this process or in shares over several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import models, ranks
from .families import family_of
from .mask import TensorMask, apply_mask, restore
from .parallel import mesh, own, own_rows, place
from .stored import stored_weights


class MaskedTeacher:
    """A frozen teacher whose mask can be changed: going up zeroes more in place, going down copies the weights back first. With `shard`, each in its share."""

    def __init__(self, folder: Path, masks: Sequence[TensorMask], dtype: torch.dtype, shard: bool) -> None:
        if shard and ranks.count() > 1:
            mesh()
        with ranks.in_turn():  # the machine's memory holds one whole teacher at a time
            self.model = place(models.frozen(models.load_model(folder, dtype)), dtype, shard)
        self.masks, self.ratio, self.stored = masks, 0.0, stored_weights(folder, self.model.model)
        named = dict(self.model.model.named_parameters())
        language = family_of(self.model.config.model_type).LANGUAGE
        self.language_alone = all(any(part in mask.name for part in language) for mask in masks)  # a recipe may mask the tower too
        self.tensors = {mask.name: own(named[mask.name].data) for mask in masks}
        self.rows = {mask.name: own_rows(named[mask.name].data) for mask in masks}

    def set_ratio(self, ratio: float) -> None:
        """Mask the model at `ratio`, one of those that the masks were planned for, or 0."""
        if ratio < self.ratio:
            restore(self.tensors, self.stored, self.rows)
        if ratio != self.ratio and ratio > 0:
            apply_mask(self.tensors, self.masks, ratio)
        self.model.weights_changed(self.language_alone or ratio == self.ratio)
        self.ratio = ratio


@contextmanager
def masked(teacher: Callable[[], MaskedTeacher], ratio: float) -> Iterator[Any]:
    """A teacher's model under the mask of `ratio`; what makes the teacher is called when it is wanted."""
    teacher().set_ratio(ratio)
    yield teacher().model
