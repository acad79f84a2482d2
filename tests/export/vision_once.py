"""What spares tests of an export its longest part."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir
import pytest

from masters.export import onnx_target, products


def reuse_vision(patch: pytest.MonkeyPatch, bundle: Path) -> None:
    """Let exports take the vision graph of an fp32 bundle: tracing takes most of an export's time. One in float16 is another graph, and traced."""
    trace = onnx_target.build_vision

    def build_vision(model: Any, family: ModuleType, half: bool = False) -> ir.Model:
        return trace(model, family, half) if half else ir.load(bundle / "onnx" / "vision_encoder.onnx")

    for module in (onnx_target, products):
        patch.setattr(module, "build_vision", build_vision)
