"""The Core ML target: three packages for iOS 18 / macOS 15 and later, and running them.

    vision_encoder   images fp16 [1, 3, side, side], one whole tile a call     -> image_features fp16 [1, image tokens, D]
    embed_tokens     inputIds int32 [1, q]                                     -> inputsEmbeds fp16 [1, q, D]
    decoder          inputsEmbeds fp16 [1, q, D], causalMask fp16 [1, 1, q, T] -> logits fp16 [1, 1, V] of the last position
                     states keyCache, valueCache fp16 [layers, key heads, context, head width]

T is the number of positions with the past; the mask is 0 where a position attends and -10,000 elsewhere. The q new positions are the last of T, so the decoder
takes the place in its caches, and the angles of its rotary embedding, from the shapes. A tile with padding is refused: a static graph has no use for its mask.
On macOS the packages run on Apple's engine, elsewhere in this package's interpreter.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BundleError, MastersError, ModelError
from ..files import read_json
from ..manifest import Manifest, Part, TensorSpec
from .mil import DATA, import_coremltools, load_program, quiet
from .precision import Precision, parse_precision
from .source import load_family
from .written import Written

if TYPE_CHECKING:
    import torch

    from ..runtime.pixels import Pixels

WORDS = ("fp16", "int8", "int4")
MASKED = -1e4  # far below any score, and its sums stay within float16
MOST_CONTEXT = 2048  # unless asked otherwise: a cache takes its whole size from the start
LEAST_CONTEXT = 8  # a free axis needs some room
# Only weights: coremltools would also quantise the tables of positions and rotary angles, whatever their effect.
WEIGHTED = ("conv", "linear", "gather")
EXPORTER = "co.huggingface.exporters.name"


@dataclass(frozen=True)
class Package:
    """What a package is converted from. An axis with a name is 1 to context long."""

    module: torch.nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[TensorSpec, ...] = ()


def write_parts(model: Any, processor: Any, folder: Path, precision: Precision | str, context: int | None = None) -> Written:
    """Write the three packages of a Hugging Face model (float32, evaluation mode) below `folder`; the same model gives the same bytes.

    `precision` is fp16, int8 (weights, a scale per output channel), int4 (the decoder's weights, a scale per block; the rest int8), or one word per part as
    for ONNX. `context` is the most positions of prompt and answer, by default the model's own but at most 2,048. Raises ModelError for a model that
    can't be re-authored, MastersError for another precision or context.
    """
    precision = parse_precision(precision) if isinstance(precision, str) else precision
    words = _words(precision)
    longest = int(model.config.text_config.max_position_embeddings)
    context = min(longest, MOST_CONTEXT) if context is None else context
    if not LEAST_CONTEXT <= context <= longest:
        raise MastersError(f"context is {context}; expected {LEAST_CONTEXT} to {longest}, the positions that the model was made for")
    packages = _packages(model, processor, context)
    name = _model_name(model)
    parts = {}
    for part, package in packages.items():
        converted = _compress(_convert(package, context), words[part], precision.block_size)
        converted.short_description = f"{part} of {name}, {words[part]}"
        converted.user_defined_metadata[EXPORTER] = name
        _save(converted, folder / f"{part}.mlpackage")
        parts[part] = Part(f"{part}.mlpackage", words[part], package.inputs, package.outputs)
    return Written(parts)


def _words(precision: Precision) -> dict[str, str]:
    words = {"vision_encoder": precision.vision, "embed_tokens": precision.embed, "decoder": precision.decoder}
    for part, word in words.items():
        if word not in WORDS:
            raise MastersError(f"{part} would be {word}; Core ML's states and Neural Engine are float16, choose fp16, int8 or int4 for every part")
    if precision.embed == "int4":
        raise MastersError("the embedding would be int4; a Core ML bundle looks up fp16 or int8 rows, write embed=int8")
    return words


def _model_name(model: Any) -> str:
    """The name of the checkpoint on the Hub, or of its folder; never a path of this machine."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return (Path(name).name if Path(name).is_absolute() or Path(name).exists() else name) or str(model.config.model_type)


def _packages(model: Any, processor: Any, context: int) -> dict[str, Package]:
    from .reauthored import reauthor

    family = load_family(model.config.model_type)
    if not hasattr(family, "vision_parts"):
        raise ModelError(f"the model type '{model.config.model_type}' has no Core ML form; export it with --target onnx")
    side = int(processor.image_processor.max_image_size["longest_edge"])
    parts = reauthor(family.vision_parts(model), family.text_parts(model), side, context)
    vision, decoder = parts.vision_encoder, parts.decoder
    vocabulary, width = parts.embed_tokens.weight.shape
    images = TensorSpec("images", "float16", (1, 3, side, side))
    features = TensorSpec("image_features", "float16", (1, (vision.grid // vision.scale) ** 2, width))
    ids, embeds = TensorSpec("inputIds", "int32", (1, "q")), TensorSpec("inputsEmbeds", "float16", (1, "q", width))
    mask, logits = TensorSpec("causalMask", "float16", (1, 1, "q", "total")), TensorSpec("logits", "float16", (1, 1, vocabulary))
    states = tuple(TensorSpec(name, "float16", tuple(getattr(decoder, name).shape)) for name in ("keyCache", "valueCache"))
    return {
        "vision_encoder": Package(vision, (images,), (features,)),
        "embed_tokens": Package(parts.embed_tokens, (ids,), (embeds,)),
        "decoder": Package(decoder, (embeds, mask), (logits,), states),
    }


def _convert(package: Package, context: int) -> Any:
    """The package as an unsaved Core ML model in float16."""
    import torch

    coremltools = converter()
    ranges = {name: coremltools.RangeDim(1, context, default=1, symbol=name) for name in ("q", "total")}

    def kind(tensor: TensorSpec) -> Any:
        shape = tuple(ranges[size] if isinstance(size, str) else size for size in tensor.shape)
        return coremltools.TensorType(name=tensor.name, shape=shape, dtype=np.dtype(tensor.dtype).type)

    states = [coremltools.StateType(coremltools.TensorType(shape=state.shape, dtype=np.float16), name=state.name) for state in package.states]
    with quiet(), torch.no_grad():
        program = _exported(package, context)
        return coremltools.convert(
            program,
            inputs=[kind(tensor) for tensor in package.inputs],
            outputs=[coremltools.TensorType(name=tensor.name, dtype=np.dtype(tensor.dtype).type) for tensor in package.outputs],
            states=states or None,
            compute_precision=coremltools.precision.FLOAT16,
            minimum_deployment_target=coremltools.target.iOS18,
            # Loading would compile the package for this machine, which only macOS can.
            skip_model_load=True,
        )


def _exported(package: Package, context: int) -> Any:
    """torch's graph of the module; jit tracing, the converter's other way in, breaks with numpy 2."""
    import torch

    axes = {name: torch.export.Dim(name, min=1, max=context) for name in ("q", "total")}
    # Two different lengths, neither 0 nor 1, which the exporter would take for constants.
    example_sizes = {"q": 3, "total": 5}
    examples, dynamic = [], []
    for tensor in package.inputs:
        shape = [example_sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        examples.append(torch.zeros(shape, dtype=torch.int32 if tensor.dtype == "int32" else torch.float32))
        dynamic.append({axis: axes[size] for axis, size in enumerate(tensor.shape) if isinstance(size, str)})
    # The exporter asks how slices of the cache lie in memory, which depends on both lengths but changes no value: such questions become assertions.
    options: dict[str, Any] = dict(dynamic_shapes=tuple(dynamic), strict=False, prefer_deferred_runtime_asserts_over_guards=True)
    exported = torch.export.export(package.module, tuple(examples), **options).run_decompositions({})
    for node in reversed(exported.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:  # Core ML has no assertions
            exported.graph.erase_node(node)
    exported.graph.eliminate_dead_code()
    return exported


def _compress(converted: Any, word: str, block: int) -> Any:
    """The model with its weights as integers and scales; they are decompressed to float16 on the device."""
    if word == "fp16":
        return converted
    optimize = import_coremltools().optimize.coreml
    settings = {"granularity": "per_channel"} if word == "int8" else {"granularity": "per_block", "block_size": block}
    weights = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", dtype=word, weight_threshold=1024, **settings)
    with quiet():
        return optimize.linear_quantize_weights(converted, optimize.OptimizationConfig(op_type_configs=dict.fromkeys(WEIGHTED, weights)))


def _save(converted: Any, package: Path) -> None:
    """Save the model so that equal models give equal bytes: messages in a fixed order, identifiers derived from what they identify."""
    with quiet():
        converted.save(str(package))
    # A map from torch's graph to the program's, which no program on a device reads.
    (package / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    model = package / DATA / "model.mlmodel"
    spec = import_coremltools().proto.Model_pb2.Model()
    spec.ParseFromString(model.read_bytes())
    model.unlink()  # it is readable by its owner alone
    model.write_bytes(spec.SerializeToString(deterministic=True))
    _name_items(package)


def _name_items(package: Path) -> None:
    """Replace the package's random identifiers by ones that its contents determine."""
    file = package / "Manifest.json"
    manifest = read_json(file)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((package / DATA).rglob("*")) if path.is_file())).hexdigest()
    names = {old: str(uuid.uuid5(uuid.NAMESPACE_URL, f"{item['path']}:{digest}")) for old, item in manifest["itemInfoEntries"].items()}
    items = sorted(manifest["itemInfoEntries"].items(), key=lambda entry: entry[1]["path"])
    manifest["itemInfoEntries"] = {names[old]: item for old, item in items}
    manifest["rootModelIdentifier"] = names[manifest["rootModelIdentifier"]]
    file.write_text(json.dumps(manifest, indent=4) + "\n", encoding="utf-8")


@functools.cache
def converter() -> Any:
    """coremltools, knowing the re-authored decoder's own operation, and gelu's approximations."""
    coremltools = import_coremltools()
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs, _get_kwinputs
    from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op

    @register_torch_op(torch_alias=["masters::write_cache"], override=True)
    def write_cache(context: Any, node: Any) -> None:
        cache, update, layer, begin, end = _get_inputs(context, node, expected=5)
        first = Builder.concat(values=[layer.val, 0, begin, 0], axis=0)
        last = Builder.concat(values=[layer.val + 1, cache.shape[1], end, cache.shape[3]], axis=0)
        context.add(Builder.slice_update(x=cache, update=update, begin=first, end=last, name=node.name))

    # coremltools 9.0 looks for the approximation among the positional arguments, where torch.export never puts it, and converts every gelu as the exact one.
    @register_torch_op(override=True)
    def gelu(context: Any, node: Any) -> None:
        (approximate,) = _get_kwinputs(context, node, "approximate", default=["none"])
        mode = "TANH_APPROXIMATION" if getattr(approximate, "val", approximate) == "tanh" else "EXACT"
        context.add(Builder.gelu(x=_get_inputs(context, node)[0], mode=mode, name=node.name))

    return coremltools


# Running


def load_parts(folder: Path, manifest: Manifest) -> CoreMLParts:
    """The packages of a bundle, ready to run. Raises BundleError for another target or a damaged package."""
    if manifest.target != "coreml":
        raise BundleError(f"the bundle in {folder} is for {manifest.target}; expected one for coreml")
    vision, embedding, decoder = (_open(folder / manifest.parts[part].file) for part in ("vision_encoder", "embed_tokens", "decoder"))
    return CoreMLParts(vision, embedding, decoder, manifest.decoder.context)


def _open(package: Path) -> Any:
    if not (package / DATA / "model.mlmodel").is_file():
        raise BundleError(f"no Core ML package at {package}; copy the bundle again, or export again")
    if sys.platform != "darwin":
        return load_program(package)
    coremltools = import_coremltools()
    with quiet():
        return coremltools.models.MLModel(str(package))


@dataclass
class StateCache:
    """The decoder's states and how many of their positions are filled."""

    state: Any
    context: int
    length: int = 0

    def keep(self, length: int, capacity: int) -> None:
        """Forget all but the first `length` positions; what lies behind them is never read before it is written again."""
        _check_capacity(capacity, self.context)
        self.length = length


class CoreMLParts:
    """The three packages as `masters.runtime.graphs.Parts`."""

    def __init__(self, vision: Any, embedding: Any, decoder: Any, context: int) -> None:
        self.vision, self.embedding, self.decoder, self.context = vision, embedding, decoder, context
        self.threads = os.cpu_count() or 1
        self.provider = "coreml" if sys.platform == "darwin" else "interpreter"

    def encode_images(self, pixels: Pixels) -> np.ndarray:
        """Image features float32 [image tokens, D], tile after tile. Raises BundleError for a tile with padding."""
        features = [self.vision.predict({"images": tile[None].astype(np.float16)})["image_features"][0] for tile in _whole_tiles(pixels)]
        return np.concatenate(features).astype(np.float32)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(self.embedding.predict({"inputIds": ids[None].astype(np.int32)})["inputsEmbeds"][0], np.float32)

    def new_cache(self, capacity: int) -> StateCache:
        _check_capacity(capacity, self.context)
        return StateCache(self.decoder.make_state(), self.context)

    def decode(self, embeds: np.ndarray, cache: StateCache, positions: np.ndarray | None = None) -> np.ndarray:
        assert positions is None, "no family that is re-authored here has positions of its own"
        total = cache.length + len(embeds)
        _check_capacity(total, self.context)
        # The row of a new position i hides what comes after it.
        mask = np.triu(np.full((len(embeds), total), MASKED, np.float16), cache.length + 1)
        data = {"inputsEmbeds": embeds[None].astype(np.float16), "causalMask": mask[None, None]}
        logits = self.decoder.predict(data, cache.state)["logits"]
        cache.length = total
        return np.asarray(logits[0, -1], np.float32)


def _check_capacity(wanted: int, context: int) -> None:
    if wanted > context:
        raise BundleError(f"{wanted} positions are asked for and the decoder's states hold {context}; ask for less, or export with a larger context")


def _whole_tiles(pixels: Pixels) -> np.ndarray:
    """The tiles [n, 3, H, W] that hold a picture; those that only fill a batch up are left out, as in PyTorch."""
    values = pixels.values.reshape(-1, *pixels.values.shape[-3:])
    masks = pixels.tensors.get("pixel_attention_mask")
    if masks is None:
        return values
    masks = masks.reshape(len(values), -1).astype(bool)
    used, whole = masks.any(1), masks.all(1)
    if (used != whole).any():
        raise BundleError(
            f"tile {int(np.argmax(used != whole)) + 1} of {len(values)} has padding, and a Core ML vision encoder takes whole tiles; "
            "let the processor split the image or fill the tile, or use an ONNX bundle"
        )
    return values[whole]
