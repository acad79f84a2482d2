"""SmolVLM: Idefics3 under another name, with the same modules and the same image tensors."""

from __future__ import annotations

from .idefics3 import LANGUAGE, PROJECTOR, VISION, collate_pixels, positions

__all__ = ["LANGUAGE", "PROJECTOR", "VISION", "collate_pixels", "positions"]
