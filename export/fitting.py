"""int4 fitted to data: GPTQ over the products of a model, layer by layer, each on what the already rounded layers before it give.

The inputs of a layer come from the PyTorch student with its own answers to calibration questions; only their products x xᵀ are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from ..progress import bar
from .calibration import Asked, forward
from .gptq import gptq
from .int4 import Blocks
from .precision import Precision
from .products import Product, give
from .source import Source

PASSES = 8  # over the questions; deeper models take several layers at a time


class _Enough(Exception):
    """The rest of a forward pass is not needed."""


def fit_int4(source: Source, products: Sequence[Product], precision: Precision, questions: Sequence[Asked]) -> dict[str, Blocks]:
    """The int4 weights of the decoder and the tower by their products' names, fitted. The source's model is changed to what its bundle will be."""
    fitted: dict[str, Blocks] = {}
    wanted = []
    for product in products:
        storage = precision.storage(product.part, product.name)
        if storage.word == "int4" and product.part != "embed":
            wanted.append(product)
        elif storage.word != "fp32":
            give(product, product.stored(storage), storage)
    for group in bar(list(_groups(wanted)), "fitting int4"):
        inputs = _input_products(source, group, questions)
        for product in group:
            storage = precision.storage(product.part, product.name)
            blocks = gptq(product.weight(), inputs.pop(product), storage.block_size)
            give(product, blocks.weight(product.shape[1]), storage)
            fitted[str(product)] = blocks
    return fitted


def _groups(products: Sequence[Product]) -> Iterator[list[Product]]:
    """Products in the order in which they are computed, a layer at a time, or several where the model has more than PASSES."""
    ordered = sorted(products, key=lambda product: (product.part == "decoder", product.name.startswith("lm_head")))
    layers = [list(layer) for _, layer in groupby(ordered, key=lambda product: (product.part, product.name.split(".")[:2]))]
    together = -(-len(layers) // PASSES)
    for start in range(0, len(layers), together):
        yield [product for layer in layers[start : start + together] for product in layer]


def _input_products(source: Source, group: Sequence[Product], questions: Sequence[Asked]) -> dict[Product, torch.Tensor]:
    """The sum of x xᵀ float32[K, K] over the inputs x of each product."""
    sums = {product: torch.zeros(product.shape[1], product.shape[1]) for product in group}
    hooks = [product.layers[0].register_forward_pre_hook(_adding(sums[product], product is group[-1] and product.part == "decoder")) for product in group]
    try:
        for asked in questions:
            try:
                forward(source, asked)
            except _Enough:
                continue
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _adding(total: torch.Tensor, last: bool) -> Any:
    def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
        total.addmm_(rows.T, rows)
        if last:
            raise _Enough

    return add
