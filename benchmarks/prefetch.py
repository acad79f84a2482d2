"""Reading prompts for generation: `python benchmarks/prefetch.py [--images 12] [--workers 2]`.

Images a second that real processors give, sizes as published, photographs of a megapixel: one after the other in this process, in threads, and in
processes that send what they read (what `masters distill` does from 256 questions with images on). All three give the same tensors.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from look_through import photographs
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from masters.demo.models import TEMPLATE, build_tokenizer
from masters.distill.inputs import Encoder, Prompt
from masters.distill.models import without_videos
from masters.distill.prefetch import read_prompts
from masters.samples import Sample

ROUNDS = 3
BATCH = 8


def tiles() -> Any:
    """SmolVLM's: pictures to a longest edge of 2,048 pixels, in tiles of 512 and the whole."""
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}, do_image_splitting=True)
    return transformers.Idefics3Processor(images, build_tokenizer(), image_seq_len=64, chat_template=TEMPLATE)


def patches() -> Any:
    """Qwen2.5-VL's: patches of 14 pixels at the picture's own size."""
    words = build_tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]})
    template = TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    return without_videos(transformers.Qwen2_5_VLProcessor)(Qwen2VLImageProcessorPil(), words, chat_template=template)


def in_threads(encoder: Encoder, samples: list[Sample], workers: int) -> list[Prompt]:
    """A thread at a time for each question; the tokenizer is shared."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(encoder.encode, samples))


def in_batches(encoder: Encoder, samples: list[Sample], workers: int) -> list[Any]:
    """Through `read_prompts`, as generation does."""
    batches = [samples[i : i + BATCH] for i in range(0, len(samples), BATCH)]
    return [prompt for batch in read_prompts(encoder, batches, workers) for prompt in batch]


def timed(work: Callable[[], list[Any]]) -> tuple[float, list[float]]:
    """Seconds on the clock, and a mark of each prompt that was read: all of them together take gigabytes."""
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, [mark(prompt) for prompt in found]


def mark(prompt: Prompt) -> float:
    """A number that another picture's tensors would not have."""
    pixels = prompt.pixels["pixel_values"].double().flatten()
    return float((pixels * torch.linspace(0, 1, len(pixels), dtype=torch.float64)).sum())


def measure(processor: Any, samples: list[Sample], workers: int) -> dict[str, float]:
    """Median images a second of each way, rounds of one after the other."""
    encoder = Encoder(processor, longest=1 << 20, cache_bytes=0)
    ways: dict[str, Callable[[], list[Any]]] = {
        "one after the other": lambda: [encoder.encode(sample) for sample in samples],
        f"{workers} threads": lambda: in_threads(encoder, samples, workers),
        f"{workers} processes": lambda: in_batches(encoder, samples, workers),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    size, expected = encoder.encode(samples[0]).bytes, [mark(encoder.encode(sample)) for sample in samples]
    for _ in range(ROUNDS):
        for way, work in ways.items():
            taken, found = timed(work)
            seconds[way].append(taken)
            assert found == expected, way
    print(f"  {size / 2**20:.1f} MiB of tensors an image")
    return {way: len(samples) / statistics.median(taken) for way, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {os.cpu_count()} cores; {chosen.images} JPEGs of side {chosen.side}; medians of {ROUNDS} rounds")
    with tempfile.TemporaryDirectory() as name:
        paths = photographs(Path(name), chosen.images, chosen.side)
        samples = [Sample(str(i), (path,), "what is shown here?") for i, path in enumerate(paths)]
        for shape, processor in (("SmolVLM, tiles", tiles()), ("Qwen2.5-VL, patches", patches())):
            print(shape)
            speeds = measure(processor, samples, chosen.workers)
            first = next(iter(speeds.values()))
            for way, speed in speeds.items():
                print(f"  {way:20s} {speed:6.2f} images/s  {speed / first:5.2f} x")


if __name__ == "__main__":
    main()
