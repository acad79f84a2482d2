"""Tables of a few answers: what they show is what training uses, and showing it changes nothing."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from masters.distill import stages
from masters.distill.examples import COLUMNS, evenly
from masters.distill.judge import Verdict
from masters.distill.recipe import build_recipe
from masters.distill.stages import distill
from masters.samples import Sample, read_samples


@pytest.fixture
def raw(models: Any, questions: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "student": str(models.student),
        "teachers": [{"model": str(models.teacher), "r_max": 0.2}],
        "data": {"train": str(questions / "train.jsonl"), "validation": str(questions / "validation.jsonl"), "limit": 12},
        "answers": {"batch": 8, "max_tokens": 3},
        "mask": {"step": 0.2},
        "train": {"dtype": "float32", "learning_rate": 1e-3, "questions_per_step": 3, "evaluate_batch": 8, "samples_every": 2, "samples": 3},
        "out": str(tmp_path / "run"),
    }


def rows_of(page: str) -> list[dict[str, str]]:
    """The table of a page, row by row."""
    body = page.split("<tbody>")[1].split("</tbody>")[0]
    cells = [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in body.split("</tr>")[:-1]]
    return [dict(zip(COLUMNS, row, strict=True)) for row in cells]


@pytest.mark.parametrize("signal", ["live", "cached"])
def test_a_page_shows_what_the_objective_pays(signal: str, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    # A random model is never right, and where all are wrong there is nothing to tell apart.
    monkeypatch.setattr(stages, "judge", lambda sample, text: Verdict(float(len(text) % 2), "odd or even"))
    out = distill(build_recipe(raw | {"teacher_signal": signal, "preset": "paper"}))
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["0000002.html", "0000004.html"]
    page = (out / "samples" / "0000002.html").read_text()
    assert "after 2 updates, teacher masked by 0.2" in page
    assert page.count("data:image/png;base64,") == 6, "three questions of each kind, their images inside the page"
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page), "it opens from disk anywhere"
    validation = read_samples(Path(raw["data"]["validation"]))
    for sample in evenly(validation, 3):
        assert html.escape(sample.question.split("\n")[0]) in page
    rows = rows_of(page)
    groups = {question: [row for row in rows if row["Question"] == question] for question in {row["Question"] for row in rows}}
    assert len(groups) == 3
    for group in groups.values():
        times = torch.tensor([float(row["Times"]) for row in group], dtype=torch.float64)
        accuracy = torch.tensor([{"right": 1.0, "wrong": 0.0}[row["Verdict"]] for row in group], dtype=torch.float64)
        divergence, paid, reward, gain = (
            torch.tensor([float(row[name]) for row in group], dtype=torch.float64) for name in ("Divergence", "Distillation reward", "Reward", "Advantage")
        )
        assert times.sum() == 8, "four answers of the teacher and four of the student"
        assert torch.allclose(accuracy + paid, reward, atol=2e-3)
        # The paper's advantage, from the printed rewards: (R - mean) / std over the eight.
        every = reward.repeat_interleave(times.long())
        if len(group) > 1:
            assert torch.allclose((reward - every.mean()) / (every.std() + 1e-4), gain, atol=2e-2)
            assert (float(paid.min()), float(paid.max())) == (0, 1), "the closest response gets 1"
            assert divergence[paid.argmax()] == divergence.min()
    assert {row["From"] for row in rows} == {"teacher", "student"}
    held = EventAccumulator(str(out / "tensorboard"))
    held.Reload()
    assert [event.step for event in held.Images("validation_answers/0")] == [2, 4]
    assert {f"training_responses/{i}/text_summary" for i in range(3)} <= set(held.Tags()["tensors"])


def test_showing_answers_changes_nothing(raw: dict[str, Any]):
    shown = distill(build_recipe(raw | {"out": raw["out"] + "-shown"}))
    silent = distill(build_recipe(raw | {"out": raw["out"] + "-silent", "train": raw["train"] | {"samples_every": 0}}))
    assert not (silent / "samples").exists()
    assert (shown / "student" / "model.safetensors").read_bytes() == (silent / "student" / "model.safetensors").read_bytes()


def test_runs_without_a_teacher_have_tables_too(raw: dict[str, Any]):
    page = (distill(build_recipe(raw | {"preset": "sft"})) / "samples" / "0000004.html").read_text()
    assert {(row["From"], row["Verdict"]) for row in rows_of(page)} == {("truth", "right")}


def test_the_same_questions_every_time(samples: list[Sample]):
    assert [samples.index(sample) for sample in evenly(samples, 4)] == [0, 10, 20, 30]
    assert evenly(samples[:3], 8) == samples[:3]
    assert evenly([], 4) == []
