"""Loading: verification, the golden self-test, providers, and what importing the runtime brings along."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from torch_reference import picture

import masters.runtime
from masters.errors import BundleError
from masters.export import ExportConfig, export
from masters.manifest import list_files, read_manifest, write_manifest
from masters.runtime import Vlm, load
from masters.runtime.golden import compare, self_test
from masters.runtime.graphs import OnnxParts
from masters.runtime.providers import PROVIDERS


def test_a_bundle_loads_and_passes_its_own_test(bundle: Path) -> None:
    vlm = load(bundle, threads=1)
    assert (vlm.parts.threads, vlm.parts.provider) == (1, "cpu")
    assert vlm.manifest.golden
    stages = {comparison.stage: comparison for comparison in self_test(vlm, bundle / vlm.manifest.golden)}
    assert list(stages) == ["pixel_values", "image_features", "logits", "tokens"]
    assert stages["pixel_values"].difference <= 1e-5


def changed(bundle: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the bundle with other golden tensors, its hashes right."""
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = read_manifest(folder)
    assert manifest.golden
    with np.load(folder / manifest.golden) as stored:
        arrays = dict(stored)
    change(arrays)
    np.savez(folder / manifest.golden, **arrays)
    write_manifest(folder, dataclasses.replace(manifest, files=list_files(folder)))
    return folder


def other_token(arrays: dict[str, Any]) -> None:
    arrays["tokens"] = (arrays["tokens"] + 1) % 400


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        (lambda a: a.update(pixel_values=a["pixel_values"] + np.float32(0.01)), "at pixel_values"),
        (lambda a: a.update(image_features=a["image_features"] * np.float32(1.5)), "at image_features"),
        (lambda a: a.update(image_features=a["image_features"][..., :-1]), "at image_features: it is inf"),
        (lambda a: a.update(logits=a["logits"][::-1]), "at logits"),
        (other_token, "at tokens"),
        (lambda a: a.update(question=np.array("what else?")), "at logits"),
        (lambda a: a.pop("logits"), "lacks 'logits'"),
    ],
)
def test_the_self_test_names_the_stage_that_is_off(change: Callable[[dict[str, Any]], None], stage: str, bundle: Path, tmp_path: Path) -> None:
    folder = changed(bundle, tmp_path, change)
    with pytest.raises(BundleError, match=stage):
        load(folder, threads=1)
    # Deferred, by name only, and made up for.
    deferred = load(folder, threads=1, test=False)
    assert deferred.answer("hi", max_tokens=1).token_ids
    with pytest.raises(BundleError, match=stage):
        deferred.verify()


@pytest.mark.parametrize("part", ["vision_encoder", "embed_tokens", "decoder_model_merged"])
def test_right_hashes_of_wrong_weights_are_found(part: str, bundle: Path, tmp_path: Path) -> None:
    """Who replaces a file can write its hash too; what the model computes gives the weights away."""
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    path = folder / "onnx" / f"{part}.onnx"
    model = onnx.load(path)
    largest = max((tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT), key=lambda tensor: len(tensor.raw_data))
    largest.raw_data = (1.3 * np.frombuffer(largest.raw_data, np.float32)).astype(np.float32).tobytes()
    onnx.save(model, path)
    write_manifest(folder, dataclasses.replace(read_manifest(folder), files=list_files(folder)))
    with pytest.raises(BundleError, match="self-test"):
        load(folder, threads=1)


def test_differences_that_are_no_number_fail() -> None:
    assert compare("x", np.array([np.nan]), np.array([0.0]), 1.0).difference == np.inf
    assert compare("x", np.array([1.5, 0.0]), np.array([[1.0], [0.0]]), 1.0).difference == 0.5


def test_a_changed_byte_is_found(bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    graph = folder / read_manifest(folder).parts["decoder"].file
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(BundleError, match=f"{graph.name} was changed since its export"):
        load(folder)


def test_a_truncated_graph_is_refused_even_unverified(bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    graph = folder / read_manifest(folder).parts["vision_encoder"].file
    graph.write_bytes(graph.read_bytes()[: graph.stat().st_size // 2])
    with pytest.raises(BundleError, match="onnxruntime could not open") as caught:
        load(folder, verify=False, test=False)
    assert "\n" not in str(caught.value)
    with pytest.raises(BundleError, match=f"{graph.name} was changed since its export"):
        load(folder)  # both go wrong: told is the reason


def test_nothing_is_deferred_silently(bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(bundle, threads=1).unverified == ()
    assert caplog.records == []
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    vlm = load(folder, threads=1, verify=False)
    assert vlm.unverified == ("comparing its files with their hashes",)
    assert load(folder, threads=1, verify=False, test=False).unverified == ("comparing its files with their hashes", "its self-test")
    assert ["opened without comparing" in record.message for record in caplog.records] == [True, True]
    with pytest.raises(BundleError, match="was changed since its export"):
        vlm.verify()
    assert vlm.unverified, "it failed: it is still to be done"
    late = load(bundle, threads=1, verify=False, test=False)
    late.verify()
    assert late.unverified == ()


def test_a_provider_that_is_not_here_is_refused(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BundleError, match=r"'cuda' is not in this onnxruntime; here are: .*cpu"):
        load(bundle, provider="cuda")
    with pytest.raises(BundleError, match=r"'directml' is not in this onnxruntime"):
        load(bundle, provider="dml")
    with pytest.raises(BundleError, match=r"'warp' is not known; expected one of cpu, .*webgpu, xnnpack"):
        load(bundle, provider="warp", fallback=True)
    assert load(bundle, provider="cuda", threads=1, fallback=True).parts.provider == "cpu"
    assert "'cuda' is not in this onnxruntime; everything runs on the CPU" in caplog.text


def test_what_really_runs_is_reported(vlm: Vlm) -> None:
    """Node by node, as the sessions tell."""
    assert isinstance(vlm.parts, OnnxParts)
    assert list(vlm.parts.placement) == ["vision_encoder", "embed_tokens", "decoder"]
    assert all(list(found) == ["cpu"] and found["cpu"] >= 1 for found in vlm.parts.placement.values())
    assert vlm.parts.placement["decoder"]["cpu"] > 20


def test_a_silent_fallback_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A provider that is here, is accepted, and runs no node of ours: Azure's, for calls to its servers."""
    import onnxruntime

    if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime lacks the provider of Azure, which other builds have")
    monkeypatch.setitem(PROVIDERS, "azure", "AzureExecutionProvider")
    with pytest.raises(BundleError, match=r"'azure' was asked for and onnx/vision_encoder\.onnx runs on cpu"):
        load(bundle, provider="azure", threads=1)
    assert load(bundle, provider="azure", threads=1, fallback=True).parts.provider == "cpu"
    assert "runs on cpu, as was allowed" in caplog.text


def test_a_provider_that_is_plugged_in(bundle: Path, vlm: Vlm) -> None:
    """OpenVINO beside the ordinary onnxruntime: the nodes are its, and so are the golden tensors and the answer."""
    pytest.importorskip("onnxruntime_ep_openvino", reason="the package onnxruntime-ep-openvino is not installed")
    plugged = load(bundle, provider="openvino", threads=1)
    assert plugged.parts.provider == "openvino"
    assert isinstance(plugged.parts, OnnxParts)
    for part in ("vision_encoder", "decoder"):
        assert plugged.parts.placement[part]["openvino"] > plugged.parts.placement[part].get("cpu", 0)
    assert plugged.answer("what colour is it?", [picture(3)], max_tokens=8).token_ids == vlm.answer("what colour is it?", [picture(3)], max_tokens=8).token_ids


def test_a_provider_for_each_graph(lively_vlm: Path, tmp_path: Path) -> None:
    """The tower on OpenVINO in bfloat16, which is not the same numbers, and the rest on the CPU."""
    pytest.importorskip("onnxruntime_ep_openvino", reason="the package onnxruntime-ep-openvino is not installed")
    bundle = tmp_path / "bundle"
    export(ExportConfig(lively_vlm, "onnx", bundle, "vision=fp16", allow_mismatch=True))
    vlm, mixed = load(bundle, threads=1), load(bundle, provider="vision=openvino-bf16, decoder=cpu", threads=1)
    assert isinstance(mixed.parts, OnnxParts)
    assert mixed.parts.provider == "vision=openvino-bf16,embed=cpu,decoder=cpu"
    assert [max(found, key=lambda name: found[name]) for found in mixed.parts.placement.values()] == ["openvino-bf16", "cpu", "cpu"]
    assert load(bundle, provider=mixed.parts.provider, threads=1).parts.provider == mixed.parts.provider
    pixels = vlm.see([picture(3)])[0]
    exact, rounded = vlm.encode(pixels), mixed.encode(pixels)
    assert rounded == pytest.approx(exact, abs=0.1 * float(np.abs(exact).max()))
    with pytest.raises(BundleError, match="names 'tower'; expected one provider for all, or vision=…, embed=…, decoder=… separated by commas"):
        load(bundle, provider="tower=cpu")
    with pytest.raises(BundleError, match="'warp' is not known"):
        load(bundle, provider="vision=warp")


def test_weights_are_mapped_into_memory(bundle: Path, tmp_path: Path) -> None:
    """Weights beside their graph stay in their file: the process holds pages of it, unchanged, rather than a copy."""
    smaps = Path("/proc/self/smaps")
    if not smaps.is_file():
        pytest.skip("this system has no /proc/self/smaps")
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    for graph in (folder / "onnx").glob("*.onnx"):
        onnx.save(onnx.load(graph), graph, save_as_external_data=True, location=f"{graph.name}_data", size_threshold=1024)
    vlm = load(folder, threads=1, verify=False)
    found = re.findall(rf"{re.escape(str(folder))}/onnx/(\S+)\nSize: +(\d+) kB[^/]*?Anonymous: +(\d+) kB", smaps.read_text())
    assert {name for name, _, _ in found} == {f"{graph.name}_data" for graph in (folder / "onnx").glob("*.onnx")}
    table = next(int(size) for name, size, _ in found if name == "embed_tokens.onnx_data")
    assert table == pytest.approx((folder / "onnx" / "embed_tokens.onnx_data").stat().st_size / 1024, abs=8)
    assert sum(int(copied) for _, _, copied in found) == 0
    assert vlm.answer("hi", max_tokens=1).token_ids


def test_other_folders_are_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no masters\.json in"):
        load(tmp_path)
    with pytest.raises(BundleError, match="threads is 0"):
        load(bundle, threads=0)
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    write_manifest(folder, dataclasses.replace(read_manifest(folder), target="coreml"))
    with pytest.raises(BundleError, match="made for 'coreml', this runtime runs 'onnx'"):
        load(folder)


def test_a_graph_of_another_layout_is_refused(bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = read_manifest(folder)
    write_manifest(folder, dataclasses.replace(manifest, parts={**manifest.parts, "decoder": manifest.parts["embed_tokens"]}))
    with pytest.raises(BundleError, match="lacks the input 'attention_mask'"):
        load(folder, verify=False, test=False)


BLOCKED = """
import sys
for name in ("torch", "transformers", "onnx", "coremltools", "safetensors", "torchvision", "huggingface_hub"):
    sys.modules[name] = None  # importing it raises ImportError
from masters.runtime import load
vlm = load(sys.argv[1], threads=1)
print(vlm.answer("what colour is it?", [sys.argv[2]], max_tokens=8).token_ids)
"""


def test_the_runtime_needs_no_training_library(bundle: Path, vlm: Vlm, tmp_path: Path) -> None:
    picture(3).save(tmp_path / "picture.png")
    run = subprocess.run([sys.executable, "-c", BLOCKED, str(bundle), str(tmp_path / "picture.png")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(vlm.answer("what colour is it?", [picture(3)], max_tokens=8).token_ids)


def test_what_importing_brings() -> None:
    """The package alone is the standard library's and ours; numpy and the libraries come while `load` opens graphs, and nothing heavier ever."""
    code = (
        "import sys, json; before = set(sys.modules); {}; brought = set(sys.modules) - before; "
        "print(json.dumps(sorted({{name.partition('.')[0] for name in brought}} - set(sys.stdlib_module_names))))"
    )
    brought = [
        set(json.loads(subprocess.run([sys.executable, "-c", code.format(line)], capture_output=True, text=True, check=True).stdout))
        for line in ("import masters.runtime", "from masters.runtime import Answer, Chat, Parts, Stream, Timings, Vlm, load")
    ]
    assert brought[0] == {"masters"}
    assert brought[1] >= {"masters", "numpy", "tokenizers", "PIL", "jinja2"}
    assert not brought[1] & {"torch", "transformers", "onnx", "coremltools", "click", "accelerate", "onnxruntime"}
    with pytest.raises(AttributeError, match=r"'masters\.runtime' has no attribute 'Vln'"):
        masters.runtime.Vln  # noqa: B018


def test_the_guides_examples_run(bundle: Path, tmp_path: Path) -> None:
    """docs/runtime.md, from its first example to its last, as one program."""
    guide = (Path(__file__).parents[2] / "docs" / "runtime.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    assert len(examples) > 8
    (tmp_path / "bundle").symlink_to(bundle)
    picture(3).save(tmp_path / "street.png")
    run = subprocess.run([sys.executable, "-c", "\n".join(examples)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "cancelled" in run.stdout
    assert "was opened without comparing its files with their hashes and its self-test" in run.stderr
