"""Execution providers: the names people write, which of them this onnxruntime has, and on which one a session's nodes really run."""

from __future__ import annotations

import importlib
import json
import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BundleError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

# The names people write, and ONNX Runtime's.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cann": "CANNExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "directml": "DmlExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "nnapi": "NnapiExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
    "vitisai": "VitisAIExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}
# Packages that bring a provider to the ordinary onnxruntime, each with get_library_path().
PLUGINS = {"openvino": "onnxruntime_ep_openvino", "webgpu": "onnxruntime_ep_webgpu"}
ALIASES = {"dml": "directml", "trt": "tensorrt"}
log = logging.getLogger("masters.runtime")

Placement = dict[str, int]  # how many nodes of a graph run on each provider, by the names people write


def choose_provider(wanted: str, fallback: bool = False) -> str:
    """The provider to open sessions on: `wanted`, or with `fallback` the CPU where this onnxruntime lacks it, which is logged.

    Raises BundleError for a name that nobody knows, and without `fallback` for one that is not here.
    """
    import onnxruntime

    wanted = ALIASES.get(wanted, wanted)
    if wanted not in PROVIDERS:
        raise BundleError(f"the provider '{wanted}' is not known; expected one of {', '.join(PROVIDERS)}")
    here = [name for name, full in PROVIDERS.items() if full in onnxruntime.get_available_providers()]
    if wanted in here or _plug_in(wanted):
        return wanted
    if not fallback:
        more = f" or {PLUGINS[wanted].replace('_', '-')}" if wanted in PLUGINS else ""
        raise BundleError(f"the provider '{wanted}' is not in this onnxruntime; here are: {', '.join(here)}; choose one or install another build{more}")
    log.warning("the provider '%s' is not in this onnxruntime; everything runs on the CPU, as was allowed", wanted)
    return "cpu"


def new_session(file: Path, options: SessionOptions, provider: str) -> InferenceSession:
    """A session on `provider`, which is here; nodes that it does not know run on the CPU."""
    import onnxruntime

    if provider in PLUGINS and (devices := _devices(provider)):
        options.add_provider_for_devices(devices[:1], _settings(provider, options.intra_op_num_threads))
        return onnxruntime.InferenceSession(str(file), options)
    return onnxruntime.InferenceSession(str(file), options, providers=[PROVIDERS[provider]])


def _plug_in(provider: str) -> bool:
    """Load the plugin that brings `provider`, if it is installed; whether a device for it is here then."""
    import onnxruntime

    try:
        plugin = importlib.import_module(PLUGINS[provider])
        if not _devices(provider):
            onnxruntime.register_execution_provider_library(provider, plugin.get_library_path())
    except (KeyError, ImportError, AttributeError):
        return False
    except Exception as error:  # the runtime's errors share no class of their own
        raise BundleError(f"the plugin {PLUGINS[provider]} could not be loaded ({str(error).splitlines()[0][:160]}); install a fitting version") from None
    return bool(_devices(provider))


def _settings(provider: str, threads: int) -> dict[str, str]:
    """OpenVINO would compute in bfloat16 where the processor can, 10,000 times as far from PyTorch, and on all cores."""
    if provider != "openvino":
        return {}
    return {"load_config": json.dumps({"CPU": {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(threads)}})}


def _devices(provider: str) -> list[Any]:
    """What the plugin of `provider` can run on here."""
    import onnxruntime

    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDERS[provider]]


def placement(session: InferenceSession) -> Placement:
    """How many of a session's nodes run on each provider, the most first."""
    names = {full: name for name, full in PROVIDERS.items()}
    if not hasattr(session, "get_provider_graph_assignment_info"):  # an older onnxruntime tells only what it tries first
        return {names.get(full, full): 0 for full in session.get_providers()[:1]}
    counts: Counter[str] = Counter()
    for graph in session.get_provider_graph_assignment_info():
        counts[names.get(graph.ep_name, graph.ep_name)] += len(graph.get_nodes())
    return dict(counts.most_common())


def check_placement(found: Placement, wanted: str, graph: str, fallback: bool = False) -> None:
    """Raises BundleError unless some node runs on `wanted`: ONNX Runtime falls back without a word. With `fallback` it is logged."""
    if wanted in found or not found:
        return
    told = f"the provider '{wanted}' was asked for and {graph} runs on {', '.join(found)}"
    if not fallback:
        raise BundleError(f"{told}; ask for that one, allow the fallback, or mend the set-up of '{wanted}'")
    log.warning("%s, as was allowed", told)
