"""The training loop: batches of questions with their responses, one update each, through a teacher's mask stages.

Everything that decides a step (order of questions, masks, responses) follows from the recipe and the step's number alone, so a run that
was killed continues from its checkpoint as if nothing had happened.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RunError
from ..files import whole_file
from ..samples import Sample
from . import ranks, rewards
from .checkpoint import optimizer_state, read_checkpoint, set_optimizer_state, set_weights, trained_weights, write_checkpoint
from .claims import training_mark
from .families import SUPPORTED, family_of
from .flops import Shape, forward, shape_of, update
from .forward import Group, PackedBatch, move, pack, response_states
from .inputs import Encoder
from .lora import without_adapters
from .objective import Heads, ObjectiveWeights, RowStats, loss, row_stats
from .parallel import STAND_IN, Hooked, head_of, place, sharding, unsynced, whole, with_gradients, within
from .reading import Reading, behind, prompt_reading, total
from .recipe import Objective, Recipe
from .responses import DistinctResponse
from .signal import CachedSignal, OwnPrompts, teacher_states

NORMS_EVERY = 20  # steps between measurements of both parts' gradient norms, for which the step is computed twice

Pair = tuple[Tensor | None, Tensor | None]  # hidden states [N, H] and the output matrix [V, H]


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
    """A student in training: its optimizer, its frozen starting point where a KL needs one, and its place in the run.

    Of several processes each computes its part of a step's questions; losses, gradients and figures are those of all of them.
    """

    def __init__(self, student: Any, encoder: Encoder, recipe: Recipe, total_steps: int, folder: Path, shared: bool = True) -> None:
        self.recipe, self.encoder, self.folder, self.shared, self.total_steps = recipe, encoder, folder, shared, total_steps
        dtype, sharded = getattr(torch, recipe.train.dtype), sharding() is not None
        self.collate = family_of(student.config.model_type).collate_pixels
        self.initial: Hooked | None = None
        if recipe.objective.beta and not recipe.lora:  # without its adapters, a student that has some is as it was
            self.initial = place(copy.deepcopy(student).to(dtype).eval().requires_grad_(False), dtype, sharded)
        self.student = student
        if recipe.train.gradient_checkpointing:
            # The older name, which earlier versions of transformers have alone, takes the same settings.
            enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.hooked = place(student, dtype, sharded)
        self.wrapped = with_gradients(self.hooked, all_used=recipe.train.freeze_vision and student.config.model_type in SUPPORTED)
        self.trained = [p for p in student.parameters() if p.requires_grad]
        # Fused: PyTorch's default on a GPU makes a second copy of all weights for a moment, on a CPU it takes four times as long.
        self.optimizer = torch.optim.AdamW(self.trained, lr=recipe.train.learning_rate, weight_decay=recipe.train.weight_decay, fused=True)
        self.shapes: dict[int, Shape] = {}  # of models by the identity of their configurations
        self.done = 0  # steps
        self.best = -1.0  # validation accuracy

    def step(self, step: Step, samples: Sequence[Sample], responses: Mapping[str, Sequence[DistinctResponse]], teacher: Any | None) -> dict[str, float]:
        """One update; returns its row for metrics.jsonl. Raises RunError, naming the questions, if loss or gradient is not finite."""
        started = time.monotonic()
        chosen = [samples[i] for i in step.questions if responses.get(samples[i].id)]
        self.student.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.train.learning_rate * rate_at(step.number, self.total_steps, self.recipe.train.schedule, self.recipe.train.warm_up)
        passes = ("distill", "rest") if step.number % NORMS_EVERY == 0 and has_both_parts(self.recipe.objective) else ("all",)
        gradients: list[list[Tensor | None]] = []
        norms: dict[str, float] = {}
        for part in passes:
            figures = self._gradients(step, chosen, responses, teacher, part)
            _check_finite("loss", figures["loss"], step, chosen)
            gradients.append([p.grad for p in self.trained])
            if len(passes) > 1:
                size = torch.nn.utils.get_total_norm([gradient for gradient in gradients[-1] if gradient is not None])
                norms["grad_norm_distill" if part == "distill" else "grad_norm_policy"] = float(whole(size))
            self.optimizer.zero_grad(set_to_none=True)
        for parameter, *parts in zip(self.trained, *gradients, strict=True):
            # What no question of a step reached has a gradient of 0, which is not none: the optimizer's momentum goes on.
            found = [gradient for gradient in parts if gradient is not None]
            parameter.grad = _sum(found) if found else torch.zeros_like(parameter)
        del gradients
        norms["grad_norm"] = float(whole(torch.nn.utils.clip_grad_norm_(self.trained, self.recipe.train.clip)))
        _check_finite("gradient's norm", norms["grad_norm"], step, chosen)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done = step.number + 1
        figures["operations"] *= len(passes)
        row = {"step": step.number, "stage": step.stage, "ratio": step.ratio, "loss": figures.pop("loss"), "loss_distill": figures.pop("loss_distill")}
        return row | norms | figures | {"seconds": time.monotonic() - started, "questions": len(chosen)}

    @torch.no_grad()
    def assess(self, samples: Sequence[Sample], groups: Sequence[Sequence[DistinctResponse]], teacher: Any | None) -> tuple[RowStats, Shaped]:
        """Divergences, rewards and advantages of the responses to these questions, as the student is now; nothing is learned from them."""
        self.student.eval()
        with self.autocast():
            stats = self._stats(samples, groups, teacher)
        asked = RowStats(*(values[: sum(map(len, groups))] for values in stats))
        return asked, shape_rewards(groups, asked, self.recipe.objective)

    def autocast(self) -> torch.autocast:
        """Computing in the recipe's type with float32 weights: an update of 1e-6 would be lost in a bfloat16 weight."""
        return torch.autocast(ranks.device().type, torch.bfloat16, enabled=self.recipe.train.dtype == "bfloat16")

    def _gradients(self, step: Step, chosen: Sequence[Sample], responses: Mapping[str, Any], teacher: Any | None, part: str) -> dict[str, float]:
        """Leave the gradient of one part of the loss, or of all of it, in the weights; returns the figures of the step, over all processes."""
        count, ours = ranks.count(), self.recipe.objective
        # All processes take as many turns, though the last of a stage's questions may leave some without any.
        turns = max(1, min(self.recipe.train.accumulate, -(-len(chosen) // count)))
        sums: dict[str, float] = defaultdict(float)
        for turn in range(turns):
            mine = chosen[turn * count + ranks.index() :: turns * count]
            groups = [responses[sample.id] for sample in mine]
            torch.manual_seed(_seed(self.recipe.seed, step.number, turn, ranks.index()))  # dropout continues as it would have
            with nullcontext() if turn == turns - 1 else unsynced(self.wrapped):
                with self.autocast():
                    stats = self._stats(mine, groups, teacher)
                asked = RowStats(*(values[: sum(map(len, groups))] for values in stats))
                shaped = shape_rewards(groups, asked, ours, len(chosen))
                distill, rest = loss(asked, shaped.advantage, shaped.weights, weights_of(ours), shaped.distill_on)
                # Processes' gradients are averaged, and the loss is a mean over the questions of all.
                work = self._work(mine, groups, teacher)
                (count * {"distill": distill, "rest": rest, "all": distill + rest}[part]).backward()
            figures = _describe(asked, shaped, groups) | {"loss": float((distill + rest).detach()), "loss_distill": float(distill.detach())} | work
            for name, value in figures.items():
                sums[name] += value
        return _figures(sums)

    def _pack(self, samples: Sequence[Sample], groups: Sequence[Sequence[DistinctResponse]], encoder: Encoder) -> PackedBatch:
        """A batch of this process's questions, as `encoder` makes their prompts.

        Where processes work together, a picture that nothing is learned from stands behind them if they have none: every part of the model then computes,
        and gets gradients, in every process, and none waits for another that left a part out.
        """
        asked = [Group(encoder.prompt(s), tuple(r.ids for r in g), s.id) for s, g in zip(samples, groups, strict=True)]
        if not samples or (ranks.count() > 1 and not any(sample.images for sample in samples)):
            asked.append(Group(encoder.prompt(STAND_IN), ((encoder.eos,),), STAND_IN.id))
        return move(pack(asked, encoder.pad, self.collate, self.shared), ranks.device())

    def _stats(self, samples: Sequence[Sample], groups: Sequence[Sequence[DistinctResponse]], teacher: Any | None) -> RowStats:
        batch = self._pack(samples, groups, self.encoder)
        with torch.no_grad():
            theirs: Pair
            if isinstance(teacher, OwnPrompts):  # the same answers behind other image tokens: their states stand in the same order
                theirs = teacher_states(teacher.model, self._pack(samples, groups, teacher.encoder))
            else:
                theirs = (None, None) if teacher is None else teacher_states(teacher, batch)
            initial = self._initial_states(batch)
        # Without a backward pass, nothing but `within` gives back what a forward gathers, and the optimizer knows the shares alone.
        call = self.wrapped if torch.is_grad_enabled() else partial(within, self.hooked)
        return RowStats(*call(_student_stats, batch, theirs, initial, self.recipe.objective).unbind(0))

    def _work(self, samples: Sequence[Sample], groups: Sequence[Sequence[DistinctResponse]], teacher: Any | None) -> dict[str, float]:
        """The tokens that the student reads of these questions in one pass, and the operations of all models in it (flops.py)."""

        def read(encoder: Encoder, config: Any) -> Reading:
            each = zip(samples, groups, strict=True)
            return total([behind(prompt_reading(encoder.prompt(s), config), [len(r.ids) for r in g], self.shared) for s, g in each])

        own, theirs, head = read(self.encoder, self.student.config), 0.0, 0
        if isinstance(teacher, CachedSignal):
            head = teacher.head_size
        elif teacher is not None:
            model, encoder = (teacher.model, teacher.encoder) if isinstance(teacher, OwnPrompts) else (teacher, self.encoder)
            shape = self._shape(model.config)
            theirs, head = forward(shape, dataclasses.replace(read(encoder, model.config), logits=0)), shape.head
        return {"tokens": own.tokens, "operations": update(self._shape(self.student.config), own, head, theirs, self.recipe)}

    def _shape(self, config: Any) -> Shape:
        if id(config) not in self.shapes:
            self.shapes[id(config)] = shape_of(config)
        return self.shapes[id(config)]

    def _initial_states(self, batch: PackedBatch) -> Pair:
        if not self.recipe.objective.beta:
            return None, None
        if self.initial is not None:
            return within(self.initial, response_states, batch), head_of(self.initial)
        with without_adapters(self.student):
            return within(self.hooked, response_states, batch), None

    def save(self) -> None:
        """Write the checkpoint whole: weights, optimizer and place."""
        weights, state = trained_weights(self.student), optimizer_state(self.student, self.optimizer)
        at = {"recipe": training_mark(self.recipe), "step": self.done, "best": self.best}
        write_checkpoint(self.folder / "last.pt", at | {"student": weights, "optimizer": state})

    def load(self) -> bool:
        """Continue from the checkpoint if there is one."""
        path = self.folder / "last.pt"
        if not ranks.agreed(path.is_file()):
            return False
        state = read_checkpoint(path)
        if state["recipe"] != training_mark(self.recipe):
            raise RunError(f"{path} is another recipe's checkpoint; choose another 'out', or remove the folder {self.folder} to train from the answers")
        set_weights(self.student, state["student"])
        set_optimizer_state(self.student, self.optimizer, state["optimizer"])
        self.done, self.best = state["step"], state["best"]
        return True

    def save_best(self) -> None:
        """Keep the weights as they are now; the checkpoint that follows records that they were the best."""
        write_checkpoint(self.folder / "best.pt", {"student": trained_weights(self.student)})


def _student_stats(model: Any, batch: PackedBatch, teacher: Pair, initial: Pair, objective: Objective) -> Tensor:
    """What the student's forward computes as a whole, inside its hooks: its output matrix is gathered once for all chunks. The fields of RowStats [6, J]."""
    head = model.get_output_embeddings().weight
    if initial[0] is not None and initial[1] is None:  # a student with adapters: its output matrix is as it was
        initial = initial[0], head
    heads = Heads(response_states(model, batch), head, *teacher, *initial)
    return torch.stack(row_stats(heads, batch.tokens, batch.rows, batch.count, objective.divergence, objective.kl))


def _seed(*key: int) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "little")


def has_both_parts(objective: Objective) -> bool:
    """Whether the gradients of distillation and of the rest are measured apart."""
    return objective.distill > 0 and max(objective.policy, objective.beta, objective.nll) > 0


def _sum(gradients: Sequence[Tensor]) -> Tensor:
    return gradients[0] if len(gradients) == 1 else gradients[0].add_(gradients[1])


@dataclass(frozen=True)
class Shaped:
    """One value a row, over all groups of a batch: rewards, advantages, each row's weight in the loss, and where D is taken."""

    accuracy: Tensor
    distillation: Tensor
    total: Tensor
    advantage: Tensor
    weights: Tensor
    distill_on: Tensor
    zero_spread: float  # groups whose rewards are all equal, as a share of the questions


def shape_rewards(groups: Sequence[Sequence[DistinctResponse]], stats: RowStats, objective: Objective, questions: int | None = None) -> Shaped:
    """Rewards and advantages group by group; every question weighs the same, and in it every response, however often it was sampled.

    `questions` is how many the loss is a mean over, if these groups are some of them only.
    """
    questions = questions or len(groups)
    device = stats.divergence.device
    verdicts = torch.tensor([[float("nan") if r.verdict is None else r.verdict for r in g][i] for g in groups for i in range(len(g))], device=device)
    counts = torch.tensor([float(r.count) for g in groups for r in g], device=device)
    distillation, total, advantage, weights = (torch.zeros_like(verdicts) for _ in range(4))
    even = 0
    for rows in _spans(groups):
        d = rewards.distillation_reward(
            objective.distillation_reward, stats.divergence[rows].detach(), stats.teacher_logprob[rows].detach(), objective.least_spread
        )
        r = rewards.total_reward(verdicts[rows], d, objective.accuracy_reward, objective.reward_wrong, counts[rows])
        distillation[rows], total[rows] = d, r
        advantage[rows] = rewards.advantages(r, counts[rows], objective.advantages)
        weights[rows] = counts[rows] / counts[rows].sum() / questions
        even += int(r.max() == r.min())
    return Shaped(verdicts, distillation, total, advantage, weights, _distill_on(groups, verdicts, objective.distill_on), even / questions)


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
    """What tells whether training goes well: figures that, summed over the parts of a step and all processes, are the step's own."""
    pairs = {"distillation": shaped.distillation, "total": shaped.total}
    row = {
        "divergence": float((shaped.weights * stats.divergence).sum()),
        "kl": float((shaped.weights * stats.kl).sum()),
        "entropy": float((shaped.weights * stats.entropy).sum()),
        "reward_accuracy": float((shaped.weights * shaped.accuracy.nan_to_num(0.0)).sum()),
        "reward_distillation": float((shaped.weights * shaped.distillation).sum()),
        "reward_expected": _expected_reward(stats, shaped, groups),
        "unjudged": float((shaped.weights * shaped.accuracy.isnan()).sum()),
        "zero_spread": shaped.zero_spread,
        "response_tokens": float(sum(len(r.ids) * r.count for g in groups for r in g)),
        "responses": float(sum(r.count for g in groups for r in g)),
    }
    for name, values in pairs.items():
        counted = [rewards.outranking(shaped.accuracy[rows], values[rows]) for rows in _spans(groups)]
        row[f"right_outranks_{name}"], row["pairs"] = sum(higher for higher, _ in counted), sum(all_ for _, all_ in counted)
    return row


def _expected_reward(stats: RowStats, shaped: Shaped, groups: Sequence[Sequence[DistinctResponse]]) -> float:
    """What the student would earn if it chose among each group's answers by its own probabilities: answers made ahead show in no other way what it learns."""
    found = 0.0
    for group, rows in zip(groups, _spans(groups), strict=True):
        lengths = torch.tensor([float(len(r.ids)) for r in group], device=stats.logprob.device)
        chosen = torch.softmax(stats.logprob[rows].float() * lengths, dim=0)
        found += float(shaped.weights[rows].sum() * (chosen * shaped.total[rows]).sum())
    return found


def _figures(sums: Mapping[str, float]) -> dict[str, float]:
    """The figures of a step from this process's sums."""
    names = sorted(sums)
    found = dict(zip(names, ranks.total(torch.tensor([sums[name] for name in names], dtype=torch.float64)).tolist(), strict=True))
    found["response_tokens"] /= max(1.0, found.pop("responses"))
    found["reward_accuracy"] /= max(1e-6, 1 - found["unjudged"])  # the mean over those that were judged
    return found


class MetricsLog:
    """metrics.jsonl, one row a line; what was written after the checkpoint that a run continues from, at step `first`, is dropped."""

    def __init__(self, path: Path, first: int) -> None:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        self.kept = [row for row in rows if first and row["step"] < first]
        with whole_file(path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in self.kept))
        self.path = path

    def write(self, row: Mapping[str, Any]) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
        except OSError as error:
            raise RunError(f"could not write {self.path}: {error.strerror}; free some space, then run again") from None
