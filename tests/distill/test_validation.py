"""Validation is kept question by question, and what is said of it at the end is what those answers say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from masters.distill import validation
from masters.distill.generate import Generated
from masters.distill.inputs import Encoder
from masters.distill.recipe import build_recipe
from masters.distill.trackers import RunLog
from masters.distill.train import Step, Trainer
from masters.distill.validation import measured, read_scores, validate
from masters.errors import RunError
from masters.samples import Sample
from masters.scoring import score

BEFORE, MIDDLE, END = [1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]


class FakeTrainer:
    """What `validate` needs of a trainer."""

    def __init__(self, out: Path) -> None:
        models = {"student": "s", "teachers": [{"model": "t"}], "data": {"train": "a", "validation": "b"}}
        self.recipe = build_recipe(models | {"out": str(out), "track": []})
        self.student = self.hooked = None
        self.best = -1.0
        self.saved: list[float] = []

    autocast = Trainer.autocast

    def save_best(self) -> None:
        self.saved.append(self.best)


@pytest.fixture
def out(tmp_path: Path, samples: list[Sample], encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was validated four times: right answers as planned, wrong ones otherwise."""
    trainer: Any = FakeTrainer(tmp_path)
    log, asked = RunLog(trainer.recipe, 0), samples[:8]
    for number, right in ((-1, BEFORE), (4, MIDDLE), (9, MIDDLE), (14, END)):
        answers = [Generated(sample.answers[0] if yes else "nonsense", (5,), "stop") for sample, yes in zip(asked, right, strict=True)]
        monkeypatch.setattr(validation, "greedy_answers", lambda *args, answers=answers: answers)
        validate(trainer, encoder, asked, log, Step(number, 0, 0.2, ()))
    assert trainer.saved == [1 / 8, 6 / 8], "an equal accuracy is no better"
    return tmp_path


def test_every_answer_is_kept_with_its_score(out: Path, samples: list[Sample]):
    assert sorted(path.name for path in (out / "validation").iterdir()) == [f"{n:07d}.parquet" for n in (0, 5, 10, 15)]
    rows = pq.read_table(out / "validation" / "0000015.parquet").to_pylist()
    assert [row["sample"] for row in rows] == [sample.id for sample in samples[:8]]
    assert [row["score"] for row in rows] == END == [score(s, row["text"]) for s, row in zip(samples, rows, strict=False)]


def test_the_log_holds_accuracy_with_its_interval(out: Path):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["validation_accuracy"]) for row in rows] == [(-1, 1 / 8), (4, 6 / 8), (9, 6 / 8), (14, 5 / 8)]
    for row, right in zip(rows, (BEFORE, MIDDLE, MIDDLE, END), strict=True):
        draws = np.random.default_rng(1).choice(right, size=(20_000, 8)).mean(axis=1)
        assert [row["validation_low"], row["validation_high"]] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=1 / 8)
        assert row["validation_low"] <= row["validation_accuracy"] <= row["validation_high"]


def test_what_the_kept_weights_reached(out: Path):
    last, best = measured(out, "last"), measured(out, "best")
    assert (last.updates, best.updates) == (15, 5), "of two equal ones the first was kept"
    assert (last.before.mean, last.after.mean, best.after.mean) == (1 / 8, 5 / 8, 6 / 8)
    assert (last.change.mean, last.change.count) == (4 / 8, 8)
    assert last.change.low > 0, "four questions more of eight, none less"


def test_a_file_of_answers_that_is_gone_is_named(out: Path, tmp_path: Path):
    assert list(read_scores(out, 5).values()) == MIDDLE
    (out / "validation" / "0000015.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(RunError, match=r"0000015\.parquet can't be read .*put the file back") as caught:
        measured(out, "last")
    assert "\n" not in str(caught.value)
