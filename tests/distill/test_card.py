"""The model card, read by Hugging Face's own parser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from masters.bootstrap import Interval
from masters.distill.card import hub_name, model_card
from masters.distill.recipe import Recipe, build_recipe
from masters.distill.skipped import Skipped, write_skipped
from masters.distill.validation import Measured

FOUND = Measured(Interval(0.5, 0.46, 0.54, 900), Interval(0.61, 0.57, 0.65, 900), Interval(0.11, 0.08, 0.14, 900), 1500)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    student = tmp_path / "hub" / "models--Qwen--Qwen3-VL-2B-Instruct" / "snapshots" / "abc"
    student.mkdir(parents=True)
    (student / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, zh]\npipeline_tag: text-generation\n---\n# Base\n")
    raw: dict[str, Any] = {
        "student": str(student),
        "teachers": [{"model": str(tmp_path / "teacher-8b")}, {"model": str(tmp_path / "teacher-38b"), "r_max": 0.4}],
        "data": {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "chart questions.jsonl")},
        "out": str(tmp_path / "tiny: student"),
        "train": {"keep": "best"},
    }
    found = build_recipe(raw)
    stages = [
        {"teacher": str(tmp_path / "teacher-8b"), "ratio": 0.2, "questions": 500, "steps": 16},
        {"teacher": str(tmp_path / "teacher-38b"), "ratio": 0.0, "questions": 470, "steps": 15},
    ]
    found.out.mkdir()
    (found.out / "plan.json").write_text(json.dumps({"stages": stages, "validation": 900}))
    write_skipped(found.out / "skipped.jsonl", [Skipped("train", str(i), "missing image" if i < 20 else "too long", "") for i in range(30)])
    return found


def card(recipe: Recipe) -> ModelCard:
    return ModelCard(model_card(recipe, "qwen3_vl", FOUND))


def test_hugging_face_reads_the_metadata(recipe: Recipe):
    data: Any = card(recipe).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("Qwen/Qwen3-VL-2B-Instruct", "transformers", "image-text-to-text")
    assert (data.license, data.language) == ("apache-2.0", ["en", "zh"]), "inherited from the untouched student"
    assert {"masters", "knowledge-distillation", "qwen3_vl"} <= set(data.tags)
    [result] = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.61, "chart questions.jsonl")
    assert data.model_name == "tiny: student"


def test_a_base_without_a_card_gives_no_licence(recipe: Recipe):
    path = recipe.student / "README.md"
    for text in ("# no metadata", "---\n[\n---\n", "---\njust text\n---\n", None):
        path.unlink() if text is None else path.write_text(text)
        data: Any = card(recipe).data
        assert data.license is None


def test_the_text_tells_what_was_done_and_measured(recipe: Recipe):
    text = card(recipe).text
    assert "| after | 0.610 | 0.570 to 0.650 |" in text
    assert "| change, question by question | +0.110 | +0.080 to +0.140 |" in text
    assert "| `teacher-38b` | 0 | 470 | 15 |" in text
    assert "| train | `train.jsonl` | 970 | 30 (missing image 20, too long 10) |" in text
    assert "| validation | `chart questions.jsonl` | 900 | 0 |" in text
    assert "chosen by accuracy on the very questions that are reported" in text
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["objective"]["divergence"] == "forward_kl"
    assert settings["train"]["keep"] == "best"


def test_no_path_of_this_machine_is_published(recipe: Recipe, tmp_path: Path):
    assert str(tmp_path) not in card(recipe).content


def test_names_of_repositories(tmp_path: Path):
    assert hub_name(tmp_path / "models--org--a--b" / "snapshots" / "123") == "org/a--b"
    assert hub_name(tmp_path / "plain-folder") == "plain-folder"
