"""Whole runs on what goes wrong outside of them: one line each, nothing that was finished is lost or done twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import processes
import pytest
from scripted_server import DROP, HALF, NOTHING, completion, serve_script
from test_endpoint import told
from test_stages import answers_of, one_line, raw, recipe_of  # noqa: F401 - raw is a fixture

from masters.distill.claims import locked
from masters.distill.inputs import Encoder
from masters.distill.stages import distill
from masters.errors import DataError, RunError

# ruff: noqa: F811

FAULTS = {
    "401": (
        401,
        {"error": {"message": "expired\nkey"}},
        r"answered 401 \(.*expired.*key.*\): the key in \$MASTERS_ENDPOINT_KEY is not set; set one that it accepts",
    ),
    "500": (500, {"error": "broken\npipe"}, r"the server answered 500 \(.*broken.*pipe"),
    "garbage": (200, b"<html>\n<body>busy", r"the answer is no JSON: '<html> <body>busy'"),
    "other JSON": (200, {"choices": [{"message": {"content": 7}}] * 2}, r"a choice has no message"),
    "half a stream": (HALF, completion("yes"), r"RemoteProtocolError: .*incomplete|RemoteProtocolError: peer closed"),
    "dropped": (DROP, b"", r"RemoteProtocolError: "),
    "nothing": (NOTHING, b"", r"no answer within 1 s"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_endpoint_that_fails_is_one_line_and_what_it_answered_is_not_asked_again(fault: str, raw: dict[str, Any], encoder: Encoder):
    status, body, said = FAULTS[fault]
    settings: dict[str, Any] = {"teacher": 2, "student": 0, "batch": 4, "max_tokens": 3, "engine": "endpoint"}
    endpoint = {"model": "{ratio}", "concurrency": 4 if status == NOTHING else 1, "retries": 0, "timeout": 1.0}
    good: list[str] = []

    def failing_later(request: dict[str, Any], count: int) -> tuple[Any, Any]:
        return (200, told(encoder, *["yes"] * request["n"])) if count <= 4 else (status, body)

    def mended(request: dict[str, Any], count: int) -> tuple[Any, Any]:
        good.append(request["messages"][0]["content"][-1]["text"])
        return 200, told(encoder, *["no"] * request["n"])

    def run(url: str) -> None:
        distill(recipe_of(raw, answers=settings | {"endpoint": endpoint | {"url": url}}), until="answers")

    with serve_script(failing_later) as server, pytest.raises(RunError, match=said) as caught:
        run(server.url)
    one_line(caught)
    kept = {row["key"]: row for path in (Path(raw["out"]) / "responses").rglob("*.parquet") for row in processes.rows(path) if row["finish"] != "failed"}
    assert len(kept) == 3 * 2, "but for the first request, which was none of the questions'"
    with serve_script(mended) as server:
        run(server.url)
    after = {row["key"]: row for row in answers_of(Path(raw["out"]))}
    assert len(after) == 12 * 2
    assert all(after[key] == row for key, row in kept.items())
    assert sum(row["text"] == "no" for row in after.values()) == 12 * 2 - len(kept)
    assert len(good) == (12 - 3) + 2, "each missing question once, and one to try each of two models"


def test_a_question_without_ground_truth_is_named_before_any_work(raw: dict[str, Any], questions: Path, tmp_path: Path):
    shutil.copytree(questions, tmp_path / "data")
    file = tmp_path / "data" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    empty: tuple[dict[str, Any], ...] = ({}, {"answer": ""}, {"answer": []}, {"answer": None})
    for nothing in empty:
        spoilt = {key: value for key, value in rows[3].items() if key not in ("answer", "answers")} | nothing
        file.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:3], spoilt, *rows[4:]]))
        data = {"train": str(file), "validation": str(questions / "validation.jsonl")}
        with pytest.raises(DataError, match=r"1 of 40 .*mend them, the first: .*train\.jsonl row 4: no answer; expected a string or a list") as caught:
            distill(recipe_of(raw, data=data | {"max_skipped": 0}))
        one_line(caught)
        assert not Path(raw["out"]).exists()
    out = distill(recipe_of(raw, data=data), until="check")
    [left_out] = map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
    assert (left_out["file"], left_out["id"]) == ("train", "row 4"), "where few may be skipped, it is, and is counted"


def test_a_buffer_of_another_recipe_or_tokenizer_is_refused_and_left_as_it_was(raw: dict[str, Any], models: Any, tmp_path: Path):
    buffer = tmp_path / "shared"
    distill(recipe_of(raw, buffer=str(buffer), data__limit=6), until="answers")
    before = {path: path.read_bytes() for path in buffer.rglob("*") if path.is_file()}
    student = tmp_path / "student"
    shutil.copytree(models.student, student)
    words = json.loads((student / "tokenizer.json").read_text())
    (student / "tokenizer.json").write_text(json.dumps(words, indent=1))  # not the very file, which might be another one
    others: dict[str, dict[str, Any]] = {
        r"answers\.temperature differ": {"answers__temperature": 0.5},
        r"seed differ": {"seed": 3},
        r"limit differ": {"data__limit": 7},
        r"r_max differ": {"teachers": [{"model": str(models.teacher), "r_max": 0.4}]},
        r"fingerprints\.student, fingerprints\.tokenizer differ": {"student": str(student)},
    }
    for number, (named, changes) in enumerate(others.items()):
        with pytest.raises(RunError, match=rf"the buffer of responses .*shared was begun with another recipe \({named}\); choose another folder") as caught:
            distill(recipe_of(raw, **({"data__limit": 6} | changes), buffer=str(buffer), out=str(tmp_path / f"other{number}")), until="answers")
        one_line(caught)
    assert {path: path.read_bytes() for path in buffer.rglob("*") if path.is_file()} == before


def hold(out: Path, told: Path) -> None:
    """Work in `out` with a child of one's own, as a run has that reads images in processes; never end."""
    with locked(out):
        child = os.fork()
        if not child:
            time.sleep(600)
            os._exit(0)
        part = told.with_name("part")
        part.write_text(str(child))
        part.replace(told)
        time.sleep(600)


def test_a_lock_is_gone_with_a_killed_process_whatever_children_it_leaves(tmp_path: Path):
    process = processes.context.Process(target=hold, args=(tmp_path / "run", tmp_path / "child"))
    process.start()
    end = time.monotonic() + 400
    while not (tmp_path / "child").exists():
        assert process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.02)
    with pytest.raises(RunError, match="another process is working in") as caught, locked(tmp_path / "run"):
        pytest.fail("two hold it")
    one_line(caught)
    process.kill()
    process.join()
    child = int((tmp_path / "child").read_text())
    try:
        os.kill(child, 0)
        with locked(tmp_path / "run"):
            assert (tmp_path / "run" / ".lock").exists()
    finally:
        os.kill(child, signal.SIGKILL)
