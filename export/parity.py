"""Does a bundle compute what PyTorch computes? Measured from the image file on, one row per stage, image and question.

Stages in order: pixels, prompt ids, image features, embeddings, the prompt's logits, then every further token of PyTorch's own greedy answer through the
bundle's cache. Each stage takes the bundle's output of the stage before, so that the first one over its tolerance is where the two part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..manifest import Part
from ..progress import bar
from ..runtime.chat import user_message
from ..runtime.pixels import Grid
from ..runtime.session import Picture, Vlm, prompt_keys
from .awkward import awkward_images
from .precision import Precision
from .reference import Prompt, Reference, encode, refer
from .row import Row, judged
from .source import Source

QUESTIONS = ("What is in the picture?", "How many shapes are there, and which colour is the largest one?")
# Images beyond this many tiles in all are compared in their pixels and prompts only: a large model takes seconds a tile.
TILES, TILE = 24, 3 * 512 * 512
# Greedy tokens on the ordinary image, and on each of the others; fewer where PyTorch ends its answer.
STEPS, FEWER_STEPS = 32, 8
ORDER = ("fp32", "fp16", "int8", "int4")  # from exact to coarse
# Two logits nearer to each other than a precision's own noise may change places.
NOISE = {"fp32": 0.01, "fp16": 0.1, "int8": 0.5, "int4": 1.0}
TOP = 10


@dataclass(frozen=True)
class Tolerance:
    """The largest error that each precision may have: |ours - theirs| / |theirs| over a whole tensor, for logits over all steps.

    fp32 and fp16 allow for another order of summation.
    """

    features: float
    embeddings: float
    logits: float


TOLERANCES = {
    "fp32": Tolerance(1e-4, 1e-6, 1e-4),
    "fp16": Tolerance(2e-2, 1e-3, 2e-2),
    # Against the model itself, where PyTorch does not follow a bundle's rounding: what healthy exports of small random models show, which nothing compensates.
    # What quantisation costs in answers, --data measures.
    "int8": Tolerance(0.15, 0.02, 0.4),
    "int4": Tolerance(0.6, 0.15, 0.9),
}
# Against PyTorch with the stored weights: at int8 an activation next to a rounding's edge may fall to its other side; at int4 only sums differ.
STORED = TOLERANCES | {"int8": Tolerance(4e-2, 1e-6, 8e-2), "int4": Tolerance(1e-3, 1e-6, 1e-3)}
PIXELS = 1e-5  # of a range of about 2: two roundings in float32


def check_parity(vlm: Vlm, source: Source, judge: bool = True) -> tuple[list[Row], list[Reference]]:
    """Compare `vlm`, the bundle in the runtime, with the model it came from; also the references, the ordinary image's first.

    Without `judge`, what follows pixels and prompt is reported only: the loss by quantisation, where check_stored judges the rest.
    """
    rows: list[Row] = []
    references: list[Reference] = []
    tiles = 0.0
    for number, (name, image) in enumerate(bar(awkward_images().items(), "parity", total=len(awkward_images()))):
        for question in QUESTIONS if number == 0 else (QUESTIONS[number % len(QUESTIONS)],):
            prompt = encode(source, question, [image])
            found, features_input = _inputs(vlm, source, prompt, name, image, question)
            rows += found
            if any(row.verdict == "fail" for row in found):
                continue
            more = features_input.values.size / TILE
            if not references or tiles + more <= TILES:
                tiles += more
                references.append(refer(source, name, image, question, prompt, FEWER_STEPS if number else STEPS))
                rows += compare(vlm, references[-1], features_input, judge)
    return rows, references


def check_stored(vlm: Vlm, stored: Source, references: Sequence[Reference], precision: Precision) -> list[Row]:
    """Compare `vlm` with the model that carries the bundle's weights (stored.py), on the images and prompts of `references`."""
    rows = []
    for old in bar(references, "parity, stored weights"):
        reference = refer(stored, old.name, old.image, old.question, old.prompt, len(old.tokens))
        rows += compare_stored(vlm, reference, vlm.see([old.image])[0], precision)
    return rows


def failures(rows: list[Row]) -> list[str]:
    """A sentence for each stage that failed: its first failing row, in the order of the stages."""
    first: dict[str, Row] = {}
    for row in rows:
        if row.verdict == "fail":
            first.setdefault(row.stage, row)
    ordered = [first[stage] for stage in ("weights", "pixels", "prompt", "features", "embeddings", "prefill", "decode", "tokens") if stage in first]
    return [
        f"the stage '{row.stage}' does not agree with PyTorch: {row.tensor} differs by {row.difference:.3g} ({row.measure})"
        + (f" on the image '{row.image}'" if row.image else "")
        + f", at most {row.tolerance or 0:.3g} is allowed"
        for row in ordered
    ]


def rows_json(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows for masters.json; an infinite difference (another shape, not finite) is null there."""
    return [asdict(row) | ({} if np.isfinite(row.difference) else {"difference": None}) for row in rows]


def _inputs(vlm: Vlm, source: Source, prompt: Prompt, name: str, image: bytes, question: str) -> tuple[list[Row], Any]:
    """Pixels and prompt ids of the runtime beside those of the Hugging Face processor."""
    pixels = vlm.see([image])[0]
    rows = []
    theirs_all = source.family.graph_pixels(prompt.pixels) if hasattr(source.family, "graph_pixels") else prompt.pixels
    for tensor, theirs in theirs_all.items():
        difference = largest_difference(pixels.tensors.get(tensor), theirs.numpy())
        rows.append(Row("pixels", tensor, name, question, "largest difference", difference, PIXELS, _verdict(difference, PIXELS)))
    ids = vlm.prompt_ids([user_message(question, 1)], pixels.grids)
    differing = float(np.sum(ids != prompt.ids)) if len(ids) == len(prompt.ids) else float(abs(len(ids) - len(prompt.ids)))
    return [*rows, Row("prompt", "input_ids", name, question, "differing ids", differing, 0.0, _verdict(differing, 0.0))], pixels


def compare(vlm: Vlm, reference: Reference, pixels: Any, judge: bool = True) -> list[Row]:
    """Features, embeddings and every step's logits of the bundle beside PyTorch's, PyTorch's tokens being fed to both; only reported without `judge`."""
    words = {name: part.precision for name, part in vlm.manifest.parts.items()}
    overall = coarsest(vlm.manifest.parts)
    features = vlm.encode(pixels)
    embeds = vlm.parts.embed(reference.prompt.ids)
    rows = [
        _error("features", "image_features", reference, features, reference.features, TOLERANCES[words["vision_encoder"]].features),
        _error("embeddings", "inputs_embeds", reference, embeds, reference.embeds, TOLERANCES[words["embed_tokens"]].embeddings),
    ]
    if features.shape == reference.features.shape and np.isfinite(features).all():
        steps = forced_logits(vlm, reference, features, pixels.grids)
        rows += _logits(reference, steps, TOLERANCES[overall].logits)
        divergences = [divergence(theirs, ours) for theirs, ours in zip(reference.logits, steps, strict=True)]
        where = (reference.name, reference.question)
        rows.append(Row("decode", "probabilities", *where, "mean KL divergence in nats", float(np.mean(divergences)), None, "reported"))
        rows.append(_tokens(reference, steps, overall))
    return rows if judge else [row if row.verdict == "ambiguous" else replace(row, tolerance=None, verdict="reported") for row in rows]


def compare_stored(vlm: Vlm, reference: Reference, pixels: Any, precision: Precision) -> list[Row]:
    """The same beside PyTorch with the stored weights, each part by itself: the decoder is given PyTorch's features."""
    tolerances = (STORED[precision.rounding("vision")].features, STORED[precision.embed].embeddings)
    rows = [
        _error("features", "image_features", reference, vlm.encode(pixels), reference.features, tolerances[0]),
        _error("embeddings", "inputs_embeds", reference, vlm.parts.embed(reference.prompt.ids), reference.embeds, tolerances[1]),
        *_logits(reference, forced_logits(vlm, reference, reference.features, pixels.grids), STORED[precision.rounding("decoder")].logits),
    ]
    return [replace(row, measure=f"{row.measure}, stored weights") for row in rows]


def forced_logits(vlm: Vlm, reference: Reference, features: np.ndarray, grids: Sequence[Grid]) -> np.ndarray:
    """The bundle's logits f32 [steps, V] for PyTorch's prompt and PyTorch's tokens one by one through the cache."""
    ids = reference.prompt.ids
    cache = vlm.parts.new_cache(len(ids) + len(reference.tokens))
    keys = prompt_keys(ids, [Picture(-1, (), features)], vlm.manifest.generation["image_token_id"])
    embeds = vlm.parts.embed(ids).copy()
    embeds[keys < 0] = features
    logits = [vlm.parts.decode(embeds, cache, vlm.positions(ids, grids))]
    for token in reference.tokens[:-1]:
        logits.append(vlm.parts.decode(vlm.parts.embed(np.array([token], np.int64)), cache))
    return np.stack(logits)


def token_verdict(theirs: np.ndarray, ours: np.ndarray, precision: str) -> str:
    """'pass' if both logits f32 [V] have one argmax; 'ambiguous' if theirs nearly tie within the precision's noise and 9 of the top 10 agree."""
    if theirs.argmax() == ours.argmax():
        return "pass"
    second, first = np.sort(theirs)[-2:]
    shared = len(set(np.argsort(theirs)[-TOP:]) & set(np.argsort(ours)[-TOP:]))
    if first - second < NOISE[precision] and shared >= min(TOP, len(theirs)) - 1:
        return "ambiguous"
    # A quantised model may prefer another token; whether that costs answers is for --data to say; the error of the logits is judged.
    return "fail" if precision in ("fp32", "fp16") else "reported"


def coarsest(parts: dict[str, Part]) -> str:
    """The least exact precision among the parts, which bounds what their chain can keep."""
    return max((part.precision for part in parts.values()), key=ORDER.index)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """|ours - theirs| / |theirs|, Euclidean over all elements; infinite for another shape or a number that is not finite."""
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    return float(np.linalg.norm((ours - theirs).astype(np.float64)) / max(float(np.linalg.norm(theirs.astype(np.float64))), 1e-30))


def largest_difference(ours: np.ndarray | None, theirs: np.ndarray) -> float:
    """The largest absolute difference; infinite where `ours` is missing or has another shape."""
    if ours is None or ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max(initial=0))


def divergence(theirs: np.ndarray, ours: np.ndarray) -> float:
    """KL(softmax(theirs), softmax(ours)) in nats, in float64; infinite if `ours` is not finite."""
    if not np.isfinite(ours).all():
        return float("inf")
    log_p, log_q = _log_softmax(theirs), _log_softmax(ours)
    return float(max(0.0, np.sum(np.exp(log_p) * (log_p - log_q))))


def _tokens(reference: Reference, steps: np.ndarray, precision: str) -> Row:
    """All greedy tokens as one row; its difference counts the steps at which the bundle would choose another token."""
    verdicts = [token_verdict(theirs, ours, precision) for theirs, ours in zip(reference.logits, steps, strict=True)]
    worst = max(verdicts, key=("pass", "ambiguous", "reported", "fail").index)
    other = float(sum(verdict != "pass" for verdict in verdicts))
    return Row("tokens", "tokens", reference.name, reference.question, f"other tokens of {len(verdicts)}", other, 0.0, worst)


def _logits(reference: Reference, steps: np.ndarray, tolerance: float) -> list[Row]:
    """The prompt's logits, and those of all further steps together."""
    rows = [_error("prefill", "logits", reference, steps[0], reference.logits[0], tolerance)]
    if len(steps) > 1:
        row = _error("decode", "logits", reference, steps[1:], reference.logits[1:], tolerance)
        rows.append(replace(row, measure=f"relative error of {len(steps) - 1} steps"))
    return rows


def _error(stage: str, tensor: str, reference: Reference, ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> Row:
    return judged(stage, tensor, (reference.name, reference.question), "relative error", relative_error(ours, theirs), tolerance)


def _verdict(difference: float, tolerance: float) -> str:
    return "pass" if difference <= tolerance else "fail"


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
