"""What ONNX Runtime's mobile tools say of a bundle's graphs, beside the tools run by themselves; graphs that mobile builds would refuse."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from vision_once import reuse_vision

from masters.errors import BundleError
from masters.export import ExportConfig, export
from masters.export.mobile import OPSETS, check_mobile, check_versions
from masters.manifest import read_manifest

Bundles = Callable[[str], Path]


@pytest.fixture(scope="module")
def bundle(lively_vlm: Path, bundle_of: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mobile") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        reuse_vision(patch, bundle_of("fp32"))
        export(ExportConfig(lively_vlm, "onnx", out, "decoder=int4,embed=int4", mobile=True))
    return out


def said(file: Path) -> dict[str, tuple[int, int, int]]:
    """Partitions, supported nodes and all nodes as the checker prints them, first with free axes and then with fixed ones."""
    code = "import logging, pathlib, sys; logging.basicConfig(level=logging.INFO); from onnxruntime.tools.mobile_helpers.usability_checker import analyze_model"
    code += "; analyze_model(pathlib.Path(sys.argv[1]), skip_optimize=True)"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    rows = re.findall(r"(\d+) partitions with a total of (\d+)/(\d+) nodes can be handled by the (\w+(?: \w+)?) EP", done.stderr + done.stdout)
    found: dict[str, tuple[int, int, int]] = {}
    for partitions, supported, nodes, name in rows:
        found[f"{name} {'fixed' if f'{name} free' in found else 'free'}"] = (int(partitions), int(supported), int(nodes))
    return found


def test_findings_are_in_the_manifest_and_are_the_tools(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    graphs, mobile = manifest.checks
    assert graphs["kind"] == "graphs"
    assert {tuple(sorted(versions.items())) for versions in graphs["versions"].values()} <= {
        (("ai.onnx", 18), ("com.microsoft", 1), ("ir", 10)),
        (("ai.onnx", 18), ("ir", 10)),
    }
    assert (mobile["kind"], mobile["onnxruntime"], set(mobile["parts"])) == ("mobile", onnxruntime.__version__, set(manifest.parts))
    decoder = mobile["parts"]["decoder"]
    theirs = said(bundle / manifest.parts["decoder"].file)
    for ours, name in (("nnapi", "NNAPI"), ("coreml_neural_network", "CoreML NeuralNetwork"), ("coreml_ml_program", "CoreML MLProgram")):
        for axes, word in (("as_is", "free"), ("fixed_axes", "fixed")):
            row = decoder[ours][axes]
            assert (row["partitions"], row["supported"], row["nodes"]) == theirs[f"{name} {word}"]
            assert row["worth_trying"] in ("no", "maybe", "yes")
        assert "com.microsoft:GroupQueryAttention" in decoder[ours]["fixed_axes"]["unsupported_operators"]


def test_conversion_to_ort_format_names_the_operators_a_minimal_build_needs(bundle: Path) -> None:
    found = check_mobile(bundle / "onnx" / "decoder_model_merged_q4.onnx")["ort_format"]
    assert found["converted"]
    needed = {line.rsplit(";", 1)[0]: set(line.rsplit(";", 1)[1].split(",")) for line in found["required_operators"]}
    assert {"GroupQueryAttention", "MatMulNBits", "SkipSimplifiedLayerNormalization"} <= needed["com.microsoft;1"]
    assert found["bytes"] > 100_000
    assert sorted(file.name for file in (bundle / "onnx").iterdir()) == sorted(
        Path(name).name for name in read_manifest(bundle).files if name.startswith("onnx/")
    )


def changed(source: Path, place: Path, change: Callable[[onnx.ModelProto], Any]) -> Path:
    model = onnx.load(source)
    change(model)
    onnx.save(model, place)
    return place


def newer(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = OPSETS[""][1] + 1


def foreign(model: onnx.ModelProto) -> None:
    model.opset_import.append(onnx.helper.make_opsetid("ai.onnx.contrib", 1))


def newer_ir(model: onnx.ModelProto) -> None:
    model.ir_version = 11


def broken(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "nowhere"


@pytest.mark.parametrize(
    ("change", "words"),
    [(newer, "opset 22 of 'ai.onnx'"), (foreign, "'ai.onnx.contrib'"), (newer_ir, "IR version 11"), (broken, "no valid ONNX graph")],
)
def test_graphs_that_mobile_builds_refuse(bundle_of: Bundles, tmp_path: Path, change: Callable[[onnx.ModelProto], Any], words: str) -> None:
    file = changed(bundle_of("fp32") / "onnx" / "embed_tokens.onnx", tmp_path / "embed_tokens.onnx", change)
    with pytest.raises(BundleError, match=re.escape(words)) as caught:
        check_versions(file)
    assert "\n" not in str(caught.value)


def test_a_failed_conversion_says_why(bundle_of: Bundles, tmp_path: Path) -> None:
    def unknown(model: onnx.ModelProto) -> None:
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
        model.graph.node[0].op_type, model.graph.node[0].domain = "NoSuchOperator", "com.microsoft"

    file = changed(bundle_of("fp32") / "onnx" / "embed_tokens.onnx", tmp_path / "embed_tokens.onnx", unknown)
    found = check_mobile(file)["ort_format"]
    assert not found["converted"]
    assert "NoSuchOperator" in found["reason"]
    assert str(tmp_path) not in found["reason"]
    assert [path.name for path in tmp_path.iterdir()] == ["embed_tokens.onnx"]
