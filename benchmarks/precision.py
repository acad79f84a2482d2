"""What int4 costs in answers, by method, block and accuracy level, and what `--precision auto` makes of the same bytes: a real student, its test questions.

    python benchmarks/precision.py --student DEMO/runs/default/student --data DEMO/data [--rows methods,levels,parts,auto] [--scored 0]

DEMO is the folder that `masters demo` wrote. Calibration and the search see validation questions alone; divergence and score are of test questions. The
weights are measured in PyTorch as they would be stored, and what products are given is rounded as ONNX Runtime rounds it here, which an export proves its
bundle equal to.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from masters.bootstrap import paired_difference
from masters.distill.evaluate import greedy_answers, scores
from masters.distill.inputs import Encoder
from masters.export import auto, int4
from masters.export.calibration import ask, mean_divergence
from masters.export.fitting import fit_int4
from masters.export.precision import Precision, Storage
from masters.export.products import Product, all_products, give, stored_as
from masters.export.sensitivity import stored_bytes
from masters.export.source import Source, load_source
from masters.samples import Sample, read_samples

BLOCKS = (32, 64, 128)
MAX_TOKENS = 8
DECODER, VISION, EMBED = "decoder", "vision", "embed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=200, help="test questions whose divergence is measured")
    parser.add_argument("--scored", type=int, default=2000, help="test questions that are answered and scored; 0: divergence alone")
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--rows", default="methods,levels,parts,auto")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    print("| stored | bytes of the weights | KL, nats a token | score | answers changed | change in points [95%] |\n|---|---|---|---|---|---|")
    bench.row("fp32, the student itself", {})
    for rows in options.rows.split(","):
        getattr(bench, rows)()


class Bench:
    """A student, its test questions, and what it answers itself."""

    def __init__(self, options: Any) -> None:
        self.source, self.options = load_source(options.student), options
        self.products = all_products(self.source.model, self.source.family)
        self.test = ask(self.source, options.data / "test.jsonl", options.questions)
        self.calibration = ask(self.source, options.data / "validation.jsonl", options.calibration)
        self.samples: Sequence[Sample] = read_samples(options.data / "test.jsonl", options.scored or 1)
        self.own: list[float] = []
        self.texts: list[str] = []

    def row(self, name: str, plan: dict[Product, Storage]) -> None:
        with stored_as(plan) if plan else nullcontext():
            self.show(name, self.size(plan), self.source)

    def show(self, name: str, size: int, source: Source) -> None:
        cells = [name, f"{size:,}", f"{mean_divergence(source, self.test):.2e}"]
        if self.options.scored:
            answers = greedy_answers(source.model, Encoder(source.processor), self.samples, MAX_TOKENS)
            found, texts = scores(self.samples, answers), [answer.text for answer in answers]
            self.own, self.texts = self.own or found, self.texts or texts
            change = paired_difference(found, self.own)
            changed = sum(ours != theirs for ours, theirs in zip(texts, self.texts, strict=True))
            cells += [
                f"{np.mean(found):.4f}",
                f"{changed / len(texts):.2%}",
                f"{100 * change.mean:+.2f} [{100 * change.low:+.2f}, {100 * change.high:+.2f}]",
            ]
        print(f"| {' | '.join(cells)} |", flush=True)

    def size(self, plan: dict[Product, Storage]) -> int:
        return sum(stored_bytes(product.shape, plan.get(product, Storage("fp32"))) for product in self.products)

    def of(self, **storages: Storage) -> dict[Product, Storage]:
        """A storage for each part that is named."""
        return {product: storages[product.part] for product in self.products if product.part in storages}

    def methods(self) -> None:
        """The decoder alone in int4."""
        for block in BLOCKS:
            self.unsearched(block)
            for method in ("rtn", "k-quant"):
                self.row(f"decoder int4/{block} {method}", self.of(decoder=Storage("int4", block, method)))
            self.fitted(block)

    def levels(self) -> None:
        """The same with products that sum in int8; levels 0 and 1 are float32, which the rows of the methods have."""
        for block in BLOCKS:
            for method in ("rtn", "k-quant"):
                self.row(f"decoder int4/{block} {method}, accuracy level 4", self.of(decoder=Storage("int4", block, method, 4)))

    def parts(self) -> None:
        """Tower and embedding alone, and beside a decoder in int4."""
        for part in (VISION, EMBED):
            for storage in (Storage("fp16"), Storage("int8"), Storage("int4"), Storage("int4", 128)):
                self.row(f"{part} {storage}", self.of(**{part: storage}))
        for embed in (Storage("int8"), Storage("int4")):
            plan = self.of(vision=Storage("int8"), embed=embed, decoder=Storage("int4"))
            self.row(f"vision=int8, decoder=int4/32, embed={embed}", plan)

    def auto(self) -> None:
        """What is stored alike everywhere, and what the search makes of as many bytes."""
        paths = auto.search(self.source, self.calibration, Storage("int4"))
        for vision, embed, decoder in (("int4", "int4", "int4"), ("int8", "int8", "int4"), ("int8", "int8", "int8")):
            plan = self.of(vision=Storage(vision), embed=Storage(embed), decoder=Storage(decoder))
            self.row(f"vision={vision}, decoder={decoder}, embed={embed}", plan)
            path, place = auto.begin(paths, self.source, self.calibration, auto.Budget(max_bytes=self.size(plan)), 0)
            self.row("auto, at most as many bytes", path.plan(place))

    def fitted(self, block: int) -> None:
        """GPTQ, on a model of its own."""
        source = load_source(self.options.student)
        products = [replace(mine, layers=_same(self.source.model, source.model, mine)) for mine in self.products]
        fit_int4(source, products, Precision("fp32", "fp32", "int4", block, method="gptq"), self.calibration)
        self.show(f"decoder int4/{block} gptq", self.size(self.of(decoder=Storage("int4", block))), source)

    def unsearched(self, block: int) -> None:
        """The nearest code, without a search for the scale."""
        storage = Storage("int4", block)
        plan = self.of(decoder=storage)
        with stored_as({product: Storage("fp32") for product in plan}):
            for product in plan:
                give(product, _without_search(product.weight(), block), storage)
            self.show(f"decoder int4/{block} rtn, no search", self.size(plan), self.source)


def _same(model: Any, other: Any, product: Product) -> tuple[Any, ...]:
    """The layers of `product` in another copy of the model."""
    names = {module: name for name, module in model.named_modules()}
    return tuple(other.get_submodule(names[layer]) for layer in product.layers)


def _without_search(weight: np.ndarray, block: int) -> np.ndarray:
    """Plain rounding: the largest weight of a block at code -8."""
    blocks = int4.in_blocks(weight, block)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(2)[..., None], 2)
    scale = np.where(extreme == 0, 1, extreme / -8)
    return np.asarray((np.clip(np.rint(blocks / scale), -8, 7) * scale).reshape(len(weight), -1)[:, : weight.shape[1]])


if __name__ == "__main__":
    main()
