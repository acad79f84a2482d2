"""SmolVLM: the image rules of Idefics3 unchanged, under a model_type of its own."""

from __future__ import annotations

from .idefics3 import expand, preprocess

__all__ = ["expand", "preprocess"]
