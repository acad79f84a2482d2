"""What accelerate's launcher starts to try every family in two processes, one of which has no picture: largest differences to one process, as JSON.

Gradients and greedy answers of the model as it is wrapped against those of an untouched copy in the same process.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from test_families import ASKED, FAMILIES, encoder, groups, made
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from masters.distill import ranks
from masters.distill.families import family_of
from masters.distill.forward import Group, pack, response_states
from masters.distill.generate import GREEDY, generate, generate_own
from masters.distill.models import freeze_vision
from masters.distill.objective import Heads, row_stats
from masters.distill.parallel import STAND_IN, place, sharding, whole, with_gradients

# Whole weights need no configuration, so that one launch tries both ways.
WAYS = ("ddp", "ddp with the tower", "fsdp2 with the tower")
MINE = ([0, 2, 3], [1])  # each process's questions: the other one's has no picture


def logprobs(model: Any, batch: Any) -> Tensor:
    heads = Heads(response_states(model, batch), model.get_output_embeddings().weight)
    return torch.stack(row_stats(heads, batch.tokens, batch.rows, batch.count, "jsd", "k3"))


def gradients(name: str, call: Any, model: Any, asked: list[Group], count: int, scale: float) -> dict[str, Tensor]:
    packed = pack(asked, 0, family_of(name).collate_pixels)
    rows = [float(len(response)) for group in asked for response in group.responses][:count]  # each row weighs differently
    (scale * (torch.tensor(rows) * call(packed)[1][:count]).sum()).backward()
    return {key: whole(p.grad) for key, p in model.named_parameters() if p.grad is not None}


def tried(name: str, way: str) -> dict[str, float]:
    """How far the wrapped model's gradients are from the whole one's, relative to the largest, and how many answers differ."""
    plain, wrapped, mine = made(name).build(seed=1), made(name).build(seed=1), MINE[ranks.index()]
    for model in (plain, wrapped) if way == "ddp" else ():
        freeze_vision(model)
    expected = gradients(name, lambda batch: logprobs(plain, batch), plain, list(groups(name)), sum(len(group.responses) for group in groups(name)), 1.0)
    hooked = place(wrapped, torch.float32, way.startswith("fsdp2"))
    forward = with_gradients(hooked, all_used=way == "ddp")
    assert isinstance(forward, FSDPModule if way.startswith("fsdp2") else DistributedDataParallel)
    asked, count = [groups(name)[i] for i in mine], sum(len(groups(name)[i].responses) for i in mine)
    assert any(group.prompt.pictured for group in asked) == ranks.is_main()
    if not ranks.is_main():
        asked.append(Group(encoder(name).prompt(STAND_IN), ((1,),)))
    found = gradients(name, lambda batch: forward(logprobs, batch), wrapped, asked, count, ranks.count())
    largest = max(float(g.abs().max()) for g in expected.values())
    apart = max(float((found[key] - gradient).abs().max()) for key, gradient in expected.items()) / largest
    sampling, collate = dataclasses.replace(GREEDY, max_tokens=6), family_of(name).collate_pixels
    answers = generate_own(hooked, encoder(name), collate, [ASKED[i] for i in mine], 1, sampling)
    alone = [generate(plain, encoder(name), collate, [ASKED[i]], 1, sampling)[0] for i in mine]
    differ = float(ranks.total(torch.tensor(float(sum(a != b for a, b in zip(answers, alone, strict=True))))))
    return {"gradients": apart, "answers": differ, "largest": largest, "weights": len(expected)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks.join()
    assert sharding() is not None
    found = ranks.gathered({name: {way: tried(name, way) for way in WAYS} for name in FAMILIES})
    if ranks.is_main():
        Path(sys.argv[1]).write_text(json.dumps(found))
