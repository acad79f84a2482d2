"""The programs that benchmarks/runtime.py sets beside each other, each in a process of its own that takes orders as JSON lines.

    python benchmarks/runtime_peers.py ours:int4 256m

Every peer has `answer(picture, question, tokens)`, from the image file to the last token, and `decode(context, tokens)`, steps behind a text of `context`
tokens; both give the seconds at which each token stood. `weights` are the bytes of its decoder that a token reads, `position` those of a position in its
cache, where they are known. A peer that can't run here raises, and the table shows why.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from runtime_bytes import bytes_read, own_peak
from runtime_models import bundle_folder, model_folder

THREADS = 2
Times = list[float]  # seconds from the start to each token


class Peer(Protocol):
    def answer(self, picture: Path, question: str, tokens: int) -> Times: ...

    def decode(self, context: int, tokens: int) -> Times: ...


class Ours:
    """masters.runtime as an application uses it."""

    def __init__(self, shape: str, settings: str) -> None:
        """`settings` is a form of the bundle, with a provider behind an @ where it is not the CPU's own."""
        from masters.runtime import load

        form, _, provider = settings.partition("@")
        bundle = bundle_folder(shape, form)
        self.vlm = load(bundle, provider.replace("+", ",") or "cpu", threads=THREADS)
        self.weights, self.position = bytes_read(bundle)

    def answer(self, picture: Path, question: str, tokens: int) -> Times:
        answer = self.vlm.answer(question, [picture] if picture.name else [], max_tokens=tokens)
        timings = answer.timings
        self.detail = dict(preprocess=timings.image_preprocess, encode=timings.image_encode, prefill=timings.prefill, prompt=answer.prompt_tokens)
        return _cumulated(timings.first_token / 1000, [step / 1000 for step in timings.decode_steps])

    def decode(self, context: int, tokens: int) -> Times:
        return self.answer(Path(), _text_of(self.vlm.format.tokenizer, context), tokens)


class Torch:
    """transformers' generate(): eager, or with the layers compiled and a static cache."""

    def __init__(self, shape: str, settings: str) -> None:
        import torch

        from masters.export.source import load_source

        torch.set_num_threads(THREADS)
        torch.set_grad_enabled(False)
        self.torch, self.source, dtype = torch, load_source(model_folder(shape)), settings.partition("+")[0]
        self.model = self.source.model.to(getattr(torch, dtype)).eval()
        self.settings: dict[str, Any] = {}
        text, head = self.source.family.text_parts(self.model)
        config, size = text.config, next(text.parameters()).element_size()
        self.weights = size * sum(tensor.numel() for tensor in (*text.layers.parameters(), head.weight))
        self.position = 2 * size * config.num_hidden_layers * config.num_key_value_heads * text.layers[0].self_attn.head_dim
        if settings.endswith("+compiled"):
            model = self.model.model
            tower = getattr(model, "vision_model", None) or model.vision_tower
            for layer in (*text.layers, *(tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer)):
                layer.compile(dynamic=False)
            self.settings = dict(cache_implementation="static")

    def answer(self, picture: Path, question: str, tokens: int) -> Times:
        from masters.export.reference import encode

        start = time.perf_counter()
        prompt = encode(self.source, question, [picture.read_bytes()])
        pixels = {name: tensor.to(self.model.dtype) if tensor.is_floating_point() else tensor for name, tensor in prompt.pixels.items()}
        return self._generate(start, prompt.ids, pixels, tokens)

    def decode(self, context: int, tokens: int) -> Times:
        return self._generate(time.perf_counter(), list(range(100, 100 + context)), {}, tokens)

    def _generate(self, start: float, ids: Any, inputs: dict[str, Any], tokens: int) -> Times:
        times: Times = []

        class Streamer:
            def put(self, value: Any) -> None:
                times.append(time.perf_counter() - start)

            def end(self) -> None: ...

        row = self.torch.as_tensor(ids)[None]
        self.model.generate(
            input_ids=row, attention_mask=self.torch.ones_like(row), **inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens,
            streamer=Streamer(), **self.settings,
        )  # fmt: skip
        return times[1:]  # the prompt itself comes first


class Genai:
    """onnxruntime-genai's generator on our decoder and embedding as one graph; it knows no SmolVLM, so our tower and prompt stand before it."""

    def __init__(self, shape: str, precision: str) -> None:
        import onnxruntime_genai as og
        from runtime_genai import text_model

        self.og, self.model = og, og.Model(str(text_model(shape, precision, THREADS)))
        self.ours = Ours(shape, precision)
        self.weights, self.position = self.ours.weights, self.ours.position

    def answer(self, picture: Path, question: str, tokens: int) -> Times:
        from masters.runtime.chat import user_message

        start = time.perf_counter()
        vlm = self.ours.vlm
        [pixels] = vlm.see([picture])
        vlm.encode(pixels)
        return self._generate(start, vlm.prompt_ids([user_message(question, 1)], pixels.grids).tolist(), tokens)

    def decode(self, context: int, tokens: int) -> Times:
        return self._generate(time.perf_counter(), list(range(100, 100 + context)), tokens)

    def _generate(self, start: float, ids: list[int], tokens: int) -> Times:
        length = len(ids) + tokens
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(do_sample=False, min_length=length, max_length=length)
        generator, times = self.og.Generator(self.model, params), []
        generator.append_tokens(ids)
        for _ in range(tokens):
            generator.generate_next_token()
            times.append(time.perf_counter() - start)
        return times


def _llama(shape: str, kind: str) -> Peer:
    from runtime_llama import Llama

    return Llama(shape, kind, THREADS)


def _openvino(shape: str, settings: str) -> Peer:
    from runtime_openvino import OpenVino

    return OpenVino(shape, settings, THREADS)


def _javascript(shape: str, precision: str) -> Peer:
    from runtime_javascript import JavaScript

    return JavaScript(shape, precision, THREADS)


PEERS: dict[str, Callable[[str, str], Peer]] = {
    "ours": Ours,
    "genai": Genai,
    "torch": Torch,
    "llama.cpp": _llama,
    "openvino": _openvino,
    "transformers.js": _javascript,
}


def _cumulated(first: float, steps: list[float]) -> Times:
    times = [first]
    for step in steps:
        times.append(times[-1] + step)
    return times


def _text_of(tokenizer: Any, tokens: int) -> str:
    """A text of about `tokens` tokens with the prompt's own around it."""
    text = " the colour of"
    return text * (tokens // max(1, len(tokenizer.encode(text).ids)))


def serve(name: str, shape: str) -> None:
    """Answer orders {"do", …} from standard input until it ends."""
    kind, _, settings = name.partition(":")
    start = time.perf_counter()
    peer = PEERS[kind](shape, settings)
    print(json.dumps({"loaded": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "answer":
            times = peer.answer(Path(order["picture"]), order["question"], order["tokens"])
        else:
            times = peer.decode(order["context"], order["tokens"])
        known = {name: getattr(peer, name, 0) for name in ("weights", "position")}
        print(json.dumps({"times": times, "peak": getattr(peer, "peak", own_peak)(), "detail": getattr(peer, "detail", {})} | known), flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:3])
