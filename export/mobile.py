"""Will a phone's build of ONNX Runtime take the graphs? ONNX's checker and the versions always; on request ONNX Runtime's own tools for mobile builds.

Those are its usability checker, which counts the nodes that NNAPI's and Core ML's execution providers would take, and its conversion to ORT format, which
minimal builds need, with the operators that such a build must hold. They say what they find; a graph that no accelerator takes still runs on the CPU.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from ..errors import BundleError
from ..manifest import Part
from .graph import MICROSOFT

# Builds for Android and iOS hold all operators since the reduced package ended (1.18). 1.18 is the oldest whose CPU has GroupQueryAttention; it implements
# ONNX opset 21 and reads IR version 10, and every onnxruntime reads opsets from 7 on (its documentation on compatibility). com.microsoft has one version.
OLDEST = "1.18"
OPSETS = {"": (7, 21), MICROSOFT: (1, 1)}
IR_VERSION = 10
NAMES = {"": "ai.onnx"}


def check_graphs(folder: Path, parts: dict[str, Part], tools: bool) -> list[dict[str, Any]]:
    """Entries for the manifest's checks: versions, and with `tools` what onnxruntime's tools find. Raises BundleError for a graph that mobile builds refuse."""
    files = {name: folder / part.file for name, part in parts.items()}
    checks = [{"kind": "graphs", "oldest_onnxruntime": OLDEST, "versions": {name: check_versions(file) for name, file in files.items()}}]
    if tools:
        checks.append({"kind": "mobile", "onnxruntime": onnxruntime.__version__, "parts": {name: check_mobile(file) for name, file in files.items()}})
    return checks


def check_versions(file: Path) -> dict[str, int]:
    """The versions that a valid graph asks for. Raises BundleError where the graph is not valid, or they lie outside what mobile builds implement."""
    try:
        onnx.checker.check_model(str(file))
    except onnx.checker.ValidationError as error:
        raise BundleError(
            f"{file.name} is no valid ONNX graph ({str(error).strip().splitlines()[0]}); this is a fault of the export, please report it"
        ) from None
    model = onnx.load(file, load_external_data=False)
    found = {entry.domain: entry.version for entry in model.opset_import}
    for domain, version in found.items():
        name = _named(domain)
        if domain not in OPSETS:
            raise BundleError(f"{file.name} uses operators of '{name}', which mobile builds of onnxruntime lack; expected {' and '.join(map(_named, OPSETS))}")
        low, high = OPSETS[domain]
        if not low <= version <= high:
            raise BundleError(f"{file.name} asks for opset {version} of '{name}'; onnxruntime {OLDEST} and newer on phones implement {low} to {high}")
    if model.ir_version > IR_VERSION:
        raise BundleError(f"{file.name} has IR version {model.ir_version}; onnxruntime {OLDEST} reads up to {IR_VERSION}")
    return {_named(domain): version for domain, version in found.items()} | {"ir": model.ir_version}


def check_mobile(file: Path) -> dict[str, Any]:
    """What ONNX Runtime's tools say of one graph, which stays as it is."""
    return {**_accelerators(file), "ort_format": _ort_format(file)}


def _accelerators(file: Path) -> dict[str, Any]:
    """Nodes and partitions that each accelerator would take: with the graph's free axes, and if they were fixed."""
    from onnxruntime.tools.mobile_helpers import usability_checker as checker

    # Without the weights: they are no part of the question, and may be larger than memory.
    model = onnx.shape_inference.infer_shapes(onnx.load(file, load_external_data=False), strict_mode=True)
    asked = {"nnapi": checker.check_nnapi_partitions}
    for name, kind in (("coreml_neural_network", "neuralnetwork"), ("coreml_ml_program", "mlprogram")):
        asked[name] = partial(checker.check_coreml_partitions, config_filename=f"coreml_supported_{kind}_ops.md")
    return {name: {"as_is": _partitions(ask(model, True)), "fixed_axes": _partitions(ask(model, False))} for name, ask in asked.items()}


def _partitions(found: Any) -> dict[str, Any]:
    return {
        "nodes": found.num_nodes,
        "supported": found.num_supported_nodes,
        "partitions": found.num_partitions,
        "worth_trying": found.suitability().name.lower(),
        "unsupported_operators": sorted(found.unsupported_ops),
    }


def _ort_format(file: Path) -> dict[str, Any]:
    """Whether the graph becomes an ORT-format file, how large, and the operators that a minimal build needs for it, as its configuration has them."""
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    with tempfile.TemporaryDirectory(dir=file.parent) as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        try:
            convert_onnx_models_to_ort(file, folder, [OptimizationStyle.Fixed])
        except Exception as error:  # the runtime's errors share no class of their own
            return {"converted": False, "reason": str(error).strip().splitlines()[0].replace(str(file.parent), "")[:200]}
        (converted,), (needed,) = folder.glob("*.ort"), folder.glob("*.config")
        operators = [line for line in needed.read_text().splitlines() if line and not line.startswith("#")]
        return {"converted": True, "bytes": converted.stat().st_size, "required_operators": operators}


def _named(domain: str) -> str:
    return NAMES.get(domain, domain)
