"""What a target wrote."""

from __future__ import annotations

from dataclasses import dataclass

from ..manifest import Part
from .products import Product
from .row import Row


@dataclass(frozen=True)
class Written:
    """The graphs by part, how their stored weights compare with the model's, and the weights that may be quantised (none where the target has no such list)."""

    parts: dict[str, Part]
    rows: tuple[Row, ...] = ()
    products: tuple[Product, ...] = ()
