"""`plan(recipe)`: what a run will ask for before it is begun: questions, tokens, memory of a process, disk and hours; it refuses what can't fit.

It needs the models' configurations and the student's processor, no weights. Prompts are measured on a sample of the questions; answers are taken as long as
they may become, unless `machine.answer_tokens` states their mean. Hours come from a throughput that a short run has measured, or else from
operations: 2 a weight and token forward, 4 more backward (Kaplan et al. 2020, section 2.1), at the share of the devices' peak that `machine` states.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError, ImageError, LengthError, RecipeError
from ..progress import say
from ..samples import Sample
from . import models, ranks
from .families import family_of
from .inputs import Encoder
from .memory import Load, Memory, Setting, forward_memory, patches_of, size_of, step_memory
from .parallel import sharding
from .recipe import Recipe
from .shares import Share, plan_run, plan_shares
from .signal import FORWARD_TOKENS
from .skipped import read_file
from .stages import distill
from .train import NORMS_EVERY, has_both_parts

PROBED = 48  # questions whose prompts are measured
GB = 1e9


@dataclass(frozen=True)
class Prompts:
    """What the measured prompts are like: tokens and patches of images on average, and the most."""

    tokens: float
    longest: int
    patches: float
    most_patches: int
    pixel_bytes: int


@dataclass(frozen=True)
class StagePlan:
    """One mask stage: its questions, updates, answers to generate, tokens of prompts (once a question) and of answers."""

    teacher: str
    ratio: float
    questions: int
    steps: int
    answers: int
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Work:
    """One part of the run, answers, signal or train: tokens that are read or written, operations, and hours where a throughput is known."""

    part: str
    tokens: int
    operations: float
    hours: float | None


@dataclass(frozen=True)
class Moment:
    """What one process holds in a stage at most, in bytes, and the setting that lowers it."""

    stage: str
    memory: Memory
    lowers: str


@dataclass(frozen=True)
class Plan:
    """What a run asks for; bytes of disk by what they hold, memory by stage."""

    stages: tuple[StagePlan, ...]
    prompts: Prompts
    moments: tuple[Moment, ...]
    work: tuple[Work, ...]
    disk: dict[str, int]
    devices: int

    @property
    def memory(self) -> Moment:
        """The stage that needs most."""
        return max(self.moments, key=lambda moment: moment.memory.total)

    @property
    def hours(self) -> float | None:
        known = [work.hours for work in self.work]
        return None if None in known else sum(hours for hours in known if hours is not None)


@dataclass(frozen=True)
class _Model:
    """A model's configuration, and its weights: those that every token meets, those that every patch meets, all, all but the frozen ones."""

    config: Any
    language: int
    vision: int


def plan(recipe: Recipe) -> Plan:
    """Check a recipe's inputs as far as they are there, and reckon what the run needs.

    Raises RecipeError where memory or disk can't hold it, and what `distill` raises where weights are there and do not fit.
    """
    found = estimate(recipe)
    refuse(recipe, found)
    folders = (recipe.student, *(teacher.model for teacher in recipe.teachers))
    if all(any(folder.glob("*.safetensors")) for folder in folders):
        distill(recipe, "check")
    else:
        say("not all weights are there: the plan is made from configurations alone, and whether the models fit each other is not checked")
    return found


def estimate(recipe: Recipe) -> Plan:
    """The plan of a recipe, whether it fits or not."""
    student = _model(recipe.student)
    teachers = [_model(teacher.model) for teacher in recipe.teachers]
    samples = read_file(recipe.data.train, recipe.data.limit).samples
    longest = models.longest_prompt([m.config for m in (student, *teachers)], recipe.longest, recipe.answers.max_tokens)
    encoder = Encoder(models.load_processor(recipe.student), longest, positions=family_of(student.config.model_type).positions)
    prompts = measure(samples, encoder, student.config)
    shares = plan_shares(recipe, samples)
    stages = tuple(stage for share, steps in zip(shares, plan_run(recipe, shares), strict=True) for stage in _stages(recipe, share, steps, prompts))
    devices = recipe.machine.devices or ranks.count()
    moments = tuple(moment for share, teacher in zip(shares, teachers, strict=True) for moment in _moments(recipe, share, student, teacher, prompts, devices))
    work = _work(recipe, shares, student, teachers, prompts, devices)
    return Plan(stages, prompts, moments, work, _disk(recipe, shares, student, teachers), devices)


def refuse(recipe: Recipe, found: Plan) -> None:
    """Raise RecipeError, naming what can be changed, if a process's device or the disk can't hold the run."""
    limit, most = _memory_of(recipe), found.memory
    if limit and most.memory.total > limit:
        raise RecipeError(f"{most.stage} takes {_gb(most.memory.total)} GB in each process ({most.memory.moment}), a device has {_gb(limit)} GB; {most.lowers}")
    for folder, parts in _places(recipe, found.disk).items():
        needed, free = sum(parts.values()), shutil.disk_usage(_existing(folder)).free
        if needed > free:
            named = ", ".join(f"{name} {_gb(size)}" for name, size in parts.items() if size)
            raise RecipeError(f"{folder} will take {_gb(needed)} GB ({named}) and its disk has {_gb(free)} GB left; free some, or choose another place")


def measure(samples: Sequence[Sample], encoder: Encoder, config: Any) -> Prompts:
    """Prompts of questions spread over a file; those that can't be used are passed over. Raises DataError if none can."""
    found = []
    for sample in samples[:: max(1, len(samples) // PROBED)][:PROBED]:
        try:
            prompt = encoder.encode(sample)
        except (DataError, ImageError, LengthError):
            continue
        pixels = {name: t for name, t in prompt.pixels.items() if t.is_floating_point()}
        found.append((len(prompt.ids), patches_of(pixels, config), sum(t.nbytes for t in pixels.values())))
    if not found:
        raise DataError(f"none of {min(PROBED, len(samples))} questions can be encoded; expected questions and images for this model, mend the file")
    tokens, patches, sizes = zip(*found, strict=True)
    return Prompts(sum(tokens) / len(tokens), max(tokens), sum(patches) / len(patches), max(patches), max(sizes))


def _model(folder: Path) -> _Model:
    config = models.read_config(folder)
    skeleton = models.skeleton(config)
    seen = [p.numel() for name, p in skeleton.named_parameters() if any(part in name for part in family_of(config.model_type).VISION)]
    inputs, outputs = (m.weight for m in (skeleton.get_input_embeddings(), skeleton.get_output_embeddings()))
    looked_up = 0 if inputs is outputs else inputs.numel()
    return _Model(config, sum(p.numel() for p in skeleton.parameters()) - sum(seen) - looked_up, sum(seen))


def _group(recipe: Recipe) -> int:
    return recipe.answers.teacher + recipe.answers.student + recipe.answers.truth


def _stages(recipe: Recipe, share: Share, steps: Sequence[Any], prompts: Prompts) -> list[StagePlan]:
    answers, mean = recipe.answers, recipe.machine.answer_tokens or recipe.answers.max_tokens
    return [
        StagePlan(
            share.teacher.model.name,
            ratio,
            len(bounds),
            sum(step.stage == i for step in steps),
            len(bounds) * (answers.teacher + answers.student),
            round(len(bounds) * prompts.tokens),
            round(len(bounds) * _group(recipe) * mean),
        )
        for i, (ratio, bounds) in enumerate(zip(share.ratios, share.bounds, strict=True))
    ]


def setting_of(recipe: Recipe, devices: int) -> Setting:
    """How the recipe's updates are computed on so many devices."""
    train, machine = recipe.train, recipe.machine
    sharded = devices > 1 and (machine.shard if machine.shard is not None else sharding() is not None)
    on_gpu = torch.cuda.is_available() or machine.memory_gb is not None
    return Setting(
        getattr(torch, train.dtype),
        "cuda" if on_gpu else "cpu",
        devices,
        sharded,
        sharded if train.shard_teacher is None else train.shard_teacher,
        train.gradient_checkpointing,
        train.freeze_vision,
        recipe.lora,
        recipe.teacher_signal == "live" and recipe.objective.needs_teacher,
        recipe.objective.beta > 0,
        2 if has_both_parts(recipe.objective) else 1,
    )


def _moments(recipe: Recipe, share: Share, student: _Model, teacher: _Model, prompts: Prompts, devices: int) -> list[Moment]:
    setting, answers, train = setting_of(recipe, devices), recipe.answers, recipe.train
    questions = -(-train.questions_per_step // (devices * train.accumulate))
    group = _group(recipe)
    load = Load(
        questions,
        prompts.longest + group * (answers.max_tokens - 1),
        questions * group * answers.max_tokens,
        questions * prompts.most_patches,
        questions * prompts.pixel_bytes,
    )
    needed = teacher.config if recipe.objective.needs_teacher else None
    update = step_memory(student.config, needed, load, setting)
    name = share.teacher.model.name
    found = [Moment(f"training under {name}", update, _lowers(recipe, setting, questions))]
    length = prompts.longest + answers.max_tokens
    if answers.teacher and answers.engine == "transformers":
        load = Load(answers.batch, prompts.longest, 0, answers.batch * prompts.most_patches, answers.batch * prompts.pixel_bytes)
        cache = answers.batch * answers.teacher * length * _cached(teacher.config, setting)
        held = forward_memory(teacher.config, load, setting, cache, update if share.number else None)
        found.append(Moment(f"answers of {name}", held, "lower answers.batch, set machine.shard under FSDP, or answers.engine=vllm"))
    if recipe.teacher_signal == "cached" and needed:
        load = Load(1, max(FORWARD_TOKENS, length), 0, FORWARD_TOKENS)
        held = forward_memory(teacher.config, load, setting, 0, update if share.number else None)
        found.append(Moment(f"signal of {name}", held, "use more devices with machine.shard under FSDP"))
    return found


def _cached(config: Any, setting: Setting) -> int:
    """Bytes of keys and values that one token leaves."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * width * setting.dtype.itemsize)


def _lowers(recipe: Recipe, setting: Setting, questions: int) -> str:
    ways = [
        ("train.gradient_checkpointing=true", not setting.checkpointing),
        (f"train.accumulate={2 * recipe.train.accumulate}", questions > 1),
        ("teacher_signal=cached", setting.live_teacher),
        ("machine.shard=true with FSDP", setting.processes > 1 and not setting.sharded),
        ("'lora'", recipe.lora is None),
        ("answers.max_tokens lower", True),
    ]
    return "set " + " or ".join([way for way, open_ in ways if open_][:3])


def _work(recipe: Recipe, shares: Sequence[Share], student: _Model, teachers: Sequence[_Model], prompts: Prompts, devices: int) -> tuple[Work, ...]:
    answers, machine = recipe.answers, recipe.machine
    mean, epochs = machine.answer_tokens or answers.max_tokens, recipe.train.epochs
    live, needed = recipe.teacher_signal == "live", recipe.objective.needs_teacher
    tokens, operations = dict.fromkeys(("answers", "signal", "train"), 0.0), dict.fromkeys(("answers", "signal", "train"), 0.0)
    for share, teacher in zip(shares, teachers, strict=True):
        count = len(share.samples)
        for model, number in ((teacher, answers.teacher), (student, answers.student)):
            tokens["answers"] += count * number * mean
            operations["answers"] += count * _forward(model, prompts, number * mean) if number else 0
        read = prompts.tokens + _group(recipe) * mean
        by_teacher = count * _forward(teacher, prompts, _group(recipe) * mean) if needed else 0.0
        if needed and not live:
            tokens["signal"] += count * read
            operations["signal"] += by_teacher
        first = _forward(student, prompts, _group(recipe) * mean)
        back = (1 if recipe.lora else 2) * 2 * student.language * read * (1 + (1 / NORMS_EVERY if has_both_parts(recipe.objective) else 0))
        tokens["train"] += epochs * count * read
        operations["train"] += epochs * (count * (first * (2 if recipe.objective.beta else 1) + back) + (by_teacher if live else 0))
    rates = {
        "answers": (machine.answer_tokens_per_second, machine.answer_mfu),
        "signal": (None, machine.mfu),
        "train": (machine.tokens_per_second, machine.mfu),
    }
    return tuple(Work(part, round(tokens[part]), operations[part], _hours(recipe, tokens[part], operations[part], *rates[part], devices)) for part in tokens)


def _forward(model: _Model, prompts: Prompts, answers: float) -> float:
    """Operations of one question's forward with so many tokens of answers; those of attention itself, a few in a hundred at these lengths, are left out."""
    return 2 * model.language * (prompts.tokens + answers) + 2 * model.vision * prompts.patches


def _hours(recipe: Recipe, tokens: float, operations: float, rate: float | None, mfu: float, devices: int) -> float | None:
    if not operations:
        return 0.0
    if rate:
        return tokens / rate / 3600
    return operations / (devices * recipe.machine.tflops * 1e12 * mfu) / 3600 if recipe.machine.tflops else None


def _disk(recipe: Recipe, shares: Sequence[Share], student: _Model, teachers: Sequence[_Model]) -> dict[str, int]:
    """Bytes by what they hold; answers and states as long as they may become."""
    count, wanted, wide = sum(len(share.samples) for share in shares), recipe.answers, getattr(torch, recipe.train.dtype).itemsize
    size = size_of(student.config, recipe.train.freeze_vision, recipe.lora)
    signal = 0
    if recipe.teacher_signal == "cached" and recipe.objective.needs_teacher:
        for share, teacher in zip(shares, teachers, strict=True):
            text = teacher.config.get_text_config()
            states = len(share.samples) * _group(recipe) * wanted.max_tokens
            signal += (states + len(share.ratios) * text.vocab_size) * text.hidden_size * wide
    # A token is 4 bytes and some 5 of text. The last checkpoint holds two moments too, and stands beside the one that replaces it.
    answers = count * (wanted.teacher + wanted.student) * (200 + 9 * wanted.max_tokens)
    return {"answers": answers, "signal": signal, "checkpoints": 4 * size.trained * (2 * 3 + 1), "student": 2 * size.weights}


def _places(recipe: Recipe, disk: dict[str, int]) -> dict[Path, dict[str, int]]:
    shared = {name: disk[name] for name in ("answers", "signal")}
    own = {name: disk[name] for name in ("checkpoints", "student")}
    return {recipe.buffer: shared, recipe.out: own} if recipe.buffer else {recipe.out: shared | own}


def _existing(folder: Path) -> Path:
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())


def _memory_of(recipe: Recipe) -> float:
    """Bytes of one device: as stated, or as found; a processor's are the machine's."""
    if recipe.machine.memory_gb:
        return recipe.machine.memory_gb * GB
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else 0.0


def _gb(size: float) -> str:
    return f"{size / GB:,.1f}" if size >= GB else f"{size / GB:.3f}"


def plan_text(found: Plan) -> str:
    """A plan as tables."""
    stages = [[s.teacher, f"{s.ratio:.2f}", *(f"{n:,}" for n in (s.questions, s.steps, s.answers, s.prompt_tokens, s.answer_tokens))] for s in found.stages]
    parts = ("parameters", "gradients", "optimizer", "initial", "teacher", "activations", "heads", "total")
    memory = [[m.stage, *(f"{_gb(getattr(m.memory, part))}" for part in parts)] for m in found.moments]
    work = [[w.part, f"{w.tokens:,}", f"{w.operations:.2e}", "not stated" if w.hours is None else f"{w.hours:,.1f}"] for w in found.work]
    disk = [[name, _gb(size)] for name, size in found.disk.items()]
    devices = f"{found.devices} device{'s' if found.devices > 1 else ''}"
    known = found.hours is not None
    advice = "" if known else "\nFor hours: machine.tflops, or machine.tokens_per_second and machine.answer_tokens_per_second as a short run has measured them."
    return "\n\n".join(
        [
            _table(["stage", "ratio", "questions", "updates", "answers", "prompt tokens", "answer tokens"], stages),
            _table([f"GB in each process, {devices}", *("S_0" if part == "initial" else part for part in parts)], memory),
            _table(["part", "tokens", "operations", "hours"], work) + advice,
            _table(["disk", "GB"], disk),
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [[line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))] for line in (head, *rows)]
    return "\n".join("  ".join(line) for line in lines)
