"""A server under four times the load that it can bear: what becomes of every request, and of its memory.

    python benchmarks/load.py [BUNDLE] [--requests 10000] [--times 4]

Measures how many answers a second `masters serve` gives to clients that wait for each other, then sends requests at `times` that rate whatever
comes back: questions about different images, whole and streamed, one in twenty malformed, one in fifty from a client that hangs up. Each answer
is compared with the model's own. Without BUNDLE the demo's student is exported first.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from masters.demo.demo import HERE
from masters.runtime import Vlm, load
from masters.runtime.device import this_device

QUESTIONS = ("what color is the shape?", "how many digits are there?", "is it a circle?", "what shape is in the image?")
IMAGES = 6
MAX_TOKENS = 8
WORKERS = 64  # connections at once
SAMPLE_SECONDS = 0.25


@dataclass(frozen=True)
class Question:
    """What is asked about which file, and the answer that it must get."""

    text: str
    image: bytes
    expected: str

    def body(self, number: int, stream: bool) -> bytes:
        """A request; its number behind the picture's end makes the file one that the server has not seen before."""
        url = "data:image/png;base64," + base64.b64encode(self.image + number.to_bytes(4, "big")).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self.text}]
        return json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": MAX_TOKENS, "stream": stream}).encode()


def questions(vlm: Vlm) -> list[Question]:
    return [Question(text, image, vlm.answer(text, [image], max_tokens=MAX_TOKENS).text) for image in map(picture, range(IMAGES)) for text in QUESTIONS]


def picture(seed: int) -> bytes:
    """A rectangle on a ground of another colour, as a file."""
    rng = random.Random(seed)
    image = Image.new("RGB", (640, 480), tuple(rng.randrange(256) for _ in range(3)))
    image.paste(tuple(rng.randrange(256) for _ in range(3)), (seed * 50, 100, seed * 50 + 300, 380))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@contextlib.contextmanager
def server(bundle: Path) -> Iterator[tuple[int, int]]:
    """`masters serve` with its defaults: (port, process id)."""
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        command = [sys.executable, "-m", "masters.cli", "serve", str(bundle), "--port", "0"]
        with subprocess.Popen(command, stdout=log, stderr=log) as process:
            while not (found := re.search(r"at http://[\d.]+:(\d+) ", Path(log.name).read_text())):
                if process.poll() is not None:
                    raise SystemExit(Path(log.name).read_text())
                time.sleep(0.05)
            yield int(found[1]), process.pid
            process.terminate()
            print(f"exit code after SIGTERM: {process.wait(60)}")


def rss_mb(process: int) -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) * 1024 / 1e6  # type: ignore[index]


def ask(port: int, question: Question, number: int, kind: str) -> str:
    """What became of one request, in a word or two."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        body = b"{" * (kind == "malformed") + question.body(number, kind == "streamed")
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        if kind == "hangs up":
            return "hung up"
        response = connection.getresponse()
        text = response.read().decode()
        if kind == "malformed":
            return f"malformed: {response.status}" if response.status in (400, 429) else f"WRONG: {response.status} to a malformed request"
        if response.status == 429:
            return "429 with Retry-After" if response.headers["Retry-After"] else "WRONG: 429 without Retry-After"
        if response.status != 200:
            return f"WRONG: {response.status}"
        said = streamed(text) if kind == "streamed" else json.loads(text)["choices"][0]["message"]["content"]
        return f"right answer, {kind}" if said == question.expected else "WRONG: another answer"
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"LOST: {type(error).__name__}"
    finally:
        connection.close()


def streamed(text: str) -> str:
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    if lines[-1] != "[DONE]":
        raise ValueError("a stream without its end")
    return "".join(choice["delta"].get("content") or "" for line in lines[:-1] for choice in json.loads(line)["choices"])


def capacity(port: int, asked: list[Question], seconds: float = 8.0) -> float:
    """Answers a second to two clients that each wait for their answer."""
    end = time.monotonic() + seconds

    def client(place: int) -> int:
        count = 0
        while time.monotonic() < end:
            count += ask(port, asked[(place + count) % len(asked)], 1_000_000 * place + count, "whole").startswith("right")
        return count

    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(client, (1, 2))) / seconds


def flood(port: int, process: int, asked: list[Question], count: int, rate: float) -> tuple[Counter[str], list[float], float]:
    """Outcomes, the server's memory over time in MB, and the rate that the clients really reached, in requests a second."""
    rng = random.Random(0)
    outcomes: Counter[str] = Counter()
    memory: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            memory.append(rss_mb(process))

    def send(number: int) -> str:
        time.sleep(max(0.0, start + number / rate - time.monotonic()))
        return ask(port, asked[number % len(asked)], number, kinds[number])

    kinds = rng.choices(("whole", "streamed", "malformed", "hangs up"), (46, 47, 5, 2), k=count)
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.monotonic()
    with ThreadPoolExecutor(WORKERS) as pool:
        outcomes.update(pool.map(send, range(count)))
    done.set()
    watcher.join()
    return outcomes, memory, count / (time.monotonic() - start)


def report(outcomes: Counter[str], memory: list[float]) -> bool:
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:7,}  {outcome}")
    print("memory over the run, MB:", *(f"{memory[len(memory) * i // 12]:.0f}" for i in range(12)), f"{memory[-1]:.0f}")
    third, last = (statistics.median(memory[len(memory) * i // 4 : len(memory) * (i + 1) // 4]) for i in (2, 3))
    print(f"memory of the server, medians: third quarter {third:.1f} MB, last quarter {last:.1f} MB, growth {100 * (last / third - 1):+.2f}%")
    bad = sum(number for outcome, number in outcomes.items() if outcome.startswith(("WRONG", "LOST")))
    print(f"lost or wrong: {bad}")
    return bad == 0 and last / third <= 1.02


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--times", type=float, default=4.0)
    options = parser.parse_args()
    os.environ.pop("MASTERS_API_KEY", None)
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle or exported(Path(folder) / "student")
        print(this_device())
        asked = questions(load(bundle))
        with server(bundle) as (port, process):
            able = capacity(port, asked)
            print(f"capacity {able:.0f} answers a second; sending {options.times:g} times as many requests")
            outcomes, memory, rate = flood(port, process, asked, options.requests, options.times * able)
            print(f"{options.requests:,} requests at {rate:.0f} a second, {rate / able:.1f} times the capacity")
            fine = report(outcomes, memory)
    sys.exit(0 if fine else 1)


def exported(folder: Path) -> Path:
    from masters.export import ExportConfig, export

    export(ExportConfig(HERE / "student", "onnx", folder, "int8"))
    return folder


if __name__ == "__main__":
    main()
