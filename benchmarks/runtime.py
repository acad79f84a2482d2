"""The runtime beside other programs: one image and some 40 tokens of text, 50 tokens of answer, on the same machine in the same run.

    python benchmarks/runtime.py [--shapes 256m,500m,internvl-1b] [--peers ours:int4,torch:bfloat16,…] [--rounds 3] [--decode] [--cold]

Random models of the real sizes (made once, see runtime_models.py). Every program lives in a process of its own and they answer in turn, round by round;
medians and their ratios to the first of the list are printed as markdown. A program that can't run here has its reason in the table's place.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from read_bandwidth import read_bandwidth
from runtime_models import SHAPES, bundle_folder, picture_file
from runtime_peers import THREADS

from masters.manifest import read_manifest

HERE = Path(__file__).resolve().parent
PEERS = (
    "ours:int4/128/4,ours:int4,ours:int8,genai:int4/128/4,genai:int4,llama.cpp:Q4_0+F16,llama.cpp:Q4_0+Q8_0,llama.cpp:Q8_0+Q8_0,openvino:int4,transformers.js:int4,"
    "torch:bfloat16,torch:float32,torch:bfloat16+compiled,torch:float32+compiled"
)
QUESTION = "What does the sign above the door of the shop say, and which colour is it? Answer with the words on the sign alone."
TOKENS, CONTEXTS, STEPS = 50, (128, 2048), 32
PAUSE = 0.5  # s between two programs: threads that still spin for their last answer go to sleep


@dataclass
class Process:
    """One program: what it was asked and what came back, or why it can't run."""

    name: str
    shape: str
    reason: str = ""
    answers: list[list[float]] = field(default_factory=list)  # seconds to each token
    decodes: dict[int, list[float]] = field(default_factory=dict)  # context -> seconds a token, by round
    peak: int = 0
    detail: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Process:
        self.complaints = tempfile.TemporaryFile("w+")
        command = [sys.executable, str(HERE / "runtime_peers.py")]
        environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
        order = [*command, self.name, self.shape]
        try:
            self.process = subprocess.Popen(
                order, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complaints, text=True, env=environment, start_new_session=True
            )
        except OSError as error:
            self.reason = str(error)
        else:
            self._reply()
        return self

    def __exit__(self, *reason: object) -> None:
        if hasattr(self, "process"):
            os.killpg(self.process.pid, signal.SIGKILL)  # a server that it started goes with it
            self.process.communicate()

    def ask(self, **order: Any) -> list[float]:
        """Seconds to each token; nothing from a program that has failed."""
        if self.reason:
            return []
        time.sleep(PAUSE)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        found = self._reply()
        self.peak, self.detail = found.get("peak", 0), found.get("detail", {})
        return [float(second) for second in found.get("times", ())]

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries print remarks of their own
                found: dict[str, Any] = json.loads(line)
                return found
        self.complaints.seek(0)
        lines = [line for line in self.complaints.read().splitlines() if line.strip()]
        self.reason = next(
            (line for line in reversed(lines) if re.match(r"\w*(Error|Exception)\b|\w+\.\w+Error", line)), lines[-1] if lines else "it ended without a word"
        )
        return {}


def measure(processes: list[Process], rounds: int, decode: bool) -> None:
    """One answer each to warm up, then `rounds` of every program in turn."""
    picture = str(picture_file())
    for number in range(rounds + 1):
        for process in processes:
            times = process.ask(do="answer", picture=picture, question=QUESTION, tokens=TOKENS)
            if times and len(times) != TOKENS:
                process.reason = f"it gave {len(times)} tokens, {TOKENS} were asked for"
            elif times and number:
                process.answers.append(times)
    for context in CONTEXTS if decode else ():
        for _ in range(rounds):
            for process in processes:
                if times := process.ask(do="decode", context=context, tokens=STEPS):
                    process.decodes.setdefault(context, []).append((times[-1] - times[0]) / (len(times) - 1))


def cold_starts(shape: str, precision: str, runs: int) -> str:
    """From the start of a process to its first token, bundle verified."""
    from masters.runtime.latency import measure_cold_start
    from masters.samples import Sample

    sample = Sample("cold", (picture_file(),), QUESTION)
    found = measure_cold_start(bundle_folder(shape, precision), "cpu", THREADS, sample, TOKENS, runs)
    seconds = f"{found.first_token / 1000:.2f} s to the first token, {found.load / 1000:.2f} s of them loading"
    return f"- cold start of ours:{precision}, files in the page cache: {seconds} (target 1.2 s for 256m)"


def ceiling(shape: str, precision: str, context: int, bandwidth: float) -> float:
    """Tokens a second if every byte of the decoder's weights and of the cache is read once a token at `bandwidth` GB/s."""
    folder = bundle_folder(shape, precision)
    manifest = read_manifest(folder)
    weights = sum(entry.bytes for name, entry in manifest.files.items() if name.startswith(manifest.parts["decoder"].file))
    return bandwidth * 1e9 / (weights + cache_bytes(shape, precision) * context)


def cache_bytes(shape: str, precision: str) -> int:
    """Of one position, float32 keys and values."""
    geometry = read_manifest(bundle_folder(shape, precision)).decoder
    return 2 * 4 * geometry.layers * geometry.kv_heads * geometry.head_dim


def median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def table(processes: list[Process], decode: bool) -> str:
    """Markdown; every ratio is to the first program's time."""
    ours = processes[0]
    lines = ["| program | image file to 50th token, s | | first token, s | | " + " | ".join(f"tokens/s at {c:,}" for c in CONTEXTS) + " | peak memory, MB |"]
    lines.append("|---|---|---|---|---|" + "---|" * len(CONTEXTS) + "---|")
    base = median([times[-1] for times in ours.answers]), median([times[0] for times in ours.answers])
    for process in processes:
        if process.reason:
            lines.append(f"| {process.name} | does not run here: {process.reason[:200].replace('|', '/')} |" + " |" * (len(CONTEXTS) + 4))
            continue
        total, first = median([times[-1] for times in process.answers]), median([times[0] for times in process.answers])
        speeds = " | ".join(f"{1 / median(process.decodes.get(context, [])):.0f}" if decode else "" for context in CONTEXTS)
        lines.append(f"| {process.name} | {total:.2f} | {total / base[0]:.2f}x | {first:.2f} | {first / base[1]:.2f}x | {speeds} | {process.peak / 1e6:,.0f} |")
    return "\n".join(lines)


def verdicts(processes: list[Process], bandwidth: float, decode: bool) -> list[str]:
    """Ours against the best of the others and against what memory allows."""
    ours, others = processes[0], [p for p in processes if not p.name.startswith("ours") and p.answers]
    precision = ours.name.partition(":")[2]
    found = []
    if ours.answers and others:
        for what, place, target in (("50th token", -1, 0.7), ("first token", 0, 0.6)):
            best = min(others, key=lambda p, place=place: median([times[place] for times in p.answers]))  # type: ignore[misc]
            ratio = median([times[place] for times in ours.answers]) / median([times[place] for times in best.answers])
            found.append(f"- {what}: {ratio:.2f}x of the best other program's, {best.name} (target {target}x)")
    for context in CONTEXTS if decode and ours.decodes else ():
        most, speed = ceiling(ours.shape, precision, context, bandwidth), 1 / median(ours.decodes[context])
        found.append(f"- decode at {context:,}: {speed:.0f} of {most:.0f} tokens/s that {bandwidth:.1f} GB/s allow, {speed / most:.0%} (target 85%)")
    if ours.peak:
        manifest = read_manifest(bundle_folder(ours.shape, precision))
        needed = sum(entry.bytes for entry in manifest.files.values()) + (max(CONTEXTS) + STEPS if decode else 150) * cache_bytes(ours.shape, precision)
        found.append(f"- peak memory: {ours.peak / needed:.2f}x of bundle and cache, {needed / 1e6:,.0f} MB (target 1.25x)")
    return found


def machine() -> str:
    name = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.machine()
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "onnxruntime-genai", "openvino", "xllamacpp", "torch", "transformers"))
    return f"{name}, {os.cpu_count()} cores, {THREADS} threads; Python {platform.python_version()}, {versions}"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--peers", default=PEERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--decode", action="store_true", help="measure decoding at 128 and 2,048 tokens of context too")
    parser.add_argument("--cold", action="store_true", help="measure cold starts of ours too")
    options = parser.parse_args()
    print(machine(), flush=True)
    for shape in options.shapes.split(","):
        with ExitStack() as stack:
            processes = [stack.enter_context(Process(name, shape)) for name in options.peers.split(",")]
            before = read_bandwidth(THREADS)
            measure(processes, options.rounds, options.decode)
            bandwidth = max(before, read_bandwidth(THREADS))
        print(
            f"\n### {shape}, prompt of {processes[0].detail.get('prompt')} tokens, medians of {options.rounds} rounds\n\n{table(processes, options.decode)}\n"
        )
        print("\n".join(verdicts(processes, bandwidth, options.decode)), flush=True)
        if options.cold:
            print("\n" + cold_starts(shape, processes[0].name.partition(":")[2], options.rounds), flush=True)


if __name__ == "__main__":
    main()
