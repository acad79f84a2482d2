"""From the start of a process to the first token of an answer about an image: where the seconds go, and what is in memory after each step.

    python benchmarks/cold_start.py [--bundle FOLDER] [--prepared FOLDER] [--picture FILE] [--runs 5] [--threads 2]

Two tables. Every step alone, one after the other, in a process that does nothing else; and what `load` makes of them, beside each other: with and
without its checks, and with weights packed before (`prepared`). Each run is a fresh process, all variants in turn, and medians are printed; the files
are in the system's cache. MB are 10^6 bytes: anonymous memory is the process's own, of files the system may take pages back.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

QUESTION = "What does the sign above the door of the shop say, and which colour is it? Answer with the words on the sign alone."
TOKENS = 50
VARIANTS: dict[str, dict[str, Any]] = {
    "hashes and self-test (the default)": {},
    "hashes; self-test deferred": {"test": False},
    "both deferred": {"verify": False, "test": False},
    "prepared: hashes, self-test passed before": {"prepared": True},
    "prepared: hashes deferred": {"prepared": True, "verify": False},
}


def memory() -> tuple[float, float, float]:
    """MB of this process: anonymous, of files, and the most that both were together. Linux alone tells the first two."""
    with open("/proc/self/smaps_rollup") as rollup, open("/proc/self/status") as status:
        told = dict(line.split(":", 1) for line in [*rollup.readlines()[1:], *status])
    rss, anonymous, peak = (int(told[name].split()[0]) * 1024 / 1e6 for name in ("Rss", "Anonymous", "VmHWM"))
    return anonymous, rss - anonymous, peak


class Steps:
    """Rows of (step, seconds, MB anonymous, MB of files, peak MB), each step ending where it is told."""

    def __init__(self, start: float) -> None:
        self.last, self.rows = start, list[tuple[str, float, float, float, float]]()

    def end(self, step: str) -> None:
        took = time.perf_counter() - self.last
        self.rows.append((step, took, *memory()))
        self.last = time.perf_counter()


def in_steps(start: float, bundle: str, picture: str, threads: int) -> list[Any]:
    """What a cold start is made of, one thing after the other."""
    steps = Steps(start)
    steps.end("Python itself")
    import numpy as np

    steps.end("import numpy")
    import onnxruntime  # noqa: F401

    steps.end("import onnxruntime")
    from pathlib import Path

    from masters.manifest import PARTS, read_manifest, verify_files
    from masters.runtime import golden, graphs, session
    from masters.runtime.chat import read_chat_format, user_message

    steps.end("import Pillow, tokenizers, jinja2, masters.runtime")
    folder = Path(bundle)
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    steps.end("manifest, SHA-256 of every file")
    chat_format = read_chat_format(folder)
    steps.end("tokenizer, chat template")
    opened = {}
    for part in PARTS:
        file = folder / manifest.parts[part].file
        opened[file] = graphs.open_session(file, "cpu", 1 if part == "embed_tokens" else threads)
        steps.end(f"open {part}")
    graphs.open_session = lambda file, *_: opened[file]  # rather than beside each other
    vlm = session.Vlm(manifest, folder, graphs.OnnxParts(folder, manifest, "cpu", threads), 0, chat_format)
    pixels = vlm.see([picture])[0]
    steps.end("image: decode, resize, normalise")
    features = vlm.encode(pixels)
    steps.end("vision tower")
    ids = vlm.prompt_ids([user_message(QUESTION, 1)], pixels.grids)
    embeds = vlm.parts.embed(ids).copy()
    embeds[session.prompt_keys(ids, [session.Picture(-1, pixels.grids[0], features)], manifest.generation["image_token_id"]) < 0] = features
    steps.end(f"prompt of {len(ids)} tokens, embedding")
    cache = vlm.parts.new_cache(len(ids) + TOKENS)
    logits = vlm.parts.decode(embeds, cache, vlm.positions(ids, pixels.grids))
    steps.end("prefill: the first token")
    for _ in range(TOKENS - 1):
        logits = vlm.parts.decode(vlm.parts.embed(np.array([logits.argmax()])), cache)
    steps.end(f"{TOKENS - 1} more tokens")
    if manifest.golden:
        golden.self_test(vlm, folder / manifest.golden)
        steps.end("golden self-test (load runs it before the answer)")
    return steps.rows


def at_once(start: float, bundle: str, picture: str, threads: int, options: dict[str, Any]) -> list[Any]:
    """What an application does: seconds of Python and the import, of load, to the first token in all; and memory after 50 tokens."""
    from masters.runtime import load

    imported = time.perf_counter()
    vlm = load(bundle, threads=threads, **options)
    loaded = time.perf_counter()
    first = vlm.answer(QUESTION, [picture], max_tokens=TOKENS).timings.first_token / 1000
    return [imported - start, loaded - imported, loaded - start + first, *memory()]


def child(order: str) -> None:
    """In a fresh process: one of the two, as JSON on stdout."""
    what = json.loads(order)
    print(json.dumps((in_steps if what.pop("steps") else at_once)(**what)))


def main() -> None:
    import argparse
    import statistics
    import subprocess
    import tempfile
    from pathlib import Path

    from runtime_models import bundle_folder, picture_file

    from masters.manifest import read_manifest, stored_bytes
    from masters.runtime import load
    from masters.runtime.device import this_device

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="default: SmolVLM-256M's shape with random weights, int4, made once")
    parser.add_argument("--prepared", type=Path, help="where packed graphs are kept; default: a temporary folder")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    bundle = (options.bundle or bundle_folder("256m", "int4")).resolve()
    asked = dict(bundle=str(bundle), picture=str((options.picture or picture_file()).resolve()), threads=options.threads)

    def run(**order: Any) -> Any:
        command = [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(asked | order | {"start": time.perf_counter()})]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout)

    with tempfile.TemporaryDirectory() as temporary:
        place = str((options.prepared or Path(temporary) / "prepared").resolve())
        load(bundle, prepared=place, threads=options.threads)  # which writes what is not there
        steps: list[Any] = []
        starts: dict[str, list[Any]] = {name: [] for name in VARIANTS}
        for _ in range(options.runs):
            steps.append(run(steps=True))
            for name, variant in VARIANTS.items():
                starts[name].append(run(steps=False, options=variant | ({"prepared": place} if "prepared" in variant else {})))
    manifest = read_manifest(bundle)
    geometry = manifest.decoder
    prompt = next(int(row[0].split()[2]) for row in steps[0] if row[0].startswith("prompt of"))
    size = stored_bytes(manifest.files) / 1e6
    cache = (prompt + TOKENS) * 2 * 4 * geometry.layers * geometry.kv_heads * geometry.head_dim / 1e6
    print(f"{this_device()}; {options.threads} threads, medians of {options.runs} runs\n")
    print("| step | s | anonymous, MB | of files, MB | peak, MB |\n|---|---|---|---|---|")
    for rows in zip(*steps, strict=True):
        took, anonymous, files, peak = (statistics.median(figures) for figures in list(zip(*rows, strict=True))[1:])
        print(f"| {rows[0][0]} | {took:.3f} | {anonymous:.0f} | {files:.0f} | {peak:.0f} |")
    print(f"\nBundle {size:.0f} MB and cache {cache:.1f} MB.\n")
    print("| load | Python, import, s | load, s | process start to first token, s | least, s | anonymous, MB | of files, MB | peak, MB | of bundle and cache |")
    print("|" + "---|" * 9)
    for name, found in starts.items():
        imported, loaded, first, anonymous, files, peak = (statistics.median(figures) for figures in zip(*found, strict=True))
        least = min(row[2] for row in found)
        told = f"| {name} | {imported:.2f} | {loaded:.2f} | {first:.2f} | {least:.2f} | {anonymous:.0f} | {files:.0f} | {peak:.0f} |"
        print(f"{told} {peak / (size + cache):.2f}x |")


if __name__ == "__main__":
    child(sys.argv[2]) if sys.argv[1:2] == ["--child"] else main()
