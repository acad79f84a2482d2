"""The search for each weight's precision: its order against all plans there are, a planted outlier, budgets kept by whole bundles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product as combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from test_export_quantize import product
from vision_once import reuse_vision

from masters.errors import MastersError
from masters.export import ExportConfig, auto, export
from masters.export.auto import Budget, Search, divergence_of, order_changes
from masters.export.calibration import Asked, ask, forward, mean_divergence, seen_once
from masters.export.int4 import round_to_nearest
from masters.export.precision import Storage
from masters.export.products import Product, all_products, decoder_products, stored_as, stored_weight
from masters.export.quantize import quantize_products
from masters.export.sensitivity import HALF, Choice, stored_bytes
from masters.export.source import Source, load_source
from masters.manifest import read_manifest
from masters.runtime import load

WAYS = (HALF, Storage("int8"), Storage("int4", 32), Storage("int4", 128))
Bundles = Callable[[str], Path]


def invented(seed: int) -> list[Choice]:
    """Three products with divergences as measurements have them, not even in order."""
    rng = np.random.default_rng(seed)
    choices = []
    for number in range(3):
        product = Product("decoder", f"layers.{number}", (torch.nn.Linear(8, int(rng.integers(1, 9)), bias=False),))
        costs = np.sort(rng.exponential(1, 3)) * (1 + 0.3 * rng.standard_normal(3))
        sizes = product.shape[0] * np.array([16, 12, 7, 6])
        choices += [Choice(product, way, int(size), float(cost)) for way, size, cost in zip(WAYS, sizes, (0.0, *np.maximum(costs, 0)), strict=True)]
    return choices


@pytest.mark.parametrize("seed", range(8))
def test_every_place_on_the_path_is_the_best_plan_of_its_size(seed: int) -> None:
    """Divergences added up: of all 64 plans no other of at most as many bytes has less."""
    choices = invented(seed)
    found = Search(tuple(choices), order_changes(choices))
    by_product = {product: [choice for choice in choices if choice.product == product] for product in {choice.product for choice in choices}}
    plans = [(sum(c.bytes for c in plan), sum(c.divergence for c in plan)) for plan in combinations(*by_product.values())]
    cost = {(choice.product, choice.storage): choice for choice in choices}
    for place, size in enumerate(found.bytes):
        chosen = [cost[item] for item in found.plan(place).items()]
        assert sum(choice.bytes for choice in chosen) == size
        assert sum(choice.divergence for choice in chosen) <= min(divergence for bytes_, divergence in plans if bytes_ <= size) + 1e-12
    assert list(found.bytes) == sorted(found.bytes, reverse=True)
    assert found.bytes[0] == sum(choice.bytes for choice in choices if choice.storage == HALF)
    assert found.within(found.bytes[-1]) == len(found.changes)
    assert found.within(found.bytes[-1] - 1) is None


def test_where_a_path_ends_another_goes_on() -> None:
    """A bundle turned out larger than its weights and what was known of the rest: a place on the same path that fits, else on one that goes further."""
    choices = invented(0)
    whole, short = (Search(tuple(choices), order_changes(ways)) for ways in (choices, [choice for choice in choices if choice.storage.word != "int4"]))
    budget, size = Budget(max_bytes=short.bytes[1] + 5), short.bytes[0] + 5
    assert auto.next_place([whole, short], short, 0, budget, short.bytes[1] + 5, 0.0) is None
    assert auto.next_place([whole, short], short, 0, budget, size, 0.0) == (short, 1)
    budget = Budget(max_bytes=whole.bytes[-1] + 5)
    assert auto.next_place([whole, short], short, 0, budget, size, 0.0) == (whole, len(whole.changes))
    with pytest.raises(MastersError, match=f"int4 everywhere takes {whole.bytes[-1] + 5:,}; allow that many"):
        auto.next_place([whole, short], short, 0, Budget(max_bytes=10), size, 0.0)


@pytest.mark.parametrize(("shape", "storage"), [((48, 100), Storage("int4", 32)), ((48, 100), Storage("int4", 128, "k-quant")), ((7, 33), Storage("int8"))])
def test_bytes_are_the_files(shape: tuple[int, int], storage: Storage) -> None:
    """As many as the tensors that the pass adds to a graph take."""
    graph = quantize_products(product(np.random.default_rng(0).standard_normal(shape[::-1]).astype(np.float32)), lambda _: storage)
    tensors = [value.const_value for value in graph.graph.initializers.values()]
    assert stored_bytes(shape, storage) == sum(tensor.nbytes for tensor in tensors if tensor is not None)


@pytest.fixture
def asked(lively_source: Source, questions_file: Path) -> list[Asked]:
    return ask(lively_source, questions_file)


def test_a_model_does_not_depart_from_itself(asked: list[Asked], lively_source: Source, qwen_source: Callable[[str], Source], questions_file: Path) -> None:
    """One pass over prompt and answer gives what greedy decoding with its cache gave; so for positions of three axes too."""
    qwen = qwen_source("qwen2_5_vl")
    for source, questions in ((lively_source, asked), (qwen, ask(qwen, questions_file))):
        assert forward(source, questions[0]).shape == (len(questions[0].tokens), questions[0].log_probabilities.shape[1])
        assert mean_divergence(source, questions) < 1e-7


def test_features_that_are_kept_change_nothing(asked: list[Asked], lively_source: Source) -> None:
    products = {product.name: product for product in _products(lively_source)}
    with stored_as({products["layers.1.mlp.up.weight"]: Storage("int4")}):
        expected = mean_divergence(lively_source, asked)
        with seen_once(lively_source, asked) as measure:
            assert measure(lively_source, asked) == measure(lively_source, asked) == expected > 0
    assert mean_divergence(lively_source, asked) < 1e-7, "the weights are back"


def _products(source: Source) -> list[Product]:
    return decoder_products(*source.family.text_parts(source.model))


def test_stored_weights() -> None:
    weight = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    np.testing.assert_array_equal(stored_weight(weight, Storage("fp32")), weight)
    np.testing.assert_array_equal(stored_weight(weight, Storage("fp16")), weight.astype(np.float16))
    np.testing.assert_array_equal(stored_weight(weight, Storage("int4", 64)), round_to_nearest(weight, 64).weight(64))


def test_a_layer_with_outliers_is_kept_fine(lively_vlm: Path, questions_file: Path, bundle_of: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of its inputs are made small and their weights large: the model computes what it did, yet each block has an outlier that coarsens all others."""
    reuse_vision(monkeypatch, bundle_of("fp32"))
    source = load_source(lively_vlm)
    layer = source.model.model.text_model.layers[1]
    with torch.no_grad():
        layer.input_layernorm.weight[::32] /= 60
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight[:, ::32] *= 60
    questions = ask(source, questions_file)
    paths = auto.search(source, questions, Storage("int4"))
    found = paths[0]
    assert len(found.plan(0)) == len(all_products(source.model, source.family))
    place = found.within(0.36 * found.bytes[0])
    assert place is not None
    words = {str(product): storage.word for product, storage in found.plan(place).items()}
    assert words.pop("decoder layers.1.attention.qkv.weight") in ("fp16", "int8")
    assert sum(word == "int4" for word in words.values()) > 0.6 * len(words)
    for word in ("int4", "int8"):
        alike = dict.fromkeys(found.plan(0), Storage(word))
        limit = sum(stored_bytes(product.shape, storage) for product, storage in alike.items())
        path, place = auto.begin(paths, source, questions, Budget(max_bytes=limit), 0)
        assert path.bytes[place] <= limit
        assert divergence_of(path.plan(place), source, questions) <= divergence_of(alike, source, questions)


@pytest.fixture
def config(lively_vlm: Path, questions_file: Path, bundle_of: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExportConfig:
    reuse_vision(monkeypatch, bundle_of("fp32"))
    return ExportConfig(lively_vlm, "onnx", tmp_path / "bundle", "auto", calibrate=questions_file)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_budget_of_bytes_is_kept(config: ExportConfig, bundle_of: Bundles) -> None:
    """By the whole folder, closely, by a mixed bundle that passes the same proof and tells what it was decided from."""
    limit = round(0.9 * size_of(bundle_of("int8")))
    export(replace(config, max_bytes=limit))
    assert 0.9 * limit < size_of(config.out) <= limit
    manifest = read_manifest(config.out)
    assert not [row for row in manifest.parity if row["verdict"] == "fail"]
    assert {row["verdict"] for row in manifest.parity if "stored weights" in row["measure"]} == {"pass"}
    (entry,) = (check for check in manifest.checks if check["kind"] == "precision")
    assert entry["bytes"] == size_of(config.out)
    assert len(set(entry["stored"].values())) > 1
    assert {row["weight"] for row in entry["sensitivity"]} == set(entry["stored"])
    assert {weight.split()[0] for weight in entry["stored"]} == {"vision", "embed", "decoder"}
    assert f"{entry['bytes']:,} bytes" in auto.summary(entry)
    assert load(config.out).answer("What is this?", max_tokens=3).token_ids


def test_a_budget_of_divergence_is_kept(config: ExportConfig, bundle_of: Bundles) -> None:
    manifest = export(replace(config, max_kl=0.02))
    (entry,) = (check for check in manifest.checks if check["kind"] == "precision")
    assert 0 < entry["kl"] <= 0.02
    assert size_of(config.out) < size_of(bundle_of("fp16"))


@pytest.mark.parametrize(("budget", "words"), [({"max_bytes": 1000}, "1,000 bytes are too few: int4 everywhere takes"), ({"max_kl": 0.0}, "can't be kept")])
def test_an_impossible_budget_is_refused(config: ExportConfig, budget: dict[str, float], words: str) -> None:
    with pytest.raises(MastersError, match=words) as caught:
        export(replace(config, **budget))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not config.out.exists()
    assert not list(config.out.parent.iterdir())
