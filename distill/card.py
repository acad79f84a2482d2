"""student/README.md: a model card that Hugging Face reads: where the student comes from, how it was made, what was measured, what that does not say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..files import read_json
from .recipe import Recipe, recipe_values
from .skipped import SKIPPED, Skipped, counted, read_skipped
from .validation import Measured

SETTINGS = ("preset", "answers", "mask", "objective", "train", "lora", "longest", "seed")  # of the recipe, in the card
# What of a recipe says nothing that anyone else could use: places, and addresses of servers.
LOCAL = {"endpoint", "vllm", "processes", "out", "buffer", "machine", "track", "project"}


def portable_values(recipe: Recipe) -> dict[str, Any]:
    """A recipe's plain values as a student carries them: models and files by their names alone, nothing of the machine that trained it."""

    def kept(values: dict[str, Any]) -> dict[str, Any]:
        return {key: kept(value) if isinstance(value, dict) else value for key, value in values.items() if key not in LOCAL}

    return kept(recipe_values(recipe, hub_name))


def model_card(recipe: Recipe, model_type: str, found: Measured) -> str:
    """The card's text."""
    values, name, base = portable_values(recipe), recipe.out.name, hub_name(recipe.student)
    head = yaml.safe_dump(_metadata(recipe, name, base, model_type, found), sort_keys=False, allow_unicode=True)
    teachers = ", then ".join(f"`{hub_name(teacher.model)}`" for teacher in recipe.teachers)
    return "\n".join(
        [
            f"---\n{head}---\n\n# {name}\n",
            f"`{base}`, distilled from {teachers} by masters, preset `{recipe.preset}`.\n",
            *_measurements(recipe, found),
            *_training(recipe),
            *_data(recipe),
            "## Recipe\n",
            f"```yaml\n{yaml.safe_dump({key: values[key] for key in SETTINGS if values.get(key) is not None}, sort_keys=False)}```\n",
            *_limits(recipe, found),
        ]
    )


def hub_name(folder: Path) -> str:
    """The repository that a folder of Hugging Face's cache holds (`models--Qwen--Qwen3-VL-2B/snapshots/…`), or the folder's name."""
    for part in folder.resolve().parts:
        if match := re.fullmatch(r"models--(.+?)--(.+)", part):
            return f"{match[1]}/{match[2]}"
    return folder.resolve().name


def _metadata(recipe: Recipe, name: str, base: str, model_type: str, found: Measured) -> dict[str, Any]:
    metric = {"type": "accuracy", "name": "Accuracy", "value": round(found.after.mean, 4)}
    dataset = {"name": recipe.data.validation.name, "type": recipe.data.validation.stem}
    result = {"task": {"type": "image-text-to-text", "name": "Questions about images"}, "dataset": dataset, "metrics": [metric]}
    licence = _base_metadata(recipe.student)
    return {
        **licence,
        "base_model": base,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["masters", "knowledge-distillation", "vision-language-model", model_type],
        "metrics": ["accuracy"],
        "model-index": [{"name": name, "results": [result]}],
    }


def _base_metadata(folder: Path) -> dict[str, Any]:
    """Licence and languages as the untouched student's own card states them: a derived model inherits both."""
    path = folder / "README.md"
    match = re.match(r"---\r?\n(.*?)\r?\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL) if path.is_file() else None
    try:
        stated = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    wanted = ("license", "license_name", "license_link", "language")
    return {key: stated[key] for key in wanted if key in stated} if isinstance(stated, dict) else {}


def _measurements(recipe: Recipe, found: Measured) -> list[str]:
    kept = f"the {recipe.train.keep} weights, after {found.updates:,} updates"
    level = f"{found.after.level:.0%}"
    return [
        "## Measured\n",
        f"Greedy answers to {found.after.count:,} validation questions (`{recipe.data.validation.name}`), each scored by its own metric; {kept}.\n",
        f"| | accuracy | {level} interval |\n|---|---|---|",
        f"| before | {found.before.mean:.3f} | {found.before.low:.3f} to {found.before.high:.3f} |",
        f"| after | {found.after.mean:.3f} | {found.after.low:.3f} to {found.after.high:.3f} |",
        f"| change, question by question | {found.change.mean:+.3f} | {found.change.low:+.3f} to {found.change.high:+.3f} |\n",
    ]


def _training(recipe: Recipe) -> list[str]:
    stages = read_json(recipe.out / "plan.json")["stages"]
    rows = [f"| `{hub_name(Path(stage['teacher']))}` | {stage['ratio']:g} | {stage['questions']:,} | {stage['steps']:,} |" for stage in stages]
    return ["## Teachers\n", "| teacher | share of weights masked | questions | updates |\n|---|---|---|---|", *rows, ""]


def _data(recipe: Recipe) -> list[str]:
    plan, skipped = read_json(recipe.out / "plan.json"), read_skipped(recipe.out / SKIPPED)
    used = {"train": sum(stage["questions"] for stage in plan["stages"]), "validation": plan["validation"]}
    files = {"train": recipe.data.train, "validation": recipe.data.validation}
    rows = [f"| {name} | `{files[name].name}` | {used[name]:,} | {_left_out([row for row in skipped if row.file == name])} |" for name in files]
    return ["## Data\n", "| | file | questions used | skipped |\n|---|---|---|---|", *rows, ""]


def _left_out(skipped: Sequence[Skipped]) -> str:
    return f"{len(skipped):,} ({counted(skipped)})" if skipped else "0"


def _limits(recipe: Recipe, found: Measured) -> list[str]:
    said = [
        f"The intervals are over the {found.after.count:,} questions, of one training run: another seed may differ by more.",
        "Answers were scored by rules (exact, numeric, choice, ANLS, contains), which take a right answer in other words for a wrong one.",
        f"Questions unlike those of `{recipe.data.validation.name}` were not asked; nothing was measured on safety, bias or languages.",
        f"Training computed in {recipe.train.dtype}, the weights here are bfloat16.",
        "What the untouched student and its teachers must not be used for, this model must not either.",
    ]
    if recipe.train.keep == "best":
        said.append("The weights were chosen by accuracy on the very questions that are reported, which flatters them.")
    return ["## Limits\n", *(f"- {line}" for line in said), ""]
