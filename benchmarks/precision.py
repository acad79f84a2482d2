"""What int4's methods and blocks cost in answers, and what `--precision auto` makes of the same bytes, on a real student and its test questions.

    python benchmarks/precision.py --student DEMO/runs/default/student --data DEMO/data [--rows methods,parts,auto]

DEMO is the folder that `masters demo` wrote. Calibration and the search see validation questions alone; divergence and score are of test questions. The
weights are measured in PyTorch as they would be stored, which an export proves its bundle equal to.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=200, help="test questions whose divergence is measured")
    parser.add_argument("--scored", type=int, default=2000, help="test questions that are answered and scored")
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--rows", default="methods,parts,auto")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    print("| stored | bytes of the weights | KL, nats a token | score | change [95%] |\n|---|---|---|---|---|")
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
        self.samples: Sequence[Sample] = read_samples(options.data / "test.jsonl", options.scored)
        self.own: list[float] = []

    def row(self, name: str, plan: dict[Product, Storage]) -> float:
        with stored_as(plan) if plan else nullcontext():
            return self.show(name, sum(stored_bytes(product.shape, plan.get(product, Storage("fp32"))) for product in self.products), self.source)

    def show(self, name: str, size: int, source: Source) -> float:
        divergence = mean_divergence(source, self.test)
        answers = greedy_answers(source.model, Encoder(source.processor), self.samples, MAX_TOKENS)
        found = scores(self.samples, answers)
        self.own = self.own or found
        change = paired_difference(found, self.own)
        print(
            f"| {name} | {size:,} | {divergence:.2e} | {np.mean(found):.4f} | {100 * change.mean:+.2f} [{100 * change.low:+.2f}, {100 * change.high:+.2f}] |",
            flush=True,
        )
        return divergence

    def methods(self) -> None:
        for block in BLOCKS:
            for name, method in (("rtn, no search", None), ("rtn", "rtn"), ("k-quant", "k-quant"), ("gptq", "gptq")):
                self.method(name, method, block)

    def parts(self) -> None:
        """Tower and embedding alone."""
        for part, storage in (("vision", Storage("int8")), ("vision", Storage("int4")), ("embed", Storage("int8")), ("embed", Storage("int4"))):
            self.row(f"{part} {storage}", {product: storage for product in self.products if product.part == part})

    def method(self, name: str, method: str | None, block: int) -> None:
        """The decoder alone in int4."""
        decoder = [product for product in self.products if product.part == "decoder"]
        storage = Storage("int4", block, method or "rtn")
        size = sum(stored_bytes(product.shape, storage if product in decoder else Storage("fp32")) for product in self.products)
        label = f"decoder int4/{block} {name}"
        if method == "gptq":
            self._fitted(label, size, Precision("fp32", "fp32", "int4", block, method="gptq"))
        elif method is None:
            with stored_as({product: Storage("fp32") for product in decoder}):
                for product in decoder:
                    give(product, _without_search(product.weight(), block), "int4")
                self.show(label, size, self.source)
        else:
            self.row(label, dict.fromkeys(decoder, storage))

    def auto(self) -> None:
        """Uniform int4 everywhere, and what the search makes of as many bytes."""
        uniform = {product: Storage("int4") for product in self.products}
        limit = sum(stored_bytes(product.shape, storage) for product, storage in uniform.items())
        self.row("int4/32 rtn everywhere", uniform)
        found = auto.search(self.source, self.calibration, "rtn")
        for share in (1.0, 1.25, 1.5):
            place = found.within(share * limit)
            assert place is not None
            self.row(f"auto, {share:g} of its bytes", found.plan(place))

    def _fitted(self, label: str, size: int, precision: Precision) -> None:
        source = load_source(self.options.student)
        products = [replace(mine, layers=_same(self.source.model, source.model, mine)) for mine in self.products]
        fit_int4(source, products, precision, self.calibration)
        self.show(label, size, source)


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
