"""The three parts of a vision-language model, re-authored for Apple's Neural Engine and GPU; plain torch, no converter.

The vision encoder keeps the engine's layout, (batch, channels, 1, tokens), with 1x1 convolutions for its linear layers, static shapes and no tensor above
rank 4. The decoder keeps rows of hidden states, since its lengths vary and stateful models run on the GPU; its cache is two buffers, which a converter turns
into states. Each part equals the Hugging Face module in float32 to rounding.

Shapes: C channels, S tokens of a tile, q new positions, T positions with the past, H and K heads of queries and of keys, d their width, D hidden size,
V vocabulary.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ModelError

# A state whose last dimension is no multiple of this gives wrong results or fails on the Neural Engine.
STATE_MULTIPLE = 32
# Scales that stand for every position; the others ('dynamic', 'longrope') change with the length of the text.
FIXED_ROPE = ("default", "linear", "llama3", "yarn")
VISION_LAYER = {"layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", "self_attn.k_proj", "self_attn.out_proj", "self_attn.q_proj", "self_attn.v_proj"}
DECODER_LAYER = {
    *("input_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm"),
    *("self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"),
}


@dataclass(frozen=True)
class Reauthored:
    """The parts, in float32 and evaluation mode."""

    vision_encoder: VisionEncoder
    embed_tokens: EmbedTokens
    decoder: Decoder


class VisionEncoder(nn.Module):
    """images [1, 3, side, side], one whole tile of normalised pixels -> image_features [1, image tokens, D].

    Position embeddings are those of a tile without padding.
    """

    positions: Tensor

    def __init__(self, tower: Any, projection: nn.Linear, scale: int, side: int) -> None:
        super().__init__()
        self.grid, self.scale = side // tower.embeddings.patch_size, scale
        self.patches = deepcopy(tower.embeddings.patch_embedding)
        self.register_buffer("positions", _tile_positions(tower, self.grid), persistent=False)
        self.layers = nn.ModuleList(VisionLayer(layer) for layer in tower.encoder.layers)
        self.norm = ChannelNorm(tower.post_layernorm)
        self.projection = _shuffle_projection(projection, scale)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).unsqueeze(2) + self.positions  # [1, C, 1, S]
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x).view(1, -1, self.grid, self.grid)
        return self.projection(x).flatten(2).transpose(1, 2)


class VisionLayer(nn.Module):
    """Attention and MLP of a SigLIP layer, [1, C, 1, S] -> [1, C, 1, S]."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        _expect_parameters(layer, VISION_LAYER, "vision")
        attention = layer.self_attn
        self.heads = attention.num_heads
        self.norm1, self.norm2 = ChannelNorm(layer.layer_norm1), ChannelNorm(layer.layer_norm2)
        # The scale of the scores costs nothing inside the weights of the queries.
        self.queries = _conv1x1(attention.q_proj, attention.scale)
        self.keys, self.values, self.out = _conv1x1(attention.k_proj), _conv1x1(attention.v_proj), _conv1x1(attention.out_proj)
        self.up, self.down = _conv1x1(layer.mlp.fc1), _conv1x1(layer.mlp.fc2)
        self.activation = layer.mlp.activation_fn

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.down(self.activation(self.up(self.norm2(x))))

    def attend(self, x: Tensor) -> Tensor:
        channels, tokens = x.shape[1], x.shape[3]
        by_head = (1, self.heads, channels // self.heads, tokens)
        queries, keys, values = self.queries(x).view(by_head), self.keys(x).view(by_head), self.values(x).view(by_head)
        # Both transpositions become flags of the matrix products.
        weights = functional.softmax(queries.transpose(2, 3) @ keys, dim=-1)  # [1, H, S, S]
        return self.out((values @ weights.transpose(2, 3)).reshape(1, channels, 1, tokens))


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of [1, C, 1, S], in the form that converters recognise as one operation."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = (nn.Parameter(p.detach().clone().view(1, -1, 1, 1)) for p in (norm.weight, norm.bias))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        normal = centred * torch.rsqrt((centred * centred).mean(1, keepdim=True) + self.eps)
        return normal * self.weight + self.bias


class EmbedTokens(nn.Module):
    """inputIds int32 [1, q] -> inputsEmbeds [1, q, D]."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = nn.Parameter(embedding.weight.detach().clone())

    def forward(self, inputIds: Tensor) -> Tensor:
        return functional.embedding(inputIds, self.weight)


class Decoder(nn.Module):
    """inputsEmbeds [1, q, D], causalMask [1, 1, q, T] (0 where a position attends, a large negative number elsewhere) -> logits [1, 1, V] of the last position.

    The new positions are the last q of T: the mask's shape alone says where the cache is written and which angles the rotation takes. The caches
    `keyCache` and `valueCache` are [layers, K, context, d].
    """

    cos: Tensor
    sin: Tensor
    keyCache: Tensor
    valueCache: Tensor

    def __init__(self, text: Any, head: nn.Linear, context: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(layer, number) for number, layer in enumerate(text.layers))
        self.norm = RowNorm(text.norm)
        self.head = _linear([head])
        cos, sin = _rotation(text, context)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        first: Any = self.layers[0]
        self.group = first.group
        shape = (len(self.layers), first.kv_heads, context, first.head_dim)
        self.register_buffer("keyCache", torch.zeros(shape), persistent=False)
        self.register_buffer("valueCache", torch.zeros(shape), persistent=False)

    def forward(self, inputsEmbeds: Tensor, causalMask: Tensor) -> Tensor:
        end = causalMask.shape[-1]
        begin = end - inputsEmbeds.shape[1]
        rotation = self.cos[begin:end], self.sin[begin:end]
        # One row of the mask for each query head that shares a key head.
        mask = torch.cat([causalMask] * self.group, dim=2)
        x, keys, values = inputsEmbeds, self.keyCache, self.valueCache
        for layer in self.layers:
            x, keys, values = layer(x, rotation, mask, keys, values, begin, end)
        self.keyCache.copy_(keys)
        self.valueCache.copy_(values)
        return self.head(self.norm(x[:, -1:]))


class DecoderLayer(nn.Module):
    """A Llama layer; the queries, keys and values of one product, the heads that share a key side by side so that no key is repeated."""

    def __init__(self, layer: Any, number: int) -> None:
        super().__init__()
        _expect_parameters(layer, DECODER_LAYER, "decoder")
        attention = layer.self_attn
        self.number, self.head_dim, self.group = number, attention.head_dim, attention.num_key_value_groups
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.heads = self.kv_heads * self.group
        if self.head_dim % STATE_MULTIPLE:
            raise ModelError(
                f"the decoder's heads are {self.head_dim} wide; a Core ML state needs a multiple of {STATE_MULTIPLE}, export this model with --target onnx"
            )
        self.qkv = _linear([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = _linear([attention.o_proj])
        self.gate, self.up, self.down = _linear([layer.mlp.gate_proj]), _linear([layer.mlp.up_proj]), _linear([layer.mlp.down_proj])
        self.activation = layer.mlp.act_fn
        self.norm1, self.norm2 = RowNorm(layer.input_layernorm), RowNorm(layer.post_attention_layernorm)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor, keys: Tensor, values: Tensor, begin: int, end: int) -> tuple[Tensor, ...]:
        length, layer, split = x.shape[1], slice(self.number, self.number + 1), self.heads + self.kv_heads
        heads = self.qkv(self.norm1(x)).view(1, length, split + self.kv_heads, self.head_dim).transpose(1, 2)
        turned = _rotate(heads[:, :split], *rotation)
        keys = write_cache(keys, turned[:, self.heads :], self.number, begin, end)
        values = write_cache(values, heads[:, split:], self.number, begin, end)
        queries = turned[:, : self.heads].reshape(1, self.kv_heads, self.group * length, self.head_dim)
        attended = functional.scaled_dot_product_attention(queries, keys[layer, :, :end], values[layer, :, :end], mask)
        x = x + self.out(attended.view(1, self.heads, length, self.head_dim).transpose(1, 2).reshape(1, length, -1))
        normal = self.norm2(x)
        return x + self.down(self.activation(self.gate(normal)) * self.up(normal)), keys, values


class RowNorm(nn.Module):
    """RMSNorm over the last dimension that can't overflow in float16: each row is divided by its largest magnitude first.

    With y = x / m, x / sqrt(mean(x^2) + eps) = y / sqrt(mean(y^2) + eps / m^2) for every m > 0. Without this a hidden state above 255 has a square beyond
    float16's range, and such states occur in every large decoder.
    """

    root_eps: Tensor

    def __init__(self, norm: Any) -> None:
        super().__init__()
        # A tensor, because converters make a number divided by a tensor an inexact reciprocal.
        self.register_buffer("root_eps", torch.tensor([norm.variance_epsilon**0.5]), persistent=False)
        self.weight = nn.Parameter(norm.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        # Any positive number keeps a row of zeros from dividing by zero.
        magnitude = x.abs().amax(-1, keepdim=True) + 2**-6
        scaled, root_eps = x / magnitude, self.root_eps / magnitude
        return scaled * torch.rsqrt((scaled * scaled).mean(-1, keepdim=True) + root_eps * root_eps) * self.weight


@torch.library.custom_op("masters::write_cache", mutates_args=())
def write_cache(cache: Tensor, update: Tensor, layer: int, begin: int, end: int) -> Tensor:
    """`cache` [layers, K, context, d] with positions `begin` to `end` of one layer replaced by `update` [1, K, end - begin, d].

    An operation of its own, since two nested slices of torch become a dozen operations in a converted graph, and this is one there.
    """
    written = cache.clone()
    written[layer : layer + 1, :, begin:end] = update
    return written


@write_cache.register_fake
def _(cache: Tensor, update: Tensor, layer: int, begin: int, end: int) -> Tensor:
    return torch.empty_like(cache)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [1, heads, q, d] by angles [q, d], the halves of d paired (Su et al. 2021, as Llama pairs them)."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def _rotation(text: Any, context: int) -> tuple[Tensor, Tensor]:
    """The cosines and sines [context, d] of every position."""
    kind = text.rotary_emb.rope_type
    if kind not in FIXED_ROPE:
        raise ModelError(f"the decoder's rotary embedding is '{kind}'; Core ML packages hold a fixed table ({', '.join(FIXED_ROPE)}), use --target onnx")
    cos, sin = text.rotary_emb(torch.zeros(1, dtype=torch.float32), torch.arange(context).unsqueeze(0))
    return cos[0].clone(), sin[0].clone()


@torch.no_grad()
def _tile_positions(tower: Any, grid: int) -> Tensor:
    """The position embeddings [1, C, 1, S] of a whole tile: what the tower adds to patches that are zero."""
    embeddings: Any = deepcopy(tower.embeddings)
    for parameter in embeddings.patch_embedding.parameters():
        parameter.zero_()
    side, channels = grid * embeddings.patch_size, embeddings.patch_embedding.in_channels
    rows = embeddings(torch.zeros(1, channels, side, side), torch.ones(1, grid, grid, dtype=torch.bool))
    return rows.transpose(1, 2).unsqueeze(2).clone()


def _shuffle_projection(linear: nn.Linear, scale: int) -> nn.Conv2d:
    """Pixel shuffle and the projection after it as one convolution: a window is a block of the shuffle, which orders its channels by (row, column, channel)."""
    channels = linear.in_features // scale**2
    conv = nn.Conv2d(channels, linear.out_features, scale, stride=scale, bias=linear.bias is not None)
    weight = linear.weight.detach().view(linear.out_features, scale, scale, channels).permute(0, 3, 1, 2)
    return _filled(conv, weight, linear.bias)


def _conv1x1(linear: nn.Linear, factor: float = 1.0) -> nn.Conv2d:
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None)
    return _filled(conv, linear.weight.detach()[:, :, None, None] * factor, None if linear.bias is None else linear.bias.detach() * factor)


def _linear(parts: list[nn.Linear]) -> nn.Linear:
    """Linear layers of the same input as one, their outputs side by side."""
    bias = torch.cat([part.bias.detach() for part in parts]) if parts[0].bias is not None else None
    linear = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts), bias=bias is not None)
    return _filled(linear, torch.cat([part.weight.detach() for part in parts]), bias)


def _filled(module: Any, weight: Tensor, bias: Tensor | None) -> Any:
    module.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone())
    return module


def _expect_parameters(layer: nn.Module, expected: set[str], part: str) -> None:
    """Refuse a layer with parameters that the re-authored one would leave out."""
    found = {name.rpartition(".")[0] for name, _ in layer.named_parameters()}
    if found != expected:
        names = ", ".join(sorted(found ^ expected))
        raise ModelError(f"a {part} layer differs from the re-authored one in {names}; Core ML knows SigLIP towers and Llama decoders, use --target onnx")


def reauthor(vision: tuple[Any, nn.Linear, int], text: tuple[Any, nn.Linear], side: int, context: int) -> Reauthored:
    """The parts of a Hugging Face model made of a SigLIP tower, pixel shuffle and a Llama decoder, in float32.

    `vision` is the tower, the projection after the shuffle and the shuffle's factor, `text` the decoder and its head. `side` is a tile's height and
    width in pixels, `context` the most positions of prompt and answer. Raises ModelError for parts of another make.
    """
    (tower, projection, scale), (decoder, head) = vision, text
    patch = tower.embeddings.patch_size
    if side % (patch * scale):
        raise ModelError(f"a tile is {side} pixels wide; expected a multiple of patch x shuffle ({patch} x {scale}), correct the processor's max_image_size")
    parts = Reauthored(VisionEncoder(tower, projection, scale, side), EmbedTokens(decoder.embed_tokens), Decoder(decoder, head, context))
    for part in (parts.vision_encoder, parts.embed_tokens, parts.decoder):
        part.float().eval().requires_grad_(False)
    return parts
