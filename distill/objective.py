"""The offline GRPO objective with a masked teacher (Masters, arXiv 2512.22238; method.md section 5), from hidden states to a loss.

    L = mean_j [ w_D D_j  -  w_P A_j mean_t exp(logp - stopgrad(logp))  +  beta KL_j  +  w_NLL NLL_j ]

The last term is the baseline 'sft'. Everything is computed over the common vocabulary in float32, by token_stats.py in chunks of tokens.

Shapes: N response tokens of all rows, J rows (distinct responses), V common vocabulary, S and T the hidden sizes of student and teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .token_stats import DIVERGENCES, token_stats

__all__ = ["DIVERGENCES", "Heads", "ObjectiveWeights", "RowStats", "loss", "row_stats"]


@dataclass(frozen=True)
class Heads:
    """Hidden states [N, S] or [N, T] at the positions that predict response tokens, and the output matrices [V, S], [V, T]; None where not needed."""

    student: Tensor
    student_head: Tensor
    teacher: Tensor | None = None
    teacher_head: Tensor | None = None
    initial: Tensor | None = None  # of S_0, the student before training
    initial_head: Tensor | None = None


class RowStats(NamedTuple):
    """Means over each row's tokens, [J] float32; gradients flow through the student only."""

    divergence: Tensor
    logprob: Tensor
    policy: Tensor  # mean exp(logp - stopgrad(logp)): 1 in value, the policy gradient in its derivative
    kl: Tensor
    teacher_logprob: Tensor
    entropy: Tensor


def row_stats(heads: Heads, tokens: Tensor, rows: Tensor, count: int, kind: str, kl: str, chunk: int | None = None) -> RowStats:
    """Statistics of `count` rows from their N tokens: `tokens` [N] are the ids sampled, `rows` [N] the row each belongs to.

    `kl` is 'k3' or 'full' (over the vocabulary, bounded where k3 spikes). The logits of `chunk` tokens are the most that exist at a time;
    without it as many as fit `token_stats.CHUNK_BYTES`.
    """
    pairs = ((heads.student, heads.student_head), (heads.teacher, heads.teacher_head), (heads.initial, heads.initial_head))
    stats = token_stats(*pairs, tokens, kind, kl, chunk)
    lengths = rows.bincount(minlength=count).clamp(min=1)
    means = stats.new_zeros(len(stats), count).index_add(1, rows, stats) / lengths
    return RowStats(*means.unbind(0))


@dataclass(frozen=True)
class ObjectiveWeights:
    """w_D, w_P, beta and w_NLL of the formula above."""

    distill: float = 1.0
    policy: float = 1.0
    beta: float = 0.1
    nll: float = 0.0


def loss(stats: RowStats, advantage: Tensor, weights: Tensor, objective: ObjectiveWeights, distill_on: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """The distillation part, and the policy part with the KL and the NLL, of L; their sum is the loss.

    `weights` [J] sum to 1: each row's share of the batch. `distill_on` [J] is 1 where D counts, 0 where it does not.
    """
    distill = objective.distill * (weights * distill_on * stats.divergence).sum()
    rest = -objective.policy * advantage.detach() * stats.policy + objective.beta * stats.kl - objective.nll * stats.logprob
    return distill, (weights * rest).sum()
