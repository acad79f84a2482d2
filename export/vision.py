"""The vision_encoder graph: PyTorch's exporter on a family's thin module, or the family's own authoring."""

from __future__ import annotations

import logging
import warnings
from copy import deepcopy
from types import ModuleType
from typing import Any

import onnx_ir as ir
import torch

from .fuse import fuse_vision
from .graph import OPSET, clean


def build_vision(model: Any, family: ModuleType, half: bool = False) -> ir.Model:
    """The graph from the family's inputs to image_features f32[tiles, tokens, D]; with `half`, weights and arithmetic are float16.

    The free axes are those that the family names; inputs and outputs are float32 either way.
    """
    if hasattr(family, "author_vision"):
        authored: ir.Model = family.author_vision(model, half)
        return authored
    module = family.vision_module(model)
    if half:
        module = deepcopy(module).half()
    example, free_axes = family.vision_example(model)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=family.INPUTS,
            output_names=["image_features"],
            dynamic_shapes=free_axes,
            verbose=False,
        )
    assert program is not None
    graph = clean(program.model)
    if not half:  # ONNX Runtime's CPU has the fused operators in float32 alone
        fuse_vision(graph)
    graph.graph.name = "vision_encoder"
    output = graph.graph.outputs[0]
    # The exporter names the count of real tiles after a symbol of its own (u0).
    output.shape = ir.Shape(["num_image_tiles", *list(output.shape or ())[1:]])
    return graph


class _quiet(warnings.catch_warnings):
    """The exporter's remarks on torchvision's absence and on axis names say nothing about the result."""

    def __enter__(self) -> Any:
        found = super().__enter__()
        warnings.simplefilter("ignore")
        self.logger = logging.getLogger("torch.onnx")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)
        return found

    def __exit__(self, *reason: Any) -> None:
        self.logger.setLevel(self.level)
        super().__exit__(*reason)
