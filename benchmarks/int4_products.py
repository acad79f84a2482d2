"""How fast ONNX Runtime multiplies by int4 weights, by block, accuracy level and zero points: the products of a decoder of a real shape, nothing else.

    python benchmarks/int4_products.py [--threads 2] [--rounds 7] [--layers 30 --width 576 --inner 1536 --heads 960 --vocabulary 49280]

The default shape is SmolVLM-256M's text model. Weights are random, since speed does not depend on them. Every form is run in turn, and again; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise, product
from typing import Any

import numpy as np
import onnx
import onnxruntime

from runtime import machine

PROMPT = 128  # rows at once when a prompt is read
FORMS = list(product((32, 64, 128), (0, 4), (False, True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(threads=2, rounds=7, layers=30, width=576, inner=1536, heads=960, vocabulary=49280).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    weights = options.layers * options.width * (options.heads + options.width + 3 * options.inner) + options.width * options.vocabulary
    sessions, sizes = [], []
    for form in FORMS:
        model = products(options, *form)
        sizes.append(model.ByteSize())
        sessions.append(session(model, options.threads))
    seconds: dict[tuple[int, int], list[float]] = {(number, rows): [] for number in range(len(FORMS)) for rows in (1, PROMPT)}
    for _, (number, rows) in product(range(options.rounds), seconds):
        seconds[number, rows].append(timed(sessions[number], rows, options.width, 8 if rows == 1 else 1))
    print("| block | accuracy level | zero points | bytes a weight | tokens/s, one at a time | tokens/s of a prompt |\n|---|---|---|---|---|---|")
    for number, (block, level, zeros) in enumerate(FORMS):
        one, many = (rows / statistics.median(seconds[number, rows]) for rows in (1, PROMPT))
        print(f"| {block} | {level} | {'yes' if zeros else 'no'} | {sizes[number] / weights:.3f} | {one:.0f} | {many:.0f} |")
    print(f"\n{machine()}")


def products(options: Any, block: int, level: int, zeros: bool) -> onnx.ModelProto:
    """Layer after layer: queries, keys and values, their output, gate and up, down; then the head."""
    nodes, weights = [], []
    rng = np.random.default_rng(0)
    layer = [(options.width, options.heads), (options.width, options.width), (options.width, 2 * options.inner), (options.inner, options.width)]
    shapes = [*layer * options.layers, (options.width, options.vocabulary), (options.vocabulary, 0)]
    value = "x"
    for number, ((inputs, outputs), (following, _)) in enumerate(pairwise(shapes)):
        blocks = -(-inputs // block)
        constants = {
            f"codes{number}": rng.integers(0, 256, (outputs, blocks, block // 2), np.uint8),
            f"scales{number}": np.full((outputs, blocks), 0.01, np.float16),
        }
        if zeros:
            constants[f"zeros{number}"] = rng.integers(0, 256, (outputs, -(-blocks // 2)), np.uint8)
        weights += [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
        codes, scales, *rest = constants
        nodes.append(onnx.helper.make_node("Cast", [scales], [f"{scales}.wide"], to=onnx.TensorProto.FLOAT))
        settings = dict(K=inputs, N=outputs, bits=4, block_size=block, accuracy_level=level)
        nodes.append(onnx.helper.make_node("MatMulNBits", [value, codes, f"{scales}.wide", *rest], [f"y{number}"], domain="com.microsoft", **settings))
        value = f"y{number}"
        if outputs != following:  # part of it stands for what attention and gate make of it
            nodes.append(onnx.helper.make_node("Slice", [value, "zero", f"end{number}", "one"], [f"x{number}"]))
            weights.append(onnx.numpy_helper.from_array(np.array([following]), f"end{number}"))
            value = f"x{number}"
    weights += [onnx.numpy_helper.from_array(np.array([number]), name) for name, number in (("zero", 0), ("one", 1))]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", None]) for name in ("x", value)]
    versions = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "products", ends[:1], ends[1:], weights), opset_imports=versions, ir_version=10)


def session(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def timed(tried: onnxruntime.InferenceSession, rows: int, width: int, times: int) -> float:
    """Seconds of one run, of `times` in a row, after one that warms up."""
    feeds = {"x": np.random.default_rng(1).standard_normal((rows, width)).astype(np.float32)}
    tried.run(None, feeds)
    started = time.perf_counter()
    for _ in range(times):
        tried.run(None, feeds)
    return (time.perf_counter() - started) / times


if __name__ == "__main__":
    main()
