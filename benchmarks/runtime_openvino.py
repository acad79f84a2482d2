"""OpenVINO as a peer: `pip install openvino nncf`.

OpenVINO GenAI's pipeline (2026.4) knows neither Idefics3 nor InternVL in transformers' own form, so this is what it would run: the tower and a decoder whose
cache is state inside the model, both converted from the PyTorch weights by OpenVINO itself, in its default arithmetic for this processor (bfloat16 where it
has AMX), and a plain loop. Its weights are packed by nncf; `int4+int8` is int4 for every matrix of the decoder and the tower quantised after training.
OpenVINO has no preprocessing for these models: reading the picture and writing the prompt are ours, as in benchmarks/runtime_genai.py's case.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from runtime_models import NARROW, bundle_folder, cache_folder, model_folder, picture_file

from masters.files import whole_folder
from masters.manifest import read_manifest

GROUP = 64  # divides every width of these models; 128 does not
TOWER, DECODER, TABLE = "vision.xml", "decoder.xml", "embedding.npy"


class OpenVino:
    """Two compiled models and the embedding as a table."""

    def __init__(self, shape: str, settings: str, threads: int) -> None:
        import openvino as ov

        from masters.runtime.session import Vlm

        decoder, _, vision = settings.partition("+")
        folder, bundle = graphs(shape, decoder, vision or "bf16"), bundle_folder(shape, NARROW)
        manifest = read_manifest(bundle)
        nothing: Any = None  # template, tokenizer and preprocessing alone are asked for
        self.prompts = Vlm(manifest, bundle, nothing)
        self.image_token = manifest.generation["image_token_id"]
        core = ov.Core()
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        tower, model = (core.compile_model(folder / name, "CPU", options) for name in (TOWER, DECODER))
        self.tower, self.decoder = tower.create_infer_request(), model.create_infer_request()
        self.table = np.load(folder / TABLE, mmap_mode="r")
        properties = {name: str(model.get_property(name)) for name in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")}
        self.detail: dict[str, Any] = {"openvino": ov.__version__, **properties}
        self.weights = (folder / DECODER).with_suffix(".bin").stat().st_size
        # Bytes, and a scale and a zero point in float32 for each head of a position.
        geometry = manifest.decoder
        self.position = 2 * geometry.layers * geometry.kv_heads * (geometry.head_dim + 8) if "uint8" in properties["KV_CACHE_PRECISION"] else 0

    def answer(self, picture: Path, question: str, tokens: int) -> list[float]:
        from masters.runtime.chat import user_message

        start = time.perf_counter()
        [pixels] = self.prompts.see([picture])
        [piece] = pixels.pieces(1)
        self.tower.infer({0: piece["pixel_values"].reshape(self.tower.get_input_tensor(0).shape)})
        features = self.tower.get_output_tensor(0).data
        ids = self.prompts.prompt_ids([user_message(question, 1)], pixels.grids)
        embeds = self._embed(ids)
        embeds[ids == self.image_token] = features.reshape(-1, embeds.shape[1])
        return self._generate(start, embeds, tokens)

    def decode(self, context: int, tokens: int) -> list[float]:
        return self._generate(time.perf_counter(), self._embed(np.arange(100, 100 + context)), tokens)

    def _embed(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(self.table[ids], np.float32)

    def _generate(self, start: float, embeds: np.ndarray, tokens: int) -> list[float]:
        self.detail["prompt"], times, known = len(embeds), [], 0
        self.decoder.reset_state()
        for _ in range(tokens):
            positions = np.arange(known, known + len(embeds), dtype=np.int64)
            inputs = {"inputs_embeds": embeds[None], "position_ids": positions[None], "beam_idx": np.zeros(1, np.int32)}
            self.decoder.infer(inputs, share_inputs=True)
            known += len(embeds)
            embeds = self._embed(np.array([self.decoder.get_output_tensor(0).data[0, -1].argmax()]))
            times.append(time.perf_counter() - start)
        return times


def graphs(shape: str, decoder: str, vision: str) -> Path:
    """Tower, decoder and embedding of `shape`, converted once."""
    folder = cache_folder() / shape / f"openvino-{decoder}-{vision}"
    if not folder.exists():
        import openvino as ov

        from masters.export.source import load_source

        source = load_source(model_folder(shape))
        with whole_folder(folder) as part:
            ov.save_model(packed_tower(source, vision), part / TOWER, compress_to_fp16=True)
            ov.save_model(packed_decoder(source, decoder), part / DECODER, compress_to_fp16=True)
            np.save(part / TABLE, source.model.get_input_embeddings().weight.detach().numpy().astype(np.float16))
    return folder


def packed_tower(source: Any, kind: str) -> Any:
    """The tower on one whole tile: 'bf16' leaves its weights in 16 bits, 'int8' quantises weights and what they are multiplied with."""
    import nncf
    import openvino as ov
    import torch

    from masters.export.reference import encode

    pixels = encode(source, "?", [picture_file()]).pixels
    tile = pixels["pixel_values"].reshape(1, 3, *pixels["pixel_values"].shape[-2:])
    with torch.no_grad():
        tower = ov.convert_model(tower_module(source).eval(), example_input=tile, input=[tuple(tile.shape)])
    if kind == "int8":
        return nncf.quantize(tower, nncf.Dataset([tile.numpy()]), subset_size=1, model_type=nncf.ModelType.TRANSFORMER)
    return tower


def tower_module(source: Any) -> Any:
    """Pixels f32[1, 3, side, side] of a tile without padding -> features; what get_image_features computes, without its search for padding."""
    import torch

    class Tile(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = source.model.model

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            if source.model_type == "internvl":
                found: torch.Tensor = self.model.get_image_features(pixels, return_dict=True).pooler_output
                return found
            tower = self.model.vision_model
            x = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2) + tower.embeddings.position_embedding.weight
            features: torch.Tensor = self.model.connector(tower.post_layernorm(tower.encoder(inputs_embeds=x).last_hidden_state))
            return features

    return Tile()


def packed_decoder(source: Any, kind: str) -> Any:
    """The decoder from embeddings to the last position's logits, its cache as state, every matrix of `kind` (int4, int8)."""
    import nncf
    import openvino as ov
    import torch
    from openvino import opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    text, head = source.family.text_parts(source.model)
    config = text.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    past = [torch.zeros(1, config.num_key_value_heads, 3, width) for _ in range(2 * config.num_hidden_layers)]
    with torch.no_grad():
        model = ov.convert_model(decoder_module(text, head).eval(), example_input=(torch.zeros(1, 2, config.hidden_size), torch.tensor([[3, 4]]), *past))
    names = [f"{{}}.{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]
    for port, name in zip(model.inputs, ["inputs_embeds", "position_ids", *(name.format("past") for name in names)], strict=True):
        port.get_tensor().set_names({name})
    for port, name in zip(model.outputs, ["logits", *(name.format("present") for name in names)], strict=True):
        port.get_tensor().set_names({name})
    shapes = {name.format("past"): [1, config.num_key_value_heads, -1, width] for name in names}
    model.reshape({"inputs_embeds": [1, -1, config.hidden_size], "position_ids": [1, -1]} | shapes)
    # OpenVINO's attention with state is recognised by the choice of a beam between the state and what is appended to it.
    beam = opset13.parameter([1], np.int32, name="beam_idx")
    beam.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([beam])
    for name in shapes:
        port = model.input(name)
        readers = port.get_target_inputs()
        chosen = opset13.gather(port, beam, opset13.constant(0))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, {name.format("past"): name.format("present") for name in names})
    empty = opset13.constant(np.zeros((1, config.num_key_value_heads, 0, width), np.float32))
    for op in model.get_ops():
        if op.get_type_name() == "ReadValue":
            op.set_arguments([empty.output(0)])
    model.validate_nodes_and_infer_types()
    if kind == "int4":
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=GROUP, ratio=1.0, all_layers=True)
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)


def decoder_module(text: Any, head: Any) -> Any:
    """(embeds f32[1, S, D], positions i64[1, S], past keys and values) -> (logits f32[1, 1, V], present keys and values)."""
    import torch
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    def layer(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
        found = DynamicLayer()
        found.lazy_initialization(keys, values)
        found.keys, found.values = keys, values  # appended to as they are, not to an empty tensor, which has no axes
        return found

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.head = text, head

        def forward(self, embeds: torch.Tensor, positions: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
            cache = DynamicCache()
            cache.layers = [layer(keys, values) for keys, values in zip(past[::2], past[1::2], strict=True)]
            total = past[0].shape[2] + embeds.shape[1]
            seen = torch.arange(total)[None] <= positions[0][:, None]
            mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
            found = self.text(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
            return self.head(found.last_hidden_state[:, -1:]), *present

    return Decoder()
