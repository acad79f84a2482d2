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
# Ways to run a provider that are names of their own, because the numbers are others.
VARIANTS = {"openvino-bf16": "openvino"}
# Packages that bring a provider to the ordinary onnxruntime, each with get_library_path().
PLUGINS = {"openvino": "onnxruntime_ep_openvino", "webgpu": "onnxruntime_ep_webgpu"}
# OpenVINO would by itself compute in bfloat16 where the processor can, 10,000 times as far from PyTorch as in float32.
PRECISIONS = {"openvino": "f32", "openvino-bf16": "bf16"}
# How far rounding at every step may take a result from PyTorch's, as a share of the largest number.
ROUNDING = {"openvino-bf16": 0.1}
# What people call the graphs, as for --precision.
WORDS = {"vision": "vision_encoder", "embed": "embed_tokens", "decoder": "decoder"}
ALIASES = {"dml": "directml", "trt": "tensorrt"}
log = logging.getLogger("masters.runtime")

Placement = dict[str, int]  # how many nodes of a graph run on each provider, by the names people write


def providers_by_part(wanted: str) -> dict[str, str]:
    """'cpu' -> that for each graph; 'vision=openvino-bf16,decoder=cpu' -> as it says, and the CPU for a graph that is not named.

    Raises BundleError for a word that names no graph.
    """
    if "=" not in wanted:
        return dict.fromkeys(WORDS.values(), wanted)
    named = dict(pair.partition("=")[::2] for pair in wanted.replace(" ", "").split(","))
    if unknown := [word for word in named if word not in WORDS]:
        raise BundleError(f"the provider '{wanted}' names '{unknown[0]}'; expected one provider for all, or {'=…, '.join(WORDS)}=… separated by commas")
    return {part: named.get(word, "cpu") for word, part in WORDS.items()}


def choose_provider(wanted: str, fallback: bool = False) -> str:
    """The provider to open sessions on: `wanted`, or with `fallback` the CPU where this onnxruntime lacks it, which is logged.

    Raises BundleError for a name that nobody knows, and without `fallback` for one that is not here.
    """
    import onnxruntime

    wanted = ALIASES.get(wanted, wanted)
    if wanted not in (*PROVIDERS, *VARIANTS):
        raise BundleError(f"the provider '{wanted}' is not known; expected one of {', '.join((*PROVIDERS, *VARIANTS))}")
    base = VARIANTS.get(wanted, wanted)
    here = [name for name, full in PROVIDERS.items() if full in onnxruntime.get_available_providers()]
    if base in here or _plug_in(base):
        return wanted
    if not fallback:
        more = f" or {PLUGINS[base].replace('_', '-')}" if base in PLUGINS else ""
        raise BundleError(f"the provider '{wanted}' is not in this onnxruntime; here are: {', '.join(here)}; choose one or install another build{more}")
    log.warning("the provider '%s' is not in this onnxruntime; everything runs on the CPU, as was allowed", wanted)
    return "cpu"


def new_session(file: Path, options: SessionOptions, provider: str) -> InferenceSession:
    """A session on `provider`, which is here; nodes that it does not know run on the CPU."""
    import onnxruntime

    base = VARIANTS.get(provider, provider)
    if base in PLUGINS and (devices := _devices(base)):
        options.add_provider_for_devices(devices[:1], _settings(provider, options.intra_op_num_threads))
        return onnxruntime.InferenceSession(str(file), options)
    return onnxruntime.InferenceSession(str(file), options, providers=[PROVIDERS[base]])


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
    if provider not in PRECISIONS:
        return {}
    return {"load_config": json.dumps({"CPU": {"INFERENCE_PRECISION_HINT": PRECISIONS[provider], "INFERENCE_NUM_THREADS": str(threads)}})}


def _devices(provider: str) -> list[Any]:
    """What the plugin of `provider` can run on here."""
    import onnxruntime

    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDERS[provider]]


def placement(session: InferenceSession, chosen: str = "cpu") -> Placement:
    """How many nodes of a session that was opened on `chosen` run on each provider, the most first."""
    names = {full: name for name, full in PROVIDERS.items()} | {PROVIDERS[VARIANTS.get(chosen, chosen)]: chosen}
    if not hasattr(session, "get_provider_graph_assignment_info"):  # an older onnxruntime tells only what it tries first
        return {names.get(full, full): 0 for full in session.get_providers()[:1]}
    counts: Counter[str] = Counter()
    for graph in session.get_provider_graph_assignment_info():
        counts[names.get(graph.ep_name, graph.ep_name)] += len(graph.get_nodes())
    return dict(counts.most_common())


def name_providers(chosen: dict[str, str], found: dict[str, Placement]) -> str:
    """What really runs, as `load` takes it: one name where tower and decoder run alike."""
    runs = {word: chosen[part] if chosen[part] in found[part] else next(iter(found[part]), chosen[part]) for word, part in WORDS.items()}
    return runs["decoder"] if runs["vision"] == runs["decoder"] else ",".join(f"{word}={name}" for word, name in runs.items())


def check_placement(found: Placement, wanted: str, graph: str, fallback: bool = False) -> None:
    """Raises BundleError unless some node runs on `wanted`: ONNX Runtime falls back without a word. With `fallback` it is logged."""
    if wanted in found or not found:
        return
    told = f"the provider '{wanted}' was asked for and {graph} runs on {', '.join(found)}"
    if not fallback:
        raise BundleError(f"{told}; ask for that one, allow the fallback, or mend the set-up of '{wanted}'")
    log.warning("%s, as was allowed", told)
