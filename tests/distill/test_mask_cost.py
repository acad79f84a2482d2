"""The cost of masks: against files that are really there, and for a 38B teacher against sums by hand."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import FAMILIES, made

from masters.distill.mask import plan_masks
from masters.distill.mask_cost import Throughput, mask_cost, measure_throughput, write_costs
from masters.distill.models import weights_to_mask
from masters.distill.recipe import Mask
from masters.distill.stored import read_header, weight_files

RATIOS = (0.2, 0.15, 0.1, 0.05, 0.0)
EASY = Throughput(count=1e9, zero=2e9, read=5e8, write=2.5e8)


def large() -> Any:
    """The 38B configuration that the benchmark plans for."""
    path = Path(__file__).parents[2] / "benchmarks" / "shapes.py"
    spec = importlib.util.spec_from_file_location("shapes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.internvl3_5_38b()


def test_five_ratios_of_a_38b_teacher_from_its_configuration_alone():
    cost = mask_cost(large(), Mask(), RATIOS, EASY)
    # By hand, from the published shape: 64 layers of query, key, value, output and three matrices of the MLP.
    layer = 5120 * 64 * 128 + 2 * 5120 * 8 * 128 + 64 * 128 * 5120 + 3 * 5120 * 25600
    assert (cost.tensors, cost.weights, cost.bytes) == (64 * 7, 64 * layer, 2 * 64 * layer)
    embeddings, norms = 2 * 151936 * 5120, 64 * (2 * 5120 + 2 * 128) + 5120
    language = 64 * layer + embeddings + norms
    assert language == 32_762_123_264, "Qwen3-32B as published: 32.8 billion"
    assert 38.3e9 < cost.total_bytes / 2 < 38.5e9, "38.4 billion in all"
    assert cost.largest_bytes == 2 * 5120 * 25600
    assert cost.thresholds.read_bytes == cost.bytes
    assert cost.thresholds.seconds == pytest.approx(cost.bytes / 5e8 + cost.bytes / 1e9)
    assert [row.ratio for row in cost.ratios] == list(RATIOS)
    first, *later = cost.ratios
    assert first.in_place.read_bytes == 0, "what was loaded is masked"
    assert first.in_place.seconds == pytest.approx(cost.bytes / 2e9)
    for row in later:
        assert row.in_place.read_bytes == cost.bytes
        assert row.in_place.seconds == pytest.approx(cost.bytes / 5e8 + (cost.bytes / 2e9 if row.ratio else 0))
    for row in cost.ratios:
        assert row.zeroed == pytest.approx(row.ratio * cost.weights, rel=1e-6)
        assert (row.materialized.read_bytes, row.materialized.write_bytes) == (cost.total_bytes, cost.total_bytes)
        assert row.materialized.seconds > cost.total_bytes / 2.5e8


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_and_weights_are_those_of_the_files(name: str, dtype: torch.dtype, tmp_path: Path):
    model = made(name).build(seed=1)
    chosen = Mask(exclude=("down_proj",))
    cost = mask_cost(model.config, chosen, RATIOS, EASY, dtype)
    model.to(dtype).save_pretrained(tmp_path, max_shard_size="100KB")
    model.float()
    weights = weights_to_mask(tmp_path, chosen, dtype)
    stored = [place for file in weight_files(tmp_path) for place in read_header(file)]
    assert cost.total_bytes == sum(place.stop - place.start for place in stored)
    assert cost.bytes == sum(place.stop - place.start for place in weights.stored.values())
    assert cost.largest_bytes == max(place.stop - place.start for place in weights.stored.values())
    plans = plan_masks(weights, RATIOS)
    assert (cost.tensors, cost.weights) == (len(plans), sum(plan.weights for plan in plans))
    for row in cost.ratios:
        assert row.zeroed == pytest.approx(sum(plan.reached[row.ratio] * plan.weights for plan in plans), rel=0.02)


def test_throughput_is_measured_on_the_disk_that_is_named_and_leaves_nothing(tmp_path: Path):
    found = measure_throughput(tmp_path)
    assert all(1e5 < value < 1e12 for value in dataclasses.astuple(found)), found
    assert list(tmp_path.iterdir()) == []
    assert measure_throughput(tmp_path) is found, "once in a process"


def test_what_is_written_is_what_was_found(models: Any, tmp_path: Path):
    write_costs(tmp_path / "mask-cost.json", [(models.student, (0.0,)), (models.teacher, RATIOS)], Mask(), torch.bfloat16)
    rows = json.loads((tmp_path / "mask-cost.json").read_text())
    assert [(row["teacher"], len(row["ratios"])) for row in rows] == [(str(models.student), 1), (str(models.teacher), 5)]
    assert rows[1]["bytes"] == 2 * rows[1]["weights"]
    assert all(ratio["in_place"]["seconds"] > 0 for ratio in rows[1]["ratios"])
