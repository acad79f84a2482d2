"""Choosing the next token: transformers' logits processors as pure functions on one row of logits, in their order.

Penalty, temperature, top-k, top-p, min-p; a token that a filter removes gets -inf. Each function takes and gives float [vocab].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import RecipeError
from .answer import TokenLogprob

# Logits divided by less overflow float32, and there the likeliest token is certain anyway.
COLDEST = 1e-3


@dataclass(frozen=True)
class Sampling:
    """How to choose; the defaults are greedy. Raises RecipeError for a value out of range."""

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None  # None draws a new one

    def __post_init__(self) -> None:
        for name, holds, wanted in (
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (off) to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0, where 1 is off"),
        ):
            if not holds:
                raise RecipeError(f"{name} is {getattr(self, name)}; expected {wanted}")


def choose(logits: np.ndarray, seen: np.ndarray, sampling: Sampling, rng: np.random.Generator) -> int:
    """The next token's id; `seen` are the ids of the prompt and the answer so far, int64 [S]."""
    logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature < COLDEST:
        return int(np.argmax(logits))
    return draw(keep_min_p(keep_top_p(keep_top_k(logits / sampling.temperature, sampling.top_k), sampling.top_p), sampling.min_p), rng)


def penalise_repetition(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Divide the positive logits of `seen` tokens by `penalty`, multiply their negative ones (Keskar et al. 2019)."""
    if penalty == 1:
        return logits
    logits, ids = logits.copy(), np.unique(seen)
    logits[ids] = np.where(logits[ids] < 0, logits[ids] * penalty, logits[ids] / penalty)
    return logits


def keep_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Keep the `k` highest and all that tie with the last of them; 0 keeps everything."""
    if k == 0 or k >= logits.size:
        return logits
    return np.where(logits < np.partition(logits, -k)[-k], -np.inf, logits)


def keep_top_p(logits: np.ndarray, p: float) -> np.ndarray:
    """Keep the smallest set of likeliest tokens whose probabilities reach `p` (Holtzman et al. 2020), at least one."""
    if p >= 1:
        return logits
    order = np.argsort(logits, kind="stable")
    drop = np.cumsum(softmax(logits[order])) <= 1 - p
    drop[-1] = False
    kept = logits.copy()
    kept[order[drop]] = -np.inf
    return kept


def keep_min_p(logits: np.ndarray, p: float) -> np.ndarray:
    """Keep the tokens with at least `p` times the likeliest one's probability (Nguyen et al. 2024)."""
    if p == 0:
        return logits
    probabilities = softmax(logits)
    return np.where(probabilities < p * probabilities.max(), -np.inf, logits)


def draw(logits: np.ndarray, rng: np.random.Generator) -> int:
    """A token id drawn from softmax(logits)."""
    steps = np.cumsum(softmax(logits))
    return int(np.searchsorted(steps, rng.random() * steps[-1], side="right"))


def softmax(logits: np.ndarray) -> np.ndarray:
    """float64, so that the sums over a large vocabulary stay exact."""
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(powers / powers.sum())


def rank(logits: np.ndarray, token: int, top: int) -> TokenLogprob:
    """The log-probability of `token` and of the `top` likeliest ones, ties in the order of their ids, under softmax(logits)."""
    logprobs = logits.astype(np.float64) - logits.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    best = np.argsort(-logprobs, kind="stable")[:top]
    return TokenLogprob(token, float(logprobs[token]), tuple((int(one), float(logprobs[one])) for one in best))
