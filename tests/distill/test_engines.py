"""Runs whose answers come from an endpoint: different weights under different names, and a server that fails on the way."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from scripted_server import completion, serve_script
from test_stages import recipe_of

from masters.distill.answers import Source
from masters.distill.endpoint import Endpoint
from masters.distill.engines import check_names, name_weights
from masters.distill.inputs import Encoder
from masters.distill.stages import distill
from masters.errors import RecipeError, RunError


@pytest.fixture
def raw(models: Any, questions: Path, tmp_path: Path) -> dict[str, Any]:
    """12 questions over two masks of a teacher that an endpoint serves, 2 answers each; the student does not answer."""
    return {
        "student": str(models.student),
        "teachers": [{"model": str(models.teacher), "r_max": 0.2}],
        "data": {"train": str(questions / "train.jsonl"), "validation": str(questions / "validation.jsonl"), "limit": 12},
        "answers": {"teacher": 2, "student": 0, "batch": 4, "engine": "endpoint", "endpoint": {"model": "{name}-{ratio}", "pause": 0.01, "concurrency": 1}},
        "mask": {"step": 0.2},
        "train": {"dtype": "float32"},
        "out": str(tmp_path / "run"),
    }


def rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for path in (out / "responses").rglob("[!.]*.parquet") for row in pq.read_table(path).to_pylist()}


def told(encoder: Encoder, text: str, count: int) -> tuple[int, dict[str, Any]]:
    return 200, completion(*[text] * count, token_ids=encoder.answer(text))


def test_every_masks_weights_are_asked_for_by_their_own_name(raw: dict[str, Any], encoder: Encoder):
    with serve_script(lambda request, _: told(encoder, request["model"][-3:], request["n"])) as server:
        out = distill(recipe_of(raw, answers__endpoint__url=server.url), until="answers")
    assert {(row["ratio"], row["text"], row["finish"]) for row in rows(out).values()} == {(0.2, "0.2", "stop"), (0.0, "r-0", "stop")}
    assert Counter(request["model"] for request in server.requests) == {"teacher-0.2": 7, "teacher-0": 7}, "six questions and what is asked first"
    assert len({request["cache_salt"] for request in server.requests}) == 2


def test_one_name_for_different_weights_is_refused_before_any_work(raw: dict[str, Any]):
    message = r"asks 'one' at http://here/v1 for the teacher teacher at mask ratio 0\.2 and for the teacher teacher at mask ratio 0; expected \{ratio\}"
    with pytest.raises(RecipeError, match=message):
        distill(recipe_of(raw, answers__endpoint={"url": "http://here/v1", "model": "one"}), until="check")
    distill(recipe_of(raw, answers__endpoint={"url": "http://{ratio}.here/v1", "model": "one"}), until="check")


def test_names_are_filled_in_and_the_same_weights_may_share_one():
    big, bigger = (Source(f"teacher{i}-stage0", "teacher", i, name, 0.0, 4) for i, name in enumerate(("big", "bigger")))
    endpoint = Endpoint("http://{source}{number}/v1", "{name}@{ratio} {other}")
    assert (name_weights(endpoint, bigger).url, name_weights(endpoint, bigger).model) == ("http://teacher1/v1", "bigger@0 {other}")
    check_names(Endpoint("u", "{name}"), [big, bigger, big])
    with pytest.raises(RecipeError):
        check_names(Endpoint("u", "m"), [big, bigger])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers__endpoint": {"model": "m"}}, "has no server"),
        ({"answers__endpoint": {"url": "http://here/v1"}}, "has no server"),
        ({"answers__engine": "sglang"}, "expected one of transformers, endpoint, vllm"),
        ({"answers__endpoint__concurrency": 0}, "at least 1"),
        ({"answers__student_engine": "endpoint", "answers__student": 2, "answers__refresh": "stage", "answers__endpoint__url": "u"}, "no endpoint has it then"),
    ],
)
def test_settings_that_can_not_be(raw: dict[str, Any], changes: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        recipe_of(raw, **changes)


def test_a_run_goes_on_where_its_endpoint_failed(raw: dict[str, Any], encoder: Encoder):
    """A key that expires stops it, a question that fails is asked again, and what was answered is not."""
    expiring = serve_script(lambda request, count: told(encoder, "yes", request["n"]) if count <= 5 else (401, {}))
    with expiring as server, pytest.raises(RunError, match="answered 401"):
        distill(recipe_of(raw, answers__endpoint__url=server.url), until="answers")
    out = Path(raw["out"])
    first = rows(out)
    assert len(first) == 4 * 2, "the first request was none of the questions'"

    failing: list[str] = []

    def script(request: dict[str, Any], _: int) -> tuple[Any, Any]:
        text = request["messages"][0]["content"][-1]["text"]
        if request["n"] == 2 and (not failing or text in failing):
            failing.append(text)
            return 500, {"error": "broken"}
        return told(encoder, "no", request["n"])

    with serve_script(script) as server, pytest.raises(RunError, match=r"\d+ of 24 answers of teacher failed .*answered 500"):
        distill(recipe_of(raw, answers__endpoint__url=server.url, answers__endpoint__retries=0), until="answers")
    second = rows(out)
    assert all(second[key] == row for key, row in first.items())
    bad = {key for key, row in second.items() if row["finish"] == "failed"}
    assert 0 < len(bad) < 16
    with serve_script(lambda request, _: told(encoder, "now", request["n"])) as server:
        distill(recipe_of(raw, answers__endpoint__url=server.url), until="answers")
    third = rows(out)
    assert {key for key, row in third.items() if row["text"] == "now"} == bad
    assert all(third[key] == row for key, row in second.items() if key not in bad)
    assert len(third) == 24
