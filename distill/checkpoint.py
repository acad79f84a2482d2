"""What a run continues from: the trained weights and the optimizer's state under the weights' names, whole, in one file.

A checkpoint does not say by how many processes it was written: any number of them, in any of parallel.py's ways, continues from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RunError
from ..files import whole_file
from . import ranks
from .parallel import like, own, whole


def trained_weights(model: Any) -> dict[str, Tensor]:
    """The weights that are trained, by name, on the CPU; gathered from all processes, kept by the main one, empty in the others."""
    return _kept({name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad})


def optimizer_state(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The optimizer's state of every trained weight, kept as `trained_weights` are."""
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: _kept(state) for name, state in states.items()}


@torch.no_grad()
def set_weights(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Copy whole weights into a model, this process's share of each where it is in shares. Raises RunError for names that it has not."""
    parameters = dict(model.named_parameters())
    if unknown := sorted(weights.keys() - parameters.keys()):
        raise RunError(f"the checkpoint holds {unknown[0]}, which the student has not; expected a checkpoint of this student, remove it to train again")
    for name, values in weights.items():
        own(parameters[name]).copy_(own(like(parameters[name], values)))


def set_optimizer_state(model: Any, optimizer: torch.optim.Optimizer, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """The inverse of `optimizer_state`, in every process."""
    for name, parameter in model.named_parameters():
        for key, value in states.get(name, {}).items():
            # All of it goes where the weight is: what is as large in shares as the weight is, a count of steps whole.
            values = like(parameter, value) if value.shape == parameter.shape else value.to(parameter.device)
            optimizer.state[parameter][key] = values.clone()


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write the main process's `state` whole."""
    if not ranks.is_main():
        return
    with whole_file(path) as part:
        try:
            torch.save(state, part)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(str(error).splitlines()[0][:120]) from error


def read_checkpoint(path: Path) -> Any:
    """What `write_checkpoint` wrote, left on the disk until it is used. Raises RunError if the file is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise RunError(f"{path} is damaged ({str(error).splitlines()[0][:120]}); remove the folder {path.parent} to train again from the answers") from None


def _kept(tensors: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in tensors.items():
        # One after the other: all processes take part in gathering, and none holds more than one whole tensor on its device.
        gathered = whole(value).cpu() if isinstance(value, Tensor) else value
        if ranks.is_main():
            found[name] = gathered
    return found
