"""The three graphs of a bundle behind four plain calls, and their ONNX Runtime form.

`Parts` is all that a session asks of an engine: `OnnxParts` runs .onnx files, and the interpreter that proves Core ML packages is another.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from ..errors import BundleError
from ..manifest import PARTS, Manifest
from .memory import Range, give_back, mapped_meanwhile, take
from .pixels import Pixels
from .providers import ROUNDING, check_placement, choose_provider, name_providers, new_session, placement, providers_by_part

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

DTYPES = {"tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16)}
# On a CPU: a tile of 512 pixels takes 41 MB and two cores' whole time; four at once take 162 MB and are 5% slower. What other processors gain is not known.
TILES_AT_ONCE, TILES_ELSEWHERE = 1, 4


class Cache(Protocol):
    """Keys and values of the positions decoded so far."""

    @property
    def length(self) -> int: ...


@runtime_checkable
class ResizableCache(Protocol):
    """A cache that can forget its tail and make room; one that can't is built anew for each prompt."""

    @property
    def length(self) -> int: ...

    def keep(self, length: int, capacity: int) -> None:
        """Forget all but the first `length` positions and make room for `capacity` in all."""


class Parts(Protocol):
    """A vision-language model as an engine runs it: one sequence, batch of 1."""

    @property
    def threads(self) -> int: ...

    @property
    def provider(self) -> str:
        """The provider that really runs."""

    def encode_images(self, pixels: Pixels) -> np.ndarray:
        """Image features float32 [n_image_tokens, hidden], images in order."""

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Embeddings float32 [S, hidden] of token ids int64 [S]."""

    def new_cache(self, capacity: int) -> Any:
        """An empty cache with room for `capacity` positions."""

    def decode(self, embeds: np.ndarray, cache: Any, positions: np.ndarray | None = None) -> np.ndarray:
        """Append embeds float32 [S, hidden], S >= 1, to the cache; logits float32 [vocab] of the last position.

        `positions` int64 [3, S] where the model's have three axes; None counts on from the last ones.
        """


class GrowingCache:
    """The cache of a plain graph, whose `present` outputs are the next step's inputs; arrays [1, kv_heads, length, head_dim]."""

    def __init__(self, past: dict[str, np.ndarray]) -> None:
        self.past = past
        self.shift = 0  # from the count of tokens to the next one's position

    @property
    def length(self) -> int:
        return int(next(iter(self.past.values())).shape[2])

    def keep(self, length: int, capacity: int) -> None:
        self.past = {name: np.ascontiguousarray(array[:, :, :length]) for name, array in self.past.items()}


class SharedCache:
    """The cache of a fused graph, which reads and writes one buffer a tensor, [1, kv_heads, capacity, head_dim], in place."""

    def __init__(self, session: InferenceSession, past: dict[str, np.ndarray], capacity: int) -> None:
        self.session = session
        self.past = past
        self.length = self.shift = 0
        self._allocate(capacity)

    def keep(self, length: int, capacity: int) -> None:
        self.length = length
        if capacity > self.capacity:
            self._allocate(capacity)

    def _allocate(self, capacity: int) -> None:
        self.capacity = capacity
        self.mask = np.ones((1, capacity), np.int64)
        self.binding = self.session.io_binding()
        for name, old in self.past.items():
            shape = (*old.shape[:2], capacity, old.shape[3])
            buffer = np.zeros(shape, old.dtype)
            buffer[:, :, : self.length] = old[:, :, : self.length]
            self.past[name] = buffer
            place = ("cpu", 0, buffer.dtype, shape, buffer.ctypes.data)
            self.binding.bind_input(name, *place)
            self.binding.bind_output(present_name(name), *place)


class OnnxParts:
    """The graphs of an ONNX bundle, each in a session of its own."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        provider: str = "cpu",
        threads: int | None = None,
        fallback: bool = False,
        prepared: Mapping[str, Path] | None = None,
    ) -> None:
        """Open the three graphs, those that are `prepared` in that form. Raises BundleError for a graph that can't be opened or has other inputs, and
        without `fallback` for a provider that doesn't run here or takes no node of a graph."""
        self.threads = threads or usable_cores()
        self._pages: dict[str, Sequence[Range]] = {}  # that prepared weights take in memory while they are used
        chosen = {part: choose_provider(wanted, fallback) for part, wanted in providers_by_part(provider).items()}

        def opened(part: str) -> InferenceSession:
            count = 1 if part == "embed_tokens" else self.threads  # a table lookup needs no pool of threads
            if not prepared or part not in prepared:
                return open_session(folder / manifest.parts[part].file, chosen[part], count)
            with mapped_meanwhile(data_of(prepared[part])) as self._pages[part]:
                return open_session(prepared[part], chosen[part], count, optimised=True)

        # Packing weights keeps one core busy; what an accelerator compiles for itself comes one after the other.
        with ThreadPoolExecutor(self.threads if set(chosen.values()) == {"cpu"} else 1) as beside:
            self.vision, self.embedding, self.decoder = beside.map(opened, PARTS)
        # What really runs: nodes of each graph by provider.
        sessions = zip(PARTS, (self.vision, self.embedding, self.decoder), strict=True)
        self.placement = {part: placement(session, chosen[part]) for part, session in sessions}
        for part in ("vision_encoder", "decoder"):
            check_placement(self.placement[part], chosen[part], manifest.parts[part].file, fallback)
        self.provider = name_providers(chosen, self.placement)
        self.rounding = max(ROUNDING.get(one, 0.0) for one in chosen.values())
        self.shared = bool(manifest.generation.get("shared_cache"))
        inputs = {node.name: node for node in self.decoder.get_inputs()}
        missing = {"inputs_embeds", "attention_mask"} - set(inputs)
        if missing:
            raise BundleError(f"{manifest.parts['decoder'].file} lacks the input '{min(missing)}'; expected the layout of 'masters export', export again")
        self.inputs = set(inputs)
        self.axes = "position_ids" in inputs and len(inputs["position_ids"].shape) == 3
        geometry = manifest.decoder
        self.empty = {
            name: np.zeros((1, geometry.kv_heads, 0, geometry.head_dim), DTYPES[node.type])
            for name, node in inputs.items()
            if name.startswith("past_key_values.")
        }

    def encode_images(self, pixels: Pixels) -> np.ndarray:
        self._turn("decoder", "vision_encoder")
        names = [node.name for node in self.vision.get_inputs()]
        at_once = TILES_AT_ONCE if self.provider == "cpu" else TILES_ELSEWHERE
        features = [self.vision.run(["image_features"], {name: piece[name] for name in names})[0] for piece in pixels.pieces(at_once)]
        self._turn("vision_encoder", "decoder")
        return np.concatenate([f.reshape(-1, f.shape[-1]) for f in features]).astype(np.float32, copy=False)

    def _turn(self, done: str, next_part: str) -> None:
        """Only one of the two large graphs works at a time: prepared weights of the other need not be in memory."""
        give_back(self._pages.get(done, ()))
        take(self._pages.get(next_part, ()))

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(self.embedding.run(["inputs_embeds"], {"input_ids": ids[None]})[0][0])

    def new_cache(self, capacity: int) -> GrowingCache | SharedCache:
        return SharedCache(self.decoder, dict(self.empty), capacity) if self.shared else GrowingCache(dict(self.empty))

    def decode(self, embeds: np.ndarray, cache: GrowingCache | SharedCache, positions: np.ndarray | None = None) -> np.ndarray:
        return self.append(embeds, cache, positions)[-1]

    def append(self, embeds: np.ndarray, cache: GrowingCache | SharedCache, positions: np.ndarray | None = None, keep: int = 1) -> np.ndarray:
        """As `decode`, but logits float32 [keep, vocab] of the last `keep` positions."""
        total = cache.length + len(embeds)
        feeds: dict[str, np.ndarray] = {"inputs_embeds": np.ascontiguousarray(embeds[None], np.float32)}
        if "position_ids" in self.inputs:
            feeds["position_ids"] = self._position_ids(cache, total, positions)
        if "num_logits_to_keep" in self.inputs:
            feeds["num_logits_to_keep"] = np.array(keep, np.int64)
        logits = self._decode_shared(feeds, cache, total) if isinstance(cache, SharedCache) else self._decode_growing(feeds, cache, total)
        return np.asarray(logits[0, -keep:], np.float32)

    def _position_ids(self, cache: GrowingCache | SharedCache, total: int, positions: np.ndarray | None) -> np.ndarray:
        """int64 [1, S], or [3, 1, S] where positions have three axes; the cache remembers how far they are from the count of tokens."""
        if positions is None:
            positions = np.arange(cache.length, total, dtype=np.int64) + cache.shift
        else:
            cache.shift = int(positions.max()) + 1 - total
        if not self.axes:
            return positions[None]
        return np.ascontiguousarray(np.broadcast_to(positions, (3, positions.shape[-1]))[:, None])

    def _decode_growing(self, feeds: dict[str, np.ndarray], cache: GrowingCache, total: int) -> np.ndarray:
        feeds["attention_mask"] = np.ones((1, total), np.int64)
        names = list(cache.past)
        logits, *present = self.decoder.run(["logits", *map(present_name, names)], feeds | cache.past)
        cache.past = dict(zip(names, present, strict=True))
        return np.asarray(logits)

    def _decode_shared(self, feeds: dict[str, np.ndarray], cache: SharedCache, total: int) -> np.ndarray:
        if total > cache.capacity:
            raise ValueError(f"the cache has room for {cache.capacity} positions, {total} are needed")
        feeds["attention_mask"] = cache.mask[:, :total]
        for name, array in feeds.items():
            cache.binding.bind_cpu_input(name, array)
        # Bound anew each time: the runtime would take the last step's output, of another shape, as the place to write to.
        cache.binding.bind_output("logits", "cpu")
        self.decoder.run_with_iobinding(cache.binding)
        cache.length = total
        # Outputs stand in the order in which their names were first bound: the buffers, then the logits.
        return np.asarray(cache.binding.get_outputs()[len(cache.past)].numpy())


def open_session(file: Path, provider: str, threads: int, optimised: bool = False, packed: Path | None = None) -> InferenceSession:
    """An ONNX Runtime session on `provider`, which is here; nodes that it does not know run on the CPU. Raises BundleError for a damaged graph.

    With `packed` the graph is written there as it is run here, and its weights, as given and as packed for this processor, beside it; opening that, it
    is `optimised`.
    """
    # Imported here: half of the import time of everything that a program loads, and not needed before a bundle is opened.
    import onnxruntime

    onnxruntime.disable_telemetry_events()  # some builds report to their maker
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Room for a whole run's tensors, planned after the first, would stay taken beside what they are given as they come; and planned reuse keeps a tensor's
    # place from its first use to its last. Without either the arena holds what is alive, at the same speed.
    options.enable_mem_pattern = options.enable_mem_reuse = False
    # The three pools take turns: one that goes on spinning after its call takes the cores from the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if packed:
        options.optimized_model_filepath = str(packed)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", data_of(packed).name)
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    try:
        return new_session(file, options, provider)
    except Exception as error:  # the runtime's errors share no class of their own
        raise BundleError(f"onnxruntime could not open {file} ({str(error).splitlines()[0][:160]}); copy the bundle again, or export again") from None


def data_of(graph: Path) -> Path:
    """The file of a prepared graph's weights."""
    return graph.with_name(f"{graph.name}_data")


def present_name(past: str) -> str:
    return past.replace("past_key_values.", "present.", 1)


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
