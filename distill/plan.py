"""`plan(recipe)`: what a run will ask for before it is begun: questions, tokens, memory of a process, disk and hours; it refuses what can't fit.

It needs the models' configurations and the student's processor, no weights. Prompts are measured on a sample of the questions; answers are taken as long as
they may become, unless `machine.answer_tokens` states their mean. Hours come from a throughput that a short run has measured, or else from
operations (flops.py), at the share of the devices' peak that `machine` states.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import DataError, ImageError, LengthError, RecipeError
from ..files import read_json, write_json
from ..progress import say
from ..samples import Sample
from . import models, ranks
from .cost import text_table
from .families import family_of
from .flops import Shape, forward, shape_of, update
from .inputs import Encoder
from .memory import Load, Memory, Setting, forward_memory, size_of, step_memory
from .parallel import sharding
from .reading import Reading, answered, packed, patches_of, prompt_reading, total
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
    """What the measured prompts are like to one model: what is read of them on average, and the most."""

    mean: Reading
    longest: int
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
    """One piece of the run, as cost.json names it: answers of a source, signal or training in a mask stage.

    Tokens that are read and written, operations, and seconds where a throughput is known.
    """

    stage: str
    name: str
    tokens_read: int
    tokens_written: int
    operations: float
    seconds: float | None


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
        return _hours_of(self.work)


@dataclass(frozen=True)
class _Model:
    """A model's configuration, what its operations are counted from, and the prompts as it reads them."""

    config: Any
    shape: Shape
    prompts: Prompts


def plan(recipe: Recipe) -> Plan:
    """Check a recipe's inputs as far as they are there, and reckon what the run needs.

    Raises RecipeError where memory or disk can't hold it, and what `distill` raises where weights are there and do not fit.
    """
    found = estimate(recipe)
    refuse(recipe, found)
    folders = (recipe.student, *(teacher.model for teacher in recipe.teachers))
    if all(any(folder.glob("*.safetensors")) for folder in folders):
        distill(recipe, "check")
        ranks.once(_keep, recipe, found)
    else:
        say("not all weights are there: the plan is made from configurations alone, and whether the models fit each other is not checked")
    return found


def _keep(recipe: Recipe, found: Plan) -> None:
    path = recipe.out / "plan.json"
    write_json(path, read_json(path) | {"needs": plan_values(found)})


def estimate(recipe: Recipe) -> Plan:
    """The plan of a recipe, whether it fits or not."""
    configs = [models.read_config(folder) for folder in (recipe.student, *(teacher.model for teacher in recipe.teachers))]
    samples = read_file(recipe.data.train, recipe.data.limit).samples
    longest = models.longest_prompt(configs, recipe.longest, recipe.answers.max_tokens)
    encoder = Encoder(models.load_processor(recipe.student), longest, positions=family_of(configs[0].model_type).positions)
    readers = [encoder, *(models.teacher_encoder(teacher.model, encoder) for teacher in recipe.teachers)]
    student, *teachers = (_Model(config, shape_of(config), measure(samples, reader, config)) for config, reader in zip(configs, readers, strict=True))
    prompts = student.prompts
    shares = plan_shares(recipe, samples)
    stages = tuple(stage for share, steps in zip(shares, plan_run(recipe, shares), strict=True) for stage in _stages(recipe, share, steps, prompts))
    devices = recipe.machine.devices or ranks.count()
    moments = tuple(moment for share, teacher in zip(shares, teachers, strict=True) for moment in _moments(recipe, share, student, teacher, devices))
    work = _work(recipe, shares, student, teachers, devices)
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
        found.append((prompt_reading(prompt, config), patches_of(pixels, config), sum(t.nbytes for t in pixels.values())))
    if not found:
        raise DataError(f"none of {min(PROBED, len(samples))} questions can be encoded; expected questions and images for this model, mend the file")
    read, patches, sizes = zip(*found, strict=True)
    return Prompts(total(read).scaled(1 / len(read)), int(max(each.tokens for each in read)), max(patches), max(sizes))


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
            round(len(bounds) * prompts.mean.tokens),
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


def _moments(recipe: Recipe, share: Share, student: _Model, teacher: _Model, devices: int) -> list[Moment]:
    setting, answers, train = setting_of(recipe, devices), recipe.answers, recipe.train
    questions = -(-train.questions_per_step // (devices * train.accumulate))
    group = _group(recipe)

    def load_of(model: _Model) -> Load:
        prompts, tokens = model.prompts, questions * group * answers.max_tokens
        length = prompts.longest + group * (answers.max_tokens - 1)
        return Load(questions, length, tokens, questions * prompts.most_patches, questions * prompts.pixel_bytes)

    needed = teacher.config if recipe.objective.needs_teacher else None
    update = step_memory(student.config, needed, load_of(student), setting, load_of(teacher) if teacher.prompts != student.prompts else None)
    name = share.teacher.model.name
    found = [Moment(f"training under {name}", update, _lowers(recipe, setting, questions))]
    prompts = teacher.prompts
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


def _work(recipe: Recipe, shares: Sequence[Share], student: _Model, teachers: Sequence[_Model], devices: int) -> tuple[Work, ...]:
    """What every source of answers and every mask stage does; answers have their mean length."""
    answers, mean = recipe.answers, recipe.machine.answer_tokens or recipe.answers.max_tokens
    found = []
    for share, teacher in zip(shares, teachers, strict=True):
        if answers.student:
            found.append(_answers(recipe, f"student{share.number}", student, len(share.samples), answers.student, devices))
        for stage, bounds in enumerate(share.bounds):
            name, count = f"teacher{share.number}-stage{stage}", len(bounds)
            found += [_answers(recipe, name, teacher, count, answers.teacher, devices)] if answers.teacher else []
            found += _learning(recipe, name, student, teacher, count, [mean] * _group(recipe), devices)
    return tuple(found)


def _answers(recipe: Recipe, name: str, model: _Model, questions: int, number: int, devices: int) -> Work:
    mean = recipe.machine.answer_tokens or recipe.answers.max_tokens
    read, written = questions * model.prompts.mean.tokens, questions * number * mean
    operations = questions * forward(model.shape, answered(model.prompts.mean, [mean] * number))
    seconds = _seconds(recipe, written, operations, recipe.machine.answer_tokens_per_second, recipe.machine.answer_mfu, devices)
    return Work("answers", name, round(read), round(written), operations, seconds)


def _learning(recipe: Recipe, name: str, student: _Model, teacher: _Model, questions: int, lengths: Sequence[float], devices: int) -> list[Work]:
    """The teacher's states of a mask stage, where they are kept, and its updates."""
    machine, needed, found = recipe.machine, recipe.objective.needs_teacher, []
    own, theirs = packed(student.prompts.mean, lengths), dataclasses.replace(packed(teacher.prompts.mean, lengths), logits=0)
    by_teacher = forward(teacher.shape, theirs) if needed else 0.0
    live = recipe.teacher_signal == "live"
    if needed and not live:
        operations = questions * by_teacher
        seconds = _seconds(recipe, 0, operations, None, machine.mfu, devices)
        found.append(Work("signal", name, round(questions * theirs.tokens), 0, operations, seconds))
    twice = 1 + (1 / NORMS_EVERY if has_both_parts(recipe.objective) else 0)
    one = update(student.shape, own, teacher.shape.head if needed else 0, by_teacher if live else 0.0, recipe)
    count = recipe.train.epochs * questions
    seconds = _seconds(recipe, count * own.tokens, count * one * twice, machine.tokens_per_second, machine.mfu, devices)
    return [*found, Work("training", name, round(count * own.tokens), 0, count * one * twice, seconds)]


def _seconds(recipe: Recipe, tokens: float, operations: float, rate: float | None, mfu: float, devices: int) -> float | None:
    if not operations:
        return 0.0
    if rate:
        return tokens / rate
    return operations / (devices * recipe.machine.tflops * 1e12 * mfu) if recipe.machine.tflops else None


def _hours_of(work: Sequence[Work]) -> float | None:
    known = [piece.seconds for piece in work]
    return None if None in known else sum(seconds for seconds in known if seconds is not None) / 3600


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
    work = [_part(name, [piece for piece in found.work if piece.stage == name]) for name in ("answers", "signal", "training")]
    disk = [[name, _gb(size)] for name, size in found.disk.items()]
    devices = f"{found.devices} device{'s' if found.devices > 1 else ''}"
    known = found.hours is not None
    advice = "" if known else "\nFor hours: machine.tflops, or machine.tokens_per_second and machine.answer_tokens_per_second as a short run has measured them."
    return "\n\n".join(
        [
            text_table(["stage", "ratio", "questions", "updates", "answers", "prompt tokens", "answer tokens"], stages),
            text_table([f"GB in each process, {devices}", *("S_0" if part == "initial" else part for part in parts)], memory),
            text_table(["part", "tokens read", "written", "operations", "hours"], work) + advice,
            text_table(["disk", "GB"], disk),
        ]
    )


def _part(name: str, work: Sequence[Work]) -> list[str]:
    hours = _hours_of(work)
    read, written = (sum(getattr(piece, key) for piece in work) for key in ("tokens_read", "tokens_written"))
    said = "not stated" if hours is None else f"{hours:,.1f}" if hours >= 1 else f"{hours:.4f}"
    return [name, f"{read:,}", f"{written:,}", f"{sum(piece.operations for piece in work):.2e}", said]


def plan_values(found: Plan) -> dict[str, Any]:
    """All that `plan_text` prints, and more, as plain values."""
    return {**dataclasses.asdict(found), "hours": found.hours, "peak": {"stage": found.memory.stage, "bytes": found.memory.memory.total}}
