"""What a dry run says beforehand, against what a real update takes, what a real run writes, and what is counted by hand."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from masters.cli import main
from masters.demo.models import build_model
from masters.distill import memory, plan
from masters.distill.recipe import Lora, build_recipe
from masters.distill.stages import distill
from masters.errors import RecipeError

QUESTIONS, GROUP, TOKENS = 8, 6, 32
MIDDLE = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64)

# One update of a 25 M student under a teacher of its own size, in a process of its own: the peak of its resident memory above what it had before the models.
STEP = """
import json, sys
from pathlib import Path
import torch
from masters.demo import models as demo
from masters.distill.inputs import Encoder
from masters.distill.models import freeze_vision
from masters.distill.recipe import build_recipe
from masters.distill.responses import DistinctResponse
from masters.distill.train import Step, Trainer
from masters.samples import read_samples
folder, shape, questions, group, tokens = json.loads(sys.argv[1])
torch.set_num_threads(1)
demo.TEXT["student"] = demo.TEXT["teacher"] = shape or demo.TEXT["student"]
tokenizer = demo.build_tokenizer()
encoder, samples = Encoder(demo.build_processor(tokenizer)), read_samples(Path(folder) / "train.jsonl")[:questions]
length = max(len(encoder.prompt(sample).ids) for sample in samples)
random = torch.Generator().manual_seed(0)
responses = {s.id: [DistinctResponse(tuple(torch.randint(100, 400, (tokens,), generator=random).tolist()), 1, float(i % 2), True, False)
                    for i in range(group)] for s in samples}
raw = dict(student="s", teachers=[dict(model="t")], data=dict(train="x", validation="y"), out="o", preset="paper", train=dict(dtype="float32"))
def status(name):
    return [int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name + ":")][0]
before = status("VmRSS")
student, teacher = demo.build_model("student", tokenizer), demo.build_model("teacher", tokenizer).eval().requires_grad_(False)
freeze_vision(student)
trainer = Trainer(student, encoder, build_recipe(raw), 10, Path("o"))
for number in (0, 20):  # both of those that measure the parts' gradients; the optimizer has its moments from the first on
    trainer.step(Step(number, 0, 0.2, tuple(range(questions))), samples, responses, teacher)
print(json.dumps([status("VmHWM") - before, length]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's")
def test_the_memory_of_an_update_is_the_one_that_a_process_needs(processor: Any, questions: Path, monkeypatch: pytest.MonkeyPatch):
    from masters.demo import models as demo

    # Freed memory goes back at once, so that resident memory is what tensors take.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    given = json.dumps([str(questions), MIDDLE, QUESTIONS, GROUP, TOKENS])
    done = subprocess.run([sys.executable, "-c", STEP, given], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    measured, prompt = json.loads(done.stdout.splitlines()[-1])
    monkeypatch.setitem(demo.TEXT, "student", MIDDLE)
    with torch.device("meta"):
        config = build_model("student", processor.tokenizer).config
    load = memory.Load(QUESTIONS, prompt + GROUP * (TOKENS - 1), QUESTIONS * GROUP * TOKENS, QUESTIONS * 64, QUESTIONS * 3 * 64 * 64 * 4)
    found = memory.step_memory(config, config, load, memory.Setting(torch.float32, "cpu", passes=2))
    assert abs(found.total / measured - 1) < 0.2, f"planned {found.total / 2**20:.0f} MiB, measured {measured / 2**20:.0f}: {found}"
    assert found.activations > 0.3 * found.total, "what is estimated has its weight in the sum"


def setting(**changes: Any) -> memory.Setting:
    return memory.Setting(torch.bfloat16, **changes)


def test_what_lowers_memory_lowers_the_plan(tiny: Any, tiny_teacher: Any):
    load = memory.Load(4, 400, 1000, 256)
    config, teacher = tiny.config, tiny_teacher.config
    whole = memory.step_memory(config, teacher, load, setting())
    weights, theirs = (sum(p.numel() for p in model.parameters()) for model in (tiny, tiny_teacher))
    trained = sum(p.numel() for name, p in tiny.named_parameters() if "vision_model" not in name)
    assert (whole.parameters, whole.optimizer, whole.initial, whole.teacher) == (4 * weights, 8 * trained, 2 * weights, 2 * theirs)
    checkpointed = memory.step_memory(config, teacher, load, setting(checkpointing=True))
    assert checkpointed.activations < 0.75 * whole.activations
    shared = memory.step_memory(config, teacher, load, setting(processes=4, sharded=True, shard_teacher=True))
    assert (shared.parameters, shared.teacher) == (weights, theirs // 2)
    assert memory.step_memory(config, teacher, load, setting(live_teacher=False)).teacher == 0
    adapted = memory.step_memory(config, teacher, load, setting(lora=Lora(rank=4)))
    assert adapted.optimizer < 0.3 * whole.optimizer
    assert adapted.initial == 0
    half = memory.layers_trace(config, memory.Load(2, 400, 500), setting())
    assert half.saved < 0.7 * memory.layers_trace(config, load, setting()).saved


@pytest.fixture
def raw(models: Any, questions: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "student": str(models.student),
        "teachers": [{"model": str(models.teacher), "r_max": 0.1}],
        "data": {"train": str(questions / "train.jsonl"), "validation": str(questions / "validation.jsonl")},
        "answers": {"max_tokens": 6},
        "train": {"dtype": "float32", "questions_per_step": 8},
        "out": str(tmp_path / "run"),
    }


def test_a_plan_counts_what_the_run_will_do(raw: dict[str, Any]):
    recipe = build_recipe(raw | {"machine": {"tokens_per_second": 100.0, "answer_tokens_per_second": 10.0}})
    found = plan.plan(recipe)
    written = json.loads((recipe.out / "plan.json").read_text())
    assert [(s.ratio, s.questions, s.steps) for s in found.stages] == [(s["ratio"], s["questions"], s["steps"]) for s in written["stages"]]
    assert sum(s.answers for s in found.stages) == 40 * 8
    assert sum(s.answer_tokens for s in found.stages) == 40 * 8 * 6
    by_part = {part: [work for work in found.work if work.stage == part] for part in ("answers", "training")}
    assert sum(work.tokens_written for work in by_part["answers"]) == 40 * 8 * 6
    assert sum(work.seconds for work in by_part["answers"]) == pytest.approx(40 * 8 * 6 / 10)
    assert sum(work.seconds for work in by_part["training"]) == pytest.approx(sum(work.tokens_read for work in by_part["training"]) / 100, rel=1e-3)
    assert written["needs"] == json.loads(json.dumps(plan.plan_values(found))), "plan.json holds what is printed"
    assert not (recipe.out / "responses").exists()


def test_the_planned_disk_holds_what_a_run_writes(raw: dict[str, Any]):
    recipe = build_recipe(raw | {"teacher_signal": "cached"})
    found = plan.plan(recipe).disk
    distill(recipe)
    size = {name: sum(file.stat().st_size for file in (recipe.out / folder).rglob("*")) for name, folder in (("checkpoints",) * 2, ("signal", "teacher"))}
    assert found["checkpoints"] / 2.2 < size["checkpoints"] < found["checkpoints"], "the newest checkpoint stands beside the last while it is written"
    assert 0.3 * found["signal"] < size["signal"] < found["signal"] + 10_000


def test_a_plan_that_does_not_fit_is_refused_in_one_line_before_anything_is_written(raw: dict[str, Any], tmp_path: Path):
    with pytest.raises(
        RecipeError, match=r"training under teacher takes .* GB in each process .*, a device has 0\.005 GB; set train.gradient_checkpointing=true or"
    ) as caught:
        plan.plan(build_recipe(raw | {"machine": {"memory_gb": 0.005}, "answers": {"max_tokens": 200, "batch": 1}}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_too_small_is_refused(raw: dict[str, Any], small_disk: Path):
    with pytest.raises(RecipeError, match=r"disk has 0\.0\d* GB left; free some"):
        plan.plan(build_recipe(raw | {"out": str(small_disk / "run")}))
    assert not (small_disk / "run").exists()


def test_the_command_prints_the_tables(raw: dict[str, Any], tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(raw))
    result = CliRunner().invoke(main, ["distill", str(path), "--dry-run", "machine.tflops=1", "machine.memory_gb=8"], catch_exceptions=False)
    assert result.exit_code == 0
    for word in ("questions", "optimizer", "S_0", "hours", "checkpoints"):
        assert word in result.output
    assert "not stated" not in result.output


def test_hours_need_a_throughput(raw: dict[str, Any]):
    found = plan.estimate(build_recipe(raw))
    assert found.hours is None
    assert "machine.tflops" in plan.plan_text(found)
    stated = plan.estimate(build_recipe(raw | {"machine": {"tflops": 1.0}}))
    twice = plan.estimate(build_recipe(raw | {"machine": {"tflops": 1.0, "devices": 2}}))
    assert stated.hours
    assert twice.hours
    assert math.isclose(stated.hours, 2 * twice.hours)
