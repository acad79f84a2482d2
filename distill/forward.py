"""One forward a question: the prompt and its images once, then its G responses behind it, each blind to the others.

Every response continues the prompt at the position after its end, so its hidden states are those of a forward of its own. A group of G responses
of R tokens on a prompt of P tokens costs P + G*R tokens in place of G*(P+R).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .attention import block_mask, dense_mask, takes_blocks
from .inputs import CollatePixels, Pixels, Prompt, to_device


@dataclass(frozen=True)
class Group:
    """One question's prompt and its distinct responses (ids, end token included); `sample` is its id, for what is kept by name."""

    prompt: Prompt
    responses: tuple[tuple[int, ...], ...]
    sample: str = ""


@dataclass(frozen=True)
class PackedBatch:
    """B questions in the form that one forward takes, L tokens at the longest, N response tokens in all."""

    ids: Tensor  # int64 [B, L]: prompt, then every response without its last token
    positions: Tensor  # int64 [B, L] or, in A axes, [A, B, L]
    segments: Tensor  # int64 [B, L]: 0 the prompt, j > 0 a response, -1 padding
    shared: bool  # whether responses stand behind one prompt, so that a mask must keep them apart
    pixels: Pixels
    gather: Tensor  # int64 [N]: where, in the flattened [B*L], the state that predicts each response token stands
    tokens: Tensor  # int64 [N]: the response tokens
    rows: Tensor  # int64 [N]: the response, counted over the batch, that each token belongs to
    count: int  # responses in the batch
    responses: tuple[tuple[str, tuple[int, ...]], ...]  # each one's sample id and ids

    @cached_property
    def mask(self) -> Tensor:
        """What each token may look at, bool [B, 1, L, L]; where tokens stand, bool [B, L], if no prompt is shared."""
        return dense_mask(self.segments) if self.shared else self.segments >= 0

    @cached_property
    def blocks(self) -> BlockMask:
        """The same for FlexAttention."""
        return block_mask(self.segments)


def pack(groups: Sequence[Group], pad: int, collate_pixels: CollatePixels, shared: bool = True) -> PackedBatch:
    """Lay out a batch: padded on the right, positions continuing the prompt's end in every response.

    Without `shared` every response gets a row and a prompt of its own, for models whose layers can't be told by a mask what to see.
    """
    if not shared:
        groups = [Group(group.prompt, (response,), group.sample) for group in groups for response in group.responses]
    laid = [_lay_out(group) for group in groups]
    length = max(len(row.ids) for row in laid)
    ids = torch.full((len(laid), length), pad)
    positions = torch.zeros((*laid[0].positions.shape[:-1], *ids.shape), dtype=torch.long)
    segments = torch.full_like(ids, -1)
    gather: list[Tensor] = []
    tokens: list[int] = []
    rows: list[int] = []
    count = 0
    for b, (row, group) in enumerate(zip(laid, groups, strict=True)):
        size = len(row.ids)
        ids[b, :size], positions[..., b, :size], segments[b, :size] = row.ids, row.positions, row.segments
        gather.append(row.gather + b * length)
        for response in group.responses:
            tokens += response
            rows += [count] * len(response)
            count += 1
    pixels = collate_pixels([group.prompt.pixels for group in groups])
    named = tuple((group.sample, response) for group in groups for response in group.responses)
    return PackedBatch(ids, positions, segments, shared, pixels, torch.cat(gather), torch.tensor(tokens), torch.tensor(rows), count, named)


def response_states(model: Any, batch: PackedBatch) -> Tensor:
    """The last hidden states [N, hidden] that predict the batch's response tokens."""
    device = batch.ids.device
    out = model.model(
        input_ids=batch.ids,
        attention_mask=batch.blocks if batch.shared and takes_blocks(model, device) else batch.mask,
        position_ids=batch.positions,
        use_cache=False,
        **to_device(batch.pixels, device, model.dtype),
    )
    return out.last_hidden_state.flatten(0, 1)[batch.gather]


@torch.no_grad()
def packing_error(model: Any, prompt: Prompt, collate_pixels: CollatePixels, shared: bool = True) -> float:
    """How far, relative to their size, two packed responses' states are from those of the model's own forward of each."""
    responses = tuple(tuple(prompt.ids[-n:].tolist()) for n in (3, 5))  # any text does
    found = response_states(model, move(pack([Group(prompt, responses)], 0, collate_pixels, shared), model.device))
    expected = []
    for response in responses:
        ids = torch.cat([prompt.ids, torch.tensor(response)])[None].to(model.device)
        out = model.model(input_ids=ids, use_cache=False, **to_device(prompt.pixels, model.device, model.dtype))
        expected.append(out.last_hidden_state[0, len(prompt.ids) - 1 : -1])
    wanted = torch.cat(expected)
    return float((found - wanted).norm() / wanted.norm())


def move(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """The batch with its tensors on `device`."""
    pixels = {name: t.to(device) for name, t in batch.pixels.items()}
    names = ("ids", "positions", "segments", "gather", "tokens", "rows")
    return dataclasses.replace(batch, pixels=pixels, **{name: getattr(batch, name).to(device) for name in names})


@dataclass(frozen=True)
class _Row:
    ids: Tensor
    positions: Tensor
    segments: Tensor
    gather: Tensor


def _lay_out(group: Group) -> _Row:
    """One question's ids, positions and segments, and where each response token is predicted: the first one at the prompt's end."""
    prompt = len(group.prompt.ids)
    ids, segments, gather, start = [group.prompt.ids], [torch.zeros(prompt, dtype=torch.long)], [], prompt
    positions = [group.prompt.places]
    end = int(positions[0].max()) + 1  # an image may take fewer positions than tokens
    for number, response in enumerate(group.responses, start=1):
        # The last token predicts nothing, so it is not read.
        read = len(response) - 1
        ids.append(torch.tensor(response[:-1], dtype=torch.long))
        positions.append(torch.arange(end, end + read).expand(*positions[0].shape[:-1], -1))
        segments.append(torch.full((read,), number))
        gather.append(torch.cat([torch.tensor([prompt - 1]), torch.arange(start, start + read)]))
        start += read
    return _Row(torch.cat(ids), torch.cat(positions, dim=-1), torch.cat(segments), torch.cat(gather))
