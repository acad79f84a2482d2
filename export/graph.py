"""Authoring ONNX graphs with onnx-ir, and writing them with their weights streamed to external data.

Written files depend on the model alone: names are given by the author or numbered in order, traces and doc strings are dropped.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ..errors import MastersError
from ..manifest import TensorSpec

OPSET = 18  # the oldest with everything used here, so that older mobile builds load the files too
MICROSOFT = "com.microsoft"
IR_VERSION = 10

# Below 1 KiB a tensor stays in the graph: onnxruntime-node can't read empty or scalar tensors from external data.
EXTERNAL_TENSOR_BYTES = 1024
# A graph whose weights are larger in all goes to external data: it is then memory-mapped, and stays clear of protobuf's 2 GB.
EXTERNAL_GRAPH_BYTES = 8 * 2**20
# Browsers can't hold an ArrayBuffer of 2 GiB.
CHUNK_BYTES = 2**31 - 2**27
MOST_CHUNKS = 100  # that transformers.js reads
PAGE = 4096

Shape = Sequence[int | str | None]


class GraphAuthor:
    """Builds one graph node by node: every method appends and returns the new value."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Shape) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Shape) -> None:
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
        self.outputs.append(value)

    def weight(self, name: str, shape: Sequence[int], dtype: ir.DataType, read: Callable[[], torch.Tensor]) -> ir.Value:
        """A weight that is read (and copied) only while its bytes are written."""
        return self._initializer(name, lazy_tensor(name, shape, dtype, read))

    def tensor(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A weight that another graph has too."""
        return self._initializer(name, tensor)

    def array(self, name: str, values: np.ndarray) -> ir.Value:
        """A weight whose final values are in memory already."""
        return self._initializer(name, ir.tensor(values, name=name))

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """A small constant; equal ones are stored once."""
        array = np.asarray(value, dtype=dtype)
        name = f"const_{array.dtype}_{'_'.join(map(str, array.shape))}_{array.tobytes().hex()}"
        return self.initializers.get(name) or self._initializer(name, ir.tensor(array, name=name))

    def op(self, kind: str, *inputs: ir.Value | None, name: str | None = None, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Append a node; returns its output value, or the list of them where `outputs` is more than one."""
        name = name or f"{kind.lower()}_{len(self.nodes)}"
        node = ir.node(kind, inputs, attributes=attributes, domain=domain, num_outputs=outputs, name=name)
        for index, value in enumerate(node.outputs):
            value.name = f"{name}.{index}" if index else name
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> Any:
        return self.op("Cast", value, to=dtype.value)

    def model(self) -> ir.Model:
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=tuple(self.initializers.values()),
            opset_imports={"": OPSET, MICROSOFT: 1},
            name=self.name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="masters")

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = new_initializer(name, tensor)
        self.initializers[name] = value
        return value


def new_initializer(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor)


def lazy_tensor(name: str, shape: Sequence[int], dtype: ir.DataType, read: Callable[[], torch.Tensor]) -> ir.LazyTensor:
    """A tensor of `shape` whose values `read` gives each time they are asked for; nothing is kept."""

    def evaluate() -> ir.TensorProtocol:
        return ir.tensor(read().detach().to(torch.float32).contiguous().numpy().astype(dtype.numpy(), copy=False), name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name, cache=False)


class Spool:
    """Where finished weights wait for their graph to be written: a file without a name below `folder`, so that none is held in memory."""

    def __init__(self, folder: Path) -> None:
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  the last tensor that reads it closes it

    def tensor(self, name: str, values: np.ndarray) -> ir.TensorProtocol:
        if values.nbytes < EXTERNAL_TENSOR_BYTES:
            return ir.tensor(values, name=name)
        start = self.file.seek(0, os.SEEK_END)
        self.file.write(values.reshape(-1).view(np.uint8).data)
        self.file.flush()

        dtype, shape = values.dtype, values.shape

        def read() -> ir.TensorProtocol:
            return ir.tensor(np.memmap(self.file, dtype, "r", start, shape), name=name)

        return ir.LazyTensor(read, dtype=ir.DataType.from_numpy(dtype), shape=ir.Shape(shape), name=name, cache=False)


def clean(model: ir.Model) -> ir.Model:
    """Drop what a tracer leaves of the machine it ran on: stack traces, file names, versions."""
    model.producer_name, model.producer_version, model.doc_string, model.ir_version = "masters", None, None, IR_VERSION
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    return model


def save_graph(model: ir.Model, path: Path, external_over: int = EXTERNAL_GRAPH_BYTES, chunk_bytes: int = CHUNK_BYTES, apart: Sequence[ir.Value] = ()) -> int:
    """Write `model` to `path`, its weights beside it as `<path>_data`, `<path>_data_1` … if they take more than `external_over` or `chunk_bytes`.

    No data file is larger than `chunk_bytes`, but for one that holds a single larger tensor. Where the weights `apart` take more than that themselves, they
    stand in data files of their own, the last ones, in which a graph with these weights alone would have them. Returns the number of data files. `model`
    is consumed: its tensors point into the files afterwards, and none but the one being written is in memory. Raises MastersError for more files than
    loaders look for.
    """
    tensors, inside = _external(model.graph.initializers.values()), min(external_over, chunk_bytes)
    if _bytes(tensors) <= inside:
        for value in tensors:
            if isinstance(value.const_value, ir.ExternalTensor):  # of another graph's file
                value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
        ir.save(model, path)
        return 0
    last = _external(apart) if _bytes(_external(apart)) > inside else []
    chunk, offset = 0, 0
    for value in [*(value for value in tensors if value not in last), *last]:
        tensor = _tensor(value)
        start = -(-offset // PAGE) * PAGE  # ONNX Runtime maps tensors that start on a page
        if offset and (start + tensor.nbytes > chunk_bytes or value in last[:1]):
            chunk, start = chunk + 1, 0
        if chunk >= MOST_CHUNKS:
            raise MastersError(f"{path.name} takes more than {MOST_CHUNKS} data files of {chunk_bytes:,} bytes, no loader looks for more; allow larger ones")
        data = _chunk_path(path, chunk)
        with open(data, "r+b" if start else "wb") as handle:
            handle.seek(start)
            handle.write(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
        offset = start + tensor.nbytes
        value.const_value = ir.ExternalTensor(
            data.name, start, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=value.name or "", base_dir=path.parent
        )
    ir.save(model, path)
    return chunk + 1


def interface(model: ir.Model) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs of a graph, a free axis by its symbol."""
    return tuple(map(_spec, model.graph.inputs)), tuple(map(_spec, model.graph.outputs))


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
    return TensorSpec(value.name, str(value.dtype.numpy()), shape)


def _external(values: Iterable[ir.Value]) -> list[ir.Value]:
    return [value for value in values if _tensor(value).nbytes >= EXTERNAL_TENSOR_BYTES]


def _bytes(values: Iterable[ir.Value]) -> int:
    return sum(_tensor(value).nbytes for value in values)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _chunk_path(path: Path, chunk: int) -> Path:
    return path.with_name(f"{path.name}_data" + (f"_{chunk}" if chunk else ""))
