"""The runtime beside other programs: one image and some 40 tokens of text, 50 tokens of answer, on the same machine in the same run.

    python benchmarks/runtime.py [--shapes 256m,500m,internvl-1b] [--peers ours:int4,torch:bfloat16,…] [--what answers,decode,cold] [--rounds 3] [--keep]

Random models of the real sizes (made once, see runtime_models.py). Every program lives in a process of its own and they answer in turn, round by round;
medians and their ratios to the first of the list are printed as markdown. With --keep rows go to results/runtime.json, in the place of the same programs' rows;
python benchmarks/tables.py writes them into the documents. A program that can't run here has its reason in the table's place.

What the others need: pip install onnxruntime-genai openvino nncf xllamacpp gguf; Node with npm install @huggingface/transformers (runtime_javascript.py);
a llama-server built for this processor in $LLAMA_SERVER (runtime_llama.py); torch and transformers are those of masters[export].
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
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
from runtime_models import NARROW, SHAPES, TOWER, bundle_folder, picture_file
from runtime_peers import THREADS
from runtime_table import CONTEXTS, Row, answers_table, decode_table, merged, read_rows, verdicts

from masters.files import read_json, write_json
from masters.manifest import read_manifest, stored_bytes

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "runtime.json"
PEERS = (
    f"ours:{NARROW},ours:int4,ours:{TOWER},genai:{NARROW},llama.cpp:Q4_0+F16,llama.cpp:Q8_0+F16,openvino:int4+bf16,openvino:int4+int8,transformers.js:{NARROW},"
    "torch:bfloat16,torch:float32,torch:bfloat16+compiled,torch:float32+compiled"
)
QUESTION = "What does the sign above the door of the shop say, and which colour is it? Answer with the words on the sign alone."
TOKENS, STEPS = 50, 32
PAUSE = 0.3  # s between two programs: threads that still spin for their last answer go to sleep


@dataclass
class Process:
    """One program: what it was asked and what came back, or why it can't run."""

    name: str
    shape: str
    reason: str = ""
    warm: float = 0.0  # s of its first answer
    answers: list[list[float]] = field(default_factory=list)  # seconds to each token
    decodes: dict[int, list[float]] = field(default_factory=dict)  # context -> seconds a token, by round
    peak: int = 0
    weights: int = 0  # bytes that a token reads
    position: int = 0  # and for each position of the cache
    detail: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Process:
        self.complaints = tempfile.TemporaryFile("w+")
        command = [sys.executable, str(HERE / "runtime_peers.py")]
        environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
        order = [*command, self.name, self.shape]
        try:
            self.process = subprocess.Popen(
                order, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complaints, text=True, env=environment, process_group=0
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
        if order["do"] == "answer":  # long contexts have other prompts and other peaks
            self.peak, self.detail = found.get("peak", 0), found.get("detail", {})
        self.weights, self.position = found.get("weights", 0), found.get("position", 0)
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


def ask_for_answers(processes: list[Process], rounds: int) -> None:
    """One answer each to warm up, then `rounds` of every program in turn."""
    picture = str(picture_file())
    for number in range(rounds + 1):
        for process in processes:
            times = process.ask(do="answer", picture=picture, question=QUESTION, tokens=TOKENS)
            if times and len(times) != TOKENS:
                process.reason = f"it gave {len(times)} tokens, {TOKENS} were asked for"
            elif times and number:
                process.answers.append(times)
            elif times:
                process.warm = times[-1]


def ask_for_steps(processes: list[Process], rounds: int) -> None:
    """Seconds a token behind texts of two lengths; the prompt's own time is not counted."""
    for context in CONTEXTS:
        for _ in range(rounds):
            for process in processes:
                if times := process.ask(do="decode", context=context, tokens=STEPS):
                    process.decodes.setdefault(context, []).append((times[-1] - times[0]) / (len(times) - 1))


def row_of(process: Process, ours: Process, cold: float, bandwidth: dict[int, float]) -> Row:
    row = Row(process.shape, process.name, process.reason, warm=process.warm, rounds=len(process.answers), peak=process.peak, detail=process.detail)
    row.machine, row.date, row.prompt, row.cold = machine(), datetime.date.today().isoformat(), process.detail.get("prompt", 0), cold
    if process.answers and ours.answers:
        row.first, row.total = median(process.answers, 0), median(process.answers, -1)
        row.ours_first, row.ours_total = median(ours.answers, 0), median(ours.answers, -1)
    for context, seconds in process.decodes.items():
        row.speeds[str(context)] = 1 / statistics.median(seconds)
        if process.weights:
            row.read[str(context)] = process.weights + process.position * context
            row.bandwidth[str(context)] = bandwidth[context]
    if row.ours and process.answers:
        manifest = read_manifest(bundle_folder(process.shape, process.name.partition(":")[2].partition("@")[0]))
        row.needed = stored_bytes(manifest.files) + process.position * (row.prompt + TOKENS)
    return row


def median(answers: list[list[float]], place: int) -> float:
    return statistics.median(times[place] for times in answers)


def cold_start(shape: str, precision: str, runs: int) -> float:
    """Seconds from the start of a process to its first token, bundle verified, files in the page cache."""
    from masters.runtime.latency import measure_cold_start
    from masters.samples import Sample

    sample = Sample("cold", (picture_file(),), QUESTION)
    return measure_cold_start(bundle_folder(shape, precision), "cpu", THREADS, sample, TOKENS, runs).first_token / 1000


def measure(shape: str, peers: list[str], what: set[str], rounds: int) -> list[Row]:
    """A row for each program; the first is the one that the others are compared with."""
    with ExitStack() as stack:
        processes = [stack.enter_context(Process(name, shape)) for name in peers] if what & {"answers", "decode"} else [Process(peers[0], shape)]
        if "answers" in what:
            ask_for_answers(processes, rounds)
        if "decode" in what:
            ask_for_steps(processes, rounds)
        cold = cold_start(shape, peers[0].partition(":")[2], rounds) if "cold" in what and peers[0].startswith("ours:") else 0.0
        # Of as many bytes as the first program reads a token.
        bandwidth = {context: read_bandwidth(THREADS, processes[0].weights + processes[0].position * context) for context in processes[0].decodes}
        return [row_of(process, processes[0], cold if process is processes[0] else 0.0, bandwidth) for process in processes]


def machine() -> str:
    name = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.machine()
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "onnxruntime-genai", "openvino", "torch", "transformers"))
    return f"{name}, {os.cpu_count()} cores, {THREADS} threads; Python {platform.python_version()}, {versions}"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def keep(rows: list[Row]) -> None:
    """Into the file of results, each in its program's place."""
    old = read_rows(read_json(RESULTS)) if RESULTS.is_file() else []
    write_json(RESULTS, {"rows": [dataclasses.asdict(row) for row in merged(old, rows)]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--peers", default=PEERS)
    parser.add_argument("--what", default="answers,decode,cold")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="into results/runtime.json")
    options = parser.parse_args()
    print(machine(), flush=True)
    for shape in options.shapes.split(","):
        rows = measure(shape, options.peers.split(","), set(options.what.split(",")), options.rounds)
        if options.keep:
            keep(rows)
        print(f"\n### {shape}\n\n{answers_table(rows)}\n\n{decode_table(rows)}\n\n" + "\n".join(verdicts(rows)), flush=True)


if __name__ == "__main__":
    main()
