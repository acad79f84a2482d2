"""Who looks at whom in a packed row, and what computes it: FlexAttention on a GPU, which skips blocks that nobody looks at, SDPA with a mask elsewhere.

A row's segments are int64 [B, L]: 0 the prompt, j > 0 its j-th response, -1 padding. A language model that may take block masks is switched, once, to an
attention of ours that computes with FlexAttention where it is handed one and is SDPA for every other mask, as in generation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..progress import say

NAME = "packed"
FLEX_DEVICES = ("cuda",)
BLOCK = 128  # tokens of a block, FlexAttention's own
LEAST_HEAD = 16  # the narrowest head that its kernels take
TOLERANCE = 0.03  # of 16-bit attention and its gradients against SDPA's, relative

Sees = Callable[[Any, Any, Any, Any], Tensor]


def sees(segments: Tensor) -> Sees:
    """Whether, in row b and any head, token q looks at token k: causal, the prompt and its own response."""

    def look(b: Any, head: Any, q: Any, k: Any) -> Tensor:
        key = segments[b, k]
        # Padding looks at itself: a row that sees nothing would be NaN.
        return (q == k) | ((q >= k) & (key >= 0) & ((key == 0) | (key == segments[b, q])))

    return look


def dense_mask(segments: Tensor) -> Tensor:
    """bool [B, 1, L, L] of `sees`."""
    rows, length = segments.shape
    place = torch.arange(length, device=segments.device)
    return sees(segments)(torch.arange(rows, device=segments.device)[:, None, None], None, place[:, None], place)[:, None]


def block_mask(segments: Tensor) -> BlockMask:
    """The same for FlexAttention: which blocks of 128 x 128 tokens hold anything that is looked at, and the rule inside them."""
    rows, length = segments.shape
    whole = torch.nn.functional.pad(segments, (0, -length % BLOCK), value=-1)  # a kernel may ask about the rest of its last block
    found: BlockMask = create_block_mask(sees(whole), rows, None, length, length, device=segments.device, BLOCK_SIZE=BLOCK)
    return found


def takes_blocks(model: Any, device: torch.device) -> bool:
    """Whether `model` can be handed a block mask on this device; the first time, its language model is switched to the attention that takes one."""
    text = model.config.get_text_config()
    if text._attn_implementation == NAME:
        return True
    if device.type not in FLEX_DEVICES or text._attn_implementation != "sdpa" or not _follows_interface(model, text):
        return False
    heads = int(text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    shape = heads, int(getattr(text, "num_key_value_heads", None) or heads), width
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype
    if getattr(text, "attention_dropout", 0) or width < LEAST_HEAD or not _proved(*shape, dtype, device):
        return False
    text._attn_implementation = NAME
    return True


def packed_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
    """Transformers' interface of an attention: query, key and value [B, heads, L, width] to [B, L, heads, width]."""
    if not isinstance(attention_mask, BlockMask):
        found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return found
    # Rotary positions in float32 widen query and key under autocast, which knows SDPA but not FlexAttention.
    kind = value.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    attended: tuple[Tensor, Tensor | None] = flex_attention_forward(module, query.to(dtype), key.to(dtype), value.to(dtype), attention_mask, **settings)
    return attended


transformers.AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _follows_interface(model: Any, text: Any) -> bool:
    """Whether the layers of the language model ask transformers which attention to use, every time."""
    own = [m for m in model.modules() if isinstance(m, transformers.PreTrainedModel) and m.config is text]
    return bool(own) and all(type(m)._can_set_attn_implementation() for m in own)


@cache
def _proved(heads: int, key_heads: int, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether FlexAttention compiles here for heads of this shape and agrees with SDPA, gradients included; says so if not."""
    # Each model, shape and mode is a compilation of its own; past the limit all would fall back to a dense one.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    try:
        apart = attention_error(heads, key_heads, width, dtype, device)
    except Exception as error:  # whatever a compiler, a driver or a missing C compiler raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    else:
        if apart < TOLERANCE:
            return True
        reason = f"it is {apart:.1%} off"
    say(f"FlexAttention can't be used with {heads} heads of {width} in {str(dtype).removeprefix('torch.')} ({reason}): SDPA with a mask is, which is slower")
    return False


def attention_error(heads: int, key_heads: int, width: int, dtype: torch.dtype, device: torch.device) -> float:
    """How far, relative to their size, FlexAttention's results and gradients on random packed rows are from SDPA's: the worst of the four."""
    lengths = (150, 40, 1, 90)
    row = torch.cat([torch.full((n,), j) for j, n in enumerate(lengths)])
    segments = torch.stack([row, torch.where(row < 3, row, -1)]).to(device)
    module: Any = torch.nn.Module()
    module.num_key_value_groups = heads // key_heads
    random = torch.Generator().manual_seed(0)
    query, key, value = inputs = [
        torch.randn(2, n, len(row), width, generator=random).to(device, dtype).requires_grad_() for n in (heads, key_heads, key_heads)
    ]
    weight = torch.randn(2, len(row), heads, width, generator=random).to(device, dtype) * (segments >= 0)[:, :, None, None]
    results: list[list[Tensor]] = []
    with torch.enable_grad():
        for mask in (block_mask(segments), dense_mask(segments)):
            out, _ = packed_attention(module, query, key, value, mask, scaling=width**-0.5, dropout=0.0)
            results.append([out.detach() * (weight != 0), *torch.autograd.grad((out * weight).sum(), inputs)])
    return max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(*results, strict=True))
