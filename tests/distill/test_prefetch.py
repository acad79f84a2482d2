"""The processes that read images: what they give is tested with the answers; here, how they end."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import processes
import pytest
import torch

from masters.distill import prefetch
from masters.distill.answers import Asking, Source, collect
from masters.distill.buffer import Shelf, image_digests
from masters.distill.engines import Weights, open_engine
from masters.distill.families.idefics3 import collate_pixels
from masters.distill.generate import Sampling
from masters.distill.inputs import Encoder
from masters.distill.judge import Verdict
from masters.distill.prefetch import process_count, read_prompts
from masters.distill.recipe import Answers
from masters.errors import RunError
from masters.samples import Sample, read_samples

READERS = 2


def wait_half_read(questions: Path, told: Path) -> None:
    """Take one batch of many, tell the readers' process ids, and stay: they hold more than a pipe takes."""
    import multiprocessing

    from masters.demo.models import build_processor, build_tokenizer

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it
    torch.set_num_threads(1)
    batches = [read_samples(questions / "train.jsonl")[i : i + 8] for i in (0, 8, 16, 24, 32)]
    reader = read_prompts(Encoder(build_processor(build_tokenizer())), batches, READERS)
    next(reader)
    (told.with_name("part")).write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
    os.replace(told.with_name("part"), told)
    time.sleep(600)


def ended(pids: list[int], seconds: float = 60) -> bool:
    """Whether these processes are gone, or will be in time; one that nobody has waited for is gone."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(runs(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=["SIGKILL", "SIGINT", "SIGTERM"])
def test_readers_end_with_the_process_that_asked_for_them(number: int, questions: Path, tmp_path: Path):
    # Not a daemon, which may have no children.
    process: BaseProcess = processes.context.Process(target=wait_half_read, args=(questions, tmp_path / "pids"))
    process.start()
    end = time.monotonic() + 400
    while not (tmp_path / "pids").exists():
        assert process.is_alive(), process.exitcode
        assert time.monotonic() < end
        time.sleep(0.05)
    pids = list(map(int, (tmp_path / "pids").read_text().split()))
    assert len(pids) == READERS
    assert all(map(runs, pids))
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode not in (0, None)
    assert ended(pids)


def test_a_reader_that_is_killed_is_one_line_and_finished_answers_stay(tiny: Any, encoder: Encoder, samples: list[Sample], tmp_path: Path):
    killed: list[int] = []

    def judge(sample: Sample, text: str) -> Verdict:
        """Ends a reader after the first batches, as the kernel does for want of memory."""
        readers = [pid for pid in children() if pid not in killed]
        if len(Shelf(tmp_path, "teacher0-stage0").read()) >= 2 * 2 and readers and not killed:
            killed.append(readers[0])
            os.kill(readers[0], signal.SIGKILL)
        return Verdict(1.0, "")

    def asked(processes: int, judge: Any) -> Any:
        asking = Asking(tmp_path, Sampling(max_tokens=2), 0, 2, judge)
        source, images = Source("teacher0-stage0", "teacher", 0, "big", 0.2, 2), image_digests(samples)

        def opened() -> Any:
            return open_engine(
                "transformers", Answers(processes=processes), source, asking, encoder, collate_pixels, Weights(lambda: given(tiny), Path), tmp_path, images
            )

        return collect(asking, source, samples, images, opened, lambda: False, together=True)

    with pytest.raises(RunError, match=r"a process that reads images was ended \(DataLoader worker .*\), as for want of memory; .*answers.processes") as caught:
        asked(READERS, judge)
    assert len(killed) == 1
    assert "\n" not in str(caught.value)
    kept = Shelf(tmp_path, "teacher0-stage0").read()
    assert 4 <= len(kept) < 2 * len(samples)
    rows = asked(READERS, lambda sample, text: Verdict(1.0, ""))
    assert len(rows) == 2 * len(samples)
    assert all(kept.get(row.key, row) == row for row in rows)
    assert ended(killed)


def test_an_error_of_another_kind_passes_unchanged():
    with pytest.raises(RuntimeError, match="a bug"), prefetch.reading():
        raise RuntimeError("a bug")


def test_processes_are_started_where_there_is_enough_to_gain(samples: list[Sample], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    many = samples * (prefetch.WORTH // len(samples) + 1)
    assert process_count(many, None) == prefetch.MOST
    assert process_count(samples, None) == 0
    assert process_count([Sample(str(i), (), "?") for i in range(1000)], None) == 0, "there is no image to decode"
    assert process_count(samples, 3) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert process_count(many, None) == 3


def given(model: Any) -> Any:
    from contextlib import nullcontext

    return nullcontext(model)


def children() -> list[int]:
    import multiprocessing

    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]
