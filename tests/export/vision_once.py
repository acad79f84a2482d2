"""What spares tests of an export its longest part."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from masters.export import onnx_target, products


def reuse_vision(patch: pytest.MonkeyPatch, bundle: Path) -> None:
    """Let exports take the vision graph of an fp32 bundle: tracing takes most of an export's time."""
    for module in (onnx_target, products):
        patch.setattr(module, "build_vision", lambda *_: ir.load(bundle / "onnx" / "vision_encoder.onnx"))
