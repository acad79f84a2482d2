"""Writing a bundle under a budget: the search's plan is written and proven, and written again a little finer or coarser where the whole breaks the budget."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from ..manifest import NAME, Manifest, stored_bytes, write_manifest
from ..progress import say
from . import ExportConfig, auto
from .auto import Budget, Search
from .bundle import COPIED, write_whole
from .calibration import ask
from .precision import Precision, Storage
from .source import Source, load_source


def write_within(config: ExportConfig, precision: Precision, folder: Path) -> Manifest:
    """The bundle of `config` in `folder`, its weights stored as its budget allows; the manifest, whose checks hold the table that decided.

    Raises MastersError for a budget that can't be kept.
    """
    budget = Budget(config.max_bytes, config.max_kl)
    source = load_source(config.student)
    data = config.calibrate or config.data
    assert data is not None
    questions = ask(source, data)
    method = "rtn" if precision.method == "gptq" else precision.method
    paths = auto.search(source, questions, Storage("int4", method=method, accuracy_level=precision.accuracy_level))
    following: tuple[Search, int] | None = auto.begin(paths, source, questions, budget, _overhead(source, paths[0]))
    while following is not None:
        found, place = following
        _empty(folder)
        manifest, vlm = write_whole(source, config, auto.with_plan(precision, found.plan(place)), folder, questions)
        measured = auto.bundle_divergence(vlm, questions)
        manifest = replace(manifest, checks=[*manifest.checks, auto.report(found, place, budget, 0, measured, len(questions))])
        manifest, size = _with_size(manifest, folder)
        following = auto.next_place(paths, found, place, budget, size, measured)
        if following is not None:
            say(f"{size:,} bytes, KL {measured:.3g}: outside the budget, trying again")
            source = load_source(config.student)  # the proof changed it
    return manifest


def _overhead(source: Source, found: Search) -> int:
    """Bytes that a bundle has at least beside its products: what is copied, and all other weights in float32."""
    copied = sum((source.folder / name).stat().st_size for name in COPIED if (source.folder / name).is_file())
    products = {choice.product for choice in found.choices}
    weights = {weight.data_ptr(): weight.numel() for weight in source.model.parameters()}
    for product in products:
        for layer in product.layers:
            weights.pop(layer.weight.data_ptr(), None)
    return copied + 4 * sum(weights.values())


def _with_size(manifest: Manifest, folder: Path) -> tuple[Manifest, int]:
    """The manifest whose last check names the bundle's bytes, masters.json itself included; its length depends on the number's digits alone."""
    rest = stored_bytes(manifest.files)
    size = rest
    for _ in range(3):
        manifest = replace(manifest, checks=[*manifest.checks[:-1], manifest.checks[-1] | {"bytes": size}])
        write_manifest(folder, manifest)
        size = rest + (folder / NAME).stat().st_size
    return manifest, size


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
