"""Validation while a student is trained: how it answers the same questions every time, kept question by question, and what that says at the end."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..bootstrap import Interval, mean_interval, paired_difference
from ..errors import RunError
from ..files import read_json, whole_file
from ..samples import Sample
from . import ranks
from .evaluate import greedy_answers, scores
from .generate import Generated
from .inputs import Encoder
from .report import read_run
from .trackers import RunLog
from .train import Step, Trainer

SCHEMA = pa.schema([("sample", pa.string()), ("text", pa.string()), ("score", pa.float64())])


@dataclass(frozen=True)
class Measured:
    """Validation accuracy before training and of the weights that are kept, their paired difference, and after how many updates those stood."""

    before: Interval
    after: Interval
    change: Interval
    updates: int


def validate(trainer: Trainer, encoder: Encoder, samples: Sequence[Sample], log: RunLog, step: Step) -> list[Generated]:
    """Write accuracy and its interval to the log, every answer to validation/, and keep the weights where accuracy is the highest so far.

    Returns the answers.
    """
    recipe = trainer.recipe
    with trainer.autocast():
        answers = greedy_answers(trainer.hooked, encoder, samples, recipe.answers.max_tokens, recipe.train.evaluate_batch, "validating")
    reached = scores(samples, answers)
    if ranks.is_main():
        _write(_path(recipe.out, step.number + 1), samples, answers, reached)
    found = mean_interval(reached)
    row = {"kind": "evaluation", "step": step.number, "stage": step.stage, "ratio": step.ratio}
    row |= {"validation_accuracy": found.mean, "validation_low": found.low, "validation_high": found.high}
    log.write(row | _form(answers) | _since(log, samples, reached))
    if found.mean > trainer.best:
        trainer.best = found.mean
        trainer.save_best()
    return answers


def _form(answers: Sequence[Generated]) -> dict[str, float]:
    """What a collapse shows in whatever the answers say: their mean number of tokens, and the share of the commonest one."""
    commonest = max(Counter(answer.text.strip() for answer in answers).values())
    return {"validation_tokens": fmean(len(answer.ids) for answer in answers), "validation_commonest": commonest / len(answers)}


def _since(log: RunLog, samples: Sequence[Sample], reached: Sequence[float]) -> dict[str, float]:
    """The change, question by question, since before training, since the best validation so far and from the baseline, each with its standard error."""
    if not (past := log.watch.evaluations):  # the first one, or a process that writes none
        return {}
    out, best = log.recipe.out, max(past, key=lambda row: row["validation_accuracy"])
    others = {"start": read_scores(out, past[0]["step"] + 1), "best": read_scores(out, best["step"] + 1)}
    if log.recipe.baseline:
        others["baseline"] = baseline_scores(log.recipe.baseline, samples)
    found: dict[str, float] = {}
    for name, before in others.items():
        changes = [now - before[sample.id] for sample, now in zip(samples, reached, strict=True)]
        error = stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else 0.0
        found |= {f"since_{name}": fmean(changes), f"since_{name}_error": error}
    return found


def measured(out: Path, keep: str) -> Measured:
    """What the validations of the run in `out` say of its `keep` ('last' or 'best') weights. Raises RunError where a file of answers is missing."""
    rows = [row for row in read_run(out) if row["kind"] == "evaluation"]
    kept = _kept(rows, keep)
    before, after = (read_scores(out, step + 1) for step in (rows[0]["step"], kept["step"]))
    pairs = [(after[sample], score) for sample, score in before.items()]
    change = paired_difference([ours for ours, _ in pairs], [theirs for _, theirs in pairs])
    return Measured(mean_interval(list(before.values())), mean_interval(list(after.values())), change, kept["step"] + 1)


def _kept(rows: Sequence[Mapping[str, Any]], keep: str) -> Mapping[str, Any]:
    """The validation of the weights that are kept; the first of several equal ones is the best: only a higher accuracy takes its place."""
    return rows[-1] if keep == "last" else max(rows, key=lambda row: (row["validation_accuracy"], -row["step"]))


def baseline_scores(out: Path, samples: Sequence[Sample]) -> Mapping[str, float]:
    """The scores of the weights that a finished run keeps. Raises RunError where `out` holds none, or was validated on other questions than `samples`."""
    card = out / "student" / "masters_recipe.json"
    if not card.is_file():
        raise RunError(f"no finished run in {out}; expected one as 'baseline', such as that of preset sft on the same data")
    rows = [row for row in read_run(out) if row["kind"] == "evaluation"]
    found = read_scores(out, _kept(rows, read_json(card)["train"]["keep"])["step"] + 1)
    if missing := [sample.id for sample in samples if sample.id not in found]:
        raise RunError(f"the baseline {out} was not asked validation question '{missing[0]}' and {len(missing) - 1} others; expected a run on the same file")
    return found


def read_scores(out: Path, updates: int) -> Mapping[str, float]:
    """The score of every validation question after so many updates, by its id."""
    path = _path(out, updates)
    try:
        table = pq.read_table(path, schema=SCHEMA)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} can't be read ({str(error).splitlines()[0][:120]}); expected the answers of that validation, put the file back") from None
    return dict(zip(table["sample"].to_pylist(), table["score"].to_pylist(), strict=True))


def _path(out: Path, updates: int) -> Path:
    return out / "validation" / f"{updates:07d}.parquet"


def _write(path: Path, samples: Sequence[Sample], answers: Sequence[Generated], reached: Sequence[float]) -> None:
    rows = [{"sample": s.id, "text": a.text, "score": score} for s, a, score in zip(samples, answers, reached, strict=True)]
    with whole_file(path) as part:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), part)
