"""The decoder_model_merged graph, authored: a decoder of Llama's, Qwen2's or Qwen3's shape on ONNX Runtime's fused operators.

Packed query, key and value projections, GroupQueryAttention with the rotary embedding inside (before it, where positions have three axes), skip
connections fused into the norms, and logits for the last positions alone. One graph serves prompts and single steps, a cache that grows from nothing
(transformers.js) and one buffer that is past and present at once (the runtime here).

Shapes: B batch, S new positions, P past positions, T = P + S, D hidden, H query heads, K key/value heads, h head size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from ..errors import ModelError
from .graph import MICROSOFT, GraphAuthor

SUPPORTED = ("llama", "qwen2", "qwen3", "qwen2_5_vl_text", "qwen3_vl_text")  # text_config.model_type
AXES = 3  # of a position in a picture: time, height, width
LAST = 2**63 - 1


def build_decoder(
    text_model: Any, lm_head: torch.nn.Linear, half: bool = False, context: int | None = None, injected: int = 0, head_by_rows: bool = False
) -> ir.Model:
    """The graph of a Hugging Face decoder (`text_model`: embed_tokens, layers, norm, rotary_emb) and its head.

    Inputs inputs_embeds f32[B,S,D], attention_mask i64[B,T], position_ids i64[B,S] (i64[3,B,S] where the model's positions have three axes),
    past_key_values.{i}.key/.value [B,K,P,h], num_logits_to_keep i64[] (0 keeps all); outputs logits f32[B,kept,V], present.{i}.key/.value [B,K,T,h].
    With `half`, weights, cache and arithmetic are float16. `context` is the most positions (None: the model's own). Padding, where a batch has
    some, stands on the right. The outputs of the first `injected` layers each get a vector of their own added: these stand behind the embedding,
    inputs_embeds f32[B,S,(1+injected)·D], so that programs which know one row per token carry them along. With `head_by_rows` the head's weight is
    stored [V,D], as an embedding that is the same matrix has it. Raises ModelError for other architectures.
    """
    check_decoder(text_model.config)
    longest = context or text_model.config.max_position_embeddings
    return _Decoder(text_model, lm_head, ir.DataType.FLOAT16 if half else ir.DataType.FLOAT, longest, injected, head_by_rows).build()


def check_decoder(config: Any) -> None:
    """Raise ModelError unless the graph below computes what this text config describes."""
    if config.model_type not in SUPPORTED:
        raise ModelError(f"the decoder is of type '{config.model_type}'; expected one of {', '.join(SUPPORTED)}, this version can't export another")
    if config.hidden_act != "silu":
        raise ModelError(f"the decoder's activation is '{config.hidden_act}'; expected 'silu', this version can't export another")
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if other:
        raise ModelError(f"the decoder has layers of '{min(other)}'; expected 'full_attention' in every one, this version can't export another")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    # These two change the angles with the length of the prompt, a stored table can't.
    if rope in ("dynamic", "longrope"):
        raise ModelError(f"the decoder's rotary embedding is of type '{rope}'; expected one whose angles depend on the position alone")


def product_layers(text_model: Any, lm_head: torch.nn.Linear) -> dict[str, tuple[torch.nn.Linear, ...]]:
    """The layers whose weights stand side by side in each product of the graph, by the product's name; its weight is called `<name>.weight`."""
    found: dict[str, tuple[torch.nn.Linear, ...]] = {"lm_head": (lm_head,)}
    for index, layer in enumerate(text_model.layers):
        attention, mlp, name = layer.self_attn, layer.mlp, f"layers.{index}"
        found[f"{name}.attention.qkv"] = (attention.q_proj, attention.k_proj, attention.v_proj)
        found[f"{name}.attention.o"] = (attention.o_proj,)
        found |= {f"{name}.mlp.gate": (mlp.gate_proj,), f"{name}.mlp.up": (mlp.up_proj,), f"{name}.mlp.down": (mlp.down_proj,)}
    return found


class _Decoder:
    """The graph under construction: what every layer needs, computed once."""

    def __init__(self, text_model: Any, lm_head: torch.nn.Linear, dtype: ir.DataType, context: int, injected: int, head_by_rows: bool) -> None:
        self.text_model, self.lm_head, self.dtype, self.context, self.config = text_model, lm_head, dtype, context, text_model.config
        self.products = product_layers(text_model, lm_head)
        self.injected, self.head_by_rows = injected, head_by_rows
        self.axes = hasattr(text_model.rotary_emb, "mrope_section")
        self.author = GraphAuthor("decoder_model_merged")

    def build(self) -> ir.Model:
        author, config = self.author, self.config
        embeds = author.input("inputs_embeds", ir.DataType.FLOAT, ("batch_size", "sequence_length", (1 + self.injected) * config.hidden_size))
        mask = author.input("attention_mask", ir.DataType.INT64, ("batch_size", "total_sequence_length"))
        axes = (AXES,) if self.axes else ()
        self.positions = author.input("position_ids", ir.DataType.INT64, (*axes, "batch_size", "sequence_length"))
        self._lengths(mask)
        self._rotary_of_axes() if self.axes else self._rotary()
        hidden = embeds if self.dtype == ir.DataType.FLOAT else author.cast(embeds, self.dtype)
        hidden, *added = self._split(hidden, (config.hidden_size,) * (1 + self.injected)) if self.injected else (hidden,)
        residual, normed = hidden, self._norm(hidden, self.text_model.layers[0].input_layernorm, "layers.0.attention_norm")
        for index, layer in enumerate(self.text_model.layers):
            normed, residual = self._skip_norm(
                self._attention(normed, layer.self_attn, index), residual, layer.post_attention_layernorm, f"layers.{index}.mlp_norm"
            )
            if index < len(added):
                residual = author.op("Add", residual, added[index])
            last = index + 1 == len(self.text_model.layers)
            following = self.text_model.norm if last else self.text_model.layers[index + 1].input_layernorm
            name = "norm" if last else f"layers.{index + 1}.attention_norm"
            normed, residual = self._skip_norm(self._mlp(normed, index), residual, following, name)
        self._logits(normed)
        return author.model()

    def _lengths(self, mask: ir.Value) -> None:
        """GroupQueryAttention's own description of the mask: each row's last position i32[B], and the longest row's length i32[]."""
        op, constant = self.author.op, self.author.constant
        count = op("ReduceSum", mask, constant([1]), keepdims=0)
        self.last_position = self.author.cast(op("Sub", count, constant([1])), ir.DataType.INT32)
        self.total = self.author.cast(op("Gather", op("Shape", mask), constant(1), axis=0), ir.DataType.INT32)

    def _rotary(self) -> None:
        """Tables of cosines and sines for every position, [context, h/2], as the Hugging Face module computes them (scaled variants included)."""
        positions = torch.arange(self.context)[None]
        with torch.no_grad():
            tables = self.text_model.rotary_emb(torch.zeros(1), positions)
        half = tables[0].shape[-1] // 2
        self.cos, self.sin = (self._table(f"rotary.{name}", table[0, :, :half]) for name, table in zip(("cos", "sin"), tables, strict=True))

    def _rotary_of_axes(self) -> None:
        """Cosines and sines of each new position, [B·S, h/2], a row each: every frequency turns with one of the three axes."""
        op, constant, rotary = self.author.op, self.author.constant, self.text_model.rotary_emb
        frequencies = rotary.inv_freq.detach().float().numpy()
        placed = self.author.cast(op("Transpose", self.positions, perm=[1, 2, 0]), ir.DataType.FLOAT)  # B, S, 3
        angles = op("Mul", op("Gather", placed, constant(_axis_of_frequencies(rotary)), axis=2), self.author.array("rotary.frequencies", frequencies))
        angles = op("Reshape", angles, constant([-1, len(frequencies)]))
        scale = constant(rotary.attention_scaling, "float32")
        tables = [op("Mul", op(kind, angles), scale) for kind in ("Cos", "Sin")]
        self.cos, self.sin = tables if self.dtype == ir.DataType.FLOAT else (self.author.cast(table, self.dtype) for table in tables)
        count = op("Gather", op("Shape", self.cos), constant(0))
        self.rows = op("Reshape", op("Range", constant(0), count, constant(1)), op("Slice", op("Shape", self.positions), constant([1]), constant([3])))

    def _norm(self, x: ir.Value, norm: Any, name: str) -> Any:
        """A norm without a skip connection before it; in standard operators, which ONNX Runtime fuses by itself. Computed in float32 as everywhere."""
        op = self.author.op
        wide = x if self.dtype == ir.DataType.FLOAT else self.author.cast(x, ir.DataType.FLOAT)
        mean = op("ReduceMean", op("Pow", wide, self.author.constant(2, "float32")), self.author.constant([-1]), keepdims=1)
        scaled = op("Div", wide, op("Sqrt", op("Add", mean, self.author.constant(norm.variance_epsilon, "float32"))))
        narrow = scaled if self.dtype == ir.DataType.FLOAT else self.author.cast(scaled, self.dtype)
        return op("Mul", narrow, self._table(f"{name}.weight", norm.weight))

    def _skip_norm(self, x: ir.Value, skip: ir.Value, norm: Any, name: str) -> tuple[Any, Any]:
        """(norm(x + skip), x + skip)."""
        gamma = self._table(f"{name}.weight", norm.weight)
        outputs = self.author.op(
            "SkipSimplifiedLayerNormalization", x, skip, gamma, name=name, outputs=4, domain=MICROSOFT, epsilon=float(norm.variance_epsilon)
        )
        return outputs[0], outputs[3]

    def _attention(self, x: ir.Value, attention: Any, index: int) -> Any:
        config, name = self.config, f"layers.{index}.attention"
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        cache_shape = ("batch_size", kv_heads, "past_sequence_length", attention.head_dim)
        past = [self.author.input(f"past_key_values.{index}.{kind}", self.dtype, cache_shape) for kind in ("key", "value")]
        packed = self._linear(x, f"{name}.qkv")
        normed = hasattr(attention, "q_norm")
        query = self._query_key_value(packed, attention, name, normed) if normed or self.axes else (packed, None, None)
        rotary = () if self.axes else (self.cos, self.sin, self.positions)
        mixed, *present = self.author.op(
            "GroupQueryAttention",
            *(*query, *past, self.last_position, self.total, *rotary),
            name=name,
            outputs=3,
            domain=MICROSOFT,
            num_heads=heads,
            kv_num_heads=kv_heads,
            scale=float(attention.scaling),
            do_rotary=int(not self.axes),
            rotary_interleaved=0,
        )
        for value, kind in zip(present, ("key", "value"), strict=True):
            # Not total_sequence_length: where past and present share a buffer, this is the buffer's length.
            self.author.output(value, f"present.{index}.{kind}", self.dtype, (*cache_shape[:2], "present_sequence_length", attention.head_dim))
        return self._linear(mixed, f"{name}.o")

    def _query_key_value(self, packed: ir.Value, attention: Any, name: str, normed: bool) -> tuple[Any, Any, Any]:
        """The packed projections apart, [B,S,heads·h] each: query and key with their norms over h, and turned by positions of three axes."""
        size = attention.head_dim
        counts = (self.config.num_attention_heads, self.config.num_key_value_heads)
        query, key, value = self._split(packed, (counts[0] * size, counts[1] * size, counts[1] * size))
        turned = []
        for x, kind, heads in zip((query, key), ("q", "k"), counts, strict=True):
            if normed:
                by_head = self.author.op("Reshape", x, self.author.constant([0, 0, heads, size]))
                by_head = self._norm(by_head, getattr(attention, f"{kind}_norm"), f"{name}.{kind}_norm")
                x = self.author.op("Reshape", by_head, self.author.constant([0, 0, heads * size]))
            turned.append(self.author.op("RotaryEmbedding", x, self.rows, self.cos, self.sin, domain=MICROSOFT) if self.axes else x)
        return turned[0], turned[1], value

    def _split(self, x: ir.Value, sizes: tuple[int, ...]) -> Any:
        return self.author.op("Split", x, self.author.constant(sizes), outputs=len(sizes), axis=-1)

    def _mlp(self, x: ir.Value, index: int) -> Any:
        gate = self._linear(x, f"layers.{index}.mlp.gate")
        up = self._linear(x, f"layers.{index}.mlp.up")
        silu = self.author.op("Mul", gate, self.author.op("Sigmoid", gate))
        return self._linear(self.author.op("Mul", silu, up), f"layers.{index}.mlp.down")

    def _logits(self, normed: ir.Value) -> None:
        """Logits of the last num_logits_to_keep positions: a prompt's other logits would be S x V numbers that nobody reads."""
        author, op = self.author, self.author.op
        kept = author.input("num_logits_to_keep", ir.DataType.INT64, ())
        start = op("Reshape", op("Neg", kept), author.constant([1]))
        hidden = op("Slice", normed, start, author.constant([LAST]), author.constant([1]))
        logits = self._by_rows(hidden, "lm_head") if self.head_by_rows else self._linear(hidden, "lm_head")
        if self.dtype != ir.DataType.FLOAT:
            logits = author.cast(logits, ir.DataType.FLOAT)
        author.output(logits, "logits", ir.DataType.FLOAT, ("batch_size", "num_logits", self.lm_head.out_features))
        # present.* were declared layer by layer; readers expect the logits first.
        author.outputs.insert(0, author.outputs.pop())

    def _linear(self, x: ir.Value, name: str) -> Any:
        """x times the weights of the product's layers side by side, [D, sum of outputs], plus their biases where they have some."""
        layers = self.products[name]
        shape = (layers[0].in_features, sum(layer.out_features for layer in layers))
        weight = self.author.weight(f"{name}.weight", shape, self.dtype, lambda: torch.cat([layer.weight.detach() for layer in layers]).T)
        return self._biased(self.author.op("MatMul", x, weight, name=name), name)

    def _by_rows(self, x: ir.Value, name: str) -> Any:
        """The same of a single layer whose weight stands as the layer has it, [outputs, D]."""
        op, constant, (layer,) = self.author.op, self.author.constant, self.products[name]
        weight = self.author.weight(f"{name}.weight", tuple(layer.weight.shape), self.dtype, lambda: layer.weight)
        product = op("Gemm", op("Reshape", x, constant([-1, layer.in_features])), weight, name=name, transB=1)
        shape = op("Concat", op("Shape", x, start=0, end=2), constant([layer.out_features]), axis=0)
        return self._biased(op("Reshape", product, shape), name)

    def _biased(self, product: ir.Value, name: str) -> Any:
        layers = self.products[name]
        if all(layer.bias is None for layer in layers):
            return product
        bias = [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in layers]
        return self.author.op("Add", product, self._table(f"{name}.bias", torch.cat(bias)))

    def _table(self, name: str, values: torch.Tensor) -> ir.Value:
        return self.author.weight(name, tuple(values.shape), self.dtype, lambda: values)


def _axis_of_frequencies(rotary: Any) -> list[int]:
    """Which axis of a position turns each frequency: asked of the model's own module, one axis at a time."""
    probe = torch.eye(AXES)[:, None].long()  # position number a is 1 on axis a and 0 on the others
    with torch.no_grad():
        _, sines = rotary(torch.zeros(1), probe)
    return [int(axis) for axis in sines[0, :, : sines.shape[-1] // 2].abs().argmax(0)]
