"""The self-test that a bundle carries: one image and question with the PyTorch model's own numbers, compared stage by stage.

The .npz holds `image` (encoded bytes, uint8), `question`, `pixel_values`, `image_features`, `logits` float32 [vocab] of the prompt's last
position, `tokens` int64 of the greedy answer, and `tolerance`, a JSON object of the largest absolute difference allowed by stage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BundleError
from .chat import user_message
from .session import Picture, Vlm, prompt_keys


@dataclass(frozen=True)
class Comparison:
    """One stage against its golden tensor: the largest absolute difference, and what is allowed."""

    stage: str
    difference: float
    tolerance: float


def self_test(vlm: Vlm, file: Path) -> list[Comparison]:
    """Run `vlm` on the golden image and question. Raises BundleError, naming the first stage that differs by more than its tolerance.

    A token may differ where the golden logits nearly tie: within twice the logits' tolerance of each other, either is right.
    """
    golden = read_golden(file)
    rounding = getattr(vlm.parts, "rounding", 0.0)  # of a provider that computes in less than float32
    allowed = json.loads(str(golden["tolerance"]))
    for stage in ("image_features", "logits"):
        allowed[stage] = max(allowed[stage], rounding * float(np.abs(golden[stage]).max(initial=0)))
    pixels = vlm.see([bytes(golden["image"])])[0]
    features = vlm.encode(pixels)
    ids = vlm.prompt_ids([user_message(str(golden["question"]), 1)], pixels.grids)
    keys = prompt_keys(ids, [Picture(-1, pixels.grids[0], features)], vlm.manifest.generation["image_token_id"])
    tokens = [int(token) for token in golden["tokens"]]
    cache = vlm.parts.new_cache(len(ids) + len(tokens))
    embeds = vlm.parts.embed(ids).copy()
    embeds[keys < 0] = features
    logits = vlm.parts.decode(embeds, cache, vlm.positions(ids, pixels.grids))
    stages = {"pixel_values": pixels.values, "image_features": features, "logits": logits}
    found = [compare(stage, ours, golden[stage], allowed[stage]) for stage, ours in stages.items()]
    found.append(Comparison("tokens", _shortfall(vlm, tokens, logits, cache), 2 * allowed["logits"]))
    for comparison in found:
        if not comparison.difference <= comparison.tolerance:
            raise BundleError(
                f"the self-test of {vlm.folder} fails at {comparison.stage}: it is {comparison.difference:.3g} from the PyTorch model's, at most "
                f"{comparison.tolerance:.3g} is allowed; this runtime and the bundle don't fit, export again or report it"
            )
    return found


def read_golden(file: Path) -> Mapping[str, Any]:
    """The arrays of a golden file. Raises BundleError if it is missing or incomplete."""
    wanted = {"image", "question", "pixel_values", "image_features", "logits", "tokens", "tolerance"}
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError) as error:
        raise BundleError(f"{file} can't be read as golden tensors ({error}); export the bundle again") from None
    if missing := wanted - set(arrays):
        raise BundleError(f"{file} lacks '{min(missing)}'; expected {', '.join(sorted(wanted))}; export the bundle again")
    return arrays


def compare(stage: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> Comparison:
    """The largest absolute difference; infinite where the sizes differ or a number is not finite."""
    if ours.size != theirs.size or not np.isfinite(ours).all():
        return Comparison(stage, float("inf"), tolerance)
    return Comparison(stage, float(np.abs(ours.ravel() - theirs.ravel()).max(initial=0)), tolerance)


def _shortfall(vlm: Vlm, tokens: list[int], logits: np.ndarray, cache: Any) -> float:
    """How far, at worst, a golden token's logit lies below our highest one, each step given the golden tokens before it."""
    worst = 0.0
    for step, token in enumerate(tokens):
        worst = max(worst, float(logits.max() - logits[token]))
        if step + 1 < len(tokens):
            logits = vlm.parts.decode(vlm.parts.embed(np.array([token], np.int64)), cache)
    return worst
