"""Rewards and advantages of the G responses to one question (Masters, arXiv 2512.22238, section 3; method.md sections 4-5).

All functions take one question's distinct responses with their `counts` [J]: a response sampled n times stands once, with n, and every mean
and deviation is the one over the G = sum(counts) responses.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-4  # added to the deviation, as in the GRPO implementations that the method builds on


def minmax(values: Tensor, least_spread: float = 0.0) -> Tensor:
    """Values [J] scaled so that the group's lowest becomes 0 and its highest 1; all 0 where they spread no more than `least_spread`."""
    low, high = values.min(), values.max()
    spread = high - low
    # A spread of rounding errors would otherwise be blown up to [0, 1] like any other.
    return torch.where(spread > least_spread, (values - low) / spread.clamp(min=torch.finfo(values.dtype).tiny), torch.zeros_like(values))


def distillation_reward(kind: str, divergence: Tensor, teacher_logprob: Tensor, least_spread: float = 0.0) -> Tensor:
    """R_distill [J] in [0, 1] by `kind`.

    'jsd_minmax': (D_max - D_j) / (D_max - D_min), the paper's, 1 for the response on which teacher and student agree most.
    'jsd': 1 - D_j, at least 0: the paper's without the scaling of each group.
    'teacher_logprob': the same scaling of the teacher's mean log-probability of the response, 1 for the one it finds likeliest.
    'none': 0.
    """
    if kind == "jsd_minmax":
        return minmax(-divergence, least_spread)
    if kind == "jsd":
        spread = divergence.max() - divergence.min()
        return torch.where(spread > least_spread, (1 - divergence).clamp(min=0), torch.zeros_like(divergence))
    if kind == "teacher_logprob":
        return minmax(teacher_logprob, least_spread)
    return torch.zeros_like(divergence)


def total_reward(accuracy: Tensor, distillation: Tensor, use_accuracy: bool, reward_wrong: bool, counts: Tensor | None = None) -> Tensor:
    """R = R_acc + R_distill, both [J]; without `reward_wrong` a response judged wrong gets no R_distill.

    A response without a verdict (NaN) takes no part in R_acc: it stands at the mean of the group's verdicts, each `counts` times, and so is neither
    raised nor lowered by it; R_distill it keeps. In a group without any verdict R_acc is 0.
    """
    known = accuracy.nan_to_num(group_accuracy(accuracy, torch.ones_like(accuracy) if counts is None else counts))
    shaped = distillation if reward_wrong else distillation * torch.where(accuracy.isnan(), 1.0, (accuracy > 0.5).to(distillation.dtype))
    return shaped + known if use_accuracy else shaped


def group_accuracy(accuracy: Tensor, counts: Tensor) -> float:
    """The mean of a group's verdicts [J] that are there; 0 where none is."""
    weights = counts * ~accuracy.isnan()
    return float((weights * accuracy.nan_to_num(0.0)).sum() / weights.sum().clamp(min=1.0))


def advantages(rewards: Tensor, counts: Tensor, which: str = "all") -> Tensor:
    """A_j = (R_j - mean) / (std + 1e-4) over the G responses, unbiased std; 'positive' sets negative ones to 0. A group of one has none."""
    total = counts.sum()
    if total < 2:
        return torch.zeros_like(rewards)
    mean = (counts * rewards).sum() / total
    deviation = ((counts * (rewards - mean) ** 2).sum() / (total - 1)).sqrt()
    found = (rewards - mean) / (deviation + EPSILON)
    return found.clamp(min=0) if which == "positive" else found


def outranking(accuracy: Tensor, rewards: Tensor) -> tuple[int, int]:
    """How many pairs (right, wrong) of one group give the right response the higher reward, and how many pairs there are."""
    right, wrong = rewards[accuracy == 1], rewards[accuracy == 0]
    higher = (right[:, None] > wrong[None, :]).sum()
    return int(higher), len(right) * len(wrong)
