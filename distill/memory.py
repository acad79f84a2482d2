"""What the largest moment of an update holds in memory, from configurations alone: no weights are read, and no tensor has any memory.

Weights, gradients, optimizer, S_0 and teacher are counted on skeletons. What a layer keeps for its backward pass, and what it needs for a moment, is
watched: one and two layers of the language model compute a batch on PyTorch's fake tensors, forward and back, and every further layer keeps what the
second one did. The head's share is token_stats.py's own buffers. A tower of images is reckoned from its widths.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel

from .families import family_of
from .lora import targets
from .models import freeze_vision, skeleton
from .parallel import blocks
from .recipe import Lora
from .token_stats import BLOCK_BYTES, CHUNK_BYTES

FLOAT = 4  # bytes of float32, which trained weights, their gradients and AdamW's two moments have


@dataclass(frozen=True)
class Load:
    """What one process computes at once: padded rows of tokens, the response tokens N among them, and the images."""

    rows: int
    length: int
    tokens: int
    patches: int = 0
    pixel_bytes: int = 0


@dataclass(frozen=True)
class Setting:
    """How an update is computed."""

    dtype: torch.dtype
    device: str = "cuda"  # or cpu
    processes: int = 1
    sharded: bool = False  # FSDP: a share of every model in each process
    shard_teacher: bool = False
    checkpointing: bool = False
    freeze_vision: bool = True
    lora: Lora | None = None
    live_teacher: bool = True
    initial: bool = True  # whether a KL to the student before training is taken
    passes: int = 1  # 2 where both parts' gradients are measured apart


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the largest moment of an update, and which moment that is."""

    moment: str
    parameters: int
    gradients: int
    optimizer: int
    initial: int
    teacher: int
    activations: int
    heads: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.initial + self.teacher + self.activations + self.heads


@dataclass(frozen=True)
class Size:
    """How many numbers a model has, are trained, are in its largest block, and in its embedding and output matrix."""

    weights: int
    trained: int
    block: int
    ends: int


@dataclass(frozen=True)
class Trace:
    """Bytes that a language model of some layers keeps for its backward pass, and needs beyond that for a moment, forward and back."""

    saved: int
    forward: int
    backward: int
    gradients: int  # of one layer, of those that `backward` counts


def size_of(config: Any, frozen_vision: bool = True, lora: Lora | None = None) -> Size:
    """The size of a model of this configuration, and of what is trained of it."""
    model = skeleton(config)
    if frozen_vision and not lora:
        freeze_vision(model)
    adapters = [model.get_submodule(name) for name in targets(model, lora, family_of(config.model_type).LANGUAGE)] if lora else []
    extra = sum(lora.rank * (int(layer.in_features) + int(layer.out_features)) for layer in adapters) if lora else 0
    trained = extra if lora else sum(p.numel() for p in model.parameters() if p.requires_grad)
    ends = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    weights = sum(p.numel() for p in model.parameters()) + extra
    return Size(weights, trained, max(sum(p.numel() for p in block.parameters()) for block in blocks(model)), sum(ends.values()))


def step_memory(student: Any, teacher: Any | None, load: Load, setting: Setting, theirs_load: Load | None = None) -> Memory:
    """The peak of one update of `student` (a configuration) under `teacher`, in one process; `theirs_load` is the teacher's where it reads other prompts."""
    reading = theirs_load or load
    ours, theirs = size_of(student, setting.freeze_vision, setting.lora), size_of(teacher) if teacher else None
    share, wide = setting.processes if setting.sharded else 1, setting.dtype.itemsize
    parameters, gradients = ours.weights * FLOAT // share, ours.trained * FLOAT // share
    optimizer = 2 * gradients
    initial = ours.weights * wide // share if setting.initial and not setting.lora else 0
    taught = theirs.weights * wide // (setting.processes if setting.shard_teacher else 1) if theirs and setting.live_teacher else 0
    kept = (setting.passes - 1) * gradients  # those of the pass before
    if setting.processes > 1 and not setting.sharded:
        kept += gradients  # DDP's buckets
    gathered = _gathered(student, teacher, ours, theirs, setting)
    trace = layers_trace(student, load, setting)
    heads, by_head = _heads(student, teacher, load, setting)
    images, tower = _tower(student, load, setting)
    moments = {
        "teacher's forward": (0, _passing(teacher, reading, setting) + _tower(teacher, reading, setting)[0] if theirs and setting.live_teacher else images, 0),
        "head": (0, trace.saved + tower, heads),
        "backward, begun": (by_head, trace.saved + trace.backward + tower, 0),
        "backward, ended": (gradients, max(0, trace.backward - trace.gradients) + _tied(student, ours), 0),
    }
    name, (found, activations, head) = max(moments.items(), key=lambda item: sum(item[1]))
    own = reading.pixel_bytes if reading is not load and theirs and setting.live_teacher else 0
    rest = load.pixel_bytes + own + gathered
    return Memory(name, parameters, found + kept, optimizer, initial, taught, activations + rest, head)


def forward_memory(config: Any, load: Load, setting: Setting, cache: int, trainer: Memory | None) -> Memory:
    """The peak while a frozen model reads `load` and holds `cache` bytes of keys and values, beside a `trainer` between two of its updates."""
    size, share = size_of(config), setting.processes if setting.shard_teacher else 1
    gathered = (2 * size.block + size.ends) * setting.dtype.itemsize if share > 1 else 0
    needed = max(cache, _passing(config, load, setting)) + _tower(config, load, setting)[0] + load.pixel_bytes + gathered
    kept = (trainer.parameters, 0, trainer.optimizer, trainer.initial) if trainer else (0, 0, 0, 0)
    return Memory("forward", *kept, size.weights * setting.dtype.itemsize // share, needed, 0)


def layers_trace(config: Any, load: Load, setting: Setting) -> Trace:
    """What all layers of a model's language part keep and need in an update: two traced, the others like the second."""
    one, two = (_trace(config, layers, load, setting, train=True) for layers in (1, 2))
    more = config.get_text_config().num_hidden_layers - 1
    return Trace(one.saved + more * (two.saved - one.saved), one.forward, one.backward, two.gradients - one.gradients)


def _passing(config: Any, load: Load, setting: Setting) -> int:
    """What a forward without gradients needs, however many layers there are."""
    return _trace(config, 2, load, setting, train=False).forward


def _trace(config: Any, layers: int, load: Load, setting: Setting, train: bool) -> Trace:
    text = copy.deepcopy(config.get_text_config())
    text.num_hidden_layers = layers
    text.vocab_size = 64  # the embedding is counted with the weights
    if getattr(text, "pad_token_id", None) is not None:
        text.pad_token_id = 0
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    # Gathered weights have the type to compute in; others are cast for each layer, and what was cast is kept for the backward pass.
    kind = torch.float32 if train and not setting.sharded else setting.dtype
    with torch.device("meta"):
        model = AutoModel.from_config(text, dtype=kind).train(train).requires_grad_(train and not setting.lora)
    if train and setting.lora:
        model = _adapted(model, setting.lora)
    if train and setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        return _watched(model, text, load, setting, kind, train)


def _adapted(model: Any, lora: Lora) -> Any:
    import peft

    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    peft.get_peft_model(model, peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=linear))
    return model


def _watched(model: Any, text: Any, load: Load, setting: Setting, kind: torch.dtype, train: bool) -> Trace:
    shape = load.rows, load.length
    # Rotary axes of a family stand before the rows.
    axes = (3,) if "mrope_section" in (getattr(text, "rope_parameters", None) or {}) else ()
    positions = torch.zeros(*axes, *shape, dtype=torch.long)
    # On a GPU who looks at whom is a block mask, and attention keeps what a causal one does.
    mask = torch.ones(load.rows, 1, load.length, load.length, dtype=torch.bool) if setting.device == "cpu" else None
    with watching() as live, torch.set_grad_enabled(train):
        inputs = torch.empty(*shape, text.hidden_size, dtype=kind, requires_grad=train)
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.dtype == torch.bfloat16):
            out = model(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        saved, forward = live.now, live.peak
        if not train:
            return Trace(saved, forward, 0, 0)
        live.peak = live.now
        out.backward(torch.empty_like(out))
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        return Trace(saved, forward - saved, live.peak - saved, gradients)


class Live(TorchDispatchMode):
    """The bytes of all storages that were made while this was on and are still there, `now`, and the most at any time, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in given:
                self._add(tensor.untyped_storage())
        return found

    def _add(self, storage: Any) -> None:
        if storage not in self._known:
            self._known[storage] = None
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, size: int) -> None:
        self.now -= size


@contextmanager
def watching() -> Iterator[Live]:
    with Live() as live:
        yield live


def _heads(student: Any, teacher: Any | None, load: Load, setting: Setting) -> tuple[int, int]:
    """What token_stats.py holds at most beside hidden states, and the gradient of the output matrix that it leaves."""
    ours, wide = student.get_text_config(), setting.dtype.itemsize
    widths = [ours.hidden_size] + ([teacher.get_text_config().hidden_size] if teacher else []) + ([ours.hidden_size] if setting.initial else [])
    vocabulary = min(c.get_text_config().vocab_size for c in (student, *([teacher] if teacher else [])))
    chunk = min(load.tokens, max(1, CHUNK_BYTES[setting.device] // (FLOAT * vocabulary)))
    rooms = len(widths) * chunk * vocabulary * FLOAT
    states = load.tokens * sum(widths) * wide
    casts = vocabulary * ours.hidden_size * wide if wide < FLOAT and not setting.sharded else 0
    matrix = 0 if setting.lora else vocabulary * ours.hidden_size * FLOAT
    pulled = chunk * vocabulary * wide if wide < FLOAT else 0
    pulled += vocabulary * ours.hidden_size * wide if wide < FLOAT and setting.device == "cpu" and matrix else 0
    sums = matrix + load.tokens * ours.hidden_size * FLOAT
    return rooms + states + casts + sums + pulled + 6 * min(BLOCK_BYTES[setting.device], chunk * vocabulary * FLOAT), matrix


def _tied(config: Any, size: Size) -> int:
    """The embedding's own gradient, before it is added to that of the output matrix, where both are one tensor."""
    text = config.get_text_config()
    return size.ends * FLOAT if size.trained > size.ends and size.ends == text.vocab_size * text.hidden_size else 0


def _gathered(student: Any, teacher: Any | None, ours: Size, theirs: Size | None, setting: Setting) -> int:
    """Under FSDP: two blocks put together at a time, the student's ends for a whole update, and the frozen models' output matrices."""
    if not setting.sharded:
        return 0
    kept = [teacher] if theirs and setting.live_teacher else []
    frozen = [c.get_text_config() for c in kept + ([student] if setting.initial and not setting.lora else []) if c]
    heads = sum(text.vocab_size * text.hidden_size for text in frozen)
    block = max(ours.block, theirs.block if theirs and setting.live_teacher else 0)
    return (2 * block + ours.ends + heads) * setting.dtype.itemsize + ours.block * FLOAT


def _tower(config: Any, load: Load, setting: Setting) -> tuple[int, int]:
    """What the tower of images needs for a moment, and keeps for a backward pass if it is trained."""
    vision, wide = config.vision_config, setting.dtype.itemsize
    width = int(vision.hidden_size)
    inner = int(getattr(vision, "intermediate_size", 0) or 4 * width)
    # A block's residual stream and its norms in float32; query, key, value and what attention gives; the two sides of the activation.
    block = load.patches * (width * (2 * FLOAT + 4 * wide) + 2 * inner * wide)
    if setting.freeze_vision or setting.lora:
        return block, 0
    depth = int(getattr(vision, "depth", 0) or vision.num_hidden_layers)
    return block, block + depth * (load.patches * width * FLOAT if setting.checkpointing else block)
