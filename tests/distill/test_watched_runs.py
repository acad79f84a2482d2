"""Each known failure caused for real, in small trainings of the demo's two models, and what a run then says, keeps and shows; and a healthy one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import masters.demo as demo
from masters.demo.data import DemoSizes, build_data
from masters.distill import stages
from masters.distill.judge import Verdict, judge
from masters.distill.recipe import build_recipe
from masters.distill.report import found_in
from masters.distill.stages import distill
from masters.distill.watch import Watched, watch
from masters.errors import RunError

HERE = Path(str(demo.__file__)).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watched") / "data"
    build_data(folder, DemoSizes(train=48, validation=48, test=2, ood=2))
    return folder


def values(data: Path, out: Path, preset: str, learning_rate: float, limit: int, epochs: int, **changes: Any) -> dict[str, Any]:
    """A recipe on the demo's trained models; `limit` questions a step, seen once in each epoch, validated four times."""
    train = {
        "learning_rate": learning_rate,
        "questions_per_step": limit,
        "epochs": epochs,
        "evaluate_steps": epochs // 4,
        "dtype": "float32",
        "samples_every": 0,
    }
    return {
        "preset": preset,
        "student": str(HERE / "student"),
        "teachers": [{"model": str(HERE / "teacher"), "r_max": 0.0}],
        "data": {"train": str(data / "train.jsonl"), "validation": str(data / "validation.jsonl"), "limit": limit},
        "answers": {"max_tokens": 8, "teacher": 2, "student": 2} if preset != "sft" else {"max_tokens": 8},
        "train": train | changes.pop("train", {}),
        "track": [],
        "out": str(out),
    } | changes


def rows_in(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def found(out: Path) -> dict[str, dict[str, Any]]:
    rows = [row for row in rows_in(out) if row["kind"] == "finding"]
    assert len({row["name"] for row in rows}) == len(rows), "each is told once"
    return {row["name"]: row for row in rows}


def test_a_learning_rate_that_is_far_too_high_collapses(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """The paper's objective on 16 questions at 10,000 times its rate, unclipped."""
    raw = values(data, tmp_path / "run", "paper", 1e-2, 16, 48, train={"clip": 1e9}, track=["tensorboard"])
    out = distill(build_recipe(raw))
    told, said = found(out), capfd.readouterr().err
    assert "collapse" in told
    assert "train.learning_rate" in told["collapse"]["settings"]
    assert told["collapse"]["step"] < 47, "long before the end"
    for row in told.values():
        assert said.count(f"WATCH: {row['name']} at step {row['step']}: {row['said']}; {row['advice']}") == 1
    again = ", ".join(f"{row['name']} (step {row['step']})" for row in told.values())
    assert f"FOUND: {again}; see report.html" in said, "at the end again"
    page = (out / "report.html").read_text()
    assert "What went wrong" in page
    assert all(row["name"] in page and f"step {row['step']}" in page for row in told.values())
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("findings/0/text_summary")]
    assert [next(row["name"] for row in told.values() if f"**finding**: {row['name']}" in text) for text in texts] == list(told)
    rows = rows_in(out)
    again_found = [json.loads(json.dumps(f.row())) for f in watch([row for row in rows if row["kind"] != "finding"], Watched(48))]
    assert again_found == list(told.values()), "they follow from the rows"


def test_a_decay_that_overshoots_oscillates(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Rate times decay is 1.99, so each step turns the weights to nearly their opposite; a smaller rate, as advised, ends that."""
    told = found(distill(build_recipe(values(data, tmp_path / "run", "sft", 1e-3, 8, 40, train={"weight_decay": 1990.0})), until="train"))
    assert told["oscillation"]["figure"] == "loss"
    assert "went up and down every 2 steps" in told["oscillation"]["said"]
    assert told["oscillation"]["step"] == 39, "as soon as forty steps are over"
    assert "train.learning_rate" in told["oscillation"]["settings"]
    assert f"WATCH: oscillation at step 39: {told['oscillation']['said']}" in capfd.readouterr().err
    slower = build_recipe(values(data, tmp_path / "slower", "sft", 1e-5, 8, 40, train={"weight_decay": 1990.0}))
    assert "oscillation" not in found(distill(slower, until="train"))


def test_a_student_that_does_not_move_is_no_gain(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    out = distill(build_recipe(values(data, tmp_path / "run", "sft", 1e-12, 8, 8)))
    told = found(out)
    assert list(told) == ["no gain"]
    assert told["no gain"]["step"] == 3, "halfway, when half of the time can still be saved"
    assert told["no gain"]["settings"] == ["train.learning_rate"]
    assert "raise train.learning_rate" in capfd.readouterr().err
    second = build_recipe(values(data, tmp_path / "second", "sft", 1e-12, 8, 8, baseline=str(out)))
    distill(second)
    assert [row["since_baseline"] for row in rows_in(second.out) if "since_baseline" in row] == [0.0] * 4
    with pytest.raises(RunError, match=r"no finished run in .*; expected one as 'baseline'"):
        distill(build_recipe(values(data, tmp_path / "third", "sft", 1e-12, 8, 8, baseline=str(tmp_path / "absent"))))
    assert not (tmp_path / "third").exists()


def test_a_judge_that_pays_for_what_is_wrong_makes_reward_rise_while_accuracy_falls(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stages, "judge", lambda sample, text: Verdict(1.0 - (judge(sample, text).value or 0.0), "the other way round"))
    objective = {"distill": 0.0, "beta": 0.0, "distillation_reward": "none", "advantages": "all"}
    out = distill(build_recipe(values(data, tmp_path / "run", "default", 1e-3, 16, 40, objective=objective)))
    told = found(out)["reward without accuracy"]
    assert told["values"]["reward now"] > told["values"]["reward before"]
    assert told["values"]["accuracy now"] < told["values"]["accuracy before"] - 0.1
    assert "judge.json" in told["advice"]
    assert "reward without accuracy" in found_in(out)


def test_groups_of_one_reward_are_nothing_to_reinforce(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stages, "judge", lambda sample, text: Verdict(1.0, "whatever"))
    objective = {"distillation_reward": "none", "distill": 0.0, "beta": 0.0}
    out = distill(build_recipe(values(data, tmp_path / "run", "default", 1e-3, 2, 40, objective=objective)))
    told = found(out)
    assert told["nothing to reinforce"]["values"] == {"zero_spread": 1.0}
    assert told["nothing to reinforce"]["step"] == 39, "as soon as forty steps are over"
    assert "no gain" in told, "without a reward that differs nothing moves"


def test_a_healthy_run_finds_nothing(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Of one stage, stopped before its end: whether it gained anything is not asked of a few questions."""
    recipe = build_recipe(values(data, tmp_path / "run", "default", 2e-4, 16, 12, train={"schedule": "linear", "warm_up": 3}))
    out = distill(recipe, until="train")
    assert {row["name"] for row in rows_in(out) if row["kind"] == "finding"} <= {"no gain"}
    assert len([row for row in rows_in(out) if row["kind"] == "evaluation"]) == 5
    assert "collapse" not in capfd.readouterr().err
    assert os.path.exists(out / "checkpoints" / "last.pt")
