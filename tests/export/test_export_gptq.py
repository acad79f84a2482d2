"""GPTQ against its definition, computed another way, and against rounding that knows no data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from vision_once import reuse_vision

from masters.errors import ParityError
from masters.export import ExportConfig, export, onnx_target
from masters.export.calibration import ask, mean_divergence
from masters.export.fitting import fit_int4
from masters.export.gptq import DAMPING, gptq
from masters.export.int4 import round_to_nearest
from masters.export.precision import parse_precision
from masters.export.products import decoder_products
from masters.export.source import load_source
from masters.manifest import read_manifest

RNG = np.random.default_rng(3)


def correlated(rows: int, columns: int) -> np.ndarray:
    mixing = RNG.standard_normal((columns, columns)) * 0.3 + np.eye(columns)
    return np.asarray(RNG.standard_normal((rows, columns)) @ mixing)


def by_elimination(weight: np.ndarray, products: np.ndarray, block: int) -> np.ndarray:
    """Optimal Brain Quantization in a fixed order: after each column its row and column are eliminated from the inverse (Frantar et al., equation 3)."""
    columns = weight.shape[1]
    inverse = np.linalg.inv(products + DAMPING * np.diag(products).mean() * np.eye(columns))
    rest, kept = weight.astype(np.float64).copy(), np.zeros(weight.shape)
    for column in range(columns):
        if column % block == 0:
            scale = round_to_nearest(rest[:, column : column + block].astype(np.float32), block).scales[:, 0]
        kept[:, column] = np.clip(np.rint(rest[:, column] / scale), -8, 7) * scale
        rest -= np.outer((rest[:, column] - kept[:, column]) / inverse[column, column], inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return kept


@pytest.mark.parametrize("block", [16, 32, 64])
def test_equals_elimination_of_one_column_after_another(block: int) -> None:
    weight, x = RNG.standard_normal((24, 48)).astype(np.float32), correlated(300, 48)
    ours = gptq(weight, torch.from_numpy(x.T @ x), block).weight(48)
    theirs = by_elimination(weight, x.T @ x, block)
    assert np.mean(np.abs(ours - theirs) < 1e-5) > 0.99, "a tie may round to its other side"


@pytest.mark.parametrize("block", [32, 128])
def test_outputs_are_kept_better_than_by_rounding(block: int) -> None:
    weight, x = RNG.standard_normal((64, 128)).astype(np.float32), correlated(1000, 128).astype(np.float32)
    fitted, nearest = gptq(weight, torch.from_numpy(x.T @ x), block), round_to_nearest(weight, block)
    errors = [np.linalg.norm(x @ (kept.weight(128) - weight).T) for kept in (fitted, nearest)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("x", [np.zeros((3, 40), np.float32), np.eye(1, 40, dtype=np.float32)])
def test_inputs_that_say_nothing(x: np.ndarray) -> None:
    """Without information about inputs it rounds to nearest, up to ties."""
    weight = RNG.standard_normal((8, 40)).astype(np.float32)
    assert np.abs(gptq(weight, torch.from_numpy(x.T @ x), 32).weight(40) - round_to_nearest(weight, 32).weight(40)).max() < 1e-6


def test_a_fitted_decoder_departs_less(lively_vlm: Path, questions_file: Path) -> None:
    """All of the decoder in int4, on the questions that it was fitted to."""
    precision = parse_precision("decoder=int4", method="gptq")
    found = {}
    for method in ("rtn", "gptq"):
        source = load_source(lively_vlm)
        questions, products = ask(source, questions_file), decoder_products(*source.family.text_parts(source.model))
        if method == "gptq":
            assert set(fit_int4(source, products, precision, questions)) == {str(product) for product in products}
        else:
            for product in products:
                (layer, *rest), start = product.layers, 0
                kept = torch.from_numpy(round_to_nearest(product.weight(), 32).weight(product.shape[1]))
                for each in (layer, *rest):
                    each.weight = torch.nn.Parameter(kept[start : start + len(each.weight)])
                    start += len(each.weight)
        found[method] = mean_divergence(source, questions)
    assert found["gptq"] < 0.7 * found["rtn"]


@pytest.mark.parametrize("fault", [False, True])
def test_fitted_weights_stand_in_the_file(
    fault: bool, lively_vlm: Path, questions_file: Path, bundle_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exported, proven; and one code changed behind the fitting's back is found."""
    reuse_vision(monkeypatch, bundle_of("fp32"))
    original = onnx_target.quantize_products

    def faulty(model: ir.Model, *arguments: object) -> ir.Model:
        graph = original(model, *arguments)  # type: ignore[arg-type]
        value = graph.graph.initializers.get("layers.1.mlp.up.weight_int4")
        if value is not None and value.const_value is not None:
            packed = value.const_value.numpy().copy()
            packed[3, 1, 2] ^= 1
            value.const_value = ir.tensor(packed, name=value.name)
        return graph

    config = ExportConfig(lively_vlm, "onnx", tmp_path / "bundle", "int4", calibrate=questions_file)  # questions are given, so int4 is fitted to them
    if fault:
        monkeypatch.setattr(onnx_target, "quantize_products", faulty)
        with pytest.raises(ParityError, match=r"the stage 'weights' .* decoder layers.1.mlp.up.weight differs .*fitted to data"):
            export(config)
        return
    export(config)
    rows = read_manifest(tmp_path / "bundle").parity
    assert not [row for row in rows if row["verdict"] == "fail"]
    assert [row["difference"] for row in rows if "fitted" in row["measure"]] == [0.0]
