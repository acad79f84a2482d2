"""What a model's tower makes of images, kept while the weights that made it stay: many data sets ask several questions about one image.

The images of one question are one unit, and are encoded alone: what comes of them follows from them and the weights, whatever else is in the
batch, so that an interrupted run gets the numbers of an unbroken one; and the tower's memory is one question's.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import ranks
from .families import SUPPORTED
from .inputs import CollatePixels, Prompt, to_device

MOST_BYTES = 2 << 30  # in the memory of the processor, where there is more than a GPU has; 128 images of a 72B teacher at 1,000 tokens each


@dataclass(frozen=True)
class Features:
    """An image encoder's output under the names by which transformers' models read it: rows [n, D] an image (tiles: [t, n, D]); deeper layers, too."""

    pooler_output: Any  # a tensor, or one an image
    deepstack_features: Any = field(default_factory=list)  # a list a layer, one tensor an image

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in _tensors([self.pooler_output, self.deepstack_features]))

    def to(self, device: torch.device) -> Features:
        """A copy on `device`, or the same tensors where they are there."""
        return Features(_moved(self.pooler_output, device), _moved(self.deepstack_features, device))


class KeptFeatures:
    """The features of the latest images up to `most` bytes, by what the images are known by (`Prompt.shown`). Other weights need another one, or an emptied."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        self.most, self.bytes = most, 0
        self._kept: OrderedDict[str, Features] = OrderedDict()

    def clear(self) -> None:
        """Forget everything, as when the weights change."""
        self._kept.clear()
        self.bytes = 0

    def inputs(self, model: Any, collate_pixels: CollatePixels, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What `model` is given of the images of `prompts`: their features, or the pixels, as for a family whose features nobody has proved.

        To be called by all processes of a run together where weights are in shares: each then encodes as often as the others.
        """
        if not reads_features(model):
            return dict(to_device(collate_pixels([prompt.pixels for prompt in prompts]), model.device, model.dtype))
        pictured = [prompt for prompt in prompts if prompt.pictured]
        if not pictured:
            return {}
        # Held apart from what is kept, which may be less than one batch.
        held = {key: self._kept[key] for key in map(_key, pictured) if key in self._kept}
        lacking = list({_key(prompt): prompt for prompt in pictured if _key(prompt) not in held}.items())
        for place in range(max(ranks.gathered(len(lacking)))):
            key, prompt = lacking[place] if place < len(lacking) else ("", pictured[0])
            found = encode(model, collate_pixels, prompt)
            if key:
                held[key] = found
        for prompt in pictured:
            self._keep(prompt.shown, held[_key(prompt)])
        return {"mm_encoder_outputs": {"image": joined([held[_key(prompt)].to(model.device) for prompt in pictured])}}

    def _keep(self, key: str, features: Features) -> None:
        if not key:
            return
        if key not in self._kept:
            self.bytes += features.bytes
        self._kept[key] = features
        self._kept.move_to_end(key)
        while self.bytes > self.most:
            self.bytes -= self._kept.popitem(last=False)[1].bytes


def reads_features(model: Any) -> bool:
    """Whether the model is of a family for which features in place of pixels are proved, in a transformers that takes them."""
    return model.config.model_type in SUPPORTED and "mm_encoder_outputs" in inspect.signature(model.forward).parameters


def encode(model: Any, collate_pixels: CollatePixels, prompt: Prompt) -> Features:
    """What the model's tower and projector make of a prompt's images, in the processor's memory."""
    pixels = to_device(collate_pixels([prompt.pixels]), model.device, model.dtype)
    out = model.get_image_features(**pixels, return_dict=True)
    return Features(out.pooler_output, getattr(out, "deepstack_features", None) or []).to(torch.device("cpu"))


def joined(rows: Sequence[Features]) -> Features:
    """Several prompts' features as those of one batch, in their order."""
    first = rows[0].pooler_output
    if isinstance(first, Tensor):
        return Features(torch.cat([row.pooler_output for row in rows]))
    layers = [[image for row in rows for image in row.deepstack_features[layer]] for layer in range(len(rows[0].deepstack_features))]
    return Features([image for row in rows for image in row.pooler_output], layers)


def _key(prompt: Prompt) -> str:
    return prompt.shown or f"{id(prompt)}"


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for item in value for tensor in _tensors(item)]


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else [_moved(item, device) for item in value]
