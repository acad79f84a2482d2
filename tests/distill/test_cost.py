"""What a run says that it cost: against the answers it kept, PyTorch's counter, and a run killed with SIGKILL against one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import processes
import pyarrow.parquet as pq
import pytest
import torch
from scripted_server import completion, serve_script
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from masters.demo.models import build_tokenizer
from masters.distill import flops, judges
from masters.distill import models as loading
from masters.distill.cost import SUMMED, online, summed
from masters.distill.inputs import Encoder
from masters.distill.ledger import Ledger, read_ledger
from masters.distill.recipe import build_recipe
from masters.distill.responses import DistinctResponse
from masters.distill.stages import distill
from masters.distill.train import Step, Trainer
from masters.samples import Sample


def values(models: Any, questions: Path, out: Path, signal: str = "live") -> dict[str, Any]:
    return {
        "student": str(models.student),
        "teachers": [{"model": str(models.teacher), "r_max": 0.2}],
        "data": {"train": str(questions / "train.jsonl"), "validation": str(questions / "validation.jsonl"), "limit": 16},
        "answers": {"teacher": 2, "student": 1, "batch": 4, "max_tokens": 5},
        "mask": {"step": 0.2},
        "train": {"dtype": "float32", "questions_per_step": 2, "checkpoint_steps": 2, "samples_every": 0},
        "track": [],
        "teacher_signal": signal,
        "out": str(out),
    }


@pytest.fixture(scope="module")
def unbroken(models: Any, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    return distill(build_recipe(values(models, questions, folder / "run")))


def cost_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "cost.json").read_text())
    return found


def by_stage(cost: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(stage["stage"], stage["name"]): stage for stage in cost["stages"]}


def test_the_figures_are_those_of_the_answers_that_were_kept(unbroken: Path, encoder: Encoder, samples: list[Sample]):
    stages, by_id = by_stage(cost_of(unbroken)), {sample.id: sample for sample in samples}
    for shelf in ("teacher0-stage0", "teacher0-stage1", "student0"):
        rows, found = pq.read_table(unbroken / "responses" / f"{shelf}.parquet").to_pylist(), stages["answers", shelf]
        asked = {row["sample"] for row in rows}
        assert found["questions"] == len(asked)
        assert found["answers"] == len(rows)
        assert found["tokens_written"] == sum(len(row["ids"]) for row in rows)
        assert found["tokens_read"] == sum(len(encoder.prompt(by_id[sample]).ids) for sample in asked)
        assert found["seconds"] > 0
        assert found["operations"] > 0
    trained = [stages["training", f"teacher0-stage{stage}"] for stage in (0, 1)]
    assert sum(stage["questions"] for stage in trained) == 16
    assert stages["validation", ""]["questions"] == 3 * 8, "before training and after every stage"
    totals = cost_of(unbroken)["totals"]
    assert totals["cpu_hours"] == pytest.approx(totals["seconds"] / 3600), "one process"
    assert totals["gpu_hours"] == 0
    assert totals["peak_bytes"] > 100e6
    assert "What it cost" in (unbroken / "report.html").read_text()


def test_a_killed_run_s_seconds_are_the_sum_and_its_tokens_count_once(unbroken: Path, models: Any, questions: Path, tmp_path: Path):
    out, complaint = tmp_path / "run", tmp_path / "complaint"
    moments = (
        lambda: any(row["stage"] == "answers" for row in read_ledger(out)),
        lambda: any(row["stage"] == "training" and row["unit"] == "2" for row in read_ledger(out)),
    )
    spent = [0.0]
    for reached in moments:
        processes.kill_when(processes.start(values(models, questions, out), complaint), reached, delay=0.0)
        spent.append(sum(row["seconds"] for row in read_ledger(out)))
        assert spent[-1] > spent[-2]
    processes.run(values(models, questions, out), complaint)
    rows, cost = read_ledger(out), cost_of(out)
    assert {row["life"] for row in rows} == {1, 2, 3}
    assert cost["totals"]["lives"] == 3
    assert cost["totals"]["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert cost["totals"]["seconds"] > spent[-1]
    ours, theirs = by_stage(cost), by_stage(cost_of(unbroken))
    assert [row["unit"] for row in rows if row["stage"] == "training"].count("2") >= 2, "the step after the checkpoint was done twice"
    for key, stage in theirs.items():
        if key[0] not in ("check", "end"):
            counted = {name: stage[name] for name in (*SUMMED, "operations")}
            assert {name: ours[key][name] for name in counted} == counted, key


def test_what_was_worked_on_when_a_process_was_killed_is_counted(tmp_path: Path):
    ledger = Ledger(tmp_path)
    ledger.open()
    ledger.add("answers", "a", "1")
    known = sum(row["seconds"] for row in read_ledger(tmp_path))
    ledger._ended.set()  # its pulse goes no further
    (tmp_path / ".pulse").write_text(json.dumps({"life": 1, "seconds": known + 7.0}))
    with open(tmp_path / "costs.jsonl", "a") as handle:
        handle.write('{"life": 1, "stage": "answ')  # the line that the kill has cut
    later = Ledger(tmp_path)
    later.open()
    [lost] = [row for row in read_ledger(tmp_path) if row["stage"] == "interrupted"]
    assert lost["seconds"] == pytest.approx(7.0)
    later.close()
    assert not (tmp_path / ".pulse").exists()
    assert [row["life"] for row in read_ledger(tmp_path)] == [1, 1, 2]


def line(unit: str, seconds: float, **more: Any) -> dict[str, Any]:
    counts: dict[str, Any] = {**dict.fromkeys(SUMMED, 0), "operations": 0.0, "processes": 4, "device": "cuda", "peak_bytes": 1}
    return {"life": 1, "stage": "answers", "name": "a", "unit": unit, "seconds": seconds} | counts | more


def test_lines_of_one_unit_replace_each_other_and_their_seconds_add_up():
    [found] = summed([line("x", 3.0, tokens_read=5), line("y", 1.0, tokens_read=7), line("x", 2.0, tokens_read=6), line("z", 1.0, operations=None)])
    assert found["seconds"] == 7.0
    assert found["tokens_read"] == 13
    assert found["operations"] is None, "a server's are not known"
    assert found["gpu_hours"] == pytest.approx(4 * 7 / 3600)
    assert found["cpu_hours"] == 0


def test_online_generation_is_reckoned_from_the_run_s_own_throughput(unbroken: Path):
    """100 batches' work in 5 forwards each at 2 s; 40 updates of two sources; two epochs."""
    recipe = build_recipe({"student": "s", "teachers": [{"model": "t"}], "data": {"train": "x", "validation": "y"}, "out": "o", "train": {"epochs": 2}})
    lines = [line(str(i), 10.0, forwards=5, answers=8, tokens_written=40, processes=1) for i in range(10)]
    other = line("all", 100.0, processes=1) | {"stage": "training"}
    found = online(summed([*lines, other]), recipe, steps=40)
    assert found is not None
    assert (found["answers"], found["tokens_written"]) == (160, 800)
    assert found["seconds_offline"] == 100
    assert found["seconds_by_tokens"] == 200
    assert found["forwards"] == 40 * 2 * 5
    assert found["seconds_by_forwards"] == 40 * 2 * 5 * 2.0
    assert found["factor_of_generation"] == [2, 8]
    assert found["factor_of_run"] == [1.5, 4.5]
    assert online(summed([other]), recipe, 40) is None, "nothing was generated"


def test_an_update_takes_the_operations_that_the_counter_sees(
    models: Any, encoder: Encoder, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(flops, "ATTENTION_BACK", 2.0)  # plain attention, which the counter sees on a CPU, keeps its scores
    raw = values(models, Path("x"), tmp_path / "run") | {"preset": "paper"}
    raw["train"] = {"dtype": "float32"}
    student, teacher = loading.load_model(models.student, torch.float32), loading.frozen(loading.load_model(models.teacher, torch.float32))
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    loading.freeze_vision(student)
    trainer = Trainer(student, encoder, build_recipe(raw), 10, tmp_path / "run")
    answers = {s.id: [DistinctResponse(tuple(range(20, 20 + 9)), 1, float(i % 2), True, False) for i in range(2)] for s in samples[:2]}
    with FlopCounterMode(display=False) as counter:
        row = trainer.step(Step(1, 0, 0.2, (0, 1)), samples, answers, teacher)
    seen = counter.get_total_flops()
    assert row["tokens"] == sum(len(encoder.prompt(s).ids) + 2 * 8 for s in samples[:2])
    assert abs(row["operations"] / seen - 1) < 0.05, f"{row['operations']:.4e} by formula, {seen:.4e} counted: {row['operations'] / seen:.3f}"


JUDGE_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<end_of_utterance>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


def test_a_model_s_judgements_have_a_row_with_all_that_it_read_and_wrote(models: Any, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A tiny random Llama, whose replies are no verdicts: what passes through it is counted beside the run's ledger."""
    words = build_tokenizer()
    words.chat_template = JUDGE_TEMPLATE
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=4096, eos_token_id=words.eos_token_id, **shape)).save_pretrained(
        tmp_path / "judge"
    )
    words.save_pretrained(tmp_path / "judge")
    seen, real = {"tokens_read": 0, "tokens_written": 0}, judges.generate

    def watched(model: Any, encoder: Encoder, collate: Any, asked: Any, *rest: Any) -> Any:
        replies = real(model, encoder, collate, asked, *rest)
        seen["tokens_read"] += sum(len(encoder.encode(sample).ids) for sample in asked)
        seen["tokens_written"] += sum(len(reply.ids) for [reply] in replies)
        return replies

    monkeypatch.setattr(judges, "generate", watched)
    wanted = {"kind": "model", "model": str(tmp_path / "judge"), "max_tokens": 6, "max_unjudged": 1.0, "blind": "warn"}
    out = distill(build_recipe(values(models, questions, tmp_path / "run") | {"judge": wanted}), until="answers")
    found = by_stage(cost_of(out))["judging", "teacher0"]
    rows = [row for path in (out / "responses").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert found["answers"] == len({(row["sample"], row["text"]) for row in rows if row["judge"].startswith("model ")}) > 10
    assert {key: found[key] for key in seen} == seen
    assert found["operations"] > 0
    assert found["seconds"] > 0


def test_a_server_s_judgements_count_the_tokens_that_it_reports(models: Any, questions: Path, tmp_path: Path):
    def script(request: dict[str, Any], count: int) -> tuple[int, dict[str, Any]]:
        said = str(request["messages"][0]["content"][0]["text"])
        body = completion("Same. <answer>1</answer>" if "Answer to check" in said else "1")
        return 200, body | {"usage": {"prompt_tokens": len(said), "completion_tokens": 7}}

    with serve_script(script) as server:
        wanted = {"kind": "endpoint", "endpoint": {"url": server.url, "model": "tiny"}, "blind": "warn"}
        out = distill(build_recipe(values(models, questions, tmp_path / "run") | {"judge": wanted}), until="answers")
    found = by_stage(cost_of(out))["judging", "teacher0"]
    # Each question to a server begins with a trial of its first, whose reply is not used.
    asked = {(request["messages"][0]["content"][0]["text"], request["seed"]) for request in server.requests}
    assert found["tokens_read"] == sum(len(said) for said, _ in asked)
    assert found["tokens_written"] == 7 * len(asked) == 14 * found["answers"]
    assert found["operations"] is None
