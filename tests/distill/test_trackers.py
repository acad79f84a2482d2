"""What TensorBoard, W&B and trackio hold of a run, read back by their own readers, also when the run was killed and continued."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from masters.distill import trackers
from masters.distill.recipe import Recipe, build_recipe
from masters.distill.trackers import Cell, RunLog, check_installed, figures
from masters.errors import MissingExtraError, RecipeError

LOSS, ACCURACY = "loss/total", "validation/accuracy"

SENT_ONCE = [(step + 1, 0.0 + step / 64) for step in range(8)] + [(step + 1, 5 + step / 64) for step in range(8, 12)]
CONTINUED = [(step + 1, 0.0 + step / 64) for step in range(5)] + [(step + 1, 5 + step / 64) for step in range(5, 12)]
EVALUATED = [(0, 0.5), (5, 0.0), (10, 5 / 64)]


def recipe_of(out: Path, *track: str) -> Recipe:
    models = {"student": "s", "teachers": [{"model": "t"}], "data": {"train": "a", "validation": "b"}}
    return build_recipe(models | {"out": str(out), "track": list(track)})


def life(out: Path, tracker: str, first: int, last: int, killed: bool) -> None:
    """A run from step `first` to `last`; losses tell its lives apart."""
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", TRACKIO_DIR=str(out / "trackio"), HOME=str(out))
    sys.stdout = open(out / "stdout", "a")  # noqa: SIM115 - until the process ends
    log = RunLog(recipe_of(out, tracker), first)
    if first == 0:
        log.write({"kind": "evaluation", "step": -1, "validation_accuracy": 0.5})
    for step in range(first, last):
        log.write({"kind": "step", "step": step, "loss": first + step / 64})
        if step % 5 == 4:
            log.write({"kind": "evaluation", "step": step, "validation_accuracy": first / 64})
            log.table(step, "answers", [Cell(Image.new("RGB", (4, 3), "red"), {"question": "<b>*what*</b>?", "student": "red"})])
    if killed:
        time.sleep(0 if tracker == "tensorboard" else 3)  # what others send in the background is on its way
        os.kill(os.getpid(), signal.SIGKILL)
    log.close()


def live_twice(out: Path, tracker: str) -> None:
    """A run that was killed in its eighth step, its checkpoint being from the fifth, and then continued."""
    out.mkdir()
    for first, last, killed in ((0, 8, True), (5, 12, False)):
        process = processes.context.Process(target=life, args=(out, tracker, first, last, killed))
        process.start()
        process.join(120)
        assert process.exitcode == (-signal.SIGKILL if killed else 0)
    assert (out / "stdout").read_text() == "", "results alone go to stdout"
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [-1, 0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 9, 10, 11]


def tensorboard(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


def test_tensorboard_forgets_what_a_killed_run_repeats(tmp_path: Path):
    live_twice(tmp_path / "run", "tensorboard")
    held = tensorboard(tmp_path / "run" / "tensorboard")
    assert [(e.step, e.value) for e in held.Scalars(LOSS)] == CONTINUED
    assert [(e.step, e.value) for e in held.Scalars(ACCURACY)] == EVALUATED
    [first, second] = held.Images("answers/0")
    assert (first.step, second.step, first.width, first.height) == (5, 10, 4, 3)
    text = held.Tensors("answers/0/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "**question**" in text
    assert "<b>" not in text, "what a model or a file says is no Markdown"


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB; per piece a checksum, a length and a kind) behind seven bytes of its own."""
    from wandb.proto import wandb_internal_pb2 as protocol

    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            found: Any = vars(protocol)["Record"]()
            found.ParseFromString(record)
            yield found
            record = b""


def test_wandb_gets_every_step_once_and_in_order(tmp_path: Path):
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    live_twice(tmp_path / "run", "wandb")
    files = sorted((tmp_path / "run").rglob("*.wandb"))
    assert len(files) == 2
    records = [record for file in files for record in wandb_records(file)]
    assert len({record.run.run_id for record in records if record.WhichOneof("record_type") == "run"}) == 1, "the second life is the same run"
    rows = [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in r.history.item} for r in records if r.HasField("history")]
    assert [(row["updates"], row[LOSS]) for row in rows if LOSS in row] == SENT_ONCE
    assert [(row["updates"], row[ACCURACY]) for row in rows if ACCURACY in row] == EVALUATED
    assert [row["updates"] for row in rows if "answers/_type" in row] == [5, 10]
    [kept] = {entry.path.rsplit(".", 1)[-1] for r in records if r.HasField("artifact") for entry in r.artifact.manifest.contents if "images" in entry.path}
    assert kept == "png"


def test_trackio_gets_every_step_once_and_in_order(tmp_path: Path):
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("the package trackio is not installed (it wants an older pillow than constraints.txt)")
    live_twice(tmp_path / "run", "trackio")
    read = "import json, sys, trackio; from trackio.sqlite_storage import SQLiteStorage as s; [run] = trackio.Api().runs('masters')\n"
    read += "json.dump([{k: v for k, v in row.items() if k != 'timestamp'} for row in s.get_logs('masters', run.name)], sys.stdout)"
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "run" / "trackio")}
    done = subprocess.run([sys.executable, "-c", read], env=environment, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    assert [(row["step"], row[LOSS]) for row in rows if LOSS in row] == SENT_ONCE
    assert [(row["step"], row[ACCURACY]) for row in rows if ACCURACY in row] == EVALUATED
    tables = [(row["step"], row["answers"]["_value"][0]) for row in rows if "answers" in row]
    assert [step for step, _ in tables] == [5, 10]
    assert tables[0][1]["student"] == "red"
    assert (tmp_path / "run" / "trackio" / "media" / tables[0][1]["image"]["file_path"]).is_file()


def test_a_run_that_begins_anew_has_no_past(tmp_path: Path):
    recipe = recipe_of(tmp_path, "tensorboard")
    for loss in (1.0, 2.0):
        log = RunLog(recipe, 0)
        log.write({"kind": "step", "step": 0, "loss": loss})
        log.close()
    assert [(e.step, e.value) for e in tensorboard(tmp_path / "tensorboard").Scalars(LOSS)] == [(1, 2.0)]


def test_figures_have_grouped_names_and_shares_of_pairs():
    row = {"kind": "step", "step": 3, "stage": 1, "ratio": 0.2, "loss": 1.5, "pairs": 8, "right_outranks_total": 6, "right_outranks_distillation": 2}
    found = figures(row | {"seconds": 0.5, "questions": 16, "new_figure": 3})
    assert found == {
        "teacher/mask_ratio": 0.2,
        "loss/total": 1.5,
        "rewards/right_outranks_wrong/total": 0.75,
        "rewards/right_outranks_wrong/distillation": 0.25,
        "speed/seconds_per_step": 0.5,
        "speed/questions_per_second": 32,
        "other/new_figure": 3,
    }
    assert figures({"kind": "evaluation", "step": 3, "stage": 1, "ratio": 0.2, "validation_accuracy": 0.5}) == {"validation/accuracy": 0.5}
    assert not any("outranks" in name for name in figures(row | {"pairs": 0})), "of no pairs there is no share"


def test_the_status_line_tells_how_often_right_outranks_wrong(tmp_path: Path):
    log = RunLog(recipe_of(tmp_path), 0)
    assert log.status() == ""
    log.write({"kind": "step", "step": 0, "loss": 1.0, "pairs": 0, "right_outranks_total": 0, "right_outranks_distillation": 0})
    assert log.status() == "loss 1", "of no pairs there is no share"
    log.write({"kind": "evaluation", "step": 0, "validation_accuracy": 0.5})
    for step in range(1, 51):
        log.write({"kind": "step", "step": step, "loss": 0.5, "pairs": 8, "right_outranks_total": 6, "right_outranks_distillation": 2})
    assert log.status() == "loss 0.5, right above wrong: total 75%, distillation 25%", "of the latest fifty"


def test_a_tracker_that_fails_ends_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "tensorboard").write_text("a file is in the way")
    log = RunLog(recipe_of(tmp_path, "tensorboard"), 0)
    log.write({"kind": "step", "step": 0, "loss": 1.0})
    log.table(0, "answers", [Cell(Image.new("RGB", (2, 2)), {"question": "?"})])
    log.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    told = [line for line in capfd.readouterr().err.splitlines() if "tensorboard" in line]
    assert len(told) == 1
    assert "the run goes on" in told[0]


def test_a_tracker_that_fails_later_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    log = RunLog(recipe_of(tmp_path, "tensorboard"), 0)
    log.write({"kind": "step", "step": 0, "loss": 1.0})
    monkeypatch.setattr(log.trackers["tensorboard"], "figures", lambda *_: (_ for _ in ()).throw(ConnectionError("the server is gone")))
    for step in (1, 2):
        log.write({"kind": "step", "step": step, "loss": 1.0})
    log.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert capfd.readouterr().err.count("the server is gone") == 1


def test_a_tracker_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    for name, extra in (("tensorboard", "distill"), ("wandb", "wandb"), ("trackio", "trackio")):
        with pytest.raises(MissingExtraError, match=rf"'{name}' is not installed.*masters\[{extra}\]"):
            check_installed((name,))
    with pytest.raises(RecipeError, match=r"'track' holds 'mlflow'; expected some of tensorboard, wandb, trackio"):
        recipe_of(tmp_path, "mlflow")
