"""The interpreter against torch: torch modules through Apple's converter and back, and single operations that no module gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from masters.errors import BundleError
from masters.export.coreml import converter
from masters.export.mil import DATA, load_program, quiet, round_half
from masters.export.mil_ops import MOVES, OPERATIONS

coremltools = converter()
RNG = np.random.default_rng(0)


class Calculation(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs)


def converted(module: nn.Module, inputs: tuple[torch.Tensor, ...], folder: Path, half: bool = False) -> Path:
    """The module as a package with inputs x0, x1 …"""
    precision = coremltools.precision.FLOAT16 if half else coremltools.precision.FLOAT32
    with quiet(), torch.no_grad():
        program = torch.export.export(module.eval(), inputs, strict=False).run_decompositions({})
        types = [coremltools.TensorType(name=f"x{number}", shape=tuple(value.shape)) for number, value in enumerate(inputs)]
        target = coremltools.target.iOS18
        model = coremltools.convert(program, inputs=types, minimum_deployment_target=target, compute_precision=precision, skip_model_load=True)
        model.save(str(folder / "module.mlpackage"))
    return folder / "module.mlpackage"


def built(body: Callable[..., Any], shapes: dict[str, tuple[int, ...]], folder: Path) -> Path:
    """A package from a function over MIL's builder, its inputs float32."""
    from coremltools.converters.mil import Builder as mb

    specs = [mb.TensorSpec(shape=shape) for shape in shapes.values()]
    names = ", ".join(shapes)
    with quiet():
        # The builder takes the inputs' names from the function's own parameters.
        function = eval(f"lambda {names}: body(mb, {names})", {"body": body, "mb": mb})
        program = mb.program(input_specs=specs, opset_version=coremltools.target.iOS18)(function)
        precision, target = coremltools.precision.FLOAT32, coremltools.target.iOS18
        model = coremltools.convert(program, convert_to="mlprogram", compute_precision=precision, minimum_deployment_target=target, skip_model_load=True)
        model.save(str(folder / "built.mlpackage"))
    return folder / "built.mlpackage"


def close(found: np.ndarray, expected: torch.Tensor, tolerance: float, what: str) -> None:
    expected_array = expected.detach().numpy()
    assert found.shape == expected_array.shape, f"{what}: {found.shape} and {expected_array.shape}"
    difference = float(np.abs(found - expected_array).max())
    assert difference <= tolerance * max(1.0, float(np.abs(expected_array).max())), f"{what} differs by {difference:.2e}"


MODULES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "patches": (nn.Conv2d(3, 8, 4, stride=4), [(1, 3, 16, 16)]),
    "conv_1x1": (nn.Conv2d(6, 8, 1), [(1, 6, 1, 20)]),
    "conv_padded_grouped_dilated": (nn.Conv2d(4, 8, 3, padding=(2, 1), dilation=(1, 2), stride=(2, 1), groups=2, bias=False), [(2, 4, 9, 11)]),
    "linear": (nn.Linear(12, 7), [(1, 5, 12)]),
    "layer_norm": (nn.LayerNorm(12), [(1, 5, 12)]),
    "batch_norm": (lambda x: x * torch.arange(1.0, 7.0).view(1, 6, 1, 1) + torch.arange(6.0).view(1, 6, 1, 1), [(1, 6, 1, 5)]),
    "channel_norm": (lambda x: (x - x.mean(1, keepdim=True)) * torch.rsqrt(((x - x.mean(1, keepdim=True)) ** 2).mean(1, keepdim=True) + 1e-6), [(1, 6, 1, 5)]),
    "softmax": (lambda x: F.softmax(3 * x, dim=-1) + F.softmax(x, dim=1), [(2, 5, 6)]),
    "attention": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), [(1, 2, 4, 8), (1, 2, 6, 8), (1, 2, 6, 8), (1, 1, 4, 6)]),
    "matmul_transposed": (lambda x, y: x.transpose(1, 2) @ y + x.transpose(1, 2) @ y.transpose(1, 2).transpose(1, 2), [(2, 5, 3), (2, 5, 4)]),
    "gelu": (F.gelu, [(3, 50)]),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), [(3, 50)]),
    "silu_sigmoid_relu_tanh": (lambda x: F.silu(x) + torch.sigmoid(x) * F.relu(x) - torch.tanh(x), [(3, 50)]),
    "erf_exp_sqrt": (lambda x: torch.erf(x) + torch.exp(x) * torch.sqrt(x.abs() + 1), [(3, 50)]),
    "trigonometry": (lambda x: torch.sin(x) * torch.cos(3 * x), [(3, 50)]),
    "arithmetic": (lambda x, y: (x + y) * (x - y) / (y.abs() + 1) + torch.maximum(x, y) - torch.minimum(x, y) ** 2, [(3, 4), (1, 4)]),
    "reductions": (lambda x: x.mean(1, keepdim=True) + x.sum((0, 2), keepdim=True) + x.amax(-1, keepdim=True) - x.amin(0, keepdim=True), [(3, 4, 5)]),
    "reductions_dropped": (lambda x: x.mean(1) + x.amax(1), [(3, 4, 5)]),
    "rsqrt_clamp": (lambda x: torch.rsqrt(x.clamp(0.5, 2.0)), [(3, 4)]),
    "slices": (lambda x: torch.cat([x[:, 1:3], x[:, -2:], x[:, ::3]], dim=1)[..., 2], [(2, 7, 4)]),
    "halves": (lambda x: torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1), [(2, 3, 8)]),
    "shapes": (lambda x: x.view(2, 3, 4).transpose(1, 2).unsqueeze(1).repeat(1, 2, 1, 1).squeeze(0).reshape(-1, 3), [(6, 4)]),
    "where": (lambda x, y: torch.where(torch.logical_and(x > y, torch.logical_not(x < -1)), x, -y), [(3, 50), (3, 50)]),
    "stack": (lambda x, y: torch.stack([x, y, x], dim=1), [(3, 5), (3, 5)]),
    "gather": (lambda x: F.embedding(torch.tensor([[3, 0, 2]]), x), [(5, 4)]),
}


@pytest.mark.parametrize("name", MODULES)
def test_module_gives_what_torch_gives(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    function, shapes = MODULES[name]
    module = function if isinstance(function, nn.Module) else Calculation(function)
    inputs = tuple(torch.randn(shape) for shape in shapes)
    program = load_program(converted(module, inputs, tmp_path))
    found = program.predict({f"x{number}": value.numpy() for number, value in enumerate(inputs)})
    # The converter makes the scale and shift a batch_norm whose variance of 1 gets an epsilon of 1e-5.
    close(next(iter(found.values())), module(*inputs), 1e-5 if name == "batch_norm" else 1e-6, name)


def test_every_operation_of_a_half_program_is_rounded(tmp_path: Path) -> None:
    a, b, c = (torch.randn(64) for _ in range(3))
    module = Calculation(lambda x, y, z: (x + y) * z)
    program = load_program(converted(module, (a, b, c), tmp_path, half=True))
    found = next(iter(program.predict({"x0": a.numpy(), "x1": b.numpy(), "x2": c.numpy()}).values()))
    expected = (a.half() + b.half()) * c.half()  # torch rounds after each
    assert np.array_equal(found.astype(np.float32), expected.float().numpy())
    assert not np.array_equal(found, module(a, b, c).numpy()), "float32 arithmetic would have given the same"


def test_half_overflows_as_float16_does(tmp_path: Path) -> None:
    program = load_program(converted(Calculation(lambda x: x * x), (torch.ones(3),), tmp_path, half=True))
    found = next(iter(program.predict({"x0": np.array([10.0, 255.0, 300.0])}).values()))
    assert found.tolist() == [100.0, 65024.0, np.inf]
    with np.errstate(over="ignore"):
        assert round_half(np.array([1e-9, 65519.0, 1e6])).tolist() == [0.0, 65504.0, np.inf]


class Counter(nn.Module):
    """Adds its input to a state and gives the state."""

    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(x)
        return self.total * 1.0


def test_states_last_between_calls_and_are_apart(tmp_path: Path) -> None:
    with quiet():
        program = torch.export.export(Counter(), (torch.ones(4),), strict=False).run_decompositions({})
        states = [coremltools.StateType(coremltools.TensorType(shape=(4,), dtype=np.float16), name="total")]
        types = [coremltools.TensorType(name="x", shape=(4,))]
        model = coremltools.convert(program, inputs=types, states=states, minimum_deployment_target=coremltools.target.iOS18, skip_model_load=True)
        model.save(str(tmp_path / "counter.mlpackage"))
    counter = load_program(tmp_path / "counter.mlpackage")
    ours, theirs = counter.make_state(), counter.make_state()
    totals = [float(next(iter(counter.predict({"x": np.full(4, step)}, ours).values()))[0]) for step in (1.0, 2.0, 4.0)]
    assert totals == [1.0, 3.0, 7.0]
    assert float(next(iter(counter.predict({"x": np.full(4, 10.0)}, theirs).values()))[0]) == 10.0
    with pytest.raises(ValueError, match="state 'total'"):
        counter.predict({"x": np.ones(4)})


def test_slice_update_replaces_one_block_and_leaves_its_argument() -> None:
    cache, update = np.zeros((2, 3, 4), np.float32), np.ones((1, 3, 2), np.float32)
    expected = torch.zeros(2, 3, 4)
    expected[1:2, :, 1:3] = 1
    found = OPERATIONS["slice_update"](cache, update, [1, 9, 1], [2, 9, 3], begin_mask=[False, True, False], end_mask=[False, True, False])
    assert np.array_equal(found, expected.numpy())
    assert not cache.any()
    with pytest.raises(ValueError, match="shape"):  # numpy alone would repeat the one row
        OPERATIONS["slice_update"](cache, update[:, :1], [1, 0, 1], [2, 3, 3])


def test_slice_with_squeezed_axis_and_stride() -> None:
    x = RNG.normal(size=(4, 6)).astype(np.float32)
    found = OPERATIONS["slice_by_index"](x, [2, 5], [0, 0], stride=[1, -2], squeeze_mask=[True, False])
    assert np.array_equal(found, torch.from_numpy(x)[2, [5, 3, 1]].numpy())


def test_dequantisation_is_coremltools_own() -> None:
    from coremltools.converters.mil.mil.ops.defs.iOS18.compression import constexpr_blockwise_shift_scale, constexpr_lut_to_dense

    data, offset = RNG.integers(-8, 8, (6, 8)).astype(np.int8), RNG.integers(-8, 8, (6, 2)).astype(np.int8)
    scale = RNG.normal(size=(6, 2)).astype(np.float32)
    for shift in (None, offset):
        expected = constexpr_blockwise_shift_scale.decompress(data, scale, shift)
        assert np.array_equal(OPERATIONS["constexpr_blockwise_shift_scale"](data, scale, shift), expected)
    indices, tables = RNG.integers(0, 16, (6, 8)).astype(np.uint8), RNG.normal(size=(2, 1, 16, 1)).astype(np.float32)
    assert np.array_equal(OPERATIONS["constexpr_lut_to_dense"](indices, tables), constexpr_lut_to_dense.decompress(indices, tables, None))


@pytest.mark.parametrize("settings", [{"dtype": "int8"}, {"dtype": "int4", "granularity": "per_block", "block_size": 16}, {"nbits": 4}], ids=str)
def test_compressed_weights_are_near_the_originals(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48), torch.randn(5, 64)
    package = converted(linear, (x,), tmp_path)
    optimize = coremltools.optimize.coreml
    with quiet():
        model = coremltools.models.MLModel(str(package), skip_model_load=True)
        if "nbits" in settings:
            config = optimize.OpPalettizerConfig(mode="uniform", weight_threshold=256, **settings)
            smaller = optimize.palettize_weights(model, optimize.OptimizationConfig(config))
        else:
            config = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=256, **settings)
            smaller = optimize.linear_quantize_weights(model, optimize.OptimizationConfig(config))
        smaller.save(str(tmp_path / "small.mlpackage"))
    found = next(iter(load_program(tmp_path / "small.mlpackage").predict({"x0": x.numpy()}).values()))
    error = np.abs(found - linear(x).detach().numpy()).max()
    # Half a step of each weight (of about 0.125) times 64 terms of about 1, which mostly cancel.
    assert 0 < error < (0.01 if settings.get("dtype") == "int8" else 0.2), f"largest difference {error:.4f}"


def test_integer_arithmetic_stays_integer() -> None:
    assert OPERATIONS["real_div"](np.array([7, -7], np.int32), np.array([2, 2], np.int32)).tolist() == [3, -3]
    assert OPERATIONS["cast"](np.array([2.9, -2.9], np.float32), "int32").tolist() == [2, -2]
    assert OPERATIONS["shape"](np.zeros((2, 5))).dtype == np.int32


def test_concat_interleaves_and_joins_scalars() -> None:
    assert OPERATIONS["concat"]([np.array([[1, 2]]), np.array([[3, 4]])], axis=1, interleave=True).tolist() == [[1, 3, 2, 4]]
    assert OPERATIONS["concat"]([np.int32(4), np.array([5, 6])], axis=0).tolist() == [4, 5, 6]


def test_every_unrounded_operation_exists() -> None:
    assert set(OPERATIONS) >= MOVES


def test_unknown_operation_is_named(tmp_path: Path) -> None:
    package = built(lambda mb, x: mb.cumsum(x=mb.local_response_norm(x=x, size=3)), {"x": (1, 4, 2, 2)}, tmp_path)
    with pytest.raises(BundleError, match="the operations cumsum, local_response_norm, which"):
        load_program(package)


def test_wrong_inputs_are_refused(tmp_path: Path) -> None:
    program = load_program(converted(nn.Linear(4, 2), (torch.ones(1, 4),), tmp_path))
    with pytest.raises(ValueError, match=r"inputs \['y'\]; expected \['x0'\]"):
        program.predict({"y": np.ones((1, 4))})
    with pytest.raises(ValueError, match=r"'x0' has shape \[2, 4\]; expected \[1, 4\]"):
        program.predict({"x0": np.ones((2, 4))})


def test_damaged_package_is_one_line(tmp_path: Path) -> None:
    package = converted(nn.Linear(64, 64), (torch.ones(1, 64),), tmp_path)
    model = package / DATA / "model.mlmodel"
    whole = model.read_bytes()
    model.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BundleError, match=r"no whole Core ML package .*export the bundle again") as error:
        load_program(package)
    assert "\n" not in str(error.value)
    model.unlink()
    with pytest.raises(BundleError, match="no whole Core ML package"):
        load_program(package)
