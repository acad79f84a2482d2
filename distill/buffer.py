"""The buffer of responses on disk. A source's answers to one mask stage are a shelf: part files as batches finish, one whole file at the end.

A row is known by its key, the hash of all that it follows from; a row that is there is never made again, one that failed is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from ..errors import RunError
from ..progress import bar
from ..samples import Sample
from . import ranks
from .generate import Sampling
from .responses import Response, read_responses, write_responses

READERS = 8  # threads: a network's file system answers many readers sooner than one


def image_digests(samples: Sequence[Sample]) -> dict[str, str]:
    """A hash of each sample's images' contents, by the sample's id; '' where one of them can't be read."""
    with ThreadPoolExecutor(READERS) as pool:
        found = bar(pool.map(_images_digest, samples), "reading images", total=len(samples))
        return {sample.id: digest for sample, digest in zip(samples, found, strict=True)}


def _images_digest(sample: Sample) -> str:
    digest = hashlib.sha256()
    for image in sample.images:
        try:
            digest.update(hashlib.sha256(image if isinstance(image, bytes) else image.read_bytes()).digest())
        except OSError:
            return ""
    return digest.hexdigest()


def question_key(sample: Sample, images: str, source: str, ratio: float, sampling: Sampling, seed: int) -> str:
    """32 hex digits that are the same if and only if the answers would be: `images` as `image_digests` gives them, `source` with its place in the run."""
    values = [sample.id, sample.prompt, images, source, ratio, asdict(sampling), seed]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


class Shelf:
    """The rows of one source for one run of questions, `name`.parquet in the end, and the part files in `name`/ until then."""

    def __init__(self, buffer: Path, name: str) -> None:
        self.file, self.parts = buffer / f"{name}.parquet", buffer / name

    def read(self) -> dict[str, Response]:
        """All rows by their keys; of two with one key, the one that did not fail. Raises RunError, naming the file, for a damaged one."""
        files = [path for path in (self.file, *sorted(self.parts.glob("[!.]*.parquet"))) if path.exists()]
        rows: dict[str, Response] = {}
        for row in read_responses(files):
            if row.key not in rows or rows[row.key].finish == "failed":
                rows[row.key] = row
        return rows

    def add(self, rows: Sequence[Response]) -> None:
        """Keep a batch of rows: a whole part file, or none. The main process writes."""
        if ranks.is_main():
            write_responses(self.parts / f"{rows[0].key.replace('/', '-')}.parquet", rows)

    def close(self, rows: Sequence[Response]) -> None:
        """Make the one file of `rows`, and drop the parts. The main process does."""
        if not ranks.is_main():
            return
        write_responses(self.file, rows)
        shutil.rmtree(self.parts, ignore_errors=True)

    @property
    def closed(self) -> bool:
        return self.file.exists() and not self.parts.exists()


def check_failures(rows: Iterable[Response], most: float, what: str) -> None:
    """Raise RunError, naming the commonest reason, if more than the share `most` of `rows` failed."""
    listed = list(rows)
    failures = [row for row in listed if row.finish == "failed"]
    if len(failures) <= most * len(listed):
        return
    reasons = [row.reason for row in failures]
    common = max(set(reasons), key=reasons.count)
    named = ", ".join(list(dict.fromkeys(row.sample for row in failures))[:3])
    raise RunError(
        f"{len(failures)} of {len(listed)} answers of {what} failed (questions {named} …; mostly: {common}); the others are kept: mend it and run again, "
        f"or raise answers.max_failed from {most:g}"
    )
