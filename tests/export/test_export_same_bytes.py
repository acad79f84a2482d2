"""The same input gives the same files: all families and precisions again in another process, with other hash seeds and another count of threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from masters.export.source import Source
from masters.files import sha256_file
from masters.manifest import read_manifest

PRECISIONS = ("fp32", "fp16", "int8", "int4")
TILED, QWEN = ("smolvlm", "internvl", "llava_onevision"), ("qwen2_5_vl", "qwen3_vl")
AGAIN = """
import hashlib, json, sys
from pathlib import Path
import onnx_ir as ir, torch
from masters.export import onnx_target
from masters.export.precision import parse_precision
from masters.export.products import is_tied
from masters.export.source import load_source

torch.set_num_threads(1)
build = onnx_target.build_vision
for name, folder, vision, out in json.loads(sys.argv[1]):
    source = load_source(Path(folder))
    for precision in ("fp32", "fp16", "int8", "int4"):
        # As the bundles here were made: what is quantised starts from the graph of fp32.
        started = vision is not None and precision in ("int8", "int4")
        onnx_target.build_vision = (lambda *_: ir.load(vision)) if started else build
        place = Path(out) / name / precision
        place.mkdir(parents=True)
        tied = is_tied(*source.family.text_parts(source.model))
        onnx_target.write_parts(source.model, source.processor, place, parse_precision(precision, 64, 4).of_model(tied))
"""


@pytest.fixture(scope="module")
def bundles(
    lively_source: Source,
    bundle_of: Callable[[str], Path],
    family_source: Callable[[str], Source],
    family_bundle: Callable[[str, str], Path],
    qwen_source: Callable[[str], Source],
    qwen_bundle: Callable[[str, str], Path],
) -> dict[str, tuple[Path, dict[str, Path]]]:
    """family -> the model's folder and its bundles by precision."""
    found = {"idefics3": (lively_source.folder, {precision: bundle_of(precision) for precision in PRECISIONS})}
    for name in TILED:
        found[name] = (family_source(name).folder, {precision: family_bundle(name, precision) for precision in PRECISIONS})
    for name in QWEN:
        found[name] = (qwen_source(name).folder, {precision: qwen_bundle(name, precision) for precision in PRECISIONS})
    return found


def test_graphs_of_every_family_and_precision(bundles: dict[str, tuple[Path, dict[str, Path]]], tmp_path: Path) -> None:
    asked = []
    for name, (folder, exported) in bundles.items():
        vision = None if name in QWEN else str(exported["fp32"] / "onnx" / "vision_encoder.onnx")
        asked.append((name, str(folder), vision, str(tmp_path)))
    environment = os.environ | {"PYTHONHASHSEED": "20220", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", AGAIN, json.dumps(asked)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    compared = 0
    for name, (_, exported) in bundles.items():
        for precision, bundle in exported.items():
            again = tmp_path / name / precision
            files = read_manifest(bundle).files
            for file in sorted(path for path in again.rglob("*") if path.is_file()):
                relative = file.relative_to(again).as_posix()
                assert sha256_file(file) == files[relative].sha256, f"{name}, {precision}: {relative} has other bytes"
                compared += 1
            assert {relative for relative in files if relative.startswith("onnx/")} == {path.relative_to(again).as_posix() for path in again.glob("onnx/*")}
    assert compared >= 6 * 4 * 3


def test_a_whole_bundle(bundles: dict[str, tuple[Path, dict[str, Path]]], tmp_path: Path) -> None:
    """Everything, golden tensors and measured parity too, by the command itself."""
    folder, exported = bundles["qwen2_5_vl"]
    command = [sys.executable, "-m", "masters.cli", "export", str(folder), "--target", "onnx", "--precision", "int4", "--out", str(tmp_path / "again")]
    done = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = read_manifest(tmp_path / "again").files, read_manifest(exported["int4"]).files
    assert {name for name in theirs if ours.get(name) != theirs[name]} == set()
    assert ours.keys() == theirs.keys()
