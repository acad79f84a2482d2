"""What the export costs in answers: bundle and PyTorch on the same questions, the difference with its interval."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..bootstrap import Interval, mean_interval, paired_difference
from ..errors import ParityError
from ..files import whole_file
from ..progress import bar
from ..runtime.check import CheckConfig
from ..runtime.session import Vlm
from ..samples import Sample, read_samples
from ..scoring import score
from .reference import encode, greedy
from .source import Source

# As a check has it, so that stored answers and the device's are cut at the same length.
MAX_TOKENS = CheckConfig.max_tokens


def measure_drop(vlm: Vlm, source: Source, data: Path, max_drop: float | None, answers: Path | None = None) -> dict[str, Any]:
    """Scores of both on the questions in `data`, greedy, and the paired difference's 95% interval, as an entry for the manifest's checks.

    PyTorch's answers are kept in `answers`, as `masters check --reference` reads them. Raises ParityError if the interval's lower end lies below -max_drop.
    """
    samples = read_samples(data)
    ours, said = [], {}
    for sample in bar(samples, "questions"):
        ours.append(score(sample, vlm.answer(sample.prompt, sample.images, max_tokens=MAX_TOKENS).text))
        said[sample.id] = _torch_answer(source, sample)
    theirs = [score(sample, said[sample.id]) for sample in samples]
    if answers is not None:
        with whole_file(answers) as part:
            part.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in said.items()), encoding="utf-8")
    difference = paired_difference(ours, theirs)
    if max_drop is not None and difference.low < -max_drop:
        raise ParityError(
            f"the score on {data} changes by {difference} from PyTorch's {_mean(theirs):.3f}; its lower end may be at most {max_drop:g} below zero: "
            "choose a finer precision, or more questions if the interval is wide"
        )
    return {"kind": "drop", "data": data.name, "bundle": _row(mean_interval(ours)), "pytorch": _row(mean_interval(theirs)), "difference": _row(difference)}


def _torch_answer(source: Source, sample: Sample) -> str:
    tokens, _ = greedy(source, encode(source, sample.prompt, sample.images), MAX_TOKENS)
    return str(source.processor.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)).strip()


def _mean(scores: list[float]) -> float:
    return sum(scores) / len(scores)


def _row(interval: Interval) -> dict[str, Any]:
    return asdict(interval)
