"""The answers of one source to its questions: those that are missing are asked of an engine, judged, and kept batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import MastersError
from ..progress import bar
from ..samples import Sample
from . import ranks
from .buffer import Shelf, question_key
from .features import KeptFeatures
from .generate import Generated, Sampling, batches_by_length, failed, generate_own
from .inputs import CollatePixels, Encoder
from .judge import Verdict
from .parallel import Hooked
from .prefetch import process_count, read_prompts, reading
from .responses import Response

# From batches of questions to each question with its answers, in any order. A batch is finished before the next one is begun, or not, as the engine likes.
Engine = Callable[[Sequence[Sequence[Sample]]], Iterator[tuple[Sample, list[Generated]]]]
Judge = Callable[[Sample, str], Verdict]
Heard = Sequence[tuple[Sample, Sequence[Generated]]]
Tally = Callable[["Source", Heard], None]


@dataclass(frozen=True)
class Source:
    """Whose answers: a teacher's at one mask ratio, or the student's as it is at that place in the run."""

    shelf: str  # the name of its file
    kind: str  # teacher or student
    number: int  # of the teacher, in the recipe's order
    model: str
    ratio: float
    count: int  # answers a question

    @property
    def weights(self) -> str:
        """What the random numbers follow from, beside seed, question and place."""
        return f"{self.kind}/{self.ratio}"


@dataclass(frozen=True)
class Asking:
    """How the answers of a run are made: how they are drawn and judged, where they are kept, and how many questions a batch has."""

    buffer: Path
    sampling: Sampling
    seed: int
    batch: int
    judge: Judge
    tally: Tally | None = None  # told of a batch before it is kept


def collect(
    asking: Asking,
    source: Source,
    samples: Sequence[Sample],
    images: Mapping[str, str],
    engine: Callable[[], AbstractContextManager[Engine]],
    settled: Callable[[], bool],
    together: bool,
) -> list[Response]:
    """`source.count` rows for each sample, in the order of `samples`; only those that the shelf lacks are made, and those that failed unless `settled`.

    `engine` is opened if there is something to make: by all processes of the run where it answers with them `together`, or else by the main one.
    Whatever goes wrong, finished batches are kept.
    """
    shelf = Shelf(asking.buffer, source.shelf)
    keys = {s.id: question_key(s, images[s.id], source.shelf, source.ratio, asking.sampling, asking.seed) for s in samples}
    ranks.wait()
    rows = shelf.read()
    retry = any(row.finish == "failed" for row in rows.values()) and not settled()

    def lacking(sample: Sample) -> bool:
        found = [rows.get(f"{keys[sample.id]}/{place}") for place in range(source.count)]
        return any(row is None or (retry and row.finish == "failed") for row in found)

    # The batches of an unbroken run, less what is there: numbers depend a little on what is computed together.
    batches = [[s for s in batch if lacking(s)] for batch in batches_by_length(samples, asking.batch * (ranks.count() if together else 1), images)]
    missing = [batch for batch in batches if batch]
    if missing:
        if together or ranks.is_main():
            with reading():
                _make(asking, source, shelf, missing, keys, images, engine)
        ranks.wait()
        rows = shelf.read()
    wanted = [rows[f"{keys[s.id]}/{place}"] for s in samples for place in range(source.count)]
    ranks.wait()  # all have read the parts
    if missing or not shelf.closed:
        shelf.close(wanted)
    return wanted


def _make(
    asking: Asking,
    source: Source,
    shelf: Shelf,
    batches: Sequence[Sequence[Sample]],
    keys: Mapping[str, str],
    images: Mapping[str, str],
    engine: Callable[[], AbstractContextManager[Engine]],
) -> None:
    """Ask for the answers to `batches`, and keep them as they come, a batch's worth in a file."""
    held: list[Response] = []
    heard: list[tuple[Sample, Sequence[Generated]]] = []
    waiting = 0
    try:
        for sample, answers in bar(_asked(batches, images, source.count, engine), f"answers of {source.model}", total=sum(map(len, batches))):
            held += _rows(asking, source, sample, answers, keys[sample.id])
            heard.append((sample, answers))
            waiting += 1
            if waiting >= asking.batch:
                if asking.tally:
                    asking.tally(source, heard)
                heard = []
                # Emptied first: where a file can't be written, the same rows are not tried again below.
                rows, held, waiting = held, [], 0
                shelf.add(rows)
    finally:
        if held:
            if asking.tally:
                asking.tally(source, heard)
            shelf.add(held)


def _asked(
    batches: Sequence[Sequence[Sample]], images: Mapping[str, str], count: int, engine: Callable[[], AbstractContextManager[Engine]]
) -> Iterator[tuple[Sample, list[Generated]]]:
    """Each question with its answers; one whose images are not there is answered by a failure, and no engine is bothered."""
    readable = [[sample for sample in batch if images[sample.id]] for batch in batches]
    if any(readable):
        with engine() as answer:
            yield from answer([batch for batch in readable if batch])
    for batch in batches:
        for sample in batch:
            if not images[sample.id]:
                yield sample, [failed(f"an image of question '{sample.id}' can't be read: {sample.images[0]!s:.160}")] * count


def _rows(asking: Asking, source: Source, sample: Sample, answers: Sequence[Generated], key: str) -> list[Response]:
    """One row an answer; what was said several times is judged once."""
    texts = dict.fromkeys(answer.text for answer in answers if answer.finish != "failed")
    verdicts = {text: asking.judge(sample, text) for text in texts}
    none = Verdict(None, "")
    rows = []
    for place, answer in enumerate(answers):
        gone = answer.finish == "failed"
        verdict = none if gone else verdicts[answer.text]
        judge, reason = ("", answer.reason) if gone else (verdict.judge, verdict.reason)
        who = (sample.id, source.kind, source.model, source.ratio, asking.seed)
        rows.append(Response(*who, answer.text, answer.ids, answer.finish, verdict.value, judge, reason, f"{key}/{place}"))
    return rows


def in_process(
    model: Any, encoder: Encoder, collate_pixels: CollatePixels, source: Source, asking: Asking, processes: int | None, images: Mapping[str, str]
) -> Engine:
    """The engine that is a model in this process, or in all processes of the run: each answers its part of a batch, and all get all answers.

    `images` tells, by a question's id, what its images are known by: the same ones are encoded once. A question that can't be encoded gets failed answers.
    """
    features = model.features if isinstance(model, Hooked) else KeptFeatures()

    def answer(batches: Sequence[Sequence[Sample]]) -> Iterator[tuple[Sample, list[Generated]]]:
        # A run of neighbours to each process: they may show the same images.
        mine = [batch[len(batch) * ranks.index() // ranks.count() : len(batch) * (ranks.index() + 1) // ranks.count()] for batch in batches]
        count = process_count([sample for part in mine for sample in part], processes)
        for batch, part, prompts in zip(batches, mine, read_prompts(encoder, mine, count), strict=True):
            found = {sample.id: [failed(str(error))] * source.count for sample, error in zip(part, prompts, strict=True) if isinstance(error, MastersError)}
            good = [(sample, prompt) for sample, prompt in zip(part, prompts, strict=True) if not isinstance(prompt, MastersError)]
            readable, read = [sample for sample, _ in good], [replace(prompt, shown=images.get(sample.id, "")) for sample, prompt in good]
            answers = generate_own(model, encoder, collate_pixels, readable, source.count, asking.sampling, asking.seed, source.weights, read, features)
            found |= {sample.id: given for sample, given in zip(readable, answers, strict=True)}
            every = {name: given for each in ranks.gathered(found) for name, given in each.items()}
            for sample in batch:
                yield sample, every[sample.id]

    return answer
