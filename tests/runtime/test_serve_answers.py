"""`masters serve` as the endpoint that a distillation asks: token ids, several answers a request, images inlined, and the tokens of PyTorch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from server_process import Running, served, user_turn
from torch_reference import picture

from masters.distill import models
from masters.distill.endpoint import Draw, Endpoint, ask
from masters.distill.generate import Sampling
from masters.distill.inputs import Encoder
from masters.distill.recipe import build_recipe
from masters.distill.stages import distill
from masters.samples import Sample

QUESTIONS = ("what is the color of the triangle?", "is there a red shape?", "how many digits are there?", "which shape is it?")


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Running]:
    with served(bundle, "--name", "tiny") as running:
        yield running


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight questions: of one image, of the same one again, of two, and of none."""
    folder = tmp_path_factory.mktemp("asked")
    for seed in range(3):
        picture(seed).save(folder / f"{seed}.png")
    shown = [["0.png"], ["0.png"], ["1.png", "2.png"], [], ["1.png"], ["2.png"], ["2.png"], []]
    rows = [{"id": f"q{i}", "images": images, "question": QUESTIONS[i // 2], "answer": "yes"} for i, images in enumerate(shown)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "train.jsonl"


def answers(asked: Path, model: Path, out: Path, **settings: Any) -> list[tuple[Any, ...]]:
    """The rows of a run up to its answers: question, place, text, ids, why it ended."""
    values = {
        "student": str(model),
        "teachers": [{"model": str(model), "r_max": 0.0}],
        "data": {"train": str(asked), "validation": str(asked)},
        "answers": {"teacher": 3, "student": 0, "max_tokens": 6, **settings},
        "mask": {"enabled": False},
        "train": {"dtype": "float32"},
        "out": str(out),
    }
    distill(build_recipe(values), until="answers")
    rows = pq.read_table(out / "responses" / "teacher0-stage0.parquet").to_pylist()
    return sorted((row["sample"], row["key"][-1], row["text"], tuple(row["ids"]), row["finish"]) for row in rows)


def test_a_run_on_masters_serve_gets_the_tokens_of_pytorch(server: Running, asked: Path, lively_vlm: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    greedy: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0}
    endpoint = {"url": f"{server.url}/v1", "model": "tiny"}
    found = answers(asked, lively_vlm, tmp_path / "served", engine="endpoint", endpoint=endpoint, **greedy)
    assert found == answers(asked, lively_vlm, tmp_path / "here", **greedy)
    assert len(found) == 8 * 3
    by_question = {sample: ids for sample, _, _, ids, _ in found}
    assert len(set(by_question.values())) > 4, "they differ with question and image"
    said = capfd.readouterr().err
    assert "tells no token ids" not in said
    assert "tokens where this model's own template" not in said, "it reads the prompts that training reads"


def test_sampled_answers_come_with_the_tokens_that_were_drawn(server: Running, lively_vlm: Path, tmp_path: Path):
    picture(3).save(tmp_path / "3.png")
    encoder = Encoder(models.load_processor(lively_vlm))
    sample, endpoint = Sample("q", (tmp_path / "3.png",), QUESTIONS[0]), Endpoint(f"{server.url}/v1", "tiny", retries=0)
    draw = Draw(8, Sampling(temperature=1.5, top_p=1.0, top_k=0, repetition_penalty=1.0, max_tokens=5), 0, "w")
    [(_, group)] = ask(endpoint, encoder, [sample], draw)
    good = [answer for answer in group if answer.finish != "failed"]
    assert len(good) > 4
    assert all("image token" in answer.reason for answer in group if answer.finish == "failed"), "the server can't be told not to draw one"
    assert all(answer.told and encoder.text(answer.ids) == answer.text for answer in good)
    assert len({answer.ids for answer in good}) > 3
    [(_, again)] = ask(endpoint, encoder, [sample], draw)
    assert again == group, "a seed repeats them"
    [(_, one_by_one)] = ask(replace(endpoint, per_request=1), encoder, [sample], draw)
    assert len({answer.ids for answer in one_by_one}) > 3


def test_token_ids_are_told_where_they_are_asked_for(server: Running):
    turn: dict[str, Any] = {"messages": [user_turn("what?")], "max_tokens": 3, "n": 2}
    status, plain = server.ask(**turn)
    assert (status, [choice.keys() >= {"token_ids"} for choice in plain["choices"]]) == (200, [False, False])
    status, told = server.ask(**turn, return_token_ids=True)
    assert status == 200
    assert sum(len(choice["token_ids"]) for choice in told["choices"]) == told["usage"]["completion_tokens"]
    status, refused = server.ask(**turn, return_token_ids=True, stream=True)
    assert (status, refused["error"]["param"]) == (400, "return_token_ids")
