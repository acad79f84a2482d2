"""Running a saved Core ML package without Apple's engine: its MIL program, operation by operation, in numpy.

It checks a package on any machine: what conversion, quantisation and the handling of states did to the numbers, in the program's own types. Every value
of type float16 is rounded to it, while each operation computes in float32; an engine that accumulates less exactly differs by that much. It has
the interface of `coremltools.models.MLModel`: `predict` and `make_state`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BundleError, MissingExtraError, missing_extra
from .mil_ops import MOVES, NUMPY_TYPES, OPERATIONS

DATA = "Data/com.apple.CoreML"
State = dict[str, np.ndarray]


@dataclass(frozen=True)
class Port:
    """An input, output or state of a program; each dimension as its smallest and largest size, which a package states of inputs and states alone.

    `slot` is its place among the program's values.
    """

    name: str
    dtype: str
    shape: tuple[tuple[int, int], ...]
    slot: int


@dataclass(frozen=True)
class Step:
    """One operation: `run` takes the list of all values and gives one result, or a tuple of as many as there are `results`."""

    run: Callable[[list[Any]], Any]
    results: tuple[int, ...]
    dead: tuple[int, ...]  # values that no later step reads


class Program:
    """A loaded package, ready to run; it holds its constants decompressed."""

    def __init__(self, inputs: tuple[Port, ...], states: tuple[Port, ...], outputs: tuple[Port, ...], constants: list[Any], steps: tuple[Step, ...]) -> None:
        self.inputs, self.states, self.outputs = inputs, states, outputs
        self._constants, self._steps = constants, steps

    def make_state(self) -> State:
        """The states as they begin, all zeros."""
        return {port.name: np.zeros([high for _, high in port.shape], NUMPY_TYPES[port.dtype]) for port in self.states}

    def predict(self, data: Mapping[str, np.ndarray], state: State | None = None) -> dict[str, np.ndarray]:
        """The outputs, in the package's types, for `data`; `state` is read and updated. Raises ValueError for a wrong name or shape."""
        if set(data) != {port.name for port in self.inputs}:
            raise ValueError(f"inputs {sorted(data)}; expected {sorted(port.name for port in self.inputs)}")
        values = self._constants.copy()
        for port in self.states:
            if state is None:
                raise ValueError(f"the program has the state '{port.name}'; pass one from make_state()")
            values[port.slot] = (state, port.name)
        with np.errstate(over="ignore"):
            for port in self.inputs:
                values[port.slot] = _taken(port, data[port.name])
            for step in self._steps:
                _run_step(step, values)
        return {port.name: values[port.slot].astype(np.float16 if port.dtype == "fp16" else NUMPY_TYPES[port.dtype]) for port in self.outputs}


def _run_step(step: Step, values: list[Any]) -> None:
    result = step.run(values)
    if len(step.results) == 1:
        values[step.results[0]] = result
    else:
        for slot, part in zip(step.results, result, strict=True):
            values[slot] = part
    for slot in step.dead:
        values[slot] = None


def _taken(port: Port, value: np.ndarray) -> np.ndarray:
    value = np.asarray(value)
    if value.ndim != len(port.shape) or any(not low <= size <= high for size, (low, high) in zip(value.shape, port.shape, strict=True)):
        ranges = ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in port.shape)
        raise ValueError(f"input '{port.name}' has shape {list(value.shape)}; expected [{ranges}]")
    return round_half(value) if port.dtype == "fp16" else value.astype(NUMPY_TYPES[port.dtype])


def round_half(x: np.ndarray) -> np.ndarray:
    """The float16 nearest to each number, as float32; beyond 65,504 infinity."""
    return np.asarray(x).astype(np.float16).astype(np.float32)


@functools.cache
def import_coremltools() -> Any:
    """coremltools, without its remarks on import. Raises MissingExtraError."""
    try:
        with quiet():
            import coremltools
            import coremltools.optimize.coreml
            from coremltools.converters.mil.frontend.milproto import load  # noqa: F401
    except ImportError:
        raise missing_extra("coremltools", "export") from None
    return coremltools


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without coremltools' bars and its remarks on versions, which say nothing about the result; errors are raised as ever."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def load_program(package: Path) -> Program:
    """The program of an .mlpackage. Raises BundleError if it is damaged or uses an operation that is not known here."""
    try:
        spec, function = _read_package(package)
    except MissingExtraError:
        raise
    except Exception as error:  # protobuf, the weight reader and coremltools each raise their own kinds
        raise BundleError(f"{package} is no whole Core ML package ({str(error).splitlines()[0][:160]}); export the bundle again") from None
    slots: dict[Any, int] = {}
    constants: list[Any] = []

    def slot(variable: Any, value: Any = None) -> int:
        if variable not in slots:
            slots[variable] = len(constants)
            constants.append(value)
        return slots[variable]

    ranges = _ranges(spec)
    ports = [_port(name, variable, slot(variable), ranges) for name, variable in function.inputs.items()]
    states = {feature.name for feature in spec.description.state}
    outputs = tuple(_port(variable.name, variable, slot(variable), ranges) for variable in function.outputs)
    compute = []
    for operation in function.operations:
        if operation.op_type == "const" or operation.op_type.startswith("constexpr_"):
            slot(operation.outputs[0], _constant(operation))
        else:
            compute.append(operation)
    steps = _steps(package, compute, slot, constants, {port.slot for port in outputs})
    return Program(tuple(p for p in ports if p.name not in states), tuple(p for p in ports if p.name in states), outputs, constants, steps)


def _read_package(package: Path) -> tuple[Any, Any]:
    """The specification and the main function of a package, through coremltools' reader."""
    coremltools = import_coremltools()
    spec = coremltools.proto.Model_pb2.Model()
    spec.ParseFromString((package / DATA / "model.mlmodel").read_bytes())
    with quiet():
        load = coremltools.converters.mil.frontend.milproto.load.load
        program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=str(package / DATA / "weights"))
    return spec, program.functions["main"]


def _ranges(spec: Any) -> dict[str, tuple[tuple[int, int], ...]]:
    """By the name of an input, output or state: the smallest and largest size of each dimension."""
    found = {}
    for feature in (*spec.description.input, *spec.description.output):
        kind = feature.type.multiArrayType
        found[feature.name] = tuple((r.lowerBound, r.upperBound) for r in kind.shapeRange.sizeRanges) or tuple((n, n) for n in kind.shape)
    for feature in spec.description.state:
        found[feature.name] = tuple((n, n) for n in feature.type.stateType.arrayType.shape)
    return found


def _port(name: str, variable: Any, slot: int, ranges: dict[str, tuple[tuple[int, int], ...]]) -> Port:
    types = import_coremltools().converters.mil.mil.types
    kind = variable.sym_type.wrapped_type() if types.is_state(variable.sym_type) else variable.sym_type
    return Port(name, types.builtin_to_string(kind.get_primitive()), ranges[name], slot)


def _constant(operation: Any) -> Any:
    """The value of a constant, decompressed; floats as float32."""
    if operation.op_type == "const":
        value = operation.outputs[0].val
    else:
        arguments = {name: _constant(variable.op) for name, variable in operation.inputs.items() if variable is not None}
        value = OPERATIONS[operation.op_type](**arguments)
        value = round_half(value) if _is_half(operation.outputs[0]) else value
    is_float = isinstance(value, np.ndarray | np.generic) and np.issubdtype(value.dtype, np.floating)
    return value.astype(np.float32) if is_float else value


def _is_half(variable: Any) -> bool:
    return bool(variable.dtype == import_coremltools().converters.mil.mil.types.fp16)


def _steps(package: Path, operations: list[Any], slot: Callable[[Any], int], constants: list[Any], kept: set[int]) -> tuple[Step, ...]:
    """The operations compiled; a value dies after the last step that reads it."""
    unknown = sorted({operation.op_type for operation in operations} - set(OPERATIONS))
    if unknown:
        raise BundleError(f"{package} uses the operations {', '.join(unknown)}, which this interpreter does not know; run it on macOS")
    reads = [_reads(operation, slot) for operation in operations]
    last = {place: number for number, places in enumerate(reads) for place in places}
    steps = []
    for number, operation in enumerate(operations):
        results = tuple(slot(variable) for variable in operation.outputs)
        dead = tuple(place for place in {*reads[number], *results} if last.get(place, number) == number and place not in kept and constants[place] is None)
        steps.append(Step(_compiled(operation, slot, constants), results, dead))
    return tuple(steps)


def _reads(operation: Any, slot: Callable[[Any], int]) -> list[int]:
    variables = [v for value in operation.inputs.values() for v in (value if isinstance(value, list | tuple) else [value]) if v is not None]
    return [slot(variable) for variable in variables]


def _compiled(operation: Any, slot: Callable[[Any], int], constants: list[Any]) -> Callable[[list[Any]], Any]:
    """The operation as a function of all values: its constant arguments bound, the others looked up, its result rounded where it is float16."""
    fixed: dict[str, Any] = {}
    single: list[tuple[str, int]] = []
    several: list[tuple[str, list[int]]] = []
    for name, value in operation.inputs.items():
        if isinstance(value, list | tuple):
            several.append((name, [slot(variable) for variable in value]))
        elif value is not None:
            place = slot(value)
            if constants[place] is None:
                single.append((name, place))
            else:
                fixed[name] = constants[place]
    function = functools.partial(OPERATIONS[operation.op_type], **fixed) if fixed else OPERATIONS[operation.op_type]
    rounds = operation.op_type not in MOVES and _is_half(operation.outputs[0])

    def run(values: list[Any]) -> Any:
        arguments: dict[str, Any] = {name: values[place] for name, place in single}
        for name, places in several:
            arguments[name] = [values[place] for place in places]
        result = function(**arguments)
        return round_half(result) if rounds else result

    return run
