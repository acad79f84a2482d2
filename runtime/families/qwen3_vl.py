"""Qwen3-VL: pictures, prompts and positions follow Qwen2.5-VL's rules; patch size and limits stand in the settings."""

from __future__ import annotations

from .qwen2_5_vl import expand, positions, preprocess

__all__ = ["expand", "positions", "preprocess"]
