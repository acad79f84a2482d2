"""Validation while a student is trained: how it answers the same questions every time, kept question by question, and what that says at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..bootstrap import Interval, mean_interval, paired_difference
from ..errors import RunError
from ..files import whole_file
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


def validate(trainer: Trainer, encoder: Encoder, samples: Sequence[Sample], log: RunLog, step: Step) -> None:
    """Write accuracy and its interval to the log, every answer to validation/, and keep the weights where accuracy is the highest so far."""
    recipe = trainer.recipe
    with trainer.autocast():
        answers = greedy_answers(trainer.hooked, encoder, samples, recipe.answers.max_tokens, recipe.train.evaluate_batch, "validating")
    reached = scores(samples, answers)
    if ranks.is_main():
        _write(_path(recipe.out, step.number + 1), samples, answers, reached)
    found = mean_interval(reached)
    row = {"kind": "evaluation", "step": step.number, "stage": step.stage, "ratio": step.ratio}
    log.write(row | {"validation_accuracy": found.mean, "validation_low": found.low, "validation_high": found.high})
    if found.mean > trainer.best:
        trainer.best = found.mean
        trainer.save_best()


def measured(out: Path, keep: str) -> Measured:
    """What the validations of the run in `out` say of its `keep` ('last' or 'best') weights. Raises RunError where a file of answers is missing."""
    rows = [row for row in read_run(out) if row["kind"] == "evaluation"]
    # The first of several equal ones is the best: only a higher accuracy takes its place.
    kept = rows[-1] if keep == "last" else max(rows, key=lambda row: (row["validation_accuracy"], -row["step"]))
    before, after = (read_scores(out, step + 1) for step in (rows[0]["step"], kept["step"]))
    pairs = [(after[sample], score) for sample, score in before.items()]
    change = paired_difference([ours for ours, _ in pairs], [theirs for _, theirs in pairs])
    return Measured(mean_interval(list(before.values())), mean_interval(list(after.values())), change, kept["step"] + 1)


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
