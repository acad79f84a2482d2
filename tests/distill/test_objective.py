"""The objective against a float64 implementation of its own, SciPy, PyTorch's KL, TRL's two divergences, and sums over every possible token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from masters.distill.objective import DIVERGENCES, Heads, ObjectiveWeights, loss, row_stats
from masters.distill.token_stats import CHUNK_BYTES, divergence, k3

LENGTHS = (1, 4, 7, 2, 1)
VOCABULARY, WIDTH, TEACHER_WIDTH = 37, 6, 9
FIELDS = ("divergence", "logprob", "policy", "kl", "teacher_logprob", "entropy")


@dataclasses.dataclass
class Case:
    """Hidden states, heads and tokens of five responses, in any order of tokens."""

    heads: Heads
    tokens: Tensor
    rows: Tensor


def case(
    dtype: torch.dtype = torch.float32, seed: int = 0, vocabulary: tuple[int, int] = (VOCABULARY, VOCABULARY), grad: bool = True, scale: float = 1.0
) -> Case:
    random = torch.Generator().manual_seed(seed)
    rows = torch.cat([torch.full((n,), j) for j, n in enumerate(LENGTHS)])
    n = len(rows)

    def normal(*shape: int) -> Tensor:
        return (scale * torch.randn(*shape, generator=random, dtype=torch.float64)).to(dtype)

    student, head = normal(n, WIDTH).requires_grad_(grad), normal(vocabulary[0], WIDTH).requires_grad_(grad)
    heads = Heads(student, head, normal(n, TEACHER_WIDTH), normal(vocabulary[1], TEACHER_WIDTH), normal(n, WIDTH), normal(vocabulary[0], WIDTH))
    return Case(heads, torch.randint(0, min(vocabulary), (n,), generator=random), rows)


def naive(c: Case, kind: str, kl: str) -> dict[str, list[float]]:
    """Every statistic one response, one token and one id at a time, in float64, from probabilities and not from log-probabilities."""
    size = min(len(c.heads.student_head), len(c.heads.teacher_head))

    def distribution(states: Tensor, head: Tensor, i: int) -> np.ndarray:
        scores = head[:size].detach().double().numpy() @ states[i].detach().double().numpy()
        shifted = np.exp(scores - scores.max())
        return shifted / shifted.sum()

    found: dict[str, list[list[float]]] = {name: [[] for _ in LENGTHS] for name in FIELDS}
    for i, (token, row) in enumerate(zip(c.tokens.tolist(), c.rows.tolist(), strict=True)):
        s = distribution(c.heads.student, c.heads.student_head, i)
        t = distribution(c.heads.teacher, c.heads.teacher_head, i)
        s0 = distribution(c.heads.initial, c.heads.initial_head, i)
        m = (s + t) / 2
        of = {
            # The JSD as the entropy of the mixture less the mean entropy, not as two KLs.
            "jsd": sum(-x * math.log(x) for x in m) - 0.5 * sum(-x * math.log(x) for x in s) - 0.5 * sum(-x * math.log(x) for x in t),
            "forward_kl": sum(a * math.log(a / b) for a, b in zip(t, s, strict=True)),
            "reverse_kl": sum(b * math.log(b / a) for a, b in zip(t, s, strict=True)),
        }
        ratio = s0[token] / s[token]
        drift = {"k3": ratio - math.log(ratio) - 1, "full": sum(a * math.log(a / b) for a, b in zip(s, s0, strict=True))}
        values = (of[kind], math.log(s[token]), 1.0, drift[kl], math.log(t[token]), -sum(x * math.log(x) for x in s))
        for name, value in zip(FIELDS, values, strict=True):
            found[name][row].append(value)
    return {name: [sum(values) / len(values) for values in rows] for name, rows in found.items()}


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("kl", ["k3", "full"])
def test_row_statistics_equal_the_naive_ones(kind: str, kl: str):
    c = case()
    stats = row_stats(c.heads, c.tokens, c.rows, len(LENGTHS), kind, kl)
    for name, expected in naive(c, kind, kl).items():
        found = getattr(stats, name)
        assert found.dtype == torch.float32
        assert found.tolist() == pytest.approx(expected, abs=2e-5, rel=2e-5), name


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("kl", ["k3", "full"])
def test_the_loss_and_its_gradients_equal_automatic_differentiation_of_a_plain_float64_loss(kind: str, kl: str):
    c = case(scale=0.6)
    advantage, on = torch.tensor([1.3, -0.4, 0.2, -1.1, 0.0]), torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    weights = torch.tensor([0.3, 0.25, 0.25, 0.1, 0.1])
    objective = ObjectiveWeights(distill=0.7, policy=1.2, beta=0.3, nll=0.5)
    stats = row_stats(c.heads, c.tokens, c.rows, len(LENGTHS), kind, kl)
    distill, rest = loss(stats, advantage, weights, objective, on)
    ours = distill + rest
    gradients = torch.autograd.grad(ours, [c.heads.student, c.heads.student_head])

    states, head = (t.detach().double().requires_grad_() for t in (c.heads.student, c.heads.student_head))
    s = F.softmax(states @ head.T, -1)
    t = F.softmax(c.heads.teacher.double() @ c.heads.teacher_head.double().T, -1)
    s0 = F.softmax(c.heads.initial.double() @ c.heads.initial_head.double().T, -1)
    own, first = (p.gather(1, c.tokens[:, None])[:, 0] for p in (s, s0))
    m = (s + t) / 2
    apart = {
        "jsd": 0.5 * (t * (t / m).log()).sum(-1) + 0.5 * (s * (s / m).log()).sum(-1),
        "forward_kl": (t * (t / s).log()).sum(-1),
        "reverse_kl": (s * (s / t).log()).sum(-1),
    }[kind]
    drift = first / own - (first / own).log() - 1 if kl == "k3" else (s * (s / s0).log()).sum(-1)
    expected = torch.zeros((), dtype=torch.float64)
    value = 0.0
    for j, length in enumerate(LENGTHS):
        rows = c.rows == j
        mean = lambda x, rows=rows, length=length: x[rows].sum() / length  # noqa: E731
        # The policy term's gradient is A * grad of the mean log-probability; its value is A.
        parts = 0.7 * on[j] * mean(apart) + 0.3 * mean(drift) - 0.5 * mean(own.log())
        expected = expected + weights[j] * (parts - 1.2 * advantage[j] * mean(own.log()))
        value += float(weights[j] * (parts.detach() - 1.2 * advantage[j]))
    assert float(ours.detach()) == pytest.approx(value, abs=2e-5)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, [states, head]), strict=True):
        assert float((found.double() - wanted).abs().max()) < 2e-6


def test_the_jsd_is_scipys_squared_and_at_most_ln_2():
    random = torch.Generator().manual_seed(1)
    for scale in (0.1, 1.0, 5.0, 40.0):
        teacher, student = (torch.log_softmax(scale * torch.randn(50, 300, generator=random, dtype=torch.float64), -1) for _ in range(2))
        found = divergence("jsd", teacher, student)
        expected = jensenshannon(teacher.exp().numpy(), student.exp().numpy(), axis=1) ** 2
        assert np.abs(found.numpy() - expected).max() < 1e-12
        single = divergence("jsd", teacher.float(), student.float())
        assert np.abs(single.numpy() - expected).max() < 1e-5
        assert bool((single <= math.log(2) + 1e-6).all())
        assert bool((single >= -1e-6).all())
    apart = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]]).log_softmax(-1)
    assert float(divergence("jsd", apart[:1], apart[1:])) == pytest.approx(math.log(2)), "disjoint distributions reach the bound"
    assert torch.equal(divergence("jsd", apart, apart), torch.zeros(2)), "equal ones are 0 apart"


def test_forward_and_reverse_kl_are_pytorchs():
    random = torch.Generator().manual_seed(2)
    teacher, student = (torch.log_softmax(2 * torch.randn(20, 90, generator=random), -1) for _ in range(2))
    forward = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    reverse = F.kl_div(teacher, student, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(divergence("forward_kl", teacher, student), forward, atol=1e-5)
    assert torch.allclose(divergence("reverse_kl", teacher, student), reverse, atol=1e-5)
    assert not torch.allclose(forward, reverse, atol=1e-2), "the two directions differ here, so that a swap would show"


TRL_BETA = {"jsd": 0.5, "forward_kl": 0.0, "reverse_kl": 1.0}


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_each_responses_divergence_and_its_gradient_are_trls_generalised_jsd(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    c = case(scale=0.7, seed=6)
    stats = row_stats(c.heads, c.tokens, c.rows, len(LENGTHS), kind, "k3")
    logits, theirs = c.heads.student @ c.heads.student_head.T, c.heads.teacher @ c.heads.teacher_head.T
    expected = []
    for row in range(len(LENGTHS)):
        labels = torch.where(c.rows == row, c.tokens, -100)[None]  # TRL takes the mean over the labelled tokens of all rows: here those of one response
        expected.append(GKDTrainer.generalized_jsd_loss(logits[None], theirs[None], labels, beta=TRL_BETA[kind]))
    assert torch.allclose(stats.divergence, torch.stack(expected), atol=1e-6)
    assert float(stats.divergence.detach().std()) > 1e-2
    weights = torch.linspace(-1, 2, len(LENGTHS))
    inputs = [c.heads.student, c.heads.student_head]
    ours = torch.autograd.grad((weights * stats.divergence).sum(), inputs)
    for found, wanted in zip(ours, torch.autograd.grad((weights * torch.stack(expected)).sum(), inputs), strict=True):
        assert float((found - wanted).abs().max()) < 1e-6


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_every_tokens_divergence_and_entropy_are_those_of_trls_chunked_kernel(kind: str):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    c = case(scale=0.7, seed=7)
    alone = torch.arange(len(c.tokens))  # a response of one token each
    stats = row_stats(c.heads, c.tokens, alone, len(alone), kind, "k3")
    heads = (c.heads.student, c.heads.student_head, None, c.heads.teacher, c.heads.teacher_head, None)
    expected, entropy = ChunkedDivergenceFunction.apply(*heads, TRL_BETA[kind])
    assert torch.allclose(stats.divergence, expected, atol=1e-6)
    assert torch.allclose(stats.entropy, entropy, atol=1e-5)
    weights = torch.linspace(-1, 2, len(alone))
    inputs = [c.heads.student, c.heads.student_head]
    ours = torch.autograd.grad((weights * stats.divergence).sum(), inputs)
    for found, wanted in zip(ours, torch.autograd.grad((weights * expected).sum(), inputs), strict=True):
        assert float((found - wanted).abs().max()) < 5e-6  # of gradients up to 2


@pytest.mark.parametrize("chunk", [1, 3, 14, 15, 1000])
def test_the_chunk_size_changes_neither_values_nor_gradients(chunk: int):
    whole, cut = case(), case()
    results = []
    for c, size in ((whole, 10**6), (cut, chunk)):
        stats = row_stats(c.heads, c.tokens, c.rows, len(LENGTHS), "jsd", "full", chunk=size)
        distill, rest = loss(stats, torch.linspace(-1, 1, 5), torch.full((5,), 0.2), ObjectiveWeights(nll=0.3))
        total = distill + rest
        results.append((stats, torch.autograd.grad(total, [c.heads.student, c.heads.student_head])))
    (one, first), (other, second) = results
    for name in FIELDS:
        assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-6), name
    for a, b in zip(first, second, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(("ours", "theirs"), [(VOCABULARY, VOCABULARY + 11), (VOCABULARY + 11, VOCABULARY), (VOCABULARY, VOCABULARY)])
def test_padded_rows_of_a_head_take_no_part(ours: int, theirs: int):
    padded = case(vocabulary=(ours, theirs), seed=5)
    # Padding with a huge logit, as an untrained row may have, would take all of the probability.
    with torch.no_grad():
        for head, states in ((padded.heads.student_head, padded.heads.student), (padded.heads.teacher_head, padded.heads.teacher)):
            head[VOCABULARY:] = 1e3 * states.sum(0)
    stats = row_stats(padded.heads, padded.tokens, padded.rows, len(LENGTHS), "jsd", "k3")
    cut = dataclasses.replace(
        padded.heads,
        student_head=padded.heads.student_head[:VOCABULARY],
        teacher_head=padded.heads.teacher_head[:VOCABULARY],
        initial_head=padded.heads.initial_head[:VOCABULARY],
    )
    expected = row_stats(cut, padded.tokens, padded.rows, len(LENGTHS), "jsd", "k3")
    for name in FIELDS:
        assert torch.allclose(getattr(stats, name), getattr(expected, name), atol=1e-6), name
    (gradient,) = torch.autograd.grad(stats.divergence.sum(), padded.heads.student_head)
    assert bool((gradient[VOCABULARY:] == 0).all())


def test_gradients_reach_the_student_only():
    c = case()
    everything = [c.heads.teacher, c.heads.teacher_head, c.heads.initial, c.heads.initial_head]
    for tensor in everything:
        tensor.requires_grad_()
    advantage = torch.ones(5, requires_grad=True)
    stats = row_stats(c.heads, c.tokens, c.rows, len(LENGTHS), "jsd", "k3")
    (through_teacher,) = torch.autograd.grad(stats.teacher_logprob.sum(), c.heads.student, retain_graph=True)
    assert through_teacher.abs().max() == 0
    distill, rest = loss(stats, advantage * stats.divergence, torch.full((5,), 0.2), ObjectiveWeights(nll=1.0))
    (distill + rest).backward()
    assert all(tensor.grad is None for tensor in everything)
    assert advantage.grad is None, "rewards are detached"
    assert c.heads.student.grad.abs().max() > 0
    assert c.heads.student_head.grad.abs().max() > 0


def test_the_policy_terms_gradient_is_the_advantage_times_the_mean_log_probabilitys():
    c = case(seed=3)
    advantage = torch.tensor([2.0, -1.5, 0.0, 0.7, -0.2])
    stats = row_stats(c.heads, c.tokens, c.rows, len(LENGTHS), "jsd", "k3")
    assert stats.policy.tolist() == [1.0] * 5
    distill, policy = loss(stats, advantage, torch.full((5,), 0.2), ObjectiveWeights(distill=0.0, policy=1.0, beta=0.0))
    assert float(distill.detach()) == 0
    (found,) = torch.autograd.grad(policy, c.heads.student, retain_graph=True)
    (expected,) = torch.autograd.grad(-(0.2 * advantage * stats.logprob).sum(), c.heads.student)
    assert torch.allclose(found, expected, atol=1e-7)
    assert bool((found[c.rows == 2] == 0).all()), "no advantage, no gradient"


def test_k3_is_unbiased_for_the_full_kl_by_enumeration():
    random = torch.Generator().manual_seed(4)
    student, initial = (torch.log_softmax(torch.randn(7, 60, generator=random, dtype=torch.float64), -1) for _ in range(2))
    assert bool((k3(initial, student) >= 0).all())
    assert torch.allclose(k3(initial, student), torch.expm1(initial - student) - (initial - student))
    expectation = (student.exp() * k3(initial, student)).sum(-1)
    full = F.kl_div(initial, student, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(expectation, full, atol=1e-12)


def test_without_teacher_and_starting_point_their_statistics_are_zero():
    c = case()
    stats = row_stats(Heads(c.heads.student, c.heads.student_head), c.tokens, c.rows, len(LENGTHS), "jsd", "k3")
    assert stats.divergence.tolist() == stats.kl.tolist() == stats.teacher_logprob.tolist() == [0.0] * 5
    full = row_stats(c.heads, c.tokens, c.rows, len(LENGTHS), "jsd", "k3")
    assert torch.equal(stats.logprob, full.logprob)


def test_half_precision_states_are_compared_in_float32():
    c = case(torch.bfloat16, grad=False)
    stats = row_stats(c.heads, c.tokens, c.rows, len(LENGTHS), "jsd", "full")
    for name, expected in naive(c, "jsd", "full").items():
        # The products are bfloat16, the softmax is not.
        assert getattr(stats, name).tolist() == pytest.approx(expected, abs=0.05), name


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation's result held."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("tokens", [64, 1024])
def test_no_tensor_grows_with_the_number_of_tokens(tokens: int):
    vocabulary, chunk = 5000, 32
    student = torch.randn(tokens, 4, requires_grad=True)
    heads = Heads(student, torch.randn(vocabulary, 4, requires_grad=True), torch.randn(tokens, 8), torch.randn(vocabulary, 8))
    with LargestTensor() as seen:
        stats = row_stats(heads, torch.zeros(tokens, dtype=torch.long), torch.zeros(tokens, dtype=torch.long), 1, "jsd", "k3", chunk=chunk)
        stats.divergence.sum().backward()
    assert seen.elements == chunk * vocabulary, "the logits of one chunk, forward and backward"


def kept_for_backward(evaluate: Callable[[], Tensor]) -> int:
    """How many numbers the graph of one evaluation holds on to."""
    kept: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        assert evaluate().requires_grad
    return sum(kept.values())


def test_logits_are_not_kept_for_the_backward_pass():
    tokens, vocabulary, chunk = 256, 2000, 16
    student, head, teacher, teacher_head = torch.randn(tokens, 4, requires_grad=True), *(torch.randn(n, 4) for n in (vocabulary, tokens, vocabulary))
    none = torch.zeros(tokens, dtype=torch.long)
    kept = kept_for_backward(lambda: row_stats(Heads(student, head, teacher, teacher_head), none, none, 1, "jsd", "k3", chunk=chunk).divergence)
    assert kept < chunk * vocabulary
    plain = kept_for_backward(lambda: divergence("jsd", (teacher @ teacher_head.T).log_softmax(-1), (student @ head.T).log_softmax(-1)))
    assert plain > tokens * vocabulary, "a plain evaluation keeps them, so this would show"


def test_without_a_chunk_size_the_logits_of_a_chunk_fill_its_bytes(monkeypatch: pytest.MonkeyPatch):
    tokens, vocabulary = 100, 4000
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 7 * 4 * vocabulary)
    heads = Heads(torch.randn(tokens, 4, requires_grad=True), torch.randn(vocabulary, 4, requires_grad=True))
    none = torch.zeros(tokens, dtype=torch.long)
    with LargestTensor() as seen:
        row_stats(heads, none, none, 1, "jsd", "k3").logprob.sum().backward()
    assert seen.elements == 7 * vocabulary
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 1)
    assert row_stats(heads, none[:1], none[:1], 1, "jsd", "k3").logprob.shape == (1,), "one token at least"


@pytest.mark.parametrize("autocast", [False, True])
def test_in_half_precision_sums_and_gradients_are_float32_and_types_are_kept(autocast: bool):
    """bfloat16 states and matrices, and float32 ones under autocast, against float64 on the rounded values."""
    rounded = case(torch.bfloat16, scale=0.5)
    c = rounded if not autocast else case(scale=0.5)
    inputs, advantage = [c.heads.student, c.heads.student_head], torch.linspace(-1, 1, 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stats = row_stats(c.heads, c.tokens, c.rows, len(LENGTHS), "jsd", "full")
        distill, rest = loss(stats, advantage, torch.full((5,), 0.2), ObjectiveWeights())
    found = torch.autograd.grad(distill + rest, inputs)
    assert [g.dtype for g in found] == [t.dtype for t in inputs]

    exact = case(torch.float64, scale=0.5)
    for name in ("student", "student_head", "teacher", "teacher_head", "initial", "initial_head"):
        getattr(exact.heads, name).data.copy_(getattr(rounded.heads, name).data)
    logs = [torch.log_softmax(h @ m.T, -1) for h, m in zip(*[iter(vars(exact.heads).values())] * 2, strict=True)]
    each = [divergence("jsd", logs[1], logs[0]), logs[0].gather(1, exact.tokens[:, None])[:, 0], (logs[0].exp() * (logs[0] - logs[2])).sum(-1)]
    apart, own, drift = (torch.stack([x[exact.rows == j].mean() for j in range(5)]) for x in each)
    wanted = torch.autograd.grad((0.2 * (apart - advantage * own + 0.1 * drift)).sum(), [exact.heads.student, exact.heads.student_head])
    assert torch.allclose(stats.divergence.double(), apart, atol=5e-3)
    for g, w in zip(found, wanted, strict=True):
        assert float((g.double() - w).norm() / w.norm()) < 0.01
