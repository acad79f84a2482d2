"""The offline GRPO objective with a masked teacher (Masters, arXiv 2512.22238; method.md section 5), from hidden states to a loss.

    L = mean_j [ w_D D_j  -  w_P A_j mean_t exp(logp - stopgrad(logp))  +  beta KL_j  +  w_NLL NLL_j ]

The last term is the baseline 'sft'. Everything is computed over the common vocabulary in float32, in chunks of tokens that are
recomputed in the backward pass, so that the logits of one chunk are the most that exist at a time.

Shapes: N response tokens of all rows, J rows (distinct responses), V common vocabulary, S and T the hidden sizes of student and teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

DIVERGENCES = ("jsd", "forward_kl", "reverse_kl")


@dataclass(frozen=True)
class Heads:
    """Hidden states [N, S] or [N, T] at the positions that predict response tokens, and the output matrices [V, S], [V, T]; None where not needed."""

    student: Tensor
    student_head: Tensor
    teacher: Tensor | None = None
    teacher_head: Tensor | None = None
    initial: Tensor | None = None  # of S_0, the student before training
    initial_head: Tensor | None = None


@dataclass(frozen=True)
class RowStats:
    """Means over each row's tokens, [J] float32; gradients flow through the student only."""

    divergence: Tensor
    logprob: Tensor
    policy: Tensor  # mean exp(logp - stopgrad(logp)): 1 in value, the policy gradient in its derivative
    kl: Tensor
    teacher_logprob: Tensor
    entropy: Tensor


def divergence(kind: str, teacher: Tensor, student: Tensor) -> Tensor:
    """The divergence [N] of two sets of log-probabilities [N, V], summed over the vocabulary, in nats.

    'jsd': 0.5 KL(T || M) + 0.5 KL(S || M) with M = (T + S)/2, at most ln 2 (Lin 1991); 'forward_kl': KL(T || S); 'reverse_kl': KL(S || T).
    """
    if kind == "jsd":
        mixture = torch.logaddexp(teacher, student) - torch.log(torch.tensor(2.0, dtype=teacher.dtype))
        return 0.5 * (_kl(teacher, mixture) + _kl(student, mixture))
    return _kl(teacher, student) if kind == "forward_kl" else _kl(student, teacher)


def k3(initial: Tensor, logprob: Tensor) -> Tensor:
    """Schulman's k3 estimator of KL(S || S_0) from the sampled token's log-probabilities: exp(d) - d - 1, d = log S_0 - log S."""
    difference = initial - logprob
    return difference.exp() - difference - 1


def row_stats(heads: Heads, tokens: Tensor, rows: Tensor, count: int, kind: str, kl: str, chunk: int = 1024) -> RowStats:
    """Statistics of `count` rows from their N tokens: `tokens` [N] are the ids sampled, `rows` [N] the row each belongs to.

    `kl` is 'k3' or 'full' (over the vocabulary, bounded where k3 spikes). Logits are never held for more than `chunk` tokens.
    """
    parts = []
    for start in range(0, len(tokens), chunk):
        span = slice(start, start + chunk)
        states = [None if h is None else h[span] for h in (heads.student, heads.teacher, heads.initial)]
        args = (states[0], heads.student_head, states[1], heads.teacher_head, states[2], heads.initial_head, tokens[span], kind, kl)
        parts.append(checkpoint(_token_stats, *args, use_reentrant=False))
    stats = torch.cat(parts, dim=1)
    lengths = torch.bincount(rows, minlength=count).clamp(min=1)
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


def _token_stats(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor | None,
    teacher_head: Tensor | None,
    initial: Tensor | None,
    initial_head: Tensor | None,
    tokens: Tensor,
    kind: str,
    kl: str,
) -> Tensor:
    """The six statistics of RowStats for each token of a chunk, [6, n]."""
    size = min(head.shape[0] for head in (student_head, teacher_head, initial_head) if head is not None)
    log_s = _log_probabilities(student, student_head, size)
    own = log_s.gather(1, tokens[:, None])[:, 0]
    zero = torch.zeros_like(own)
    apart, theirs, drift = zero, zero, zero
    if teacher is not None and teacher_head is not None:
        with torch.no_grad():
            log_t = _log_probabilities(teacher, teacher_head, size)
        apart, theirs = divergence(kind, log_t, log_s), log_t.gather(1, tokens[:, None])[:, 0]
    if initial is not None and initial_head is not None:
        with torch.no_grad():
            log_0 = _log_probabilities(initial, initial_head, size)
        drift = k3(log_0.gather(1, tokens[:, None])[:, 0], own) if kl == "k3" else _kl(log_s, log_0)
    entropy = -(log_s.detach().exp() * log_s.detach()).sum(-1)
    return torch.stack([apart, own, (own - own.detach()).exp(), drift, theirs, entropy])


def _log_probabilities(states: Tensor, head: Tensor, size: int) -> Tensor:
    """log softmax over the first `size` ids, [n, V] float32: padded rows of a head take no part, so they leak no probability."""
    return torch.log_softmax((states @ head[:size].T).float(), dim=-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(P || Q) [N] of log-probabilities [N, V]."""
    return (p.exp() * (p - q)).sum(-1)
