"""What each weight of a model may be stored as, and what that costs: bytes, and the divergence of the answers when it alone is stored so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..progress import bar
from .calibration import Asked, mean_divergence, seen_once
from .precision import Storage
from .products import Product, stored_as
from .source import Source

HALF = Storage("fp16")
FINE, COARSE = 32, (128, 64)  # int4's blocks: one for answers, and for bytes the largest that fills the rows of a weight whole
Measure = Callable[[Source, Sequence[Asked]], float]


@dataclass(frozen=True)
class Choice:
    """One way to store a product: its bytes, and the KL divergence in nats of a model in which nothing else changed."""

    product: Product
    storage: Storage
    bytes: int
    divergence: float

    def to_json(self) -> dict[str, Any]:
        return {"weight": str(self.product), "storage": str(self.storage), "bytes": self.bytes, "kl": self.divergence}


def stored_bytes(shape: tuple[int, int], storage: Storage) -> int:
    """What a weight [N, K] takes in a file; scales of int4 are float16 there, those of int8 float32."""
    rows, columns = shape
    blocks = -(-columns // storage.block_size)
    match storage.word:
        case "fp16":
            return 2 * rows * columns
        case "int8":
            return rows * (columns + 4)
        case "int4":
            zeros = (blocks + 1) // 2 if storage.method == "k-quant" else 0
            return rows * (blocks * (storage.block_size // 2 + 2) + zeros)
    return 4 * rows * columns


def measure_sensitivity(source: Source, products: Sequence[Product], questions: Sequence[Asked], int4: Storage) -> list[Choice]:
    """Every product in every way that the search considers, each tried alone, int4 as `int4` has it but for its block; float16 counts as no loss."""
    tower = [product for product in products if product.part == "vision"]
    rest = [product for product in products if product.part != "vision"]
    found = _tried(source, tower, questions, int4, mean_divergence)
    with seen_once(source, questions) as measure:
        return found + _tried(source, rest, questions, int4, measure)


def _tried(source: Source, products: Sequence[Product], questions: Sequence[Asked], int4: Storage, measure: Measure) -> list[Choice]:
    found = []
    for product in bar(products, "sensitivity"):
        found.append(Choice(product, HALF, stored_bytes(product.shape, HALF), 0.0))
        # A row of the embedding is looked up by standard operators, without a zero point.
        method = "rtn" if product.part == "embed" else int4.method
        coarse = next((block for block in COARSE if product.shape[1] % block == 0), COARSE[-1])
        for storage in (Storage("int8"), *(replace(int4, block_size=block, method=method) for block in (FINE, coarse))):
            with stored_as({product: storage}):
                found.append(Choice(product, storage, stored_bytes(product.shape, storage), measure(source, questions)))
    return found
