"""Divergence, log-probabilities, KL and entropy of response tokens and their gradients, from hidden states, never holding the logits of all tokens.

The statistics of all rows decide what each token's gradient is multiplied by, so it can't be taken while the logits are there: the backward pass
projects every chunk of tokens a second time and writes the gradient, known in closed form, over its logits. Two or three matrices of one chunk are all
that exists at a time; what is computed element by element goes through smaller blocks, which stay in the processor's cache.

Shapes: N tokens, V common vocabulary, n tokens of a chunk or a block. Log-probabilities are [n, V] float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DIVERGENCES = ("jsd", "forward_kl", "reverse_kl")

# Bytes of one float32 matrix: logits of a chunk, as many as keep a matrix product busy; and of a block, few on a CPU for its cache's sake.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}

Head = tuple[Tensor | None, Tensor | None]  # hidden states [N, H] and the output matrix, [V, H] or longer


def divergence(kind: str, teacher: Tensor, student: Tensor) -> Tensor:
    """The divergence [n] of two sets of log-probabilities [n, V], summed over the vocabulary, in nats.

    'jsd': 0.5 KL(T || M) + 0.5 KL(S || M) with M = (T + S)/2, at most ln 2 (Lin 1991); 'forward_kl': KL(T || S); 'reverse_kl': KL(S || T).
    """
    if kind == "jsd":
        mixture = torch.logaddexp(teacher, student) - math.log(2)
        return 0.5 * (_kl(teacher, mixture) + _kl(student, mixture))
    return _kl(teacher, student) if kind == "forward_kl" else _kl(student, teacher)


def k3(initial: Tensor, logprob: Tensor) -> Tensor:
    """Schulman's k3 estimator of KL(S || S_0) from the sampled token's log-probabilities: exp(d) - d - 1, d = log S_0 - log S."""
    difference = initial - logprob
    return difference.exp() - difference - 1


def token_stats(student: Head, teacher: Head, initial: Head, tokens: Tensor, kind: str, kl: str, chunk: int | None = None) -> Tensor:
    """Each token's divergence, log-probability, policy term, KL, teacher's log-probability and entropy, [6, N] float32.

    What teacher or S_0 gives is 0 where it is (None, None). `kind` is one of DIVERGENCES, `kl` 'k3' or 'full'; `chunk` is in tokens. Gradients reach
    the student's states and matrix; the last two statistics have none.
    """
    size = min(len(matrix) for _, matrix in (student, teacher, initial) if matrix is not None)
    plan = _Plan(kind, kl, size, chunk or _fitting(CHUNK_BYTES, tokens.device, size), _fitting(BLOCK_BYTES, tokens.device, size))
    found: Tensor = _TokenStats.apply(plan, tokens, *student, *teacher, *initial)
    return found


@dataclass(frozen=True)
class _Plan:
    kind: str
    kl: str
    size: int  # of the common vocabulary
    chunk: int  # tokens
    block: int


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, tokens: Tensor, *pairs: Any) -> Tensor:
        ctx.plan, ctx.dtypes = plan, [_compute_dtype(*pair) for pair in _in_twos(pairs)]
        stats, initial_own = torch.zeros(6, len(tokens), device=tokens.device), torch.zeros(len(tokens), device=tokens.device)
        with torch.autocast(tokens.device.type, enabled=False):
            heads = [_projection(*pair, dtype, plan) for pair, dtype in zip(_in_twos(pairs), ctx.dtypes, strict=True)]
            for span in _spans(0, len(tokens), plan.chunk):
                logits = [None if head is None else head.logits(span) for head in heads]
                for here, logs in _blocks(logits, span, plan.block):
                    stats[:, here], initial_own[here] = _block_stats(*logs, tokens[here], plan)
        ctx.save_for_backward(tokens, *pairs, stats[1], initial_own)
        return stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, *pairs, own, initial_own = ctx.saved_tensors
        plan, (student, teacher, initial) = ctx.plan, _in_twos(pairs)
        by_divergence, by_own, by_policy, by_kl = gradient[:4]
        by_own = by_own + by_policy  # the policy term is exp(0), so it changes as the log-probability does
        if plan.kl == "k3" and initial[0] is not None:
            by_own = by_own + by_kl * (1 - (initial_own - own).exp())
        used = [bool(by_divergence.any()), plan.kl == "full" and bool(by_kl.any())]
        sums = [torch.zeros_like(t, dtype=torch.float32) if need else None for t, need in zip(student, ctx.needs_input_grad[2:4], strict=True)]
        with torch.autocast(tokens.device.type, enabled=False):
            ours = _Projection(*student, ctx.dtypes[0], plan)
            rest = zip((teacher, initial), ctx.dtypes[1:], used, strict=True)
            heads = [ours, *(_projection(*pair, dtype, plan) if on else None for pair, dtype, on in rest)]
            for span in _spans(0, len(tokens), plan.chunk):
                logits = [None if head is None else head.logits(span) for head in heads]
                for here, logs in _blocks(logits, span, plan.block):
                    found = _block_gradient(*logs, tokens[here], plan.kind, by_divergence[here], by_own[here], by_kl[here])
                    ours.room[here.start - span.start : here.stop - span.start] = found  # over the logits, which nobody reads again
                ours.pull_back(span, *sums)
        return None, None, *(g if g is None else g.to(t.dtype) for g, t in zip(sums, student, strict=True)), None, None, None, None


class _Projection:
    """Hidden states and the output matrix that turns them into logits, in the type to compute in, and room for the logits of one chunk."""

    def __init__(self, states: Tensor, matrix: Tensor, dtype: torch.dtype, plan: _Plan) -> None:
        # Cast once, not for every chunk. Rows past the vocabulary are padding: they take no part, so they leak no probability.
        self.states, self.matrix = states.to(dtype), matrix[: plan.size].to(dtype)
        self.room = states.new_empty((min(plan.chunk, len(states)), plan.size), dtype=torch.float32)

    def logits(self, span: slice) -> Tensor:
        """float32 [n, V] of the states in `span`, in the room."""
        return _product(self.states[span], self.matrix.T, self.room[: span.stop - span.start])

    def pull_back(self, span: slice, to_states: Tensor | None, to_matrix: Tensor | None) -> None:
        """Write what the gradient in the room gives for the states in `span`, and add what it gives for the matrix; both are float32."""
        by_logits = self.room[: span.stop - span.start].to(self.matrix.dtype)
        if to_states is not None:
            _product(by_logits, self.matrix, to_states[span])
        if to_matrix is not None:
            _product(by_logits.T, self.states[span], to_matrix[: len(self.matrix)], add=True)


def _projection(states: Tensor | None, matrix: Tensor | None, dtype: torch.dtype, plan: _Plan) -> _Projection | None:
    return None if states is None or matrix is None else _Projection(states, matrix, dtype, plan)


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """a @ b in float32, written or added to `out`; on a GPU, sums of 16-bit products are not rounded to 16 bits."""
    if a.dtype == torch.float32:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.addmm(out, a, b, torch.float32, out=out) if add else torch.mm(a, b, torch.float32, out=out)
    return out.add_(a @ b) if add else out.copy_(a @ b)


def _in_twos(pairs: Sequence[Any]) -> list[tuple[Any, Any]]:
    return [(pairs[i], pairs[i + 1]) for i in range(0, len(pairs), 2)]


def _compute_dtype(states: Tensor | None, matrix: Tensor | None) -> torch.dtype:
    if states is None or matrix is None:
        return torch.float32
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.promote_types(states.dtype, matrix.dtype)


def _fitting(limits: dict[str, int], device: torch.device, size: int) -> int:
    """Tokens whose float32 logits fit the limit of a device."""
    return max(1, limits.get(device.type, limits["cuda"]) // (4 * size))


def _spans(start: int, stop: int, step: int) -> Iterator[slice]:
    yield from (slice(i, min(i + step, stop)) for i in range(start, stop, step))


def _blocks(logits: Sequence[Tensor | None], span: slice, size: int) -> Iterator[tuple[slice, tuple[Any, Any, Any]]]:
    """The log-probabilities of a chunk, block by block, and where among all tokens each block stands."""
    for here in _spans(span.start, span.stop, size):
        rows = slice(here.start - span.start, here.stop - span.start)
        student, teacher, initial = (None if z is None else torch.log_softmax(z[rows], -1) for z in logits)
        yield here, (student, teacher, initial)


def _block_stats(student: Tensor, teacher: Tensor | None, initial: Tensor | None, tokens: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
    """The six statistics [6, n] of a block, and S_0's log-probability of its tokens."""
    own, zero = _at(student, tokens), student.new_zeros(len(tokens))
    theirs = zero if teacher is None else _at(teacher, tokens)
    first = zero if initial is None else _at(initial, tokens)
    apart = zero if teacher is None else divergence(plan.kind, teacher, student)
    drift = zero if initial is None else k3(first, own) if plan.kl == "k3" else _kl(student, initial)
    entropy = -(student.exp() * student).sum(-1)
    return torch.stack([apart, own, torch.ones_like(own), drift, theirs, entropy]), first


def _block_gradient(
    student: Tensor, teacher: Tensor | None, initial: Tensor | None, tokens: Tensor, kind: str, by_divergence: Tensor, by_own: Tensor, by_kl: Tensor
) -> Tensor:
    """The derivative of the loss by a block's logits [n, V], from its derivatives by three of the statistics [n].

    By the logits of S, KL(S || Q) changes by S (x - sum S x) with x = log S - log Q; the JSD by half of that with Q the mixture, since what the mixture
    itself adds is the same for every id, which a softmax ignores; KL(T || S) by S - T; and log S of a token by 1 at the token, less S.
    """
    shift, ratio = -by_own, torch.zeros_like(student) if teacher is None or kind == "forward_kl" else _ratio(kind, student, teacher, by_divergence)
    if initial is not None:
        ratio += (student - initial).mul_(by_kl[:, None])
    if teacher is not None and kind == "forward_kl":
        shift = shift + by_divergence
    weight = student.exp()
    found = ratio.add_((shift - (weight * ratio).sum(-1))[:, None]).mul_(weight)
    if teacher is not None and kind == "forward_kl":
        found -= teacher.exp().mul_(by_divergence[:, None])
    return found.scatter_add_(1, tokens[:, None], by_own[:, None])


def _ratio(kind: str, student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
    if kind == "reverse_kl":
        return (student - teacher).mul_(scale[:, None])
    # A constant such as the mixture's log 2 falls out of x - sum S x.
    return torch.logaddexp(student, teacher).neg_().add_(student).mul_(0.5 * scale[:, None])


def _at(logs: Tensor, tokens: Tensor) -> Tensor:
    return logs.gather(1, tokens[:, None])[:, 0]


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(P || Q) [n] of log-probabilities [n, V]."""
    return (p.exp() * (p - q)).sum(-1)
