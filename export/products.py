"""The weights that a bundle may quantise, one by one: which product of which graph each belongs to, and which PyTorch layers it comes from.

A graph lays layers side by side (queries, keys and values are one product); a tower is traced or authored under names of its own. So the layers of the
decoder's products are named by decoder.py, and those of the tower's are found by their values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from .activations import Rounding, rounding_of
from .decoder import product_layers
from .precision import EMBED, Storage
from .quantize import FACTOR, Weight, int4_blocks, int8_rows, product_weight
from .vision import build_vision

LOOKED_UP = 127  # the largest code of a row that nothing multiplies
KEY = 8  # values of a row that tell it from others


@dataclass(frozen=True)
class Product:
    """One weight [N, K] as the graph of `part` (vision, embed or decoder) stores it, and the layers whose rows stand in it, in their order."""

    part: str
    name: str
    layers: tuple[nn.Linear | nn.Embedding, ...]

    def __str__(self) -> str:
        return f"{self.part} {self.name}"

    @property
    def shape(self) -> tuple[int, int]:
        return sum(layer.weight.shape[0] for layer in self.layers), self.layers[0].weight.shape[1]

    def weight(self) -> np.ndarray:
        """A copy, float32[N, K]."""
        return torch.cat([layer.weight.detach() for layer in self.layers]).float().numpy()

    def stored(self, storage: Storage) -> np.ndarray:
        """The weight as `storage` keeps it, float32[N, K]."""
        return stored_weight(self.weight(), storage, LOOKED_UP if self.part == "embed" else FACTOR)


def product_weights(graph: ir.Model) -> dict[str, Weight]:
    """The weights that products of a float graph multiply by, by name: what quantisation will replace."""
    return {weight.name: weight for weight in map(product_weight, graph.graph) if weight is not None}


def is_tied(text_model: Any, head: nn.Linear) -> bool:
    """Whether head and embedding are one matrix."""
    return bool(head.weight is text_model.embed_tokens.weight)


def decoder_products(text_model: Any, head: nn.Linear) -> list[Product]:
    return [Product("decoder", f"{name}.weight", layers) for name, layers in product_layers(text_model, head).items()]


def vision_products(model: nn.Module, text_model: nn.Module, head: nn.Linear, graph: ir.Model) -> list[Product]:
    """The products of the tower's float graph, each with the layers whose values its weight holds."""
    inside = {*text_model.modules(), head}
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in inside]
    by_row: dict[tuple[int, bytes], list[nn.Linear]] = defaultdict(list)
    for layer in layers:
        by_row[layer.in_features, _key(layer.weight[0].detach().numpy())].append(layer)
    return [Product("vision", name, _side_by_side(weight.rows().T, by_row)) for name, weight in product_weights(graph).items()]


def all_products(model: Any, family: ModuleType) -> list[Product]:
    """All weights of a model that may be quantised, in the order in which they are computed, the head aside. The tower is traced for it."""
    text_model, head = family.text_parts(model)
    tower = vision_products(model, text_model, head, build_vision(model, family))
    return [*tower, Product("embed", EMBED, (text_model.embed_tokens,)), *decoder_products(text_model, head)]


def _side_by_side(weight: np.ndarray, by_row: Mapping[tuple[int, bytes], list[nn.Linear]]) -> tuple[nn.Linear, ...]:
    """The layers whose rows make up float32 [K, N], one after the other; equal layers are taken in the order of the model."""
    found: list[nn.Linear] = []
    column = 0
    while column < weight.shape[1]:
        candidates = by_row[weight.shape[0], _key(weight[:, column])]
        places = (i for i, layer in enumerate(candidates) if np.array_equal(weight[:, column : column + layer.out_features].T, layer.weight.detach().numpy()))
        layer = candidates.pop(next(places))
        found.append(layer)
        column += layer.out_features
    return tuple(found)


def _key(row: np.ndarray) -> bytes:
    return np.ascontiguousarray(row[:KEY], np.float32).tobytes()


def stored_weight(weight: np.ndarray, storage: Storage, largest: int = FACTOR) -> np.ndarray:
    """float32[N, K] as `storage` keeps it; `largest` is int8's largest code, smaller where it is multiplied than where it is looked up."""
    match storage.word:
        case "fp16":
            return weight.astype(np.float16).astype(np.float32)
        case "int8":
            codes, scales = int8_rows(weight, largest)
            return codes * scales
        case "int4":
            return int4_blocks(weight, storage).weight(weight.shape[1])
    return weight


def give(product: Product, weight: np.ndarray, storage: Storage) -> list[Any]:
    """Give the product's layers their rows of float32 [N, K], and what they are given the rounding of `storage`; returns the hooks that do this."""
    start, hooks, rounding = 0, [], rounding_of(storage, product.shape[1])
    for layer in product.layers:
        rows = len(layer.weight)
        layer.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(weight[start : start + rows], np.float32)), requires_grad=False)
        start += rows
        if rounding is not None and isinstance(layer, nn.Linear):
            hooks.append(layer.register_forward_pre_hook(partial(_round_inputs, rounding)))
    return hooks


@contextmanager
def stored_as(products: Mapping[Product, Storage]) -> Iterator[None]:
    """The model with the weights of `products` as these are to be stored, for as long as the block lasts."""
    before = {layer: layer.weight for product in products for layer in product.layers}
    hooks = [hook for product, storage in products.items() for hook in give(product, product.stored(storage), storage)]
    try:
        yield
    finally:
        for layer, weight in before.items():
            layer.weight = weight
        for hook in hooks:
            hook.remove()


def _round_inputs(rounding: Rounding, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (rounding(inputs[0]), *inputs[1:])
