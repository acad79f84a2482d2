"""What the ways to ask cost and gain on one bundle: `python benchmarks/answering.py BUNDLE [--threads 2] [--questions 16]`.

Prompt lookup (an answer that quotes its prompt, and one that never does), questions answered together against one by one, constraints by the token, and
images that were seen before. Medians, each pair of figures taken in turn in one run. Weights may be random: an answer's tokens are then given
from outside where their meaning matters, and the machine's work is the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from masters.runtime import Vlm, load
from masters.runtime.answer import Clock
from masters.runtime.constraint import Vocabulary, read_constraint
from masters.runtime.device import this_device
from masters.runtime.session import Chat
from masters.runtime.steps import Steps

ROUNDS = 3
QUOTED = 48  # tokens
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "8 choices": {"choices": [f"the {word} one on the left" for word in ["red", "green", "blue", "black", "white", "grey", "small", "large"]]},
    "a pattern": {"pattern": r"[A-Z][a-z]{2,12}( [a-z]{1,12}){3,20}"},
    "a JSON schema": {
        "json_schema": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 40}, "count": {"type": "integer"}, "kind": {"enum": ["sign", "label", "other"]}},
            "required": ["name", "count", "kind"],
            "additionalProperties": False,
        }
    },
}


def in_turn(**ways: Callable[[], float]) -> dict[str, float]:
    """The median figure of each way over rounds in which every one has its turn; the first round is not counted."""
    found = [{name: way() for name, way in ways.items()} for _ in range(ROUNDS + 1)][1:]
    return {name: statistics.median(one[name] for one in found) for name in ways}


def scripted(vlm: Vlm, text: np.ndarray, answer: Sequence[int], ahead: int) -> float:
    """Milliseconds a token of an answer that is known beforehand, after a prompt int64 [S] of text alone."""
    chat = Chat(vlm)
    logits = chat._prefill(text, [], len(text) + len(answer), Clock())
    assert logits.shape == (vlm.manifest.decoder.vocab_size,)
    steps = Steps(vlm.parts, chat.context, text, len(answer), ahead)
    start = time.perf_counter()
    for count in range(1, len(answer)):
        steps.after(answer[:count])
    return 1000 * (time.perf_counter() - start) / (len(answer) - 1)


def lookup(vlm: Vlm) -> None:
    rng = np.random.default_rng(0)
    usual = np.setdiff1d(np.arange(200, min(20_000, vlm.manifest.decoder.vocab_size)), [vlm.manifest.generation["image_token_id"]])
    text = rng.choice(usual, 300)
    answers = {"quotes its prompt": [int(t) for t in text[150 : 150 + QUOTED]], "never quotes": [int(t) for t in rng.choice(usual, QUOTED)]}
    for what, answer in answers.items():
        ways = {f"{ahead}": partial(scripted, vlm, text, answer, ahead) for ahead in (0, 2, 4, 8, 16)}
        found = in_turn(**ways)
        told = ", ".join(f"lookup={name} {ms:.2f} ({found['0'] / ms:.2f}x)" for name, ms in found.items())
        print(f"prompt lookup, an answer that {what}, ms a token: {told}")


def together(vlm: Vlm, pictures: list[Image.Image], tokens: int) -> None:
    """Answers of exactly so many tokens: an end token would make the ways unlike."""
    endless = Vlm(vlm.manifest, vlm.folder, vlm.parts)
    endless.manifest.generation["eos_token_ids"] = [vlm.manifest.decoder.vocab_size - 1]
    questions = [(f"what is shown in picture {number}?", [picture]) for number, picture in enumerate(pictures)]

    def seconds(at_once: int) -> float:
        start = time.perf_counter()
        answers = list(endless.answer_batch(questions, at_once=at_once, max_tokens=tokens))
        assert {len(answer.token_ids) for answer in answers} == {tokens}
        said[at_once] = [answer.token_ids for answer in answers]
        return (time.perf_counter() - start) / len(questions)

    said: dict[int, list[tuple[int, ...]]] = {}
    found = in_turn(**{f"{at_once}": partial(seconds, at_once) for at_once in (1, 4, 8)})
    told = ", ".join(f"at_once={name} {1000 * each:.0f} ({found['1'] / each:.2f}x)" for name, each in found.items())
    same = sum(a == b for a, b in zip(said[1], said[8], strict=True))
    print(f"{len(questions)} questions with an image each, answers of {tokens} tokens, ms a question: {told}; {same} of {len(questions)} answers alike")


def constraints(vlm: Vlm) -> None:
    start = time.perf_counter()
    vocabulary = Vocabulary(vlm.format.tokenizer, vlm.manifest.decoder.vocab_size, vlm.manifest.generation["eos_token_ids"])
    print(f"the vocabulary of {len(vocabulary.spelt):,} tokens read once: {1000 * (time.perf_counter() - start):.0f} ms")
    for what, asked in CONSTRAINTS.items():
        constraint = read_constraint(**asked)
        assert constraint is not None
        first, again = _timed(partial(vlm.guides.guide, constraint)), _timed(partial(vlm.guides.guide, constraint))
        rng, logits, steps = np.random.default_rng(0), np.zeros(len(vocabulary.spelt), np.float32), []
        for _ in range(8):
            guide = vlm.guides.guide(constraint)
            while not guide.done:
                start = time.perf_counter()
                masked = np.where(guide.allowed(), logits, -np.inf)
                took = time.perf_counter() - start
                token = int(rng.choice(np.flatnonzero(np.isfinite(masked))))
                if token in vocabulary.ends:
                    break
                steps.append(1000 * took + _timed(partial(guide.push, token)))
        print(f"{what}: {first:.1f} ms for the first, {again:.1f} ms for the next answer; {statistics.median(steps):.3f} ms a token, at most {max(steps):.2f}")


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def remembered(bundle: Path, threads: int, pictures: list[Image.Image]) -> None:
    vlm = load(bundle, threads=threads, verify=False, test=False, image_cache_mb=64)
    for name, image in (("as a picture", pictures[0]), ("as an array", np.asarray(pictures[1]))):
        first, second = (vlm.answer("what is it?", [image], max_tokens=1).timings for _ in range(2))
        cost = [times.image_preprocess + times.image_encode for times in (first, second)]
        print(f"an image {name} of {pictures[0].width} x {pictures[0].height}: {cost[0]:.0f} ms, seen before {cost[1]:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs="*", default=[4, 32], help="lengths of the answers that are written together")
    parser.add_argument("--part", choices=["lookup", "together", "constraints", "remembered"])
    chosen = parser.parse_args()
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).resize((640, 480), Image.Resampling.BICUBIC) for _ in range(chosen.questions)]
    vlm = load(chosen.bundle, threads=chosen.threads, verify=False, test=False)
    print(f"{this_device()}; {chosen.threads} threads; {chosen.bundle.name} of {vlm.manifest.model_type}, medians of {ROUNDS}")
    if chosen.part in (None, "constraints"):
        constraints(vlm)
    if chosen.part in (None, "lookup"):
        lookup(vlm)
    if chosen.part in (None, "remembered"):
        remembered(chosen.bundle, chosen.threads, pictures)
    if chosen.part in (None, "together"):
        for tokens in chosen.tokens:
            together(vlm, pictures, tokens)


if __name__ == "__main__":
    main()
