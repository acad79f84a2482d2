"""A recipe: everything a distillation run is decided by, as frozen dataclasses, read strictly from YAML and command-line overrides.

Three layers, later ones win: the preset, the file, `key=value` overrides. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

import yaml

from ..errors import RecipeError
from .endpoint import Endpoint
from .generate import Sampling
from .judge import Judge
from .launch import Launch
from .mask import SCOPES
from .objective import DIVERGENCES


@dataclass(frozen=True)
class Teacher:
    """One teacher: its Hugging Face folder, and the mask ratio at which its decay starts."""

    model: Path
    r_max: float = 0.2


@dataclass(frozen=True)
class Data:
    """Files of questions in any form that samples.py reads; `limit` takes only the first ones of `train`."""

    train: Path
    validation: Path
    limit: int | None = None
    max_skipped: float = 0.1  # share of a file's questions that may be unusable: no question, an image that can't be read, a prompt that is too long


@dataclass(frozen=True)
class Answers:
    """The responses of a group: how many from whom, and how they are sampled."""

    teacher: int = 4
    student: int = 4
    truth: int = 0  # the right answer itself, as a response
    batch: int = 128  # questions generated for at once
    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 1.05
    max_tokens: int = 64
    refresh: str = "teacher"  # when the student answers anew: under every teacher, or in every mask stage
    engine: str = "transformers"  # what answers for the teachers: transformers, endpoint, vllm
    student_engine: str = "transformers"
    endpoint: Endpoint = field(default_factory=Endpoint)
    vllm: Launch = field(default_factory=Launch)
    processes: int | None = None  # that decode and preprocess images for transformers; None: as many as pay
    max_failed: float = 0.01  # the share of answers that may fail; with more, the run stops before it trains

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k, self.repetition_penalty, self.max_tokens)


@dataclass(frozen=True)
class Mask:
    """How teachers are masked: the step of the decay, what a threshold is shared by, and which weights (regular expressions on their names)."""

    enabled: bool = True
    step: float = 0.05
    scope: str = "per_tensor"
    include: tuple[str, ...] = ()  # linear weights to mask besides the language model's
    exclude: tuple[str, ...] = ()  # to leave whole


@dataclass(frozen=True)
class MaskTrial:
    """What `--until mask` measures: the teacher's score on some validation questions at these ratios and at its own."""

    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    questions: int = 500
    tolerance: float = 0.02  # of score, which the interval of the loss must not reach


@dataclass(frozen=True)
class Objective:
    """Every part of the objective and of its rewards; each can be switched off alone."""

    divergence: str = "jsd"
    distill: float = 1.0  # weight of D
    policy: float = 1.0  # weight of the policy term
    beta: float = 0.1  # weight of the KL to the student before training
    nll: float = 0.0  # weight of plain cross-entropy on the responses
    kl: str = "k3"
    accuracy_reward: bool = True
    distillation_reward: str = "jsd_minmax"
    least_spread: float = 0.0  # a group whose reward spreads less gets none
    reward_wrong: bool = True  # whether a wrong response gets a distillation reward
    advantages: str = "all"
    distill_on: str = "all"  # responses that D is taken on: all, teacher, right

    @property
    def needs_teacher(self) -> bool:
        """Whether training looks at the teacher's probabilities at all."""
        return self.distill > 0 or self.distillation_reward != "none"


@dataclass(frozen=True)
class Train:
    """The optimizer (AdamW) and the loop."""

    learning_rate: float = 1e-6
    schedule: str = "constant"
    warm_up: int = 0  # steps
    weight_decay: float = 0.0
    clip: float = 1.0
    questions_per_step: int = 32
    accumulate: int = 1  # parts that a step's questions are computed in, one after the other, in each process
    gradient_checkpointing: bool = False
    epochs: int = 1
    dtype: str = "bfloat16"
    freeze_vision: bool = True
    keep: str = "last"  # the student written at the end: last, or best on validation
    checkpoint_steps: int = 100
    evaluate_batch: int = 128
    samples_every: int = 100  # updates between tables of a few answers; 0: none
    samples: int = 6  # questions of validation in such a table, and as many of training
    evaluate_steps: int = 0  # updates between validations within a stage; 0: at its end alone
    seed: int | None = None  # of the order of questions within a stage; the recipe's seed where none is given
    shard_teacher: bool | None = None  # a share of the teacher in each process; None: if the student is in shares


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters, trained in place of the student's weights."""

    rank: int = 16
    alpha: int = 32  # adapters count alpha / rank
    dropout: float = 0.0
    targets: tuple[str, ...] = ()  # regular expressions of layer names; empty: the language model's linear layers
    keep_adapter: bool = False  # whether adapter/ is written beside student/


@dataclass(frozen=True)
class Machine:
    """What `--dry-run` reckons with; None: what it finds here. Nothing that a run computes depends on it."""

    devices: int | None = None  # processes, one a device
    memory_gb: float | None = None  # of one device
    shard: bool | None = None  # models in shares (FSDP)
    tokens_per_second: float | None = None  # of training, all devices together, as a short run has measured them
    answer_tokens_per_second: float | None = None  # of generation, likewise
    tflops: float = 0.0  # of one device in train.dtype, where no throughput is stated
    mfu: float = 0.35  # the share of them that is reached
    answer_mfu: float = 0.05  # likewise in generation, which waits for memory
    answer_tokens: float | None = None  # of an answer, on average; None: answers.max_tokens


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    student: Path
    teachers: tuple[Teacher, ...]
    data: Data
    out: Path
    preset: str = "default"
    answers: Answers = field(default_factory=Answers)
    judge: Judge = field(default_factory=Judge)
    mask: Mask = field(default_factory=Mask)
    mask_trial: MaskTrial = field(default_factory=MaskTrial)
    objective: Objective = field(default_factory=Objective)
    train: Train = field(default_factory=Train)
    lora: Lora | None = None  # None: full fine-tuning
    teacher_signal: str = "live"  # live: the teacher stays in memory; cached: its states are kept in files, and it leaves
    buffer: Path | None = None  # folder of responses and cached signal, for runs that share them; out/responses and out/teacher otherwise
    longest: int = 4096  # tokens of a prompt with its images
    seed: int = 0
    track: tuple[str, ...] = ("tensorboard",)  # what follows metrics.jsonl: tensorboard, wandb, trackio
    project: str = "masters"  # the name under which W&B and trackio show the run
    baseline: Path | None = None  # a finished run's folder, such as preset sft's, that this one is to beat
    machine: Machine = field(default_factory=Machine)


_BARE = {"accuracy_reward": False, "distillation_reward": "none", "beta": 0.0}

# Forward KL teaches what the student lacks; likelihood ranks answers where the JSD can't; nothing is pushed down without a bound.
_MASTERS = {"objective": {"divergence": "forward_kl", "distillation_reward": "teacher_logprob", "reward_wrong": False, "advantages": "positive", "kl": "full"}}

# 'paper' is arXiv 2512.22238 to the letter, which is what the dataclasses default to; the others are named for what they do.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "default": _MASTERS,
    "sft": {"answers": {"teacher": 0, "student": 0, "truth": 1}, "mask": {"enabled": False}, "objective": {**_BARE, "distill": 0.0, "policy": 0.0, "nll": 1.0}},
    "kd": {"answers": {"student": 0}, "mask": {"enabled": False}, "objective": {**_BARE, "policy": 0.0}},
    "grpo": {"answers": {"teacher": 0, "student": 8}, "mask": {"enabled": False}, "objective": {"distill": 0.0, "distillation_reward": "none"}},
    "opd": {"answers": {"teacher": 0}, "mask": {"enabled": False}, "objective": {**_BARE, "divergence": "reverse_kl", "policy": 0.0}},
    "masters": _MASTERS,  # the default by its name in tables of baselines
}

_CHOICES = {
    "preset": tuple(PRESETS),
    "teacher_signal": ("live", "cached"),
    "answers.refresh": ("teacher", "stage"),
    "judge.kind": ("rules", "model", "endpoint"),
    "judge.blind": ("stop", "warn"),
    "mask.scope": SCOPES,
    "objective.divergence": DIVERGENCES,
    "objective.kl": ("k3", "full"),
    "objective.distillation_reward": ("jsd_minmax", "jsd", "teacher_logprob", "none"),
    "objective.advantages": ("all", "positive"),
    "objective.distill_on": ("all", "teacher", "right"),
    **dict.fromkeys(("answers.engine", "answers.student_engine"), ("transformers", "endpoint", "vllm")),
    "train.schedule": ("constant", "linear", "cosine"),
    "train.dtype": ("float32", "bfloat16"),
    "train.keep": ("last", "best"),
}

_LEAST: dict[str, float] = {
    **dict.fromkeys(("data.limit", "longest", "answers.batch", "answers.max_tokens", "mask_trial.questions"), 1),
    **dict.fromkeys(("train.questions_per_step", "train.epochs", "train.checkpoint_steps", "train.evaluate_batch", "train.accumulate", "lora.rank"), 1),
    **dict.fromkeys(("answers.teacher", "answers.student", "answers.truth", "answers.temperature", "answers.top_k"), 0),
    **dict.fromkeys(("objective.distill", "objective.policy", "objective.beta", "objective.nll", "objective.least_spread"), 0),
    **dict.fromkeys(("train.warm_up", "train.weight_decay", "train.evaluate_steps", "train.samples_every", "data.max_skipped"), 0),
    **dict.fromkeys(("lora.dropout", "mask_trial.tolerance"), 0),
}
_LEAST |= dict.fromkeys(("train.samples", "answers.endpoint.concurrency", "answers.endpoint.timeout", "answers.vllm.start_timeout"), 1)
_LEAST |= dict.fromkeys(("answers.endpoint.retries", "answers.endpoint.per_request", "answers.endpoint.pause", "answers.processes", "answers.max_failed"), 0)
_LEAST |= {"machine.devices": 1, "machine.tflops": 0}
_LEAST |= dict.fromkeys(("judge.batch", "judge.max_tokens", "judge.endpoint.concurrency", "judge.endpoint.timeout"), 1)
_LEAST |= dict.fromkeys(("judge.max_unjudged", "judge.endpoint.retries", "judge.endpoint.pause"), 0)
TRACKERS = ("tensorboard", "wandb", "trackio")
_POSITIVE: tuple[str, ...] = ("train.learning_rate", "train.clip", "lora.alpha", "answers.top_p", "answers.repetition_penalty", "mask.step")
_POSITIVE += tuple(f"machine.{key}" for key in ("memory_gb", "tokens_per_second", "answer_tokens_per_second", "mfu", "answer_mfu", "answer_tokens"))


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, its paths relative to the file, with `overrides` such as 'train.learning_rate=1e-5' or 'teachers.0.r_max=0.4'."""
    if not path.is_file():
        raise RecipeError(f"no recipe at {path}; expected a YAML file, see examples/")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML ({' '.join(str(error).split())[:160]}); mend it there") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} holds {type(raw).__name__}; expected keys such as student, teachers, data and out")
    for override in overrides:
        _override(raw, override)
    return build_recipe(raw, path.parent)


def build_recipe(raw: Mapping[str, Any], folder: Path = Path()) -> Recipe:
    """A recipe from plain values, as YAML gives them; relative paths are taken from `folder`."""
    preset = raw.get("preset", "default")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise RecipeError(f"unknown preset '{preset}'; expected one of {', '.join(PRESETS)}")
    recipe = _build(Recipe, _merge(PRESETS[preset], raw), "", folder)
    _check(recipe)
    return recipe


def recipe_values(recipe: Recipe, path_name: Callable[[Path], str] = str) -> dict[str, Any]:
    """The plain values of a resolved recipe, for recipe.yaml and comparisons; `path_name` says how paths are written."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return path_name(value) if isinstance(value, Path) else value

    values = plain(dataclasses.asdict(recipe))
    assert isinstance(values, dict)
    return values


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        merged[key] = _merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"the override '{text}' has no value; expected key=value, such as train.learning_rate=1e-5")
    *parents, last = key.split(".")
    place: Any = raw
    try:
        for name in parents:
            place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
        place[int(last) if isinstance(place, list) else last] = yaml.safe_load(value)
    except (TypeError, ValueError, IndexError, AttributeError, yaml.YAMLError):
        raise RecipeError(f"the override '{text}' names no place in the recipe; expected keys joined by dots, such as teachers.0.r_max=0.4") from None


def _build(kind: Any, raw: Any, where: str, folder: Path) -> Any:
    """A dataclass of type `kind` from a mapping, every key and type checked."""
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{where.rstrip('.') or 'the recipe'} is {type(raw).__name__}; expected keys such as {', '.join(list(_fields(kind))[:4])}")
    hints, fields = typing.get_type_hints(kind), _fields(kind)
    for key in raw:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            advice = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(fields)}"
            raise RecipeError(f"unknown key '{where + str(key)}' in the recipe; {advice}")
    for name, item in fields.items():
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING and name not in raw:
            raise RecipeError(f"the recipe has no '{where}{name}'; expected one, see examples/")
    return kind(**{key: _value(hints[key], value, f"{where}{key}", folder) for key, value in raw.items()})


def _fields(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    return {item.name: item for item in dataclasses.fields(kind)}


def _value(hint: Any, value: Any, where: str, folder: Path) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{where}.", folder)
    if isinstance(hint, UnionType):
        return None if value is None else _value(typing.get_args(hint)[0], value, where, folder)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"'{where}' is {value!r}; expected a list")
        return tuple(_value(typing.get_args(hint)[0], item, f"{where}.{i}", folder) for i, item in enumerate(value))
    if where in _CHOICES and value not in _CHOICES[where]:
        raise RecipeError(f"'{where}' is {value!r}; expected one of {', '.join(_CHOICES[where])}")
    found = _scalar(hint, value, where, folder)
    if isinstance(found, float) and not math.isfinite(found):
        raise RecipeError(f"'{where}' is {found}; expected a finite number")
    if where in _LEAST and found < _LEAST[where]:
        raise RecipeError(f"'{where}' is {found}; expected at least {_LEAST[where]}")
    if where in _POSITIVE and found <= 0:
        raise RecipeError(f"'{where}' is {found}; expected more than 0")
    return found


def _scalar(hint: Any, value: Any, where: str, folder: Path) -> Any:
    if hint is Path and isinstance(value, str | Path):
        return folder / value
    if hint is float and isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-5 as a string
        except ValueError:
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    expected = {Path: "a path", float: "a number", int: "a whole number", bool: "true or false", str: "a text"}[hint]
    raise RecipeError(f"'{where}' is {value!r}; expected {expected}")


def _check(recipe: Recipe) -> None:
    """What one key alone can't tell."""
    answers = recipe.answers
    if not recipe.teachers:
        raise RecipeError("the recipe has no teacher; expected at least one under 'teachers'")
    if answers.teacher + answers.student + answers.truth < 1:
        raise RecipeError("a group has no responses; expected at least one of answers.teacher, answers.student and answers.truth above 0")
    for name in recipe.track:
        if name not in TRACKERS:
            raise RecipeError(f"'track' holds '{name}'; expected some of {', '.join(TRACKERS)}")
    if recipe.data.max_skipped > 1:
        raise RecipeError(f"'data.max_skipped' is {recipe.data.max_skipped}; expected at most 1, the share of questions that may be skipped")
    if recipe.buffer and recipe.buffer.resolve() == recipe.out.resolve():
        raise RecipeError(f"'buffer' and 'out' are both {recipe.out}; expected a folder of its own for what several runs share")
    if answers.top_p > 1:
        raise RecipeError(f"'answers.top_p' is {answers.top_p}; expected at most 1, the share of probability to draw from")
    if "endpoint" in (answers.engine, answers.student_engine) and not (answers.endpoint.url and answers.endpoint.model):
        raise RecipeError("the engine 'endpoint' has no server; expected its address and a model in answers.endpoint.url and answers.endpoint.model")
    if answers.student_engine == "endpoint" and answers.student and (len(recipe.teachers) > 1 or answers.refresh == "stage"):
        raise RecipeError("the student answers again after it was trained in this run, and no endpoint has it then; set answers.student_engine")
    if recipe.judge.kind == "endpoint" and not (recipe.judge.endpoint.url and recipe.judge.endpoint.model):
        raise RecipeError("the judge 'endpoint' has no server; expected its address and a model in judge.endpoint.url and judge.endpoint.model")
    if recipe.lora and recipe.lora.dropout >= 1:
        raise RecipeError(f"'lora.dropout' is {recipe.lora.dropout}; expected less than 1, the share of an adapter's inputs to leave out")
    if wrong := [ratio for ratio in recipe.mask_trial.ratios if not 0 <= ratio < 1]:
        raise RecipeError(f"'mask_trial.ratios' holds {wrong[0]}; expected at least 0 and less than 1, the share of weights to set to zero")
    patterns = {"mask.include": recipe.mask.include, "mask.exclude": recipe.mask.exclude, "lora.targets": recipe.lora.targets if recipe.lora else ()}
    for key, expressions in patterns.items():
        for expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                raise RecipeError(f"'{key}' holds '{expression}', which is no regular expression ({error}); mend it, dots are written \\.") from None
