"""A model in PyTorch with the weights that 'decoder=int4,embed=int4' stores: what such a bundle must compute exactly."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import torch

from masters.export import ExportConfig
from masters.export.int4 import round_to_nearest
from masters.export.source import Source

EXACT = "decoder=int4,embed=int4"  # the precision whose bundles sum in float32 here: at a rounding's edge tokens could part


def level_of(precision: str) -> int:
    """The accuracy level of a bundle of the fixtures: the default one, or one with which tokens can be compared one by one."""
    return 1 if precision == EXACT else ExportConfig.accuracy_level


def with_int4_weights(source: Source, block: int = 64) -> Source:
    model = deepcopy(source.model)
    decoder, head = source.family.text_parts(model)
    assert head.weight is decoder.embed_tokens.weight
    with torch.no_grad():
        for layer in (head, *(module for module in decoder.layers.modules() if isinstance(module, torch.nn.Linear))):
            layer.weight.copy_(torch.from_numpy(round_to_nearest(layer.weight.numpy(), block).weight(layer.in_features)))
    return replace(source, model=model)
