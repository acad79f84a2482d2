"""Collecting answers: what is there is not made again, what was said twice is judged once, and each image is looked at once."""

from __future__ import annotations

import dataclasses
import mmap
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import processes
import pyarrow.parquet as pq
import pytest

from masters.distill import prefetch
from masters.distill.answers import Asking, Engine, Source, collect, in_process
from masters.distill.buffer import Shelf, check_failures, image_digests, question_key
from masters.distill.families.idefics3 import collate_pixels
from masters.distill.generate import Generated, Sampling, failed
from masters.distill.inputs import Encoder, Prompt
from masters.distill.judge import Verdict
from masters.distill.prefetch import read_prompts
from masters.errors import DataError, RunError
from masters.samples import Sample

SOURCE = Source("teacher0-stage1", "teacher", 0, "big", 0.2, 3)


class Scribe:
    """An engine that answers with words, notes what it was asked, and breaks off after some questions."""

    def __init__(self, stop_after: int | None = None, fails: Sequence[str] = ()) -> None:
        self.asked: list[str] = []
        self.opened, self.stop_after, self.fails = 0, stop_after, fails

    @contextmanager
    def open(self) -> Iterator[Engine]:
        self.opened += 1
        yield self.answer

    def answer(self, batches: Sequence[Sequence[Sample]]) -> Iterator[tuple[Sample, list[Generated]]]:
        for sample in [sample for batch in batches for sample in batch]:
            if len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(sample.id)
            good = [Generated(word, (len(word), 2), "stop") for word in ("same", "same", f"other {sample.id}")]
            yield sample, [failed("gone")] * 3 if sample.id in self.fails else good


@pytest.fixture
def asking(tmp_path: Path) -> Asking:
    return Asking(tmp_path / "responses", Sampling(), 0, 4, lambda sample, text: Verdict(1.0, "fine"))


def gather(asking: Asking, scribe: Scribe, samples: Sequence[Sample], settled: bool = False, source: Source = SOURCE) -> Any:
    return collect(asking, source, samples, image_digests(samples), scribe.open, lambda: settled, together=False)


def test_rows_come_in_order_and_are_made_once(asking: Asking, samples: list[Sample]):
    scribe = Scribe()
    rows = gather(asking, scribe, samples[:10])
    assert [row.sample for row in rows] == [s.id for s in samples[:10] for _ in range(3)]
    assert sorted(scribe.asked) == sorted(s.id for s in samples[:10])
    assert gather(asking, scribe, samples[:10]) == rows
    assert scribe.opened == 1, "nothing is opened where nothing is missing"
    assert [path.name for path in asking.buffer.rglob("*")] == ["teacher0-stage1.parquet"]


def test_an_engine_that_dies_loses_what_is_in_flight_alone(asking: Asking, samples: list[Sample]):
    scribe = Scribe(stop_after=6)
    with pytest.raises(KeyboardInterrupt):
        gather(asking, scribe, samples[:10])
    kept = {row.sample for row in Shelf(asking.buffer, SOURCE.shelf).read().values()}
    assert kept == set(scribe.asked)
    again = Scribe()
    rows = gather(asking, again, samples[:10])
    assert set(again.asked) == {s.id for s in samples[:10]} - kept
    assert len(again.asked) == 4
    assert len(rows) == 30


def test_failed_rows_are_kept_and_asked_for_again_until_they_are_trained_on(asking: Asking, samples: list[Sample]):
    bad = [samples[2].id, samples[7].id]
    rows = gather(asking, Scribe(fails=bad), samples[:10])
    assert Counter(row.finish for row in rows) == {"stop": 24, "failed": 6}
    assert {(row.sample, row.reason, row.verdict, row.judge) for row in rows if row.finish == "failed"} == {(name, "gone", None, "") for name in bad}
    settled = Scribe()
    assert gather(asking, settled, samples[:10], settled=True) == rows
    assert settled.opened == 0
    again = Scribe(fails=bad[:1])
    rows = gather(asking, again, samples[:10])
    assert sorted(again.asked) == sorted(bad)
    assert Counter(row.finish for row in rows) == {"stop": 27, "failed": 3}
    with pytest.raises(RunError, match=rf"3 of 30 answers of big failed \(questions {bad[0]} …; mostly: gone\).*max_failed from 0.05"):
        check_failures(rows, 0.05, "big")
    check_failures(rows, 0.1, "big")
    check_failures([], 0.0, "nobody")


def test_what_was_said_twice_is_judged_once(asking: Asking, samples: list[Sample]):
    judged: list[tuple[str, str]] = []

    def judge(sample: Sample, text: str) -> Verdict:
        judged.append((sample.id, text))
        return Verdict(float(text == "same"), text)

    rows = gather(dataclasses.replace(asking, judge=judge), Scribe(), samples[:5])
    assert sorted(judged) == sorted((s.id, text) for s in samples[:5] for text in ("same", f"other {s.id}"))
    assert [(row.verdict, row.reason) for row in rows[:3]] == [(1.0, "same"), (1.0, "same"), (0.0, f"other {samples[0].id}")]


def test_a_key_follows_from_everything_that_an_answer_does(samples: list[Sample]):
    sample, sampling = samples[0], Sampling()
    digests = image_digests([sample])[sample.id]
    base = question_key(sample, digests, "teacher0-stage1", 0.2, sampling, 0)
    assert question_key(dataclasses.replace(sample), digests, "teacher0-stage1", 0.2, dataclasses.replace(sampling), 0) == base
    assert question_key(dataclasses.replace(sample, answers=("another",)), digests, "teacher0-stage1", 0.2, sampling, 0) == base, "the truth is the judge's"
    others = {
        question_key(dataclasses.replace(sample, id="x"), digests, "teacher0-stage1", 0.2, sampling, 0),
        question_key(dataclasses.replace(sample, question="why?"), digests, "teacher0-stage1", 0.2, sampling, 0),
        question_key(dataclasses.replace(sample, choices=("a", "b")), digests, "teacher0-stage1", 0.2, sampling, 0),
        question_key(sample, image_digests([samples[1]])[samples[1].id], "teacher0-stage1", 0.2, sampling, 0),
        question_key(sample, digests, "student0", 0.2, sampling, 0),
        question_key(sample, digests, "teacher0-stage1", 0.15, sampling, 0),
        question_key(sample, digests, "teacher0-stage1", 0.2, Sampling(temperature=0.9), 0),
        question_key(sample, digests, "teacher0-stage1", 0.2, sampling, 1),
    }
    assert len(others | {base}) == 9


def test_an_images_digest_is_of_its_contents(samples: list[Sample], tmp_path: Path):
    image = samples[0].images[0]
    assert isinstance(image, Path)
    (tmp_path / "copy.png").write_bytes(image.read_bytes())
    forms: list[Path | bytes] = [image, tmp_path / "copy.png", image.read_bytes()]
    same = [dataclasses.replace(samples[0], id=str(i), images=(form,)) for i, form in enumerate(forms)]
    assert len(set(image_digests(same).values())) == 1
    two = [dataclasses.replace(samples[0], id=str(i), images=pair) for i, pair in enumerate(((image, samples[1].images[0]), (samples[1].images[0], image)))]
    assert len(set(image_digests(two).values())) == 2
    gone = dataclasses.replace(samples[0], images=(tmp_path / "gone.png",))
    assert image_digests([gone]) == {gone.id: ""}


def test_each_image_is_encoded_once_for_all_answers(tiny: Any, encoder: Encoder, samples: list[Sample], asking: Asking):
    seen: list[int] = []
    hook = tiny.model.vision_model.register_forward_hook(lambda module, given, kwargs, out: seen.append(len(out.last_hidden_state)), with_kwargs=True)
    prefills: list[int] = []
    text = tiny.model.text_model.register_forward_hook(lambda module, given, kwargs, out: prefills.append(out.last_hidden_state.shape[1]), with_kwargs=True)
    try:
        engine = in_process(tiny, encoder, collate_pixels, dataclasses.replace(SOURCE, count=4), asking, 0, {})
        answered = list(engine([samples[:4], samples[4:8]]))
    finally:
        hook.remove()
        text.remove()
    assert sum(seen) == 8, "8 questions of one image, 4 answers each"
    assert sum(length > 1 for length in prefills) == 2, "one prefill a batch"
    assert all(len(answers) == 4 for _, answers in answered)


@pytest.mark.parametrize("room", [None, mmap.PAGESIZE], ids=["shared memory", "too small"])
def test_processes_give_the_prompts_that_are_read_here(
    room: int | None, encoder: Encoder, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if room:
        monkeypatch.setattr(prefetch, "_room", lambda *_: room)
    (tmp_path / "bad.png").write_bytes(b"no image")
    bad = dataclasses.replace(samples[0], id="bad", images=(tmp_path / "bad.png",))
    two = dataclasses.replace(samples[0], id="two", images=samples[0].images + samples[1].images)
    batches = [samples[:5], [*samples[5:14], bad], [two, Sample("none", (), "what?")]]
    here, there = (list(read_prompts(encoder, batches, count)) for count in (0, 2))
    assert [len(batch) for batch in there] == [5, 10, 2]
    for ours, theirs in zip((p for b in here for p in b), (p for b in there for p in b), strict=True):
        if isinstance(ours, DataError):
            assert isinstance(theirs, DataError)
            assert str(ours) == str(theirs)
            continue
        assert isinstance(ours, Prompt)
        assert isinstance(theirs, Prompt)
        assert ours.ids.equal(theirs.ids)
        assert ours.pixels.keys() == theirs.pixels.keys()
        assert all(ours.pixels[name].equal(theirs.pixels[name]) and ours.pixels[name].dtype == theirs.pixels[name].dtype for name in ours.pixels)


def many(folder: Path, questions: Path, count: int) -> Path:
    """A file of `count` questions, every tenth with an image."""
    images = sorted((questions / "images").glob("*.png"))
    with open(folder / "many.jsonl", "w") as lines:
        for i in range(count):
            picture = f'"{images[i % len(images)]}"' if i % 10 == 0 else ""
            lines.write(f'{{"id": "q{i}", "images": [{picture}], "question": "what is {i % 97} and {i % 89}?", "answer": "yes"}}\n')
    return folder / "many.jsonl"


def test_questions_killed_five_times_end_with_the_rows_of_an_unbroken_run(models: Any, questions: Path, tmp_path: Path):
    values = {
        "student": str(models.student),
        "teachers": [{"model": str(models.student), "r_max": 0.2}],
        "data": {"train": str(many(tmp_path, questions, 400)), "validation": str(questions / "validation.jsonl")},
        "answers": {"teacher": 2, "student": 0, "batch": 20, "max_tokens": 2},
        "mask": {"step": 0.2},
        "train": {"dtype": "float32"},
    }
    unbroken, broken, rng = tmp_path / "unbroken", tmp_path / "broken", random.Random()
    processes.run(values | {"out": str(unbroken)}, tmp_path / "complaint", until="answers")
    expected = rows_of(unbroken)
    assert len(expected) == 400 * 2

    finished: dict[str, Any] = {}
    # Somewhere in each of five parts of the way, wherever that is.
    for part in range(5):
        moment = 4 * part + rng.choice((1, 2))  # batches; the last two stay out of reach of the delay
        process = processes.start(values | {"out": str(broken)}, tmp_path / "complaint", until="answers")
        processes.kill_when(process, lambda moment=moment: batches_so_far(broken) >= moment, delay=rng.random() * 0.02)
        kept = rows_of(broken)
        assert all(kept[key] == row for key, row in finished.items()), "a finished row was lost or made again"
        assert 40 * moment <= len(kept) < len(expected)
        finished = kept
    processes.run(values | {"out": str(broken)}, tmp_path / "complaint", until="answers")
    assert rows_of(broken) == expected
    names = [path.name for path in (broken / "responses").iterdir()]
    assert sorted(names) == ["buffer.yaml", "teacher0-stage0.parquet", "teacher0-stage1.parquet"]
    orders = [[row["key"] for row in pq.read_table(out / "responses" / "teacher0-stage1.parquet").to_pylist()] for out in (broken, unbroken)]
    assert orders[0] == orders[1]


def rows_of(out: Path) -> dict[str, Any]:
    """All rows by their keys; while a whole file is made of the parts, a row is in both."""
    found: dict[str, Any] = {}
    for path in (out / "responses").rglob("[!.]*.parquet"):
        for row in pq.read_table(path).to_pylist():
            assert found.setdefault(row["key"], row) == row
    return found


SHELVES = {"teacher0-stage0": 10, "teacher0-stage1": 10}  # batches of 20 questions


def batches_so_far(out: Path) -> int:
    """How many batches are on disk, while somebody works there; asked often, so no file is read."""
    folder = out / "responses"
    return sum(most if (folder / f"{name}.parquet").exists() else parts_in(folder / name) for name, most in SHELVES.items())


def parts_in(folder: Path) -> int:
    try:
        return sum(not name.startswith(".") for name in os.listdir(folder))
    except FileNotFoundError:  # not begun, or put together just now
        return 0
