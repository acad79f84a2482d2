"""The measures and verdicts of parity, by themselves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from masters.export.parity import Row, divergence, failures, largest_difference, relative_error, rows_json, token_verdict

RNG = np.random.default_rng(0)


def test_divergence_equals_torch() -> None:
    theirs, ours = RNG.standard_normal((2, 500)).astype(np.float32) * 4
    log_ours, log_theirs = (torch.from_numpy(x).double().log_softmax(-1) for x in (ours, theirs))
    expected = torch.nn.functional.kl_div(log_ours, log_theirs, reduction="sum", log_target=True).item()
    assert divergence(theirs, ours) == pytest.approx(expected, rel=1e-6)
    assert divergence(theirs, theirs + 100) == pytest.approx(0, abs=1e-9)
    assert divergence(theirs, np.full(500, np.nan)) == float("inf")


def test_relative_error_and_largest_difference() -> None:
    theirs = np.array([3.0, 4.0])
    assert relative_error(theirs + np.array([0, 0.5]), theirs) == pytest.approx(0.1)
    assert largest_difference(theirs + np.array([0, 0.5]), theirs) == 0.5
    for wrong in (np.zeros(3), np.zeros((2, 1))):
        assert relative_error(wrong, theirs) == largest_difference(wrong, theirs) == float("inf")
    assert largest_difference(None, theirs) == float("inf")


def logits(first: float, second: float) -> np.ndarray:
    """Twenty logits whose two largest are tokens 0 and 1."""
    return np.concatenate([[first, second], np.linspace(0, -5, 18)])


@pytest.mark.parametrize(
    ("theirs", "ours", "precision", "verdict"),
    [
        (logits(5, 4), logits(5.2, 4.1), "fp32", "pass"),
        (logits(5, 4.995), logits(4.99, 5), "fp32", "ambiguous"),
        (logits(5, 4.95), logits(4.99, 5), "fp32", "fail"),
        (logits(5, 4.95), logits(4.99, 5), "fp16", "ambiguous"),
        (logits(5, 4.3), logits(4.9, 5), "int4", "ambiguous"),
        (logits(5, 2), logits(4.9, 5), "int4", "reported"),
        (logits(5, 4.995), logits(5, 4.995)[::-1], "fp32", "fail"),  # a near-tie, but the rest of the order is another one
    ],
)
def test_token_verdict(theirs: np.ndarray, ours: np.ndarray, precision: str, verdict: str) -> None:
    assert token_verdict(theirs, ours, precision) == verdict


def test_failures_name_the_earliest_stage_first_and_json_holds_no_infinity() -> None:
    rows = [
        Row("prefill", "logits", "grey", "q", "relative error", 0.2, 1e-4, "fail"),
        Row("features", "image_features", "grey", "q", "relative error", float("inf"), 1e-4, "fail"),
        Row("decode", "probabilities", "grey", "q", "mean KL divergence in nats", 0.1, None, "reported"),
    ]
    assert [line.split("'")[1] for line in failures(rows)] == ["features", "prefill"]
    assert json.loads(json.dumps(rows_json(rows), allow_nan=False))[1]["difference"] is None
