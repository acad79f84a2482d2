"""Our own server: llama.cpp's, which nobody here wrote, as the executable; and how it ends, whatever ends us."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pyarrow.parquet as pq
import pytest
import torch

from masters import demo
from masters.distill import models as loading
from masters.distill.endpoint import Draw, Endpoint, ask
from masters.distill.families.idefics3 import collate_pixels
from masters.distill.generate import Sampling, generate
from masters.distill.inputs import Encoder
from masters.distill.launch import Launch, serving
from masters.distill.recipe import build_recipe
from masters.distill.stages import distill
from masters.errors import RunError
from masters.samples import Sample

HERE = Path(__file__).parent
LLAMA = (sys.executable, str(HERE / "llama_server.py"), "{model}", "--port", "{port}", "--alias", "{name}")
TRAINED = Path(demo.__file__).parent  # models that have learned something: their answers end, and differ with the picture
GREEDY = Sampling(temperature=0, repetition_penalty=1.0, max_tokens=8)

llama = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("xllamacpp", "gguf")), reason="llama.cpp's server comes with the packages xllamacpp and gguf"
)


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Encoder]:
    folder = TRAINED / "teacher"
    return loading.load_model(folder, torch.float32).eval(), Encoder(loading.load_processor(folder))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """llama.cpp's server with the demo's teacher."""
    log = tmp_path_factory.mktemp("served") / "log"
    with serving(Launch(command=LLAMA), TRAINED / "teacher", "tiny", log) as url:
        yield Endpoint(url=url, model="tiny", concurrency=4)


def texts_alone(samples: list[Sample]) -> list[Sample]:
    return [replace(sample, images=()) for sample in samples]


@llama
def test_llama_cpp_gives_the_tokens_of_pytorch(served: Endpoint, trained: tuple[Any, Encoder], samples: list[Sample]):
    model, encoder = trained
    asked = texts_alone(samples)
    found = {s.id: a for s, a in ask(served, encoder, asked, Draw(1, GREEDY, 0, "w"))}
    expected = generate(model, encoder, collate_pixels, asked, 1, GREEDY)
    assert [found[sample.id] for sample in asked] == expected
    assert len({answer.ids for [answer] in expected}) > 3


@llama
def test_llama_cpp_sees_the_images(served: Endpoint, trained: tuple[Any, Encoder], samples: list[Sample]):
    """It puts two line ends before a picture, which the processor does not, so a few answers differ."""
    model, encoder = trained
    found = {s.id: a[0] for s, a in ask(served, encoder, samples, Draw(1, GREEDY, 0, "w"))}
    blind = {s.id: a[0] for s, a in ask(served, encoder, texts_alone(samples), Draw(1, GREEDY, 0, "w"))}
    expected = [answer for [answer] in generate(model, encoder, collate_pixels, samples, 1, GREEDY)]
    same = sum(found[sample.id] == answer for sample, answer in zip(samples, expected, strict=True))
    guessed = sum(blind[sample.id] == answer for sample, answer in zip(samples, expected, strict=True))
    assert same >= 0.85 * len(samples) > 0.6 * len(samples) > guessed, (same, guessed)


@llama
def test_several_sampled_answers_come_with_the_ids_that_were_sampled(served: Endpoint, trained: tuple[Any, Encoder], samples: list[Sample]):
    encoder = trained[1]
    draw = Draw(8, Sampling(max_tokens=6), 3, "teacher0-stage0")
    asked = texts_alone(samples[:6])
    found = {s.id: a for s, a in ask(served, encoder, asked, draw)}
    answers = [answer for group in found.values() for answer in group]
    assert len(answers) == 48
    assert all(answer.told and answer.finish in ("stop", "length") for answer in answers)
    assert all(answer.ids[-1] == encoder.eos for answer in answers if answer.finish == "stop")
    assert all(encoder.text(answer.ids) == answer.text for answer in answers)
    assert any(len({answer.ids for answer in group}) > 2 for group in found.values()), "they are drawn"
    again = {s.id: a for s, a in ask(served, encoder, asked, draw)}
    other = {s.id: a for s, a in ask(served, encoder, asked, replace(draw, seed=4))}
    assert other != found
    assert sum(again[name] == found[name] for name in found) >= 4, "a seed repeats them, but for what is computed together"


@llama
def test_a_run_on_servers_of_its_own_answers_as_the_one_in_process(questions: Path, tmp_path: Path):
    """The masked teacher, the whole one and the student, each on a server of its own: mask, checkpoint, GGUF and engine in one.

    No cache outlives the weights that filled it: each server begins after the one before it has gone.
    """
    alone = ("sh", "-c", ALONE.format(pids=tmp_path / "pids"), "sh", *LLAMA)
    raw: dict[str, Any] = {
        "student": str(TRAINED / "student"),
        "teachers": [{"model": str(TRAINED / "teacher"), "r_max": 0.4}],
        "data": {"train": str(tmp_path / "texts.jsonl"), "validation": str(questions / "validation.jsonl")},
        "mask": {"step": 0.4},
        "train": {"dtype": "float32"},
        "answers": {"teacher": 2, "student": 2, "temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 6, "vllm": {"command": list(alone)}},
    }
    rows = [f'{{"id": "q{i}", "question": "{q}", "answer": "yes"}}' for i, q in enumerate(QUESTIONS)]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows) + "\n")
    found = {}
    for engine in ("transformers", "vllm"):
        settings = raw["answers"] | {"engine": engine, "student_engine": engine}
        out = distill(build_recipe(raw | {"out": str(tmp_path / engine), "answers": settings}), until="answers")
        table = [row for path in sorted((out / "responses").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
        found[engine] = {(row["source"], row["ratio"], row["sample"], row["key"][-1]): (row["text"], row["ids"], row["verdict"]) for row in table}
    assert found["vllm"] == found["transformers"]
    assert len(found["vllm"]) == 4 * len(QUESTIONS)
    serving_folder = tmp_path / "vllm" / "serving"
    assert {path.name for path in serving_folder.iterdir()} == {"teacher0-stage0.log", "teacher0-stage1.log", "student0.log"}, "the checkpoint is gone"
    assert all("listening" in path.read_text() for path in serving_folder.iterdir())
    pids = (tmp_path / "pids").read_text().split()
    assert len(set(pids)) == len(pids) == 3, "one process for each ratio and one for the student"
    assert "alive" not in pids


QUESTIONS = [f"what is the color of the {shape}?" for shape in ("circle", "triangle", "rectangle")] + [
    f"is there a {color} shape?" for color in ("red", "blue", "green", "teal", "black", "yellow", "brown")
]

# Notes its process, and whether one of those before it is there still.
ALONE = 'for p in $(cat {pids} 2>/dev/null); do kill -0 "$p" 2>/dev/null && echo alive >> {pids}; done; echo $$ >> {pids}; exec "$@"'

# A server with a child of its own; the file `health` makes it healthy.
SCRIPT = "sleep 654 & exec {python} -m http.server {port} --bind 127.0.0.1 --directory {model}"


@pytest.fixture
def plain(tmp_path: Path) -> Launch:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "health").touch()
    return Launch(command=("sh", "-c", SCRIPT.replace("{python}", sys.executable)), start_timeout=60)


def group_of(url: str) -> list[int]:
    """The processes of the server's group, by its port."""
    port = url.split(":")[2].split("/")[0]
    mine = [pid for pid, line in processes().items() if f"http.server {port}" in line and "guard.py" not in line and "sh -c" not in line]
    return [pid for pid in processes() if alive_in(pid, os.getpgid(mine[0]))]


def alive_in(pid: int, group: int) -> bool:
    try:
        return os.getpgid(pid) == group
    except ProcessLookupError:
        return False


def processes() -> dict[int, str]:
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return {pid: line for pid, line in found.items() if line}


def gone(pids: list[int], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not set(pids) & processes().keys():
            return True
        time.sleep(0.05)
    return False


def test_the_whole_group_ends_with_the_block(plain: Launch, tmp_path: Path):
    with serving(plain, tmp_path / "served", "x", tmp_path / "log") as url:
        assert httpx2.get(url.removesuffix("/v1") + "/health").status_code == 200
        group = group_of(url)
        assert len(group) == 2
    assert gone(group, 1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_the_whole_group_ends_when_we_are_killed(plain: Launch, tmp_path: Path, number: int):
    code = f"""
        import sys, time
        from pathlib import Path
        from masters.distill.launch import Launch, serving
        with serving(Launch(command={plain.command!r}), Path({str(tmp_path / "served")!r}), "x", Path({str(tmp_path / "log")!r})) as url:
            print(url, flush=True)
            time.sleep(600)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    group = group_of(url)
    assert len(group) == 2
    process.send_signal(number)
    process.wait()
    process.stdout.close()
    assert gone(group)


def test_what_goes_wrong_at_the_start_is_one_line(plain: Launch, tmp_path: Path):
    def refusal(launch: Launch) -> str:
        with pytest.raises(RunError) as caught, serving(launch, tmp_path / "served", "x", tmp_path / "log"):
            pytest.fail("it was never healthy")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "'vllm-that-is-not-here' is no program here" in refusal(Launch(command=("vllm-that-is-not-here",)))
    assert "ended with 3 before it answered: out of memory; see" in refusal(Launch(command=("sh", "-c", "echo loading; echo out of memory; exit 3")))
    (tmp_path / "served" / "health").unlink()
    assert "was not healthy after 1 s" in refusal(replace(plain, start_timeout=1.0))
    assert not [line for line in processes().values() if str(tmp_path) in line and "http.server" in line]


def test_arguments_are_filled_in_and_json_is_left_alone(tmp_path: Path):
    (tmp_path / "served").mkdir()
    launch = Launch(command=("sh", "-c", 'echo "$@"; exit 1', "sh", "{model}", "{name}"), arguments=("--limit", '{"image": 4}'))
    with (
        pytest.raises(RunError, match=r'served teacher0-stage1 --limit \{"image": 4\}; see'),
        serving(launch, tmp_path / "served", "teacher0-stage1", tmp_path / "l"),
    ):
        pass
