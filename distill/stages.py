"""`distill(recipe)`: from two model folders and a file of questions to a trained student, in stages that each leave whole files.

    check -> mask -> answers -> signal -> train -> student

A run folder that was begun continues where it stopped: finished files are kept, training goes on from its checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ..errors import MastersError, RecipeError, RunError
from ..files import read_json, whole_folder, write_json
from ..page import Table
from ..progress import bar, say
from ..samples import Sample
from . import lora, models, ranks
from .agreement import Judged, check_judge, judged
from .answers import Asking, Heard, Source, collect
from .buffer import check_failures, image_digests
from .card import model_card, portable_values
from .checkpoint import read_checkpoint
from .claims import answers_values, claim, claim_file, digest, locked
from .cost import cost_table, heard, text_table, write_cost
from .engines import Weights, check_names, open_engine
from .evaluate import greedy_answers, scores
from .examples import evenly, show
from .families import SUPPORTED, family_of, shares_prompts
from .flops import Shape, forward, shape_of
from .generate import Generated
from .inputs import Encoder
from .judge import judge
from .judge_prompts import Case
from .judges import at_once, judge_shape, judge_shelves, open_judge
from .ledger import Counts, Ledger
from .mask import TensorMask, keep_masks
from .mask_cost import write_costs
from .mask_trial import judge_trial, measure, trial_questions
from .masked_teacher import MaskedTeacher, masked
from .materialize import write_masked
from .parallel import sharding
from .recipe import Recipe
from .report import found_in, write_report
from .responses import DistinctResponse, Response, distinct
from .shares import Share, plan_run, plan_shares, teacher_sources
from .signal import CachedSignal, OwnPrompts, SignalReader, check_signal, lay_out, write_head
from .skipped import SKIPPED, counted, counts, look_through, read_file, without, write_skipped
from .student import trained_student, write_model
from .trackers import RunLog, check_installed
from .train import Step, Trainer
from .validation import Measured, baseline_scores, measured, validate

STAGES = ("check", "mask", "answers", "signal", "train", "student")
QUESTIONS_PER_FILE = 1024  # of the teacher's states: a killed run computes at most this many questions' again

TEXTS_COMPARED = 256  # questions, with their answers, of which a teacher's tokenizer must make the student's tokens


def distill(recipe: Recipe, until: str = "student") -> Path:
    """Run a recipe up to and with stage `until`; returns the run folder. Its student/ is an ordinary Hugging Face folder.

    Raises RecipeError, DataError or ModelError before any work where the inputs do not fit, and RunError where the run folder can't be continued.
    """
    if until not in STAGES:
        raise RecipeError(f"unknown stage '{until}'; expected one of {', '.join(STAGES)}")
    ranks.join()
    run = _Run(recipe)  # reads only, and refuses what does not fit before anything is written
    with locked(recipe.out), closing(run):
        ranks.once(write_skipped, recipe.out / SKIPPED, run.skipped)  # which questions there are is part of what is claimed
        ranks.once(claim, recipe)
        ranks.once(run.plan)
        if until == "check":
            costs = [(share.teacher.model, share.ratios) for share in run.shares]
            ranks.once(write_costs, recipe.out / "mask-cost.json", costs, recipe.mask, run.dtype)
        if until == "check" or ranks.agreed((recipe.out / "student").exists()):  # what comes last
            return recipe.out
        run.ledger.open()
        run.ledger.add("check")
        for share in run.shares:
            masks = run.mask(share)
            run.ledger.add("mask", unit=str(share.number))
            if until == "mask":
                run.try_masks(share)
                continue
            for stages in run.rounds(share):
                responses = run.answers(share, masks, stages)
                if until == "answers":
                    return recipe.out  # what comes later is answered by the student as this round leaves it
                signal = run.signal(share, masks, stages, responses)
                if until == "signal":
                    return recipe.out
                run.train(share, masks, stages, responses, signal)
        if until == "student":
            ranks.once(run.finish)
    return recipe.out


class _Run:
    """What the stages of one run share: the questions, the encoder, and the student as far as it has been trained."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.out = recipe, recipe.out
        check_installed(recipe.track)
        data = recipe.data
        files = {"train": read_file(data.train, data.limit), "validation": read_file(data.validation)}
        for teacher in recipe.teachers:
            models.check_pair(teacher.model, recipe.student)
        sizes = [models.count_weights(teacher.model) for teacher in recipe.teachers]
        if sizes != sorted(sizes):
            say("a teacher is followed by a smaller one: the method takes the smallest first, this run the order of the recipe")
        configs = [models.read_config(folder) for folder in (recipe.student, *(teacher.model for teacher in recipe.teachers))]
        self.family = family_of(configs[0].model_type)
        longest = models.longest_prompt(configs, recipe.longest, recipe.answers.max_tokens)
        self.encoder = Encoder(models.load_processor(recipe.student), longest, positions=self.family.positions)
        self.readers = {teacher.model: models.teacher_encoder(teacher.model, self.encoder) for teacher in recipe.teachers}
        with_answer = longest + recipe.answers.max_tokens if recipe.answers.truth else None
        self.skipped = look_through(recipe.out / SKIPPED, files, list(dict.fromkeys([self.encoder, *self.readers.values()])), with_answer, data.max_skipped)
        self.validation = without(files["validation"].samples, "validation", self.skipped)
        if recipe.baseline:
            baseline_scores(recipe.baseline, self.validation)
        self.shares = plan_shares(recipe, without(files["train"].samples, "train", self.skipped))
        self.shared = all(map(shares_prompts, configs))
        if not self.shared:
            say(f"{configs[0].model_type} has recurrent or windowed layers: every response is read with a prompt of its own, which costs more")
        self.steps = plan_run(recipe, self.shares)
        if recipe.answers.engine == "endpoint":
            check_names(recipe.answers.endpoint, [source for share in self.shares for source in teacher_sources(share, recipe.answers.teacher)])
        self.buffer = recipe.buffer or recipe.out / "responses"
        self.dtype = getattr(torch, recipe.train.dtype)
        self.trainer: Trainer | None = None
        self.judged: list[Judged] = []
        for teacher in recipe.teachers:
            models.check_prompts(teacher.model, self.encoder, self.shares[0].samples[:TEXTS_COMPARED])
        self.log: RunLog | None = None
        self.shapes: dict[Path, Shape] = {}
        self.ledger = Ledger(self.out)
        if configs[0].model_type not in SUPPORTED:
            prompt = self.encoder.prompt(self.shares[0].samples[0])
            models.check_rules(models.load_model(recipe.student, torch.float32).eval(), prompt, self.family.collate_pixels, self.shared)

    def plan(self) -> None:
        """Write plan.json: the stages with their questions and updates, and what the teachers' states take on disk where they are kept."""
        stages = [
            {"teacher": str(share.teacher.model), "ratio": ratio, "questions": len(bounds), "steps": sum(s.stage == i for s in steps)}
            for share, steps in zip(self.shares, self.steps, strict=True)
            for i, (ratio, bounds) in enumerate(zip(share.ratios, share.bounds, strict=True))
        ]
        signal = [self._signal_plan(share) for share in self.shares] if self.recipe.objective.needs_teacher else []
        left_out = {name: counts([row for row in self.skipped if row.file == name]) for name in ("train", "validation")}
        planned = {"stages": stages, "steps": sum(map(len, self.steps)), "validation": len(self.validation), "skipped": left_out}
        path = self.out / "plan.json"
        needs = {"needs": found} if path.exists() and (found := read_json(path).get("needs")) else {}  # what a dry run has reckoned
        write_json(path, planned | needs | {"teacher_signal": {"kind": self.recipe.teacher_signal, "teachers": signal}})

    def _signal_plan(self, share: Share) -> dict[str, Any]:
        wanted, text = self.recipe.answers, models.read_config(share.teacher.model).get_text_config()
        token = text.hidden_size * self.dtype.itemsize
        tokens = len(share.samples) * (wanted.teacher + wanted.student + wanted.truth) * wanted.max_tokens
        sizes = {"bytes_per_token": token, "head_bytes": token * text.vocab_size, "longest_tokens": tokens, "longest_bytes": tokens * token}
        return {"teacher": str(share.teacher.model), "hidden": text.hidden_size, "dtype": self.recipe.train.dtype} | sizes

    def rounds(self, share: Share) -> list[tuple[int, ...]]:
        """The mask stages whose questions the student answers in one go, before it is trained on any of them."""
        stages = range(len(share.ratios))
        anew = self.recipe.answers.refresh == "stage" and self.recipe.answers.student
        return [(stage,) for stage in stages] if anew else [tuple(stages)]

    def mask(self, share: Share, more: Sequence[float] = ()) -> list[TensorMask]:
        """The thresholds of every ratio of a teacher and of some `more`, kept in mask-N.json."""
        if self.recipe.buffer:
            self._claim_buffer()
        path = (self.recipe.buffer or self.out) / f"mask-{share.number}.json"
        weights = partial(models.weights_to_mask, share.teacher.model, self.recipe.mask, self.dtype)
        ranks.once(keep_masks, path, weights, {*share.ratios, *more}, self.recipe.mask.scope)
        return [TensorMask.from_json(row) for row in read_json(path)]

    def try_masks(self, share: Share) -> None:
        """Score the teacher on validation questions at every ratio of the recipe and of its trial; mask-trial-N.json says which r_max they propose."""
        if not self.recipe.mask.enabled:
            return
        trial, folder = self.recipe.mask_trial, self.out / f"mask-trial-{share.number}"
        ratios = sorted({0.0, *share.ratios, *trial.ratios})
        masks, asked = self.mask(share, ratios), trial_questions(self.validation, trial.questions, self.recipe.seed)
        teacher = cache(lambda: self._teacher(share, masks))  # loaded if any ratio lacks scores

        def score(ratio: float) -> list[float]:
            with masked(teacher, ratio) as model:
                limits = self.recipe.answers.max_tokens, self.recipe.train.evaluate_batch
                answers = greedy_answers(model, self.readers[share.teacher.model], asked, *limits, f"mask ratio {ratio:g}")
            self.ledger.add("mask trial", unit=f"{share.number}-{ratio:g}", counts=self._greedy(share.teacher.model, asked, answers))
            return scores(asked, answers)

        judged = judge_trial(share.teacher.model.name, measure(folder, ratios, asked, score), masks, trial.tolerance, self.recipe.mask.step)
        ranks.once(write_json, folder.with_suffix(".json"), dataclasses.asdict(judged))

    def _claim_buffer(self) -> None:
        claim_file(self.buffer / "buffer.yaml", answers_values(self.recipe), "the buffer of responses")

    def _alone(self) -> AbstractContextManager[None]:
        """While files are added to a buffer that other runs may share: each of them is made once."""
        return locked(self.recipe.buffer, "a buffer of responses", wait=True) if self.recipe.buffer else nullcontext()

    def answers(self, share: Share, masks: Sequence[TensorMask], stages: Sequence[int]) -> dict[str, list[DistinctResponse]]:
        """All responses to the questions of some mask stages: from the teacher under each one's mask, from the student as it is, and the truth."""
        wanted, asked, rows = self.recipe.answers, share.asked(stages), list[Response]()
        self._claim_buffer()
        if wanted.teacher or wanted.student:
            images = ranks.agreed(image_digests(asked) if ranks.is_main() else {})
            with self._alone():
                given = self._teacher_answers(share, masks, stages, images) | self._student_answers(share, stages, images)
                rows = [row for shelf in self._judge(share, masks, stages, given).values() for row in shelf]
            self.judged += judged(rows, asked)
        ranks.once(check_judge, self.out / "judge.json", self.judged, self.recipe.judge, self._done() > self._first_step(share, stages))
        if wanted.truth:
            rows += [_truth(sample, self.encoder) for sample in asked for _ in range(wanted.truth)]
        groups: dict[str, list[Response]] = defaultdict(list)
        for row in rows:
            groups[row.sample].append(row)
        return {sample: distinct(group) for sample, group in groups.items()}

    def _judge(self, share: Share, masks: Sequence[TensorMask], stages: Sequence[int], given: dict[str, list[Response]]) -> dict[str, list[Response]]:
        """The rows of each shelf with their verdicts; what the judge could not tell before is asked again until updates were made without it."""
        if self.recipe.judge.kind == "rules" or self._done() > self._first_step(share, stages):
            return given
        opened = partial(open_judge, self.recipe, share.teacher.model, lambda: self._teacher(share, masks).model)
        tally = partial(self._tally_judge, share)
        return judge_shelves(given, share.asked(stages), self.recipe, f"teacher {share.number}", self.buffer, opened, tally)

    def _teacher_answers(self, share: Share, masks: Sequence[TensorMask], stages: Sequence[int], images: Mapping[str, str]) -> dict[str, list[Response]]:
        sources, rows = teacher_sources(share, self.recipe.answers.teacher), dict[str, list[Response]]()
        teacher = cache(partial(self._teacher, share, masks))  # loaded if any stage lacks answers
        for stage in stages if self.recipe.answers.teacher else ():
            weights = Weights(partial(masked, teacher, share.ratios[stage]), partial(self._masked_folder, share, masks, share.ratios[stage]))
            rows[sources[stage].shelf] = self._collect(
                self.recipe.answers.engine,
                sources[stage],
                share.asked([stage]),
                images,
                self.readers[share.teacher.model],
                weights,
                self._settled(share, stages),
            )
        check_failures(chain(*rows.values()), self.recipe.answers.max_failed, share.teacher.model.name)
        return rows

    def _student_answers(self, share: Share, stages: Sequence[int], images: Mapping[str, str]) -> dict[str, list[Response]]:
        wanted = self.recipe.answers
        suffix = "" if len(stages) == len(share.ratios) else f"-stage{stages[0]}"
        source = Source(f"student{share.number}{suffix}", "student", share.number, self.recipe.student.name, 0.0, wanted.student)
        weights = Weights(partial(self._answering_student, share, stages), partial(self._student_folder, share, stages))
        asked = share.asked(stages) if wanted.student else []
        rows = self._collect(wanted.student_engine, source, asked, images, self.encoder, weights, self._settled(share, stages)) if asked else []
        check_failures(rows, wanted.max_failed, "the student")
        return {source.shelf: rows} if rows else {}

    def _collect(
        self,
        engine: str,
        source: Source,
        samples: Sequence[Sample],
        images: Mapping[str, str],
        encoder: Encoder,
        weights: Weights,
        settled: Callable[[], bool],
    ) -> list[Response]:
        wanted = self.recipe.answers
        asking = Asking(self.buffer, wanted.sampling, self.recipe.seed, wanted.batch, judge if self.recipe.judge.kind == "rules" else at_once, self._tally)
        opened = partial(open_engine, engine, wanted, source, asking, encoder, self.family.collate_pixels, weights, self.out / "serving", images)
        return collect(asking, source, samples, images, opened, settled, together=engine == "transformers")

    def _settled(self, share: Share, stages: Sequence[int]) -> Callable[[], bool]:
        """Whether updates or the teacher's states were made from these questions' answers: then the failed ones stay so."""

        def settled() -> bool:
            files = self._files(share, stages, (self.recipe.buffer or self.out) / "teacher", ".safetensors")
            if len(_missing(files)) < len(files):
                return True
            return self._done() > self._first_step(share, stages)

        return settled

    def _done(self) -> int:
        """Updates that the student has seen; the main process may ask alone, which is why no trainer is made."""
        path = self.out / "checkpoints" / "last.pt"
        return self.trainer.done if self.trainer else int(read_checkpoint(path)["step"]) if path.exists() else 0

    def _first_step(self, share: Share, stages: Sequence[int]) -> int:
        return min((step.number for step in self.steps[share.number] if step.stage in stages), default=0)

    def _masked_folder(self, share: Share, masks: Sequence[TensorMask], ratio: float, place: Path) -> Path:
        if ratio == 0:
            return share.teacher.model
        return write_masked(share.teacher.model, place, masks, ratio, self.dtype)

    @contextmanager
    def _answering_student(self, share: Share, stages: Sequence[int]) -> Iterator[Any]:
        self._check_untrained(share, stages)
        student = self._student()
        with self._trainer().autocast():
            yield student
        student.weights_changed()  # by the updates that follow

    def _student_folder(self, share: Share, stages: Sequence[int], place: Path) -> Path:
        if self._first_step(share, stages) == 0:
            return self.recipe.student
        self._check_untrained(share, stages)
        write_model(trained_student(self.recipe, "last"), self.encoder.processor, self.recipe.student, place)
        return place

    def _files(self, share: Share, stages: Sequence[int], folder: Path, suffix: str) -> dict[Path, tuple[int, list[Sample]]]:
        """The files of what a teacher gives to its questions, with the mask stage and the questions of each."""
        names = {stage: _chunks(share, share.bounds[stage], f"teacher{share.number}-stage{stage}") for stage in stages}
        return {folder / f"{name}{suffix}": (stage, chunk) for stage, chunks in names.items() for name, chunk in chunks}

    def _check_untrained(self, share: Share, stages: Sequence[int]) -> None:
        """Raise RunError if the student has been trained on questions that it is to answer first."""
        first = self._first_step(share, stages)
        if self._done() > first:
            place = f"step {self._done()}, its answers in {self.buffer} are missing and come from step {first}"
            raise RunError(f"the student stands at {place}; put them back, or remove {self.out / 'checkpoints'} to train it again")

    def signal(
        self, share: Share, masks: Sequence[TensorMask], stages: Sequence[int], responses: Mapping[str, Sequence[DistinctResponse]]
    ) -> CachedSignal | None:
        """The teacher's states for all responses, in files; None where it stays in memory, or is not needed."""
        if self.recipe.teacher_signal == "live" or not self.recipe.objective.needs_teacher:
            return None
        folder = (self.recipe.buffer or self.out) / "teacher"
        files, mark = self._files(share, stages, folder, ".safetensors"), digest(answers_values(self.recipe))
        layouts = {path: lay_out(chunk, responses) for path, (_, chunk) in files.items()}
        for path in set(files) - set(_missing(files)):
            check_signal(path, layouts[path], mark)
        if _missing(files):
            with self._alone():
                reader = SignalReader(self.readers[share.teacher.model], self.family.collate_pixels, self.shared, self.dtype)
                teacher = self._teacher(share, masks)
                for path in bar(_missing(files), f"signal of {share.teacher.model.name}"):
                    stage, chunk = files[path]
                    teacher.set_ratio(share.ratios[stage])
                    head = write_head(folder, f"teacher{share.number}-head", share.ratios[stage], teacher.model, teacher.tensors, mark)
                    read = reader.write(path, layouts[path], chunk, teacher.model, {"head": head.name, "mark": mark})
                    ranks.wait()
                    answers = sum(map(len, layouts[path].responses))
                    counts = Counts(len(layouts[path].samples), answers, int(read.tokens), operations=forward(self._shape(share.teacher.model), read))
                    self.ledger.add("signal", f"teacher{share.number}-stage{stage}", path.name, counts)
        return CachedSignal(list(files), ranks.device())

    def train(
        self,
        share: Share,
        masks: Sequence[TensorMask],
        stages: Sequence[int],
        responses: Mapping[str, Sequence[DistinctResponse]],
        signal: CachedSignal | None,
    ) -> None:
        """All updates of some mask stages, the mask falling from one to the next, the student evaluated at the end of each."""
        trainer, wanted = self._trainer(), self.recipe.train
        planned = [step for step in self.steps[share.number] if step.stage in stages]
        steps = [step for step in planned if step.number >= trainer.done]
        if not steps:
            return
        live = signal is None and self.recipe.objective.needs_teacher
        teacher = self._teacher(share, masks) if live else None
        taught = self._seen(share, teacher) if teacher else signal
        log = self.log = self.log or RunLog(self.recipe, trainer.done, trainer.total_steps)
        if trainer.done == 0:
            self._validate(trainer, log, Step(-1, 0, share.ratios[0], ()))
        ends = {max(s.number for s in planned if s.stage == stage) for stage in {s.stage for s in steps}}
        few = {stage: [sample for sample in share.asked([stage]) if responses.get(sample.id)][: wanted.samples] for stage in stages}
        for step in bar(steps, f"training ({self.recipe.preset})", total=len(planned), done=len(planned) - len(steps), status=log.status):
            if teacher:
                teacher.set_ratio(step.ratio)
            row = trainer.step(step, share.samples, responses, taught)
            learned = sum(len(responses[share.samples[i].id]) for i in step.questions if responses.get(share.samples[i].id))
            counts = Counts(int(row["questions"]), learned, int(row["tokens"]), operations=row["operations"])
            self.ledger.add("training", f"teacher{share.number}-stage{step.stage}", str(step.number), counts)
            log.write(row | {"kind": "step"})
            if step.number in ends or _due(trainer.done, wanted.evaluate_steps):
                self._validate(trainer, log, step)
            if _due(trainer.done, wanted.samples_every):
                show(trainer, evenly(self.validation, wanted.samples), few[step.stage], responses, taught, log, step)
                self.ledger.add("samples", unit=str(step.number))
            if step.number in ends or _due(trainer.done, wanted.checkpoint_steps):
                trainer.save()

    def finish(self) -> None:
        """Write report.html, then student/: the last or the best weights with the student's own processor files and a model card."""
        target = self.out / "student"
        if target.exists():
            return
        found = measured(self.out, self.recipe.train.keep)
        self.ledger.add("student")
        table = cost_table(write_cost(self.recipe, sum(map(len, self.steps))))
        self._report(found, table)
        student = trained_student(self.recipe, self.recipe.train.keep, self.out / "adapter" if self.recipe.lora and self.recipe.lora.keep_adapter else None)
        with whole_folder(target) as part:
            write_model(student, self.encoder.processor, self.recipe.student, part)
            write_json(part / "masters_recipe.json", portable_values(self.recipe))
            (part / "README.md").write_text(model_card(self.recipe, student.config.model_type, found), encoding="utf-8")
        say(f"{text_table(table.columns, table.rows)}\n{table.note}\nstudent written to {target}; {found_in(self.out)}")

    def _report(self, found: Measured, table: Table) -> None:
        change = f"Validation accuracy went from {found.before} to {found.after}, by {found.change} question by question."
        said = [change, f"The student holds the {self.recipe.train.keep} weights, after {found.updates:,} updates."]
        said += [f"Skipped, since they could not be used: {counted(self.skipped)} (questions in {SKIPPED})."] if self.skipped else []
        write_report(self.out / "report.html", f"Distillation by preset {self.recipe.preset}", {self.recipe.preset: self.out}, [table], said, [])

    def close(self) -> None:
        """End what watches the run, and add up what it has cost so far."""
        if self.ledger.opened:
            with suppress(OSError, MastersError):  # whatever ended the run is what is to be told
                self.ledger.close()
                write_cost(self.recipe, sum(map(len, self.steps)))
        if self.log:
            self.log.close()

    def _tally(self, source: Source, pairs: Heard) -> None:
        folder = self.shares[source.number].teacher.model if source.kind == "teacher" else self.recipe.student
        self.ledger.add("answers", source.shelf, pairs[0][0].id, heard(pairs, self._shape(folder)))

    def _tally_judge(self, share: Share, cases: Sequence[Case], pairs: Heard) -> None:
        counts = heard(pairs, judge_shape(self.recipe.judge, share.teacher.model))
        counts = dataclasses.replace(counts, questions=0, answers=len(cases))  # a judgement asks twice
        self.ledger.add("judging", f"teacher{share.number}", f"{cases[0].attempt}-{cases[0].key}", counts)

    def _greedy(self, folder: Path, samples: Sequence[Sample], answers: Sequence[Generated]) -> Counts:
        return heard([(sample, [answer]) for sample, answer in zip(samples, answers, strict=True)], self._shape(folder))

    def _validate(self, trainer: Trainer, log: RunLog, step: Step) -> None:
        answers = validate(trainer, self.encoder, self.validation, log, step)
        self.ledger.add("validation", unit=str(step.number), counts=self._greedy(self.recipe.student, self.validation, answers))

    def _shape(self, folder: Path) -> Shape:
        if folder not in self.shapes:
            self.shapes[folder] = shape_of(models.read_config(folder))
        return self.shapes[folder]

    def _trainer(self) -> Trainer:
        if self.trainer is None:
            total = sum(map(len, self.steps))
            self.trainer = Trainer(self._load_student(), self.encoder, self.recipe, total, self.out / "checkpoints", self.shared)
            self.trainer.load()
        return self.trainer

    def _student(self) -> Any:
        return self._trainer().hooked

    def _teacher(self, share: Share, masks: Sequence[TensorMask]) -> MaskedTeacher:
        wanted = self.recipe.train.shard_teacher
        return MaskedTeacher(share.teacher.model, masks, self.dtype, sharding() is not None if wanted is None else wanted)

    def _seen(self, share: Share, teacher: MaskedTeacher) -> Any:
        reader = self.readers[share.teacher.model]
        return teacher.model if reader is self.encoder else OwnPrompts(teacher.model, reader)

    def _load_student(self) -> Any:
        student = models.load_model(self.recipe.student, torch.float32)
        if self.recipe.lora:
            lora.adapt(student, self.recipe.lora, self.family.LANGUAGE, self.recipe.seed)
        elif self.recipe.train.freeze_vision:
            models.freeze_vision(student)
        return student


def _chunks(share: Share, bounds: range, name: str) -> Iterator[tuple[str, list[Sample]]]:
    for start in range(bounds.start, bounds.stop, QUESTIONS_PER_FILE):
        yield f"{name}-{start:07d}", list(share.samples[start : min(start + QUESTIONS_PER_FILE, bounds.stop)])


def _missing(files: Iterable[Path]) -> list[Path]:
    return ranks.agreed([path for path in files if not path.exists()])


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _truth(sample: Sample, encoder: Encoder) -> Response:
    text = sample.answers[0]
    return Response(sample.id, "truth", "", 0.0, 0, text, tuple(encoder.answer(text)), "stop", 1.0, "truth", "ground truth")
