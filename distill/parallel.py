"""Where a model's weights are: whole in every process, whose gradients are averaged (DDP), or a share in each (FSDP2, ZeRO-3).

accelerate's configuration chooses; torch wraps, since accelerate prepares one model with one optimizer, and here frozen models are in shares too.
Either wrapper acts around a module's forward alone, so everything that reads weights runs inside one, that of `Hooked`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from PIL import Image
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..errors import RunError
from ..samples import Sample
from . import ranks
from .features import KeptFeatures


def _white() -> bytes:
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(picture, "PNG")
    return picture.getvalue()


# What a process looks at that has no picture of its own while others have. No question that was read has such an id.
STAND_IN = Sample("\0", (_white(),), "?")


class Hooked(nn.Module):
    """A model behind one forward that applies any function to it: inside, its weights are whole, and what is computed there gets gradients."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.features = KeptFeatures()
        self._head: Tensor | None = None

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(self.model, *args, **kwargs)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def frozen_head(self) -> Tensor:
        """The output matrix of a model that is not trained, gathered once: chunk by chunk it would be asked for again and again."""
        if self._head is None:
            self._head = whole(self.model.get_output_embeddings().weight.detach())
        return self._head

    def weights_changed(self, language_alone: bool = False) -> None:
        """To be called when a frozen model is frozen no more, as when its mask changes; `language_alone` if tower and projector stay as they are."""
        self._head = None
        if not language_alone:
            self.features.clear()


def within(model: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(model, …)` without gradients, inside the model's hooks where it has any."""
    with torch.no_grad():
        if not isinstance(model, Hooked):
            return function(model, *args, **kwargs)
        found = model(function, *args, **kwargs)
    if isinstance(model, FSDPModule):
        model.reshard()  # no backward pass will: the optimizer's weights are the shares
    return found


def head_of(model: Any) -> Tensor:
    """The output matrix of a frozen model."""
    found: Tensor = model.frozen_head if isinstance(model, Hooked) else model.get_output_embeddings().weight
    return found


@dataclass(frozen=True)
class Sharding:
    """Whether a trained layer's weights are given back between its forward and its backward, and whether shares wait in the CPU's memory."""

    reshard: bool = True
    offload: bool = False


def sharding() -> Sharding | None:
    """How weights are shared, if accelerate was configured to. Raises RunError for a configuration that is not followed here."""
    if ranks.count() == 1:
        return None
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return _zero(os.environ)
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise RunError(f"accelerate is configured for FSDP version {plugin.fsdp_version}; expected fsdp_version: 2, see examples/accelerate/fsdp2.yaml")
    if plugin.cpu_ram_efficient_loading:
        raise RunError("accelerate is configured with fsdp_cpu_ram_efficient_loading: true; expected false, processes load one after the other here")
    return Sharding(bool(plugin.reshard_after_forward), isinstance(plugin.cpu_offload, CPUOffloadPolicy))


def _zero(settings: Mapping[str, str]) -> Sharding:
    """ZeRO's third stage shares weights, gradients and optimizer, which is what FSDP2 does: DeepSpeed's launcher is used, its engine is not needed."""
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in settings:
        raise RunError("accelerate is configured with a deepspeed_config_file; expected zero_stage: 3 in its own keys, see examples/accelerate/zero3.yaml")
    stage = settings.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    places = {settings.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none") for what in ("PARAM", "OPTIMIZER")}
    if stage != "3":
        raise RunError(f"accelerate is configured for DeepSpeed's zero_stage {stage}; expected 3, or for whole weights examples/accelerate/ddp.yaml")
    if not places <= {"none", "cpu"}:
        raise RunError(f"accelerate is configured to offload to {', '.join(sorted(places))}; expected none or cpu, which takes weights and optimizer together")
    return Sharding(offload="cpu" in places)


@cache
def mesh() -> DeviceMesh:
    """All processes in a row; to be asked for by all at the same time."""
    return init_device_mesh(ranks.device().type, (ranks.count(),))


def place(model: Any, dtype: torch.dtype, shard: bool) -> Hooked:
    """The model on this process's device; with `shard` a share of it, gathered block by block in `dtype` when it computes."""
    hooked = Hooked(model)
    if not shard or ranks.count() == 1:
        return hooked.to(ranks.device())
    settings = sharding() or Sharding()
    offload = CPUOffloadPolicy() if settings.offload else OffloadPolicy()
    # Autocast gives inputs their type where it matters; hidden states of a teacher must stay as they came.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    common: dict[str, Any] = {"mesh": mesh(), "mp_policy": precision, "offload_policy": offload}
    trained = any(parameter.requires_grad for parameter in model.parameters())
    # A frozen model's mask changes between two forwards: what stayed gathered would be stale.
    for block in blocks(model):
        fully_shard(block, reshard_after_forward=settings.reshard or not trained, **common)
    # Embedding and head are one group, since they may be one tensor, and stay gathered from a trained model's forward to the end of its backward.
    fully_shard(hooked, reshard_after_forward=None if trained else True, **common)
    return hooked


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a model's outermost lists of layers: what is computed as a whole, and one after the other, in any architecture."""
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else blocks(child)


def with_gradients(hooked: Hooked, all_used: bool) -> nn.Module:
    """What to call for a forward whose backward leaves the average of all processes' gradients; `all_used` if every step reaches every trained weight."""
    if ranks.count() == 1 or any(isinstance(parameter, DTensor) for parameter in hooked.parameters()):
        return hooked
    devices = [ranks.device()] if ranks.device().type != "cpu" else None
    return DistributedDataParallel(hooked, device_ids=devices, find_unused_parameters=not all_used)


def unsynced(wrapped: nn.Module) -> AbstractContextManager[None]:
    """Leave a replica's gradients as they are for now. Shares are always reduced: unreduced gradients would be whole, in every process."""
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is in shares put together, in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """This process's share of a tensor: a view to write into."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> slice:
    """Which rows of the whole tensor `own` holds."""
    if not isinstance(tensor, DTensor):
        return slice(None)
    each = -(-tensor.shape[0] // tensor.device_mesh.size())
    start = min(each * tensor.device_mesh.get_local_rank(), tensor.shape[0])
    return slice(start, start + len(tensor.to_local()))


def like(tensor: Tensor, values: Tensor) -> Tensor:
    """`values`, the same in every process, in shares as `tensor` is."""
    values = values.to(tensor.device)
    if not isinstance(tensor, DTensor):
        return values
    return distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
