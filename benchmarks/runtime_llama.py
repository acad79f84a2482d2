"""llama.cpp as a peer: its own server on GGUF files of the same weights, the picture through its multimodal part.

`llama-server` is taken from $LLAMA_SERVER or PATH; else the same C++ code out of the wheel xllamacpp, which knows no instructions newer than AVX2.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from runtime_bytes import own_peak
from runtime_models import INTERNVL_SIDE, cache_folder, model_folder

from masters.files import read_json, whole_folder

WHEEL = """
import signal, sys, xllamacpp
model, mmproj, port, threads = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.mmproj.path, params.port, params.hostnames = model, mmproj, int(port), ["127.0.0.1"]
params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.cpuparams_batch.n_threads = 4096, 1, int(threads), int(threads)
params.use_jinja, params.cache_ram_mib, params.cache_prompt = True, 0, False
server = xllamacpp.Server(params)
signal.sigwait({signal.SIGTERM, signal.SIGINT})
"""


class Llama:
    """The server and a client that sends the picture's bytes."""

    def __init__(self, shape: str, kind: str, threads: int) -> None:
        text, _, vision = kind.partition("+")
        files = gguf_folder(shape, text, vision or "F16")
        self.side = INTERNVL_SIDE if shape.startswith("internvl") else None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
        model, mmproj = files / "model.gguf", files / "mmproj.gguf"
        settings = read_json(model_folder(shape) / "config.json")["text_config"]
        self.weights = model.stat().st_size
        self.position = 2 * 2 * settings["num_hidden_layers"] * settings["num_key_value_heads"] * settings["head_dim"]  # float16
        ours = [
            "-m",
            model,
            "--mmproj",
            mmproj,
            "--port",
            port,
            "-t",
            threads,
            "-tb",
            threads,
            "-c",
            4096,
            "-np",
            1,
            "--cache-ram",
            0,
            "--no-cache-prompt",
            "--jinja",
        ]
        command = [server, *ours] if server else [sys.executable, "-c", WHEEL, model, mmproj, port, threads]
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 - as long as the server lives
        self.server = subprocess.Popen([str(part) for part in command], stdout=self.log, stderr=subprocess.STDOUT)
        self.url = f"http://127.0.0.1:{port}"
        self.detail: dict[str, Any] = {"server": Path(server).name if server else "xllamacpp (AVX2)"}
        self._wait()

    def __del__(self) -> None:
        self.server.kill()

    def answer(self, picture: Path, question: str, tokens: int) -> list[float]:
        start = time.perf_counter()
        image = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(fitted(picture, self.side)).decode()}}
        messages = [{"role": "user", "content": [image, {"type": "text", "text": question}]}]
        found = self._ask("/v1/chat/completions", messages=messages, max_tokens=tokens)
        total = time.perf_counter() - start
        return self._times(found["timings"], total)

    def decode(self, context: int, tokens: int) -> list[float]:
        start = time.perf_counter()
        found = self._ask("/completion", prompt=list(range(100, 100 + context)), n_predict=tokens)
        return self._times(found["timings"], time.perf_counter() - start)

    def peak(self) -> int:
        return own_peak(self.server.pid)

    def _times(self, timings: dict[str, float], total: float) -> list[float]:
        """The server counts its steps together, so they come out equal."""
        steps, spent = int(timings["predicted_n"]) - 1, timings["predicted_ms"] / 1000
        self.detail["prompt"] = timings["prompt_n"]
        return [total - spent + spent * step / steps for step in range(steps + 1)]

    def _ask(self, path: str, **settings: Any) -> dict[str, Any]:
        body = json.dumps(settings | {"temperature": 0, "top_k": 1, "ignore_eos": True, "cache_prompt": False}).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as reply:
            found: dict[str, Any] = json.load(reply)
        return found

    def _wait(self) -> None:
        for _ in range(600):
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=5):
                    return
            except OSError:
                if self.server.poll() is not None:
                    break
                time.sleep(0.2)
        raise RuntimeError(f"llama.cpp's server did not start: {Path(self.log.name).read_text().strip().splitlines()[-1][:200]}")


def gguf_folder(shape: str, text: str, vision: str) -> Path:
    """Model and projector as GGUF."""
    from runtime_gguf import write_gguf

    folder = cache_folder() / shape / f"gguf-{text}-{vision}"
    if not folder.exists():
        with whole_folder(folder) as part:
            write_gguf(model_folder(shape), part, text, vision)
    return folder


def fitted(picture: Path, side: int | None) -> bytes:
    """The picture's bytes, or a smaller one's: InternVL's is encoded twice, cut and whole, unless it has a tile's size already."""
    if side is None:
        return picture.read_bytes()
    from PIL import Image

    stream = io.BytesIO()
    Image.open(picture).resize((side, side)).save(stream, "bmp")
    return stream.getvalue()
