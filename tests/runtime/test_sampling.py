"""Sampling against transformers' logits processors, filter by filter and in sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from masters.errors import RecipeError
from masters.runtime.sampling import Sampling, choose, draw, keep_min_p, keep_top_k, keep_top_p, penalise_repetition, softmax

VOCAB = 1000
SEEN = np.array([3, 7, 7, 999, 0], dtype=np.int64)
rows = [np.random.default_rng(seed).normal(0, scale, VOCAB).astype(np.float32) for seed, scale in enumerate((0.1, 1.0, 4.0, 30.0))]


def theirs(processor: LogitsProcessor | LogitsProcessorList, logits: np.ndarray) -> np.ndarray:
    return processor(torch.from_numpy(SEEN)[None], torch.from_numpy(logits.astype(np.float32))[None])[0].numpy()


@pytest.mark.parametrize("row", range(len(rows)))
@pytest.mark.parametrize(
    ("ours", "processor"),
    [
        (lambda x: penalise_repetition(x, SEEN, 1.3), RepetitionPenaltyLogitsProcessor(1.3)),
        (lambda x: penalise_repetition(x, SEEN, 0.7), RepetitionPenaltyLogitsProcessor(0.7)),
        (lambda x: keep_top_k(x, 1), TopKLogitsWarper(1)),
        (lambda x: keep_top_k(x, 50), TopKLogitsWarper(50)),
        (lambda x: keep_top_k(x, 5000), TopKLogitsWarper(5000)),
        (lambda x: keep_top_p(x, 0.9), TopPLogitsWarper(0.9)),
        (lambda x: keep_top_p(x, 0.01), TopPLogitsWarper(0.01)),
        (lambda x: keep_min_p(x, 0.1), MinPLogitsWarper(0.1)),
        (lambda x: keep_min_p(x, 1.0), MinPLogitsWarper(1.0)),
    ],
)
def test_each_filter_equals_transformers(ours: Callable[[np.ndarray], np.ndarray], processor: LogitsProcessor, row: int) -> None:
    np.testing.assert_allclose(ours(rows[row]), theirs(processor, rows[row]), rtol=1e-6)


def test_ties_at_the_last_place_are_kept() -> None:
    logits = np.array([1.0, 5.0, 3.0, 3.0, 3.0, 0.0], dtype=np.float32)
    np.testing.assert_array_equal(keep_top_k(logits, 2), theirs(TopKLogitsWarper(2), logits))
    assert np.isfinite(keep_top_k(logits, 2)).sum() == 4


def test_the_whole_chain_in_transformers_order() -> None:
    """What `generate` builds from the same settings removes the same tokens and leaves the same probabilities."""
    tiny = LlamaConfig(vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0)
    settings: dict[str, Any] = dict(temperature=0.7, top_k=40, top_p=0.8, min_p=0.05, repetition_penalty=1.2)
    chain = LlamaForCausalLM(tiny)._get_logits_processor(GenerationConfig(do_sample=True, **settings), input_ids_seq_length=len(SEEN))
    for logits in rows:
        expected = torch.softmax(torch.from_numpy(theirs(chain, logits)), -1).numpy()
        rng, draws = np.random.default_rng(0), 1500
        counts = np.bincount([choose(logits, SEEN, Sampling(**settings), rng) for _ in range(draws)], minlength=VOCAB)
        assert not counts[expected == 0].any()
        assert np.abs(counts / draws - expected).max() < 4 * np.sqrt(0.25 / draws)


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.0, 0.125, 0.125]) + 1e-300)
    rng = np.random.default_rng(1)
    counts = np.bincount([draw(logits, rng) for _ in range(20_000)], minlength=5) / 20_000
    np.testing.assert_allclose(counts, softmax(logits), atol=0.012)


def test_greedy_is_the_highest_after_the_penalty() -> None:
    logits = np.array([2.0, 1.9, -1.0], dtype=np.float32)
    rng = np.random.default_rng(0)
    assert choose(logits, np.array([0]), Sampling(), rng) == 0
    assert choose(logits, np.array([0]), Sampling(repetition_penalty=1.5), rng) == 1


def test_a_seed_repeats_itself() -> None:
    sampling = Sampling(temperature=1.0, top_p=0.95)
    runs = [[choose(rows[1], SEEN, sampling, rng) for _ in range(20)] for rng in (np.random.default_rng(5), np.random.default_rng(5), np.random.default_rng(6))]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("wrong", [dict(temperature=-1), dict(top_k=-1), dict(top_p=0), dict(top_p=1.1), dict(min_p=2), dict(repetition_penalty=0)])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"{next(iter(wrong))} is .*; expected"):
        Sampling(**wrong)
