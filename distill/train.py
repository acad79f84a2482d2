"""The training loop: batches of questions with their responses, one update each, through a teacher's mask stages.

Everything that decides a step (order of questions, masks, responses) follows from the recipe and the step's number alone, so a run that
was killed continues from its checkpoint as if nothing had happened.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..errors import RunError
from ..files import whole_file
from ..samples import Sample
from . import rewards
from .claims import training_mark
from .families import family_of
from .forward import Group, PackedBatch, move, pack, response_states
from .inputs import Encoder
from .objective import Heads, ObjectiveWeights, RowStats, loss, row_stats
from .recipe import Objective, Recipe
from .responses import DistinctResponse
from .signal import teacher_states

NORMS_EVERY = 20  # steps between measurements of both parts' gradient norms, which take a second backward pass


@dataclass(frozen=True)
class Step:
    """What one update sees: its number in the run, the teacher's mask ratio, and its questions."""

    number: int
    stage: int
    ratio: float
    questions: tuple[int, ...]  # indices into the teacher's questions


def plan_steps(questions: Sequence[range], ratios: Sequence[float], per_step: int, epochs: int, seed: int, first: int = 0) -> list[Step]:
    """All updates under one teacher: stage by stage, its questions shuffled anew in every epoch, `per_step` at a time."""
    steps: list[Step] = []
    for stage, (share, ratio) in enumerate(zip(questions, ratios, strict=True)):
        for epoch in range(epochs):
            order = list(share)
            random.Random(f"{seed}/{stage}/{epoch}").shuffle(order)
            batches = [tuple(order[i : i + per_step]) for i in range(0, len(order), per_step)]
            steps += [Step(first + len(steps) + i, stage, ratio, batch) for i, batch in enumerate(batches)]
    return steps


def rate_at(step: int, total: int, schedule: str, warm_up: int) -> float:
    """The factor on the learning rate at `step` of `total`: a linear warm-up, then constant, or falling to 0 linearly or as a cosine."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, total - warm_up)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]


class Trainer:
    """A student in training: its optimizer, its frozen starting point where a KL needs one, and its place in the run."""

    def __init__(self, student: Any, encoder: Encoder, recipe: Recipe, total_steps: int, folder: Path, shared: bool = True) -> None:
        self.recipe, self.encoder, self.folder, self.shared = recipe, encoder, folder, shared
        self.accelerator = Accelerator(mixed_precision="no")
        self.collate = family_of(student.config.model_type).collate_pixels
        self.initial = copy.deepcopy(student).to(getattr(torch, recipe.train.dtype)).eval().requires_grad_(False) if recipe.objective.beta else None
        self.student = student
        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=recipe.train.learning_rate, weight_decay=recipe.train.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, total_steps, recipe.train.schedule, recipe.train.warm_up))
        self.optimizer, self.schedule = self.accelerator.prepare(optimizer, schedule)
        self.trained = trained
        self.done = 0  # steps
        self.best = -1.0  # validation accuracy

    def step(self, step: Step, samples: Sequence[Sample], responses: Mapping[str, Sequence[DistinctResponse]], teacher: Any | None) -> dict[str, float]:
        """One update; returns its row for metrics.jsonl. Raises RunError, naming the questions, if loss or gradient is not finite."""
        started = time.monotonic()
        chosen = [samples[i] for i in step.questions if responses.get(samples[i].id)]
        groups = [responses[sample.id] for sample in chosen]
        asked = [Group(self.encoder.prompt(s), tuple(r.ids for r in g), s.id) for s, g in zip(chosen, groups, strict=True)]
        packed = pack(asked, self.encoder.pad, self.collate, self.shared)
        batch = move(packed, self.accelerator.device)
        self.student.train()
        with self.autocast():
            stats = self._stats(batch, teacher)
        shaped = shape_rewards(groups, stats, self.recipe.objective)
        distill, rest = loss(stats, shaped.advantage, shaped.weights, weights_of(self.recipe.objective), shaped.distill_on)
        value = float((distill + rest).detach())
        _check_finite("loss", value, step, chosen)
        norms = self._backward(distill, rest, measure=step.number % NORMS_EVERY == 0)
        norms["grad_norm"] = float(self.accelerator.clip_grad_norm_(self.trained, self.recipe.train.clip))
        _check_finite("gradient's norm", norms["grad_norm"], step, chosen)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done = step.number + 1
        row = {"step": step.number, "stage": step.stage, "ratio": step.ratio, "loss": value, "loss_distill": float(distill.detach()), **norms}
        return row | _describe(stats, shaped, groups) | {"seconds": time.monotonic() - started, "questions": len(chosen)}

    def autocast(self) -> torch.autocast:
        """Computing in the recipe's type with float32 weights: an update of 1e-6 would be lost in a bfloat16 weight."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.recipe.train.dtype == "bfloat16")

    def _stats(self, batch: PackedBatch, teacher: Any | None) -> RowStats:
        objective = self.recipe.objective
        with torch.no_grad():
            theirs, their_head = (None, None) if teacher is None else teacher_states(teacher, batch)
            initial = None if self.initial is None else response_states(self.initial, batch)
        heads = Heads(response_states(self.student, batch), _head(self.student), theirs, their_head, initial, _head(self.initial))
        return row_stats(heads, batch.tokens, batch.rows, batch.count, objective.divergence, objective.kl)

    def _backward(self, distill: Tensor, rest: Tensor, measure: bool) -> dict[str, float]:
        if not (measure and distill.requires_grad and rest.requires_grad):
            self.accelerator.backward(distill + rest)
            return {}
        first = torch.autograd.grad(distill, self.trained, retain_graph=True, allow_unused=True)
        second = torch.autograd.grad(rest, self.trained, allow_unused=True)
        for parameter, a, b in zip(self.trained, first, second, strict=True):
            parameter.grad = a if b is None else b if a is None else a + b
        return {"grad_norm_distill": _norm(first), "grad_norm_policy": _norm(second)}

    def save(self) -> None:
        """Write the checkpoint whole: weights, optimizer and place."""
        state = {
            "recipe": training_mark(self.recipe),
            "step": self.done,
            "best": self.best,
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        _write(self.folder / "last.pt", state)

    def load(self) -> bool:
        """Continue from the checkpoint if there is one."""
        path = self.folder / "last.pt"
        if not path.is_file():
            return False
        try:
            state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise RunError(f"{path} is damaged ({str(error).splitlines()[0][:120]}); remove the folder {self.folder} to train again from the answers") from None
        if state["recipe"] != training_mark(self.recipe):
            raise RunError(f"{path} is another recipe's checkpoint; choose another 'out', or remove the folder {self.folder} to train from the answers")
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.done, self.best = state["step"], state["best"]
        return True

    def save_best(self) -> None:
        """Keep the weights as they are now; the checkpoint that follows records that they were the best."""
        _write(self.folder / "best.pt", self.student.state_dict())

    def load_best(self) -> None:
        self.student.load_state_dict(torch.load(self.folder / "best.pt", map_location=self.accelerator.device, weights_only=True))


def _write(path: Path, state: Mapping[str, Any]) -> None:
    with whole_file(path) as part:
        try:
            torch.save(state, part)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(str(error).splitlines()[0][:120]) from error


@dataclass(frozen=True)
class Shaped:
    """One value a row, over all groups of a batch: rewards, advantages, each row's weight in the loss, and where D is taken."""

    accuracy: Tensor
    distillation: Tensor
    total: Tensor
    advantage: Tensor
    weights: Tensor
    distill_on: Tensor
    zero_spread: float  # share of groups whose rewards are all equal


def shape_rewards(groups: Sequence[Sequence[DistinctResponse]], stats: RowStats, objective: Objective) -> Shaped:
    """Rewards and advantages group by group; every question weighs the same, and in it every response, however often it was sampled."""
    device = stats.divergence.device
    verdicts = torch.tensor([[float("nan") if r.verdict is None else r.verdict for r in g][i] for g in groups for i in range(len(g))], device=device)
    counts = torch.tensor([float(r.count) for g in groups for r in g], device=device)
    distillation, total, advantage, weights = (torch.zeros_like(verdicts) for _ in range(4))
    even = 0
    for rows in _spans(groups):
        d = rewards.distillation_reward(
            objective.distillation_reward, stats.divergence[rows].detach(), stats.teacher_logprob[rows].detach(), objective.least_spread
        )
        r = rewards.total_reward(verdicts[rows], d, objective.accuracy_reward, objective.reward_wrong)
        distillation[rows], total[rows] = d, r
        advantage[rows] = rewards.advantages(r, counts[rows], objective.advantages)
        weights[rows] = counts[rows] / counts[rows].sum() / len(groups)
        even += int(r.max() == r.min())
    return Shaped(verdicts, distillation, total, advantage, weights, _distill_on(groups, verdicts, objective.distill_on), even / len(groups))


def _check_finite(what: str, value: float, step: Step, samples: Sequence[Sample]) -> None:
    """Raise RunError before an update that would leave weights which are no numbers."""
    if not math.isfinite(value):
        named = ", ".join(sample.id for sample in samples[:8])
        raise RunError(f"the {what} is {value} at step {step.number} (questions {named}); the last checkpoint is kept, lower the learning rate")


def weights_of(objective: Objective) -> ObjectiveWeights:
    return ObjectiveWeights(objective.distill, objective.policy, objective.beta, objective.nll)


def _distill_on(groups: Sequence[Sequence[DistinctResponse]], verdicts: Tensor, which: str) -> Tensor:
    if which == "all":
        return torch.ones_like(verdicts)
    if which == "right":
        return (verdicts == 1).float()
    return torch.tensor([float(r.from_teacher) for g in groups for r in g], device=verdicts.device)


def _spans(groups: Sequence[Sequence[DistinctResponse]]) -> Iterator[slice]:
    start = 0
    for group in groups:
        yield slice(start, start + len(group))
        start += len(group)


@torch.no_grad()
def _describe(stats: RowStats, shaped: Shaped, groups: Sequence[Sequence[DistinctResponse]]) -> dict[str, float]:
    """The figures of one step that tell whether training goes well."""
    pairs = {"distillation": shaped.distillation, "total": shaped.total}
    row = {
        "divergence": float((shaped.weights * stats.divergence).sum()),
        "kl": float((shaped.weights * stats.kl).sum()),
        "entropy": float((shaped.weights * stats.entropy).sum()),
        "reward_accuracy": float((shaped.weights * shaped.accuracy.nan_to_num(0.0)).sum()),
        "reward_distillation": float((shaped.weights * shaped.distillation).sum()),
        "zero_spread": shaped.zero_spread,
        "response_tokens": sum(len(r.ids) * r.count for g in groups for r in g) / sum(r.count for g in groups for r in g),
    }
    for name, values in pairs.items():
        counted = [rewards.outranking(shaped.accuracy[rows], values[rows]) for rows in _spans(groups)]
        row[f"right_outranks_{name}"], row["pairs"] = sum(higher for higher, _ in counted), sum(all_ for _, all_ in counted)
    return row


def _head(model: Any | None) -> Any:
    return None if model is None else model.get_output_embeddings().weight


def _norm(gradients: Sequence[Tensor | None]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))


class MetricsLog:
    """metrics.jsonl, one row a line; what was written after the checkpoint that a run continues from, at step `first`, is dropped."""

    def __init__(self, path: Path, first: int) -> None:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        with whole_file(path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows if first and row["step"] < first))
        self.path = path

    def write(self, row: Mapping[str, Any]) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
        except OSError as error:
            raise RunError(f"could not write {self.path}: {error.strerror}; free some space, then run again") from None
