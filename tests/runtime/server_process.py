"""A server in a process of its own, and how to talk to it."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from torch_reference import picture

SLOW = """
import sys, time
from pathlib import Path
import numpy as np
from masters.runtime import load
from masters.runtime.serve import ServeConfig, serve

class Slow:
    def __init__(self, parts): self.parts = parts
    def __getattr__(self, name): return getattr(self.parts, name)
    def decode(self, embeds, cache, *positions):
        time.sleep(DELAY)
        logits = self.parts.decode(embeds, cache, *positions).copy()
        logits[vlm.manifest.generation["eos_token_ids"]] = -np.inf
        return logits

vlm = load(sys.argv[1], threads=1)
vlm.parts = Slow(vlm.parts)
serve(ServeConfig(Path(sys.argv[1]), port=0, OPTIONS), vlm)
"""


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(self, method: str, path: str, body: bytes | str | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        finally:
            connection.close()

    def ask(self, **body: Any) -> tuple[int, Any]:
        status, _, answer = self.request("POST", "/v1/chat/completions", json.dumps(body))
        return status, json.loads(answer)

    def metric(self, name: str, **labels: str) -> float:
        families = text_string_to_metric_families(self.request("GET", "/metrics")[2].decode())
        found = [sample.value for family in families for sample in family.samples if sample.name == name and labels.items() <= sample.labels.items()]
        assert found, f"no metric {name}"
        return sum(found)

    def wait_for(self, name: str, value: float, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while (found := self.metric(name)) != value:
            assert time.monotonic() < end, f"{name} stays {found}, expected {value}"
            time.sleep(0.02)


@contextlib.contextmanager
def served(bundle: Path, *options: str, key: str | None = None) -> Iterator[Running]:
    """`masters serve` on a free port; killed at the end if it still runs."""
    command = [sys.executable, "-m", "masters.cli", "serve", str(bundle), "--port", "0", "--threads", "2", *options]
    with _started(command, key) as running:
        yield running


@contextlib.contextmanager
def served_slowly(bundle: Path, options: str, delay: float = 0.02) -> Iterator[Running]:
    """The same server around a model that takes `delay` seconds a token and never ends by itself: there is time to interfere."""
    code = SLOW.replace("DELAY", str(delay)).replace("OPTIONS", options)
    with _started([sys.executable, "-c", code, str(bundle)], None) as running:
        yield running


@contextlib.contextmanager
def _started(command: list[str], key: str | None) -> Iterator[Running]:
    environment = {name: value for name, value in os.environ.items() if name != "MASTERS_API_KEY"} | ({"MASTERS_API_KEY": key} if key else {})
    with tempfile.NamedTemporaryFile(suffix=".log") as log, subprocess.Popen(command, env=environment, stderr=log, stdout=log) as process:
        try:
            yield Running(process, _port(process, log), Path(log.name))
        finally:
            process.kill()


def _port(process: subprocess.Popen[bytes], log: IO[bytes]) -> int:
    end = time.monotonic() + 60
    while True:
        text = Path(log.name).read_text()
        if found := re.search(r"at http://[\d.]+:(\d+) ", text):
            return int(found[1])
        assert process.poll() is None, text
        assert time.monotonic() < end, f"the server does not start: {text}"
        time.sleep(0.05)


def encoded(seed: int, width: int = 50, height: int = 80, form: str = "PNG") -> bytes:
    """A picture of `torch_reference` as a file."""
    file = io.BytesIO()
    picture(seed, width, height).save(file, form)
    return file.getvalue()


def data_url(image: bytes | Image.Image) -> str:
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, "PNG")
        image = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()


def image_part(image: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def user_turn(question: str, *images: bytes) -> dict[str, Any]:
    return {"role": "user", "content": [*map(image_part, images), {"type": "text", "text": question}]}
