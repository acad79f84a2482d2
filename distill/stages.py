"""`distill(recipe)`: from two model folders and a file of questions to a trained student, in stages that each leave whole files.

    check -> mask -> answers -> train -> student

A run folder that was begun continues where it stopped: finished files are kept, training goes on from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import fcntl
import random
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from ..errors import RecipeError, RunError
from ..files import read_json, sha256_file, sha256_folder, whole_folder, write_json, write_text
from ..progress import bar, say
from ..samples import Sample, read_samples
from . import models
from .evaluate import greedy_answers, scores
from .families import SUPPORTED, family_of, shares_prompts
from .generate import batches_by_length, generate
from .inputs import Encoder
from .judge import NAME as JUDGE
from .judge import judge
from .mask import TensorMask, apply_mask, maskable, plan_masks, restore
from .recipe import Recipe, Teacher, recipe_values
from .report import read_run, write_report
from .responses import DistinctResponse, Response, distinct, read_responses, write_responses
from .schedule import mask_ratios, stage_bounds
from .train import MetricsLog, Step, Trainer, plan_steps

STAGES = ("check", "mask", "answers", "train", "student")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
QUESTIONS_PER_FILE = 1024  # a killed run generates at most this many questions' answers again


@dataclass(frozen=True)
class Share:
    """The questions that one teacher is trained on, and the bounds of its mask stages among them."""

    teacher: Teacher
    number: int
    samples: tuple[Sample, ...]
    ratios: tuple[float, ...]
    bounds: tuple[range, ...]


def distill(recipe: Recipe, until: str = "student") -> Path:
    """Run a recipe up to and with stage `until`; returns the run folder. Its student/ is an ordinary Hugging Face folder.

    Raises RecipeError, DataError or ModelError before any work where the inputs do not fit, and RunError where the run folder can't be continued.
    """
    if until not in STAGES:
        raise RecipeError(f"unknown stage '{until}'; expected one of {', '.join(STAGES)}")
    run = _Run(recipe)  # reads only, and refuses what does not fit before anything is written
    with _locked(recipe.out):
        _claim(recipe)
        run.plan()
        if until == "check":
            return recipe.out
        for share in run.shares:
            masks = run.mask(share)
            if until == "mask":
                continue
            responses = run.answers(share, masks)
            if until == "answers":
                break  # a later teacher's questions are answered by the student as this one leaves it
            run.train(share, masks, responses)
        if until == "student":
            run.finish()
    return recipe.out


class _Run:
    """What the stages of one run share: the questions, the encoder, and the student as far as it has been trained."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.out = recipe, recipe.out
        self.validation = read_samples(recipe.data.validation)
        self.shares = plan_shares(recipe, read_samples(recipe.data.train, recipe.data.limit))
        for teacher in recipe.teachers:
            models.check_pair(teacher.model, recipe.student)
        configs = [models.read_config(folder) for folder in (recipe.student, *(teacher.model for teacher in recipe.teachers))]
        self.family = family_of(configs[0].model_type)
        self.encoder = Encoder(models.load_processor(recipe.student), recipe.longest, positions=self.family.positions)
        self.shared = all(map(shares_prompts, configs))
        if not self.shared:
            say(f"{configs[0].model_type} has recurrent or windowed layers: every response is read with a prompt of its own, which costs more")
        self.steps = plan_run(recipe, self.shares)
        self.buffer = recipe.buffer or recipe.out / "responses"
        self.dtype = getattr(torch, recipe.train.dtype)
        self.trainer: Trainer | None = None
        prompt = self.encoder.prompt(self.shares[0].samples[0])  # a prompt that can't be read is found before any work
        if configs[0].model_type not in SUPPORTED:
            models.check_rules(models.load_model(recipe.student, torch.float32).eval(), prompt, self.family.collate_pixels, self.shared)

    def plan(self) -> None:
        """Write plan.json: the stages with their questions and updates."""
        stages = [
            {"teacher": str(share.teacher.model), "ratio": ratio, "questions": len(bounds), "steps": sum(s.stage == i for s in steps)}
            for share, steps in zip(self.shares, self.steps, strict=True)
            for i, (ratio, bounds) in enumerate(zip(share.ratios, share.bounds, strict=True))
        ]
        write_json(self.out / "plan.json", {"stages": stages, "steps": sum(map(len, self.steps)), "validation": len(self.validation)})

    def mask(self, share: Share) -> list[TensorMask]:
        """The thresholds of every ratio of a teacher, kept in mask-N.json."""
        path = self.out / f"mask-{share.number}.json"
        if not path.exists():
            model = models.load_model(share.teacher.model, models.exact_dtype(share.teacher.model, self.dtype))
            found = plan_masks(maskable(model, self.family.LANGUAGE, self.recipe.mask.exclude), share.ratios, self.recipe.mask.scope)
            write_json(path, [dataclasses.asdict(mask) for mask in found])
        return [TensorMask.from_json(row) for row in read_json(path)]

    def answers(self, share: Share, masks: Sequence[TensorMask]) -> dict[str, list[DistinctResponse]]:
        """All responses to a teacher's questions: from the masked teacher stage by stage, from the student as it is, and the truth."""
        wanted, paths = self.recipe.answers, []
        _claim_file(self.buffer / "buffer.yaml", _answers_values(self.recipe), "the buffer of responses")
        if wanted.teacher:
            files = {
                (stage, name): chunk
                for stage, bounds in enumerate(share.bounds)
                for name, chunk in _chunks(share, bounds, f"teacher{share.number}-stage{stage}")
            }
            paths += self._generate(share, masks, files)
        if wanted.student:
            paths += self._generate_student(share)
        rows = read_responses(paths)
        if wanted.truth:
            rows += [_truth(sample, self.encoder) for sample in share.samples for _ in range(wanted.truth)]
        groups: dict[str, list[Response]] = defaultdict(list)
        for row in rows:
            groups[row.sample].append(row)
        return {sample: distinct(group) for sample, group in groups.items()}

    def _generate(self, share: Share, masks: Sequence[TensorMask], files: Mapping[tuple[int, str], list[Sample]]) -> list[Path]:
        paths = {key: self.buffer / key[1] for key in files}
        missing = [key for key in files if not paths[key].exists()]
        teacher = _MaskedTeacher(share, masks, self.family.LANGUAGE, self.dtype) if missing else None
        for key in bar(missing, f"answers of {share.teacher.model.name}"):
            assert teacher is not None
            teacher.set_ratio(share.ratios[key[0]])
            source = {"source": "teacher", "model": share.teacher.model.name, "ratio": share.ratios[key[0]]}
            write_responses(paths[key], self._respond(teacher.model, files[key], self.recipe.answers.teacher, source))
        return list(paths.values())

    def _generate_student(self, share: Share) -> list[Path]:
        chunks = dict(_chunks(share, range(len(share.samples)), f"student{share.number}"))
        paths = {name: self.buffer / name for name in chunks}
        missing = [name for name in chunks if not paths[name].exists()]
        student = self._student() if missing else None
        for name in bar(missing, "answers of the student"):
            source = {"source": "student", "model": self.recipe.student.name, "ratio": 0.0}
            with self._trainer().autocast():
                write_responses(paths[name], self._respond(student, chunks[name], self.recipe.answers.student, source))
        return list(paths.values())

    def _respond(self, model: Any, samples: Sequence[Sample], count: int, source: Mapping[str, Any]) -> list[Response]:
        """`count` judged responses to each sample."""
        wanted, seed = self.recipe.answers, self.recipe.seed
        found: dict[str, list[Response]] = {}
        for batch in batches_by_length(samples, self.encoder, wanted.batch):
            # The source is part of the key of the random numbers, or teacher and student would draw alike.
            key = f"{source['source']}/{source['ratio']}"
            for sample, answers in zip(batch, generate(model, self.encoder, self.family.collate_pixels, batch, count, wanted.sampling, seed, key), strict=True):
                verdicts = [judge(sample, answer.text) for answer in answers]
                found[sample.id] = [
                    Response(sample.id, **source, seed=seed, text=a.text, ids=a.ids, finish=a.finish, verdict=v.value, judge=JUDGE, reason=v.reason)
                    for a, v in zip(answers, verdicts, strict=True)
                ]
        return [response for sample in samples for response in found[sample.id]]

    def train(self, share: Share, masks: Sequence[TensorMask], responses: Mapping[str, Sequence[DistinctResponse]]) -> None:
        """All updates under one teacher, its mask falling stage by stage, the student evaluated at the end of each."""
        trainer = self._trainer()
        steps = [step for step in self.steps[share.number] if step.number >= trainer.done]
        if not steps:
            return
        objective = self.recipe.objective
        needed = objective.distill > 0 or objective.distillation_reward != "none"
        teacher = _MaskedTeacher(share, masks, self.family.LANGUAGE, self.dtype) if needed else None
        log = MetricsLog(self.out / "metrics.jsonl", trainer.done)
        if trainer.done == 0:
            self._evaluate(trainer, log, Step(-1, 0, share.ratios[0], ()))
        ends = {max(s.number for s in self.steps[share.number] if s.stage == stage) for stage in {s.stage for s in steps}}
        for step in bar(steps, f"training ({self.recipe.preset})", total=len(self.steps[share.number]), done=len(self.steps[share.number]) - len(steps)):
            if teacher:
                teacher.set_ratio(step.ratio)
            log.write(trainer.step(step, share.samples, responses, teacher.model if teacher else None) | {"kind": "step"})
            if step.number in ends:
                self._evaluate(trainer, log, step)
            if step.number in ends or trainer.done % self.recipe.train.checkpoint_steps == 0:
                trainer.save()

    def _evaluate(self, trainer: Trainer, log: MetricsLog, step: Step) -> None:
        """Validation accuracy; the weights are kept where it is the highest so far."""
        with trainer.autocast():
            answers = greedy_answers(
                trainer.student, self.encoder, self.validation, self.recipe.answers.max_tokens, self.recipe.train.evaluate_batch, "validating"
            )
        reached = scores(self.validation, answers)
        accuracy = sum(reached) / len(reached)
        log.write({"kind": "evaluation", "step": step.number, "stage": step.stage, "ratio": step.ratio, "validation_accuracy": accuracy})
        if accuracy > trainer.best:
            trainer.best = accuracy
            trainer.save_best()

    def finish(self) -> None:
        """Write report.html, then student/: the last or the best weights with the student's own processor files."""
        target = self.out / "student"
        if target.exists():
            return
        trainer = self._trainer()
        if self.recipe.train.keep == "best":
            trainer.load_best()
        self._report()
        with whole_folder(target) as part:
            try:
                trainer.student.to(torch.bfloat16).save_pretrained(part)
            except SafetensorError as error:  # what safetensors makes of a full disk
                raise OSError(str(error).splitlines()[0]) from error
            self.encoder.processor.save_pretrained(part)
            for name in PROCESSOR_FILES:  # as they came, settings for videos included
                if (self.recipe.student / name).is_file():
                    shutil.copyfile(self.recipe.student / name, part / name)
            write_json(part / "masters_recipe.json", recipe_values(self.recipe))
        say(f"student written to {target}")

    def _report(self) -> None:
        reached = [row["validation_accuracy"] for row in read_run(self.out) if row["kind"] == "evaluation"]
        change = f"Validation accuracy went from {reached[0]:.3f} to {reached[-1]:.3f}; the highest was {max(reached):.3f}."
        kept = f"The student holds the {self.recipe.train.keep} weights."
        write_report(self.out / "report.html", f"Distillation by preset {self.recipe.preset}", {self.recipe.preset: self.out}, [], [change, kept], [])

    def _trainer(self) -> Trainer:
        if self.trainer is None:
            total = sum(map(len, self.steps))
            self.trainer = Trainer(self._load_student(), self.encoder, self.recipe, total, self.out / "checkpoints", self.shared)
            self.trainer.load()
        return self.trainer

    def _student(self) -> Any:
        return self._trainer().student

    def _load_student(self) -> Any:
        student = models.load_model(self.recipe.student, torch.float32).to(models.device())
        if self.recipe.train.freeze_vision:
            models.freeze_vision(student)
        return student


class _MaskedTeacher:
    """A frozen teacher whose mask can be changed: going up zeroes more in place, going down copies the weights back first."""

    def __init__(self, share: Share, masks: Sequence[TensorMask], language: Sequence[str], dtype: torch.dtype) -> None:
        self.model = models.frozen(models.load_model(share.teacher.model, dtype)).to(models.device())
        self.folder, self.masks, self.ratio = share.teacher.model, masks, 0.0
        named = dict(self.model.named_parameters())
        self.tensors = {mask.name: named[mask.name].data for mask in masks}

    def set_ratio(self, ratio: float) -> None:
        if ratio < self.ratio:
            restore(self.tensors, self.folder)
        if ratio != self.ratio and ratio > 0:
            apply_mask(self.tensors, self.masks, ratio)
        self.ratio = ratio


def plan_shares(recipe: Recipe, samples: Sequence[Sample]) -> list[Share]:
    """Shuffle the questions once, give every teacher an equal run of them, and every mask stage its part of that."""
    order = list(samples)
    random.Random(recipe.seed).shuffle(order)
    shares = []
    for number, (teacher, part) in enumerate(zip(recipe.teachers, stage_bounds(len(order), len(recipe.teachers)), strict=True)):
        ratios = mask_ratios(teacher.r_max, recipe.mask.step) if recipe.mask.enabled else (0.0,)
        if len(part) < len(ratios):
            raise RecipeError(f"{len(samples)} questions leave {len(part)} for {len(ratios)} mask stages of {teacher.model.name}; expected at least one each")
        mine = tuple(order[part.start : part.stop])
        shares.append(Share(teacher, number, mine, ratios, tuple(stage_bounds(len(mine), len(ratios)))))
    return shares


def plan_run(recipe: Recipe, shares: Sequence[Share]) -> list[list[Step]]:
    """The updates under each teacher, numbered through the run."""
    planned: list[list[Step]] = []
    for share in shares:
        first = sum(map(len, planned))
        planned.append(plan_steps(share.bounds, share.ratios, recipe.train.questions_per_step, recipe.train.epochs, recipe.seed, first))
    return planned


def _chunks(share: Share, bounds: range, name: str) -> Iterator[tuple[str, list[Sample]]]:
    for start in range(bounds.start, bounds.stop, QUESTIONS_PER_FILE):
        yield f"{name}-{start:07d}.parquet", list(share.samples[start : min(start + QUESTIONS_PER_FILE, bounds.stop)])


def _truth(sample: Sample, encoder: Encoder) -> Response:
    text = sample.answers[0]
    return Response(sample.id, "truth", "", 0.0, 0, text, tuple(encoder.answer(text)), "stop", 1.0, "truth", "ground truth")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the run folder for this process alone; the lock goes with the process, however it ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise RunError(f"{out} can't hold a run ({error.strerror}); expected a folder that can be written to, choose another 'out'") from None
    with lock as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another process is working in {out}; wait for it, or choose another 'out'") from None
        for part in out.rglob(".*.part*"):  # what a killed process was writing
            shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
        yield


def _claim(recipe: Recipe) -> None:
    """Write recipe.yaml, or make sure that the one that is there is the same, models and questions included."""
    values = recipe_values(recipe) | {"fingerprints": _fingerprints(recipe)}
    _claim_file(recipe.out / "recipe.yaml", values, "the run folder")


def _answers_values(recipe: Recipe) -> dict[str, Any]:
    """What responses depend on, and nothing else, so that runs which differ elsewhere can share them."""
    values = recipe_values(recipe)
    # From the second teacher on, the student that answers is the one that this recipe has trained.
    keys = ("answers", "mask", "longest", "seed") + (("objective", "train", "preset") if len(recipe.teachers) > 1 else ())
    kept = {key: values[key] for key in keys} | {"dtype": recipe.train.dtype}
    return kept | {"limit": recipe.data.limit, "r_max": [t.r_max for t in recipe.teachers], "fingerprints": _fingerprints(recipe)}


def _fingerprints(recipe: Recipe) -> dict[str, str]:
    folders = {"student": recipe.student} | {f"teacher {i}": teacher.model for i, teacher in enumerate(recipe.teachers)}
    found = {name: sha256_folder(folder, (".safetensors", ".json", ".jinja")) for name, folder in folders.items() if folder.is_dir()}
    return found | ({"train": sha256_file(recipe.data.train)} if recipe.data.train.is_file() else {})


def _claim_file(path: Path, values: dict[str, Any], what: str) -> None:
    """Write `values` where nothing is yet; otherwise raise RunError if what is there differs."""
    if not path.exists():
        write_text(path, yaml.safe_dump(values, sort_keys=False))
        return
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in values.keys() | before.keys() if values.get(key) != before.get(key))
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError):
        raise RunError(f"{path} is damaged; remove {path.parent} to begin anew") from None
    if changed:
        raise RunError(f"{what} {path.parent} was begun with another recipe ({', '.join(changed)} differ); choose another folder, or remove that one")
