"""Two processes that accelerate's launcher started (gloo, CPU) against one: the same answers, losses, optimizer and weights, on every family.

Two of three questions have no image, so that in most steps a process has no picture to look at, and the last of a stage leave a process without any.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from safetensors.torch import load_file
from torch import Tensor

from masters.distill import parallel, ranks
from masters.distill.parallel import Sharding, blocks, own_rows, sharding
from masters.distill.recipe import read_recipe
from masters.distill.stages import distill
from masters.distill.train import Step, Trainer
from masters.errors import RunError

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "accelerate"
TOLERANCE = {"ddp": 1e-6, "fsdp2": 1e-5}  # of a loss, relative
RATE = 1e-4
STOPPED = 2  # updates that a run has seen when it is stopped


class Stopped(Exception):
    """In place of a kill, between two updates."""


@dataclass(frozen=True)
class Runs:
    """A folder of recipes, and the runs that one process made of them."""

    folder: Path
    recipes: dict[str, dict[str, Any]]


def recipes_of(models: Any, data: Path) -> dict[str, dict[str, Any]]:
    """The whole method; adapters on a cached signal; the student alone with its vision tower; the same in bfloat16."""
    train = {"dtype": "float32", "learning_rate": RATE, "schedule": "cosine", "questions_per_step": 4, "checkpoint_steps": STOPPED, "evaluate_batch": 8}
    common = {
        "student": str(models.student),
        "teachers": [{"model": str(models.teacher), "r_max": 0.3}],
        "data": {"train": str(data / "mixed.jsonl"), "validation": str(data / "validation.jsonl")},
        "answers": {"teacher": 2, "student": 2, "batch": 3, "max_tokens": 4},
        "mask": {"step": 0.3},
        "track": [],
    }
    alone = common | {"preset": "sft", "mask": {"enabled": False}, "answers": {}}
    return {
        "whole": common | {"train": train | {"accumulate": 2, "samples_every": 2, "samples": 3}},
        "adapters": common | {"teacher_signal": "cached", "lora": {"rank": 4, "keep_adapter": True}, "train": train | {"gradient_checkpointing": True}},
        "tower": alone | {"train": train | {"freeze_vision": False, "questions_per_step": 3}},
        "half": alone | {"train": train | {"dtype": "bfloat16", "learning_rate": 3e-3}},
    }


def written(folder: Path, name: str, recipe: dict[str, Any], out: Path) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe | {"out": str(out)}))
    return path


@pytest.fixture(scope="module")
def runs(models: Any, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "data"
    shutil.copytree(questions, data)
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()[:14]]
    (data / "mixed.jsonl").write_text("".join(json.dumps(row | ({} if i % 3 == 0 else {"images": []})) + "\n" for i, row in enumerate(rows)))
    recipes = recipes_of(models, data)
    for name, recipe in recipes.items():
        distill(read_recipe(written(folder, f"one-{name}", recipe, folder / "one" / name)))
    stop_early(written(folder, "one-stopped", recipes["whole"], folder / "stopped"))
    return Runs(folder, recipes)


def stop_early(recipe: Path) -> None:
    """Leave a run of one process after its first checkpoint."""
    original = Trainer.step

    def step(self: Trainer, step: Step, *arguments: Any) -> dict[str, float]:
        if step.number == STOPPED:
            raise Stopped
        return original(self, step, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(Stopped):
            distill(read_recipe(recipe))


def launch(config: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    command += ["--num_processes", "2", "--main_process_port", "0", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def strategy(request: pytest.FixtureRequest, runs: Runs) -> str:
    """The name of a way of working together, its runs done."""
    name = request.param
    # The stopped run's own folder, as it would be continued: its recipe tells where it stands.
    shutil.copytree(runs.folder / "stopped", runs.folder / name / "continued")
    # One after the other, a teacher in shares beside whole students, and a whole one beside a student in shares.
    runs.recipes["adapters"]["train"]["shard_teacher"] = name == "ddp"
    recipes = [written(runs.folder, f"{name}-{key}", recipe, runs.folder / name / key) for key, recipe in runs.recipes.items()]
    recipes.append(written(runs.folder, f"{name}-continued", runs.recipes["whole"], runs.folder / name / "continued"))
    claimed = runs.folder / name / "continued" / "recipe.yaml"
    claimed.write_text(claimed.read_text().replace(str(runs.folder / "stopped"), str(runs.folder / name / "continued")))
    done = launch(name, [str(Path(__file__).with_name("two_processes.py")), *map(str, recipes)])
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Warning: FSDP2" not in done.stderr
    return name


def steps(out: Path, kind: str = "step") -> list[dict[str, Any]]:
    return [row for line in (out / "metrics.jsonl").read_text().splitlines() if (row := json.loads(line))["kind"] == kind]


@pytest.mark.parametrize("name", ["whole", "adapters", "tower", "continued"])
def test_losses_are_those_of_one_process(runs: Runs, strategy: str, name: str):
    found, expected = steps(runs.folder / strategy / name), steps(runs.folder / "one" / name.replace("continued", "whole"))
    assert [row["questions"] for row in expected[:2]] == ([3, 3] if name == "tower" else [4, 3])
    assert len(found) == len(expected) >= 4
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ("loss", "loss_distill"):
            assert ours[key] == pytest.approx(theirs[key], rel=TOLERANCE[strategy], abs=1e-9), f"{key} of step {ours['step']}"
        for key in ours.keys() - {"kind", "seconds", "loss", "loss_distill"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), f"{key} of step {ours['step']}"
    assert len({row["loss"] for row in found}) == len(found)


def learned(weights: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """All but the biases of keys: they shift the scores of all keys alike, so that their gradient is rounding and nothing else."""
    found = [(key, weight) for key, weight in weights.items() if not key.endswith("k_proj.bias")]
    assert len(found) > 20
    return found


@pytest.mark.parametrize("name", ["whole", "adapters", "tower"])
def test_the_students_are_those_of_one_process(runs: Runs, strategy: str, name: str, models: Any):
    ours, theirs = (torch.load(runs.folder / who / name / "checkpoints" / "last.pt") for who in (strategy, "one"))
    assert ours["student"].keys() == theirs["student"].keys()
    kept = {} if name == "adapters" else load_file(models.student / "model.safetensors")
    for key, weight in learned(theirs["student"]):
        start = kept[key].float() if key in kept else torch.zeros_like(weight)
        # A gradient near 0 has a sign by rounding, and Adam a step of full size for it; of all that was learned that is little.
        noise = 1e-2 * RATE * weight.numel() ** 0.5
        assert float((ours["student"][key] - weight).norm()) <= 2e-3 * float((weight - start).norm()) + noise, key
        for moment, value in theirs["optimizer"][key].items():
            assert ours["optimizer"][key][moment].shape == value.shape, f"{moment} of {key} is whole"
            noise = {"exp_avg": 1e-9}.get(moment, 1e-14)
            assert float((ours["optimizer"][key][moment] - value).norm()) <= 1e-4 * float(value.norm()) + noise, f"{moment} of {key}"
    final, expected = (load_file(runs.folder / who / name / "student" / "model.safetensors") for who in (strategy, "one"))
    assert final.keys() == expected.keys() == load_file(models.student / "model.safetensors").keys()
    for key, weight in learned(expected):
        digit = 2**-8 * float(weight.float().abs().max()) + 1e-2 * RATE
        assert float((final[key].float() - weight.float()).abs().max()) <= digit, f"{key}, but for a digit of bfloat16"


def test_bfloat16_follows_one_process(runs: Runs, strategy: str):
    """Weights stay float32 in the shares; what is gathered and computed is rounded, elsewhere than in one process."""
    found, expected = (steps(runs.folder / who / "half") for who in (strategy, "one"))
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=0.02)
    assert abs(expected[-1]["loss"] - expected[0]["loss"]) > 0.1 * expected[0]["loss"], "something was learned"
    ours = torch.load(runs.folder / strategy / "half" / "checkpoints" / "last.pt")["student"]
    assert {weight.dtype for weight in ours.values()} == {torch.float32}
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in ours.values())


def test_the_answers_are_those_of_one_process(runs: Runs, strategy: str):
    names = [path.name for path in (runs.folder / "one" / "whole" / "responses").glob("*.parquet")]
    assert sorted(names) == ["student0.parquet", "teacher0-stage0.parquet", "teacher0-stage1.parquet"]
    for name in names:
        ours, theirs = (pq.read_table(runs.folder / who / "whole" / "responses" / name).to_pylist() for who in (strategy, "one"))
        assert len(theirs) == 28 if "student" in name else 14
        assert ours == theirs, name


def test_states_that_two_processes_kept_are_those_of_one(runs: Runs, strategy: str):
    ours, theirs = (runs.folder / who / "adapters" / "teacher" for who in (strategy, "one"))
    names = sorted(path.name for path in theirs.glob("*.safetensors"))
    assert names == ["teacher0-head.safetensors", "teacher0-stage0-0000000.safetensors", "teacher0-stage1-0000007.safetensors"]
    assert sorted(path.name for path in ours.iterdir()) == names
    for name in names:
        found, expected = (load_file(folder / name) for folder in (ours, theirs))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].shape == value.shape
            apart = float((found[key] - value).abs().max())
            assert apart <= (1e-5 if key == "states" else 0), (name, key, apart)


@pytest.mark.parametrize("name", ["whole", "adapters", "tower", "continued"])
def test_validation_is_that_of_one_process(runs: Runs, strategy: str, name: str):
    """Question by question, on weights that rounding alone has moved: an answer may differ where two tokens are all but equal."""
    ours, theirs = runs.folder / strategy / name, runs.folder / "one" / name.replace("continued", "whole")
    found, expected = steps(ours, "evaluation"), steps(theirs, "evaluation")
    assert len(expected) == (2 if name == "tower" else 3)
    assert [(row["step"], row["validation_accuracy"]) for row in found] == [(row["step"], row["validation_accuracy"]) for row in expected]
    files = sorted(path.name for path in (theirs / "validation").iterdir())
    assert len(files) == len(expected)
    for file in files:
        answers, wanted = (pq.read_table(out / "validation" / file).to_pylist() for out in (ours, theirs))
        assert [row["sample"] for row in answers] == [row["sample"] for row in wanted]
        same = sum(row == other for row, other in zip(answers, wanted, strict=True))
        assert same >= len(wanted) - (0 if file == "0000000.parquet" else 1), file


@pytest.mark.parametrize("name", ["whole", "continued"])
def test_tables_of_answers_are_those_of_one_process(runs: Runs, strategy: str, name: str):
    """But for the last digit of a figure that rounding has moved across its middle."""
    ours, theirs = runs.folder / strategy / name / "samples", runs.folder / "one" / "whole" / "samples"
    pages = sorted(path.name for path in theirs.iterdir())
    assert pages == [f"{step:07d}.html" for step in range(STOPPED, len(steps(theirs.parent)) + 1, STOPPED)]
    assert sorted(path.name for path in ours.iterdir()) == pages
    for page in pages:
        found, expected = (re.split(r"(-?\d+\.\d{3})\b", (folder / page).read_text()) for folder in (ours, theirs))
        assert len(expected) > 20, "figures of what responses are paid"
        assert found[::2] == expected[::2], page
        assert [float(value) for value in found[1::2]] == pytest.approx([float(value) for value in expected[1::2]], abs=2e-3), page


def test_one_process_alone_writes(runs: Runs, strategy: str):
    ours, theirs = ({path.relative_to(runs.folder / who) for path in (runs.folder / who / "adapters").rglob("*")} for who in (strategy, "one"))
    assert ours == theirs
    assert {Path("adapters/adapter/adapter_model.safetensors"), Path("adapters/teacher/teacher0-head.safetensors")} <= ours


def test_a_refusal_ends_all_processes_with_one_line(runs: Runs, tmp_path: Path):
    recipe = written(tmp_path, "other", runs.recipes["whole"] | {"seed": 7}, runs.folder / "one" / "whole")
    done = launch("ddp", ["-m", "masters.cli", "distill", str(recipe), "--dry-run"])
    assert done.returncode != 0
    assert done.stderr.count("was begun with another recipe") == 1, done.stderr[-3000:]


def test_every_family_agrees_with_one_process_while_the_other_has_no_picture(tmp_path: Path):
    """Gradients to a hundred-thousandth of the largest, and greedy answers token for token, in whole weights and in shares, the tower trained and not."""
    done = launch("fsdp2", [str(Path(__file__).with_name("two_process_families.py")), str(tmp_path / "found.json")])
    assert done.returncode == 0, done.stderr[-4000:]
    for families in (both := json.loads((tmp_path / "found.json").read_text())):
        assert set(families) == {"idefics3", "internvl", "llava_onevision", "qwen2_5_vl", "qwen3_vl"}
        for name, ways in families.items():
            assert set(ways) == {"ddp", "ddp with the tower", "fsdp2 with the tower"}
            assert ways["ddp"]["weights"] < ways["ddp with the tower"]["weights"]
            for way, found in ways.items():
                assert found["gradients"] < 1e-5, (name, way, found)
                assert found["answers"] == 0, (name, way)
                assert found["largest"] > 1
                assert found["weights"] > 20
    assert len(both) == 2


@pytest.mark.parametrize("name", ["one_gpu", "ddp", "fsdp2", "zero3"])
def test_accelerate_reads_the_example(name: str):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type.value == {"one_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[name]
    assert config.mixed_precision == "no", "the recipe decides"
    assert f"--config_file examples/accelerate/{name}.yaml" in (CONFIGS / f"{name}.yaml").read_text()


def zero_environment(*arguments: str) -> dict[str, str]:
    """What accelerate's launcher tells its processes of zero3.yaml."""
    config = str(CONFIGS / "zero3.yaml")
    parsed = launch_command_parser().parse_args(["--config_file", config, "--main_process_port", "0", *arguments, "script.py"])
    parsed, defaults, _ = _validate_launch_command(parsed)
    parsed.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return {key: value for key, value in prepare_deepspeed_cmd_env(parsed)[1].items() if key.startswith("ACCELERATE_")}


def test_zero_3_shares_weights_and_other_stages_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    assert sharding() is None, "nothing is configured"
    for key, value in zero_environment().items():
        monkeypatch.setenv(key, value)
    assert sharding() == Sharding(reshard=True, offload=False)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    assert sharding() == Sharding(offload=True)
    for key, value, complaint in (
        ("OFFLOAD_PARAM_DEVICE", "nvme", "expected none or cpu"),
        ("ZERO_STAGE", "2", "zero_stage 2; expected 3"),
        ("CONFIG_FILE", "ds.json", "deepspeed_config_file; expected zero_stage: 3"),
    ):
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{key}", value)
        with pytest.raises(RunError, match=complaint):
            sharding()


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [("FSDP_VERSION", "1", "FSDP version 1; expected fsdp_version: 2"), ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "expected false")],
)
def test_fsdp_settings_that_are_not_followed_are_refused(key: str, value: str, complaint: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    for name, given in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", key: value}.items():
        monkeypatch.setenv(name, given)
    with pytest.raises(RunError, match=complaint):
        sharding()


def test_every_layer_of_both_towers_is_a_block(tiny: Any):
    found = list(blocks(tiny))
    assert len(found) == tiny.config.text_config.num_hidden_layers + tiny.config.vision_config.num_hidden_layers
    assert own_rows(tiny.get_output_embeddings().weight) == slice(None), "one process holds all rows"
    assert parallel.STAND_IN.images
