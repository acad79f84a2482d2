"""What masks cost: thresholds beside PyTorch's own pruning, the memory that planning and materialising take, and a 38B teacher's plan.

    python benchmarks/masks.py thresholds [--weights 50000000] [--threads 1] [--repeat 5]
    python benchmarks/masks.py memory [--files 8] [--mib 128]
    python benchmarks/masks.py plan [--disk FOLDER]

`thresholds` times all five ratios of the default schedule together against torch.nn.utils.prune.l1_unstructured for one of them, in turn, in one
process. `memory` runs each step in a process of its own on a random model whose weights lie in several files.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shapes import internvl3_5_38b
from torch import nn
from torch.nn.utils import prune

RATIOS = (0.0, 0.05, 0.1, 0.15, 0.2)
MIB = 2**20


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def thresholds(weights: int, repeat: int) -> None:
    """Medians of both, one after the other in each round, and how far they agree."""
    from masters.distill.mask import apply_mask, plan_masks

    width = 5120
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layer = nn.Linear(width, weights // width, bias=False, device="meta", dtype=dtype).to_empty(device="cpu")
        original = (0.02 * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))).to(dtype)
        ours, theirs = [], []
        for _ in range(repeat):
            ours.append(seconds(partial(plan_masks, {"w": original}, RATIOS)))
            layer.weight = nn.Parameter(original.clone(), requires_grad=False)
            theirs.append(seconds(partial(prune.l1_unstructured, layer, "weight", amount=RATIOS[-1])))
            kept = dict(layer.named_buffers())["weight_mask"].bool()
            prune.remove(layer, "weight")
        [plan] = plan_masks({"w": original}, RATIOS)
        masked = {"w": original.clone()}
        apply_mask(masked, [plan], RATIOS[-1])
        differ = int(((masked["w"] != 0) != (kept & (original != 0))).sum())
        row = {
            "dtype": str(dtype),
            "weights": original.numel(),
            "five_ratios_s": statistics.median(ours),
            "l1_unstructured_one_ratio_s": statistics.median(theirs),
        }
        row |= {"ratio": statistics.median(ours) / statistics.median(theirs), "masks_differ_in": differ, "reached": plan.reached[RATIOS[-1]]}
        print(json.dumps(row))


def build(folder: Path, files: int, size: int) -> None:
    """A random model of two files' worth of weights more than `files` times `size` bytes, in so many files and a few."""
    from transformers import AutoModelForImageTextToText

    config = internvl3_5_38b()
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_attention_heads, text.num_key_value_heads, text.vocab_size = 1024, 4096, 8, 2, 4096
    config.vision_config.hidden_size, config.vision_config.num_attention_heads, config.vision_config.num_hidden_layers = 64, 2, 1
    config.vision_config.intermediate_size, layer = 64, 2 * (1024 * 128 * (8 + 2 + 2 + 8) + 3 * 1024 * 4096)
    text.num_hidden_layers = files * size // layer
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=size)


def step(name: str, folder: Path, out: Path) -> dict[str, Any]:
    """One step in this process, which should be a fresh one: memory before and at the peak. Pages that belong to a mapped file are counted apart."""
    from masters.distill.mask import plan_masks
    from masters.distill.materialize import write_masked
    from masters.distill.models import load_model, weights_to_mask
    from masters.distill.recipe import Mask

    weights = weights_to_mask(folder, Mask(), torch.bfloat16)
    masks = plan_masks(weights, [0.2]) if name == "materialize" else []
    before, started = resident()["anon"], time.perf_counter()
    with Watch() as watch:
        if name == "plan":
            plan_masks(weights, RATIOS)
        elif name == "materialize":
            write_masked(folder, out, masks, 0.2, torch.bfloat16)
        else:
            load_model(folder, torch.bfloat16)
    row = {"step": name, "seconds": time.perf_counter() - started, "own_mib": (watch.anon - before) / MIB, "with_mapped_mib": watch.all / MIB}
    return row


def resident() -> dict[str, int]:
    """Bytes of this process in memory: its own, and all."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(("RssAnon", "VmRSS")))
    return {"anon": 1024 * int(rows["RssAnon"].split()[0]), "all": 1024 * int(rows["VmRSS"].split()[0])}


class Watch:
    """The largest memory seen while the block runs, looked at every few milliseconds by a thread."""

    def __enter__(self) -> Watch:
        import threading

        self.anon = self.all = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.stop.wait(0.002):
            now = resident()
            self.anon, self.all = max(self.anon, now["anon"]), max(self.all, now["all"])

    def __exit__(self, *_: Any) -> None:
        self.stop.set()
        self.thread.join()


def memory(files: int, mib: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        build(folder, files, mib * MIB)
        sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
        print(json.dumps({"files": len(sizes), "largest_file_mib": max(sizes) / MIB, "checkpoint_mib": sum(sizes) / MIB}))
        for name in ("load", "plan", "materialize"):
            command = [sys.executable, __file__, "step", name, str(folder), str(Path(place) / "masked")]
            print(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def plan(disk: Path) -> None:
    """The five ratios of a 38B teacher, from its configuration."""
    import dataclasses

    from masters.distill.mask_cost import mask_cost, measure_throughput
    from masters.distill.recipe import Mask

    throughput = measure_throughput(disk)
    started = time.perf_counter()
    cost = mask_cost(internvl3_5_38b(), Mask(), RATIOS, throughput)
    print(json.dumps(dataclasses.asdict(cost) | {"planned_in_s": time.perf_counter() - started}, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("thresholds", "memory", "plan", "step"))
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--weights", type=int, default=50_000_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--mib", type=int, default=128)
    parser.add_argument("--disk", type=Path, default=Path())
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    if wanted.what == "step":
        print(json.dumps(step(wanted.rest[0], Path(wanted.rest[1]), Path(wanted.rest[2]))))
        return
    print(json.dumps({"machine": platform.processor() or platform.machine(), "threads": wanted.threads, "torch": torch.__version__}))
    if wanted.what == "thresholds":
        thresholds(wanted.weights, wanted.repeat)
    elif wanted.what == "memory":
        memory(wanted.files, wanted.mib)
    else:
        plan(wanted.disk)


if __name__ == "__main__":
    main()
