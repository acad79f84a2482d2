"""`masters demo`: what a user does with large models, done with two tiny ones, through the same functions.

Data, four runs (SFT, plain KD, the paper's objective, the default), evaluation, bundles for two targets, checks, one table and report.html.
Every step leaves a whole file or folder, and a step whose result stands is not done again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ..distill import models
from ..distill.evaluate import greedy_answers, measure_latency, scores
from ..distill.inputs import Encoder
from ..distill.recipe import read_recipe
from ..distill.report import write_report
from ..distill.stages import distill
from ..errors import MastersError
from ..export import ExportConfig, export
from ..export.bundle import open_bundle
from ..files import read_json, write_json, write_text
from ..manifest import read_manifest
from ..page import Example, Table
from ..progress import say
from ..runtime import load
from ..runtime.check import CheckConfig, check
from ..runtime.report import table
from ..samples import Sample, read_samples
from .data import DemoSizes, build_data
from .results import NOTE, Scores, compare, row, summary

HERE = Path(__file__).parent
PRESETS = ("sft", "kd", "paper", "default")
BUNDLES = (("onnx", "fp32"), ("onnx", "int8"), ("onnx", "int4"), ("coreml", "fp16"), ("coreml", "int8"))
MAX_TOKENS = 8
COLUMNS = ("model", "parameters", "MB", "test", "ood", "first token, ms", "per token, ms")


@dataclass(frozen=True)
class DemoConfig:
    """Where the demo writes, and how much it asks."""

    out: Path
    fast: bool = False
    threads: int = 2

    @property
    def sizes(self) -> DemoSizes:
        return DemoSizes(train=640, validation=100, test=200, ood=60) if self.fast else DemoSizes()

    @property
    def checked(self) -> dict[str, int]:
        """Questions per split that a bundle of each target is checked on; the interpreter that stands in for Core ML is slow."""
        return {"onnx": 60, "coreml": 20} if self.fast else {"onnx": 2000, "coreml": 400}


def demo(config: DemoConfig) -> str:
    """Run the demo, or what is left of it; returns the table and the sentences that it ends with."""
    started = time.monotonic()
    if config.out.exists() and not config.out.is_dir():
        raise MastersError(f"{config.out} is a file; expected a folder to write the demo to, choose another --out")
    torch.set_num_threads(config.threads)
    files = build_data(config.out / "data", config.sizes)
    students = {preset: distill_preset(preset, config.out) for preset in PRESETS}
    folders = {"teacher": HERE / "teacher", "student": HERE / "student", **students}
    samples = {split: read_samples(files[split]) for split in ("test", "ood")}
    found = {name: _kept(config.out / "scores" / f"{name}.json", _evaluator(folder, samples)) for name, folder in folders.items()}
    rows = [row(name, folders[name], Scores(**values)) for name, values in found.items()]
    rows += [_bundle_row(target, precision, students["default"], files, config) for target, precision in BUNDLES]
    sentences = compare({name: Scores(**values).test for name, values in found.items()}, PRESETS)
    text = summary(table(COLUMNS, rows), sentences, config.threads)
    runs = {preset: config.out / "runs" / preset for preset in PRESETS}
    write_report(
        config.out / "report.html",
        "masters demo",
        runs,
        [Table("Models and bundles", COLUMNS, tuple(rows), NOTE)],
        sentences,
        _examples(samples["test"], found),
    )
    write_text(config.out / "summary.txt", text + "\n")
    say(f"done in {time.monotonic() - started:.0f} s; report: {config.out / 'report.html'}")
    return text


def distill_preset(preset: str, out: Path) -> Path:
    """Train the demo's student with one preset, by a recipe that `masters distill` can run too; returns the student's folder."""
    path = out / "recipes" / f"{preset}.yaml"
    raw = yaml.safe_load((HERE / "recipe.yaml").read_text(encoding="utf-8"))
    raw |= {"preset": preset, "student": str(HERE / "student"), "out": f"../runs/{preset}"}
    raw["teachers"][0]["model"] = str(HERE / "teacher")
    raw["data"] = {split: f"../{name}" for split, name in raw["data"].items()}
    if preset in ("paper", "default"):
        raw["buffer"] = "../responses"  # both learn from the same answers
    if not path.exists():
        write_text(path, yaml.safe_dump(raw, sort_keys=False))
    return distill(read_recipe(path)) / "student"


def _kept(path: Path, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON at `path`, made and written first where it is missing."""
    if not path.exists():
        write_json(path, make())
    found: dict[str, Any] = read_json(path)
    return found


def _evaluator(folder: Path, samples: Mapping[str, Sequence[Sample]]) -> Callable[[], Mapping[str, Any]]:
    def evaluate() -> Mapping[str, Any]:
        model, encoder = models.frozen(models.load_model(folder, torch.float32)), Encoder(models.load_processor(folder))
        answers = {split: greedy_answers(model, encoder, asked, MAX_TOKENS, label=f"{folder.name} on {split}") for split, asked in samples.items()}
        first, token = measure_latency(model, encoder, samples["test"][:20], MAX_TOKENS)
        return asdict(
            Scores(
                parameters=model.num_parameters(),
                test=scores(samples["test"], answers["test"]),
                ood=scores(samples["ood"], answers["ood"]),
                texts={sample.id: answer.text for sample, answer in zip(samples["test"], answers["test"], strict=True)},
                first_token_ms=first,
                per_token_ms=token,
            )
        )

    return evaluate


def _bundle_row(target: str, precision: str, student: Path, files: Mapping[str, Path], config: DemoConfig) -> tuple[str, ...]:
    """Export one bundle, check it on both splits, and describe it."""
    name = f"{target}-{precision}"
    bundle = config.out / "bundles" / name
    if not bundle.exists():
        say(f"exporting {name}")
        export(ExportConfig(student, target, bundle, precision))

    def checked(split: str) -> Callable[[], Mapping[str, Any]]:
        def run() -> Mapping[str, Any]:
            vlm = load(bundle, threads=config.threads) if target == "onnx" else open_bundle(bundle)
            wanted = CheckConfig(bundle, files[split], limit=config.checked[target], max_tokens=MAX_TOKENS, min_seconds=1.0, cold_starts=0, sustained_seconds=0)
            return json.loads(json.dumps(check(wanted, vlm).to_json()))

        return run

    reports = {split: _kept(config.out / "checks" / f"{name}-{split}.json", checked(split)) for split in ("test", "ood")}
    return row(f"default, {name}", bundle, Scores.of_reports(reports, read_manifest(bundle).parameters, interpreted=target == "coreml"))


def _examples(samples: Sequence[Sample], found: Mapping[str, Mapping[str, Any]], count: int = 24) -> list[Example]:
    """Questions for the gallery: first those on which teacher, untouched and distilled student part, then others."""
    shown = ("teacher", "student", "default")
    place = {sample.id: i for i, sample in enumerate(samples)}

    def verdicts(sample: Sample) -> list[bool]:
        return [found[name]["test"][place[sample.id]] >= 0.5 for name in shown]

    ordered = sorted(samples, key=lambda sample: (len(set(verdicts(sample))) == 1, place[sample.id]))[:count]
    return [
        Example(s.images[0], s.prompt, s.answers[0], {name: (found[name]["texts"][s.id], right) for name, right in zip(shown, verdicts(s), strict=True)})
        for s in ordered
    ]
