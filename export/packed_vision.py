"""Authoring a vision tower that reads the patches of several images, each of its own size, in one row: positions, windows and frames from the grids.

A tracer can't follow such a tower: how many windows and frames there are, and which patches stand in them, depends on the values of the
grids. Here all of it is computed inside the graph, without a loop over images: each patch finds its image by comparing its number with the
images' ends, and its row, column and window by division. Attention within windows is one batched product over windows padded to equal length;
attention within frames is a loop over frames, so that no matrix of all patches by all patches is ever held.

Shapes: P patches, n images, m patches along a cell's side, F frames, W windows, L patches a window has room for, C channels, h head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ..errors import ModelError
from .graph import MICROSOFT, GraphAuthor

PATCHES = "num_patches"


@dataclass(frozen=True)
class Places:
    """Where each patch stands, i64[P] each: its number among all, its image, that image's size in patches, its frame within the image, row and column."""

    number: Any
    image: Any
    height: Any
    width: Any
    frame: Any
    row: Any
    column: Any


@dataclass(frozen=True)
class Frames:
    """Where each frame's patches begin and end, i64[F]; attention stays within."""

    count: Any
    starts: Any
    ends: Any


@dataclass(frozen=True)
class Windows:
    """`patches` i64[W·L]: which patch stands at each place of each window; `taken` i32[W,L]: whether one does; `places` i64[P]: where each patch stands."""

    room: int
    patches: Any
    taken: Any
    places: Any


class PackedTower:
    """A tower under construction: inputs pixel_values f32[P, features of a patch] and image_grid_thw i64[n,3], in patches, cell by cell."""

    def __init__(self, dtype: ir.DataType, features: int, merge: int, heads: int) -> None:
        self.author, self.dtype, self.merge, self.heads = GraphAuthor("vision_encoder"), dtype, merge, heads
        pixels = self.author.input("pixel_values", ir.DataType.FLOAT, (PATCHES, features))
        self.grids = self.author.input("image_grid_thw", ir.DataType.INT64, ("num_images", 3))
        self.pixels = self._narrow(pixels)
        self.places = self._place()
        self.frames = self._frames()

    def patch_embedding(self, convolution: Any) -> Any:
        """The convolution over patches that don't overlap, as one product, [P,C]. A Gemm: quantisation leaves it alone, as it does convolutions."""
        weight = convolution.weight
        shape = (weight.shape[0], weight[0].numel())
        bias = () if convolution.bias is None else (self.table("patch_embedding.bias", convolution.bias),)
        kernel = self.author.weight("patch_embedding.weight", shape, self.dtype, lambda: weight.reshape(shape))
        return self.author.op("Gemm", self.pixels, kernel, *bias, name="patch_embedding", transB=1)

    def rotary_tables(self, frequencies: torch.Tensor) -> None:
        """Cosines and sines [P, h/2] of the angles that rows (first half) and columns (second half) turn by."""
        op, steps = self.author.op, self.author.array("rotary.frequencies", frequencies.detach().float().numpy())
        angles = [op("Mul", self._column(self.author.cast(x, ir.DataType.FLOAT)), steps) for x in (self.places.row, self.places.column)]
        both = op("Concat", *angles, axis=1)
        self.cos, self.sin = self._narrow(op("Cos", both)), self._narrow(op("Sin", both))
        self.numbers = op("Unsqueeze", self.places.number, self.author.constant([0]))

    def attention(self, x: Any, module: Any, windows: Windows | None, name: str) -> Any:
        """Self-attention of [P,C] within windows, or within frames where there are none; `module` has qkv, proj and scaling."""
        op, axis = self.author.op, self.author.constant([0])
        query, key, value = op("Split", self.linear(x, module.qkv, f"{name}.qkv"), name=f"{name}.split", outputs=3, axis=-1, num_outputs=3)
        turned = [
            op("Squeeze", op("RotaryEmbedding", op("Unsqueeze", part, axis), self.numbers, self.cos, self.sin, domain=MICROSOFT), axis) for part in (query, key)
        ]
        rows = (*turned, value)
        mixed = self._by_frame(rows, module, name) if windows is None else self._by_window(rows, windows, module, name)
        return self.linear(mixed, module.proj, f"{name}.proj")

    def windows(self, cells: int) -> Windows:
        """Windows of `cells` x `cells` cells of one frame, those at its right and lower border smaller."""
        op, constant, places, side = self.author.op, self.author.constant, self.places, cells * self.merge
        time, height, width = self._sizes()
        down, across = (op("Div", op("Add", length, constant(side - 1)), constant(side)) for length in (height, width))
        ends = op("CumSum", op("Mul", time, op("Mul", down, across)), constant(0))
        starts = op("Sub", ends, op("Mul", time, op("Mul", down, across)))
        in_frame = op("Add", op("Mul", op("Div", places.row, constant(side)), op("Gather", across, places.image)), op("Div", places.column, constant(side)))
        of_frame = op("Mul", places.frame, op("Gather", op("Mul", down, across), places.image))
        window = op("Add", op("Gather", starts, places.image), op("Add", of_frame, in_frame))
        inside = op("Add", op("Mul", op("Mod", places.row, constant(side)), constant(side)), op("Mod", places.column, constant(side)))
        slots = op("Add", op("Mul", window, constant(side * side)), inside)
        count = op("Mul", op("Gather", ends, constant([-1])), constant(side * side))
        patches = op("ScatterElements", self._zeros(count, np.int64), slots, places.number)
        ones = op("Expand", constant([1], np.int32), op("Shape", slots))
        taken = op("Reshape", op("ScatterElements", self._zeros(count, np.int32), slots, ones), constant([-1, side * side]))
        return Windows(side * side, patches, taken, slots)

    def interpolated(self, table: Any, side: int) -> Any:
        """A learned square of side x side positions `table` [side²,C], stretched over each image with its corners on the corners, [P,C]."""
        op, constant = self.author.op, self.author.constant
        rows, row_weights = self._taps(self.places.row, self.places.height, side)
        columns, column_weights = self._taps(self.places.column, self.places.width, side)
        index = op("Add", op("Mul", op("Unsqueeze", rows, constant([2])), constant(side)), op("Unsqueeze", columns, constant([1])))  # P, 2, 2
        weights = op("Mul", op("Unsqueeze", row_weights, constant([2])), op("Unsqueeze", column_weights, constant([1])))
        near = op("Gather", self.table("position_embedding.weight", table), op("Reshape", index, constant([0, 4])))  # P, 4, C
        return op("ReduceSum", op("Mul", near, self._narrow(op("Reshape", weights, constant([0, 4, 1])))), constant([1]), keepdims=0)

    def cells(self, x: Any, channels: int) -> Any:
        """[P,C] -> [P/m², m²·C]: the patches of a cell, which stand together, side by side."""
        return self.author.op("Reshape", x, self.author.constant([-1, channels * self.merge**2]))

    def linear(self, x: Any, layer: torch.nn.Linear, name: str) -> Any:
        weight = self.author.weight(f"{name}.weight", (layer.in_features, layer.out_features), self.dtype, lambda: layer.weight.detach().T)
        product = self.author.op("MatMul", x, weight, name=name)
        return product if layer.bias is None else self.author.op("Add", product, self.table(f"{name}.bias", layer.bias))

    def root_mean_square_norm(self, x: Any, norm: Any, name: str) -> Any:
        """x / sqrt(mean(x²) + ε) · weight, the quotient in float32."""
        op, constant = self.author.op, self.author.constant
        wide = x if self.dtype == ir.DataType.FLOAT else self.author.cast(x, ir.DataType.FLOAT)
        mean = op("ReduceMean", op("Pow", wide, constant(2, "float32")), constant([-1]), keepdims=1)
        scaled = op("Div", wide, op("Sqrt", op("Add", mean, constant(norm.variance_epsilon, "float32"))))
        return op("Mul", self._narrow(scaled), self.table(f"{name}.weight", norm.weight))

    def layer_norm(self, x: Any, norm: torch.nn.LayerNorm, name: str) -> Any:
        tables = self.table(f"{name}.weight", norm.weight), self.table(f"{name}.bias", norm.bias)
        return self.author.op("LayerNormalization", x, *tables, axis=-1, epsilon=norm.eps)

    def activation(self, x: Any, kind: str) -> Any:
        """silu, gelu, or gelu by tanh. Raises ModelError for another."""
        if kind == "silu":
            return self.author.op("Mul", x, self.author.op("Sigmoid", x))
        names = {"gelu": "Gelu", "gelu_pytorch_tanh": "FastGelu"}
        if kind not in names:
            raise ModelError(f"the vision tower's activation is '{kind}'; expected silu, {' or '.join(names)}, this version can't export another")
        return self.author.op(names[kind], x, domain=MICROSOFT)

    def finish(self, features: Any, width: int) -> ir.Model:
        """The graph with image_features f32[cells, width]."""
        if self.dtype != ir.DataType.FLOAT:
            features = self.author.cast(features, ir.DataType.FLOAT)
        self.author.output(features, "image_features", ir.DataType.FLOAT, ("num_image_tokens", width))
        return self.author.model()

    def table(self, name: str, values: torch.Tensor) -> ir.Value:
        return self.author.weight(name, tuple(values.shape), self.dtype, lambda: values)

    def _sizes(self) -> list[Any]:
        """Time, height and width of each image in patches, i64[n]."""
        return [self.author.op("Gather", self.grids, self.author.constant(axis), axis=1) for axis in range(3)]

    def _place(self) -> Places:
        op, constant, merge = self.author.op, self.author.constant, self.merge
        time, high, wide = self._sizes()
        count = op("Gather", op("Shape", self.pixels), constant(0))
        number = op("Range", constant(0), count, constant(1))
        sizes = op("Mul", time, op("Mul", high, wide))
        ends = op("CumSum", sizes, constant(0))
        image = self._which(number, ends)
        height, width = op("Gather", high, image), op("Gather", wide, image)
        inside = op("Sub", number, op("Gather", op("Sub", ends, sizes), image))
        area = op("Mul", height, width)
        within = op("Mod", inside, area)
        cell, cells_across = op("Div", within, constant(merge * merge)), op("Div", width, constant(merge))
        row = op("Add", op("Mul", op("Div", cell, cells_across), constant(merge)), op("Mod", op("Div", within, constant(merge)), constant(merge)))
        column = op("Add", op("Mul", op("Mod", cell, cells_across), constant(merge)), op("Mod", within, constant(merge)))
        return Places(number, image, height, width, op("Div", inside, area), row, column)

    def _frames(self) -> Frames:
        op, constant = self.author.op, self.author.constant
        time, height, width = self._sizes()
        areas, ends = op("Mul", height, width), op("CumSum", time, constant(0))
        count = op("ReduceSum", time, keepdims=0)
        number = op("Range", constant(0), count, constant(1))
        image = self._which(number, ends)
        sizes = op("Gather", areas, image)
        # Frames stand one after the other, so that each ends where the sizes up to it add up.
        stops = op("CumSum", sizes, constant(0))
        return Frames(count, op("Sub", stops, sizes), stops)

    def _which(self, number: Any, ends: Any) -> Any:
        """The image of each number: how many images end at or before it."""
        op, constant = self.author.op, self.author.constant
        passed = op("GreaterOrEqual", self._column(number), op("Unsqueeze", ends, constant([0])))
        return op("ReduceSum", self.author.cast(passed, ir.DataType.INT64), constant([1]), keepdims=0)

    def _by_window(self, parts: tuple[Any, ...], windows: Windows, module: Any, name: str) -> Any:
        op, constant, channels = self.author.op, self.author.constant, module.qkv.in_features
        shape = constant([-1, windows.room, channels])
        rows = [op("Reshape", op("Gather", part, windows.patches), shape) for part in parts]
        mixed = op(
            "MultiHeadAttention", *rows, None, windows.taken, name=f"{name}.windows", domain=MICROSOFT, num_heads=self.heads, scale=float(module.scaling)
        )
        return op("Gather", op("Reshape", mixed, constant([-1, channels])), windows.places)

    def _by_frame(self, parts: tuple[Any, ...], module: Any, name: str) -> Any:
        """A loop over frames that appends each one's rows: without a mask, ONNX Runtime's attention is a flash attention."""
        author, channels, inside = self.author, module.qkv.in_features, f"{name}.frame"
        body = GraphAuthor(inside)
        step, going = body.input(f"{inside}.step", ir.DataType.INT64, ()), body.input(f"{inside}.going", ir.DataType.BOOL, ())
        done = body.input(f"{inside}.done", self.dtype, (None, channels))

        def op(kind: str, *inputs: Any, **options: Any) -> Any:
            return body.op(kind, *inputs, name=f"{inside}.{len(body.nodes)}", **options)

        axis = author.constant([0])
        start, end = (op("Unsqueeze", op("Gather", edges, step), axis) for edges in (self.frames.starts, self.frames.ends))
        rows = [op("Unsqueeze", op("Slice", part, start, end, axis), axis) for part in parts]
        mixed = op("MultiHeadAttention", *rows, domain=MICROSOFT, num_heads=self.heads, scale=float(module.scaling))
        outputs = [op("Identity", going), op("Concat", done, op("Squeeze", mixed, axis), axis=0)]
        graph = ir.Graph(body.inputs, outputs, nodes=body.nodes, name=inside)
        nothing = author.constant(np.zeros((0, channels)), self.dtype.numpy())
        return author.op("Loop", self.frames.count, author.constant(True, np.bool_), nothing, name=f"{name}.frames", body=graph)

    def _taps(self, place: Any, size: Any, side: int) -> tuple[Any, Any]:
        """The two learned positions next to each place on an axis, i64[P,2], and their weights, f32[P,2]."""
        op, constant, cast = self.author.op, self.author.constant, self.author.cast
        gaps = cast(op("Max", op("Sub", size, constant(1)), constant(1)), ir.DataType.FLOAT)
        source = op("Div", op("Mul", cast(place, ir.DataType.FLOAT), constant(side - 1, "float32")), gaps)
        low = op("Floor", source)
        rest = op("Sub", source, low)
        first = cast(low, ir.DataType.INT64)
        second = op("Min", op("Add", first, constant(1)), constant(side - 1))
        weights = [self._column(x) for x in (op("Sub", constant(1, "float32"), rest), rest)]
        return op("Concat", self._column(first), self._column(second), axis=1), op("Concat", *weights, axis=1)

    def _zeros(self, count: Any, dtype: Any) -> Any:
        return self.author.op("ConstantOfShape", count, value=ir.tensor(np.zeros(1, dtype)))

    def _column(self, x: Any) -> Any:
        return self.author.op("Unsqueeze", x, self.author.constant([1]))

    def _narrow(self, x: Any) -> Any:
        return x if self.dtype == ir.DataType.FLOAT else self.author.cast(x, self.dtype)
