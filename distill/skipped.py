"""Questions that can't be used: found once, before any work, so that one bad row neither stops a run in its middle nor changes how it continues.

A row is skipped for not being a question at all, for an image that is missing or damaged, for more tokens than are read (it is never cut), or for what
the processor refuses.
Every image is decoded, once; lengths are computed from the images' sizes, and a prompt is encoded only where that leaves a doubt.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from ..errors import DataError, ImageError, LengthError, RunError
from ..files import write_text
from ..images import open_image
from ..progress import bar, say
from ..samples import BadRow, Sample, read_rows
from . import ranks
from .inputs import Encoder

SKIPPED = "skipped.jsonl"  # in the run folder
MALFORMED = "malformed row"
REASONS = ("missing image", "damaged image", "too long", "refused by the processor", MALFORMED)
AT_ONCE = 256  # questions
DOUBT = 64  # tokens below the limit from which on a computed length is checked by encoding the prompt
PROBES = 4  # questions whose computed lengths must be exact before the others of as many images are believed

Size = tuple[int, int]


@dataclass(frozen=True)
class DataFile:
    """A file of questions and what was read from it: its questions, and rows that are none."""

    path: Path
    samples: Sequence[Sample]
    bad: Sequence[BadRow] = ()


@dataclass(frozen=True)
class Skipped:
    """A row that is not used: in which file ('train' or 'validation'), its id ('row 7' if it is no question), one of REASONS, and what was found."""

    file: str
    id: str
    reason: str
    message: str


def read_file(path: Path, limit: int | None = None) -> DataFile:
    """The questions in a file, the first `limit` of them, and the rows among them that are none. Raises DataError for a file that can't be read."""
    samples: list[Sample] = []
    bad: list[BadRow] = []
    for row in read_rows(path):
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        samples.append(row)
        if len(samples) == limit:
            break
    return DataFile(path, samples, bad)


def look_through(path: Path, files: Mapping[str, DataFile], encoders: Sequence[Encoder], longest: int | None, most: float) -> list[Skipped]:
    """The rows of `files` ('train', 'validation') that can't be used: those in the file `path` if a run has decided before, or as found now.

    A prompt may take `longest` tokens as each of `encoders` says, one for every way in which the run's models read; a training question `longest`
    of this function with its right answer, where that is a response to train on. Several processes of one run share the work, and each gets the
    whole list. Raises DataError where more than the share `most` of a file, or all of it, can't be used, and RunError where `path` is damaged.
    """
    if ranks.agreed(path.exists()):
        return read_skipped(path)
    rows = [(name, sample) for name, file in files.items() for sample in file.samples]
    places = range(ranks.index(), len(rows), ranks.count())
    threads = max(1, (os.cpu_count() or 1) // ranks.count())
    checked = _check_all([rows[i] for i in places], encoders, longest, threads)
    found = [(place, skipped) for place, skipped in zip(places, checked, strict=True) if skipped]
    all_skipped = [Skipped(name, f"row {row.number}", MALFORMED, row.message) for name, file in files.items() for row in file.bad]
    all_skipped += [skipped for _, skipped in sorted(chain(*ranks.gathered(found)), key=lambda pair: pair[0])]
    for name, file in files.items():
        mine = [row for row in all_skipped if row.file == name]
        _refuse_many(mine, file, most)
        if mine and ranks.is_main():
            count = len(file.samples) + len(file.bad)
            say(f"{len(mine):,} of {count:,} {name} questions are skipped: {counted(mine)}; their ids stand in {path}")
    return all_skipped


def _refuse_many(skipped: Sequence[Skipped], file: DataFile, most: float) -> None:
    count = len(file.samples) + len(file.bad)
    if skipped and (len(skipped) > most * count or len(skipped) == count):
        raise DataError(
            f"{len(skipped):,} of {count:,} questions in {file.path} can't be used ({counted(skipped)}); "
            f"at most {most:.0%} are skipped (data.max_skipped), mend them, the first: {skipped[0].message}"
        )


def counts(skipped: Sequence[Skipped]) -> dict[str, int]:
    """How many rows were skipped for each reason that occurs."""
    found = Counter(row.reason for row in skipped)
    return {reason: found[reason] for reason in REASONS if found[reason]}


def counted(skipped: Sequence[Skipped]) -> str:
    """The counts in words: 'missing image 3, too long 1'."""
    return ", ".join(f"{reason} {count:,}" for reason, count in counts(skipped).items())


def without(samples: Sequence[Sample], name: str, skipped: Sequence[Skipped]) -> list[Sample]:
    """The questions of the file `name` that are used."""
    left_out = {row.id for row in skipped if row.file == name and row.reason != MALFORMED}
    return [sample for sample in samples if sample.id not in left_out]


def write_skipped(path: Path, skipped: Sequence[Skipped]) -> None:
    """Write skipped.jsonl, a row a line, unless a run has decided before; it is empty where every question can be used."""
    if path.exists():
        return
    write_text(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in skipped))


def read_skipped(path: Path) -> list[Skipped]:
    """What was decided before. Raises RunError where the file is damaged."""
    try:
        return [Skipped(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged ({str(error)[:120]}); remove it, and the questions are looked through again") from None


def _check_all(rows: Sequence[tuple[str, Sample]], encoders: Sequence[Encoder], limit: int | None, threads: int) -> Iterator[Skipped | None]:
    """For every row what is wrong with it, or None."""
    images, lengths = _Images(), [_Lengths(encoder) for encoder in encoders]
    # Threads do for decoding, which holds no lock; tokenizers may be used by one at a time.
    with ThreadPoolExecutor(threads) as pool:
        starts = range(0, len(rows), AT_ONCE)
        for start in bar(starts, "looking through images and lengths"):
            part = rows[start : start + AT_ONCE]
            images.look([sample for _, sample in part], pool)
            for name, sample in part:
                yield _check(name, sample, images.sizes(sample), lengths, limit if name == "train" else None)


def _check(name: str, sample: Sample, sizes: list[Size] | ImageError, lengths: Sequence[_Lengths], limit: int | None) -> Skipped | None:
    try:
        if isinstance(sizes, ImageError):
            raise sizes
        length = max([each.of(sample, sizes) for each in lengths])
        if limit is not None and length + (answer := len(lengths[0].encoder.answer(sample.answers[0]))) > limit:
            raise LengthError(f"question '{sample.id}' takes {length} tokens and its answer {answer}; at most {limit} are read, raise 'longest' or shorten it")
    except DataError as error:
        return Skipped(name, sample.id, _reason(sample, error), str(error))
    return None


def _reason(sample: Sample, error: DataError) -> str:
    if isinstance(error, ImageError):
        return REASONS[0] if any(isinstance(image, Path) and not os.path.isfile(image) for image in sample.images) else REASONS[1]
    return REASONS[2] if isinstance(error, LengthError) else REASONS[3]


class _Images:
    """Decodes images whole, each once: many data sets ask several questions about one image."""

    def __init__(self) -> None:
        self._known: dict[Path | bytes, Size | ImageError] = {}

    def look(self, samples: Sequence[Sample], pool: Executor) -> None:
        """Decode what these samples show and was not seen before."""
        new = dict.fromkeys(image for sample in samples for image in sample.images if image not in self._known)
        self._known.update(zip(new, pool.map(_size, new), strict=True))

    def sizes(self, sample: Sample) -> list[Size] | ImageError:
        """Height and width of every image of a sample that was looked at, or the first one's error."""
        found = [self._known[image] for image in sample.images]
        errors = [size for size in found if isinstance(size, ImageError)]
        return errors[0] if errors else [size for size in found if not isinstance(size, ImageError)]


def _size(image: Path | bytes) -> Size | ImageError:
    try:
        decoded = open_image(image)
    except ImageError as error:
        return error
    return decoded.height, decoded.width


class _Lengths:
    """Tokens of prompts, computed from their text and their images' sizes where the processor can tell what images of some size take.

    Proved for each number of images apart: a processor may cut one image into tiles, and several not.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.proved: Counter[int] = Counter()
        self.refuted: set[int] = set()

    def of(self, sample: Sample, sizes: Sequence[Size]) -> int:
        """The tokens of a prompt; DataError, as `Encoder.encode` raises it, where it can't be used."""
        number, computed = len(sizes), self._compute(sample, sizes)
        if computed is not None and self.proved[number] >= PROBES and computed <= self.encoder.longest - DOUBT:
            return computed
        exact = len(self.encoder.encode(sample).ids)
        self.proved[number] += computed == exact
        if computed not in (None, exact):
            self.refuted.add(number)
        return exact

    def _compute(self, sample: Sample, sizes: Sequence[Size]) -> int | None:
        """None where the length can't be computed, or the text holds an image's token."""
        if len(sizes) in self.refuted:
            return None
        ids = self.encoder.tokenizer(self.encoder.chat(sample), add_special_tokens=False).input_ids
        if sum(ids.count(token) for token in self.encoder.image_tokens) != len(sizes):
            return None
        try:
            taken = self.encoder.processor._get_num_multimodal_tokens(image_sizes=list(sizes)).num_image_tokens if sizes else ()
        except Exception:  # the processor has no such rule, or the picture is of odd size: encoding it tells
            return None
        return len(ids) + sum(taken) - len(sizes)
