"""Every command on bad input: one line that says what was found, what was expected and what to do, exit code 2, nothing half-written."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from masters.cli import main
from masters.export import ExportConfig, export

ADVICE = re.compile(
    r"[;,] (did you mean|expected|pass|choose|copy|export|write|save|remove|scale|crop|mend|see|add|make|it is probably|at most|give)", re.IGNORECASE
)


def masters(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_refused(result: Result, *named: str) -> None:
    """One line on stderr that names what was found and what to do, and exit code 2."""
    assert result.exit_code == 2, (result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    assert ADVICE.search(lines[0]), lines[0]
    for text in named:
        assert text in lines[0], lines[0]
    assert "Traceback" not in result.output


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def huge_png() -> bytes:
    """A PNG of 20,000 x 20,000 by its header; nobody has to draw it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    (folder / "whole.jpg").write_bytes(jpeg())
    (folder / "truncated.jpg").write_bytes(jpeg()[:700])
    Image.new("RGB", (1, 1)).save(folder / "single.png")
    (folder / "huge.png").write_bytes(huge_png())
    return folder


@pytest.fixture(scope="module")
def bundle(random_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "bundle"
    export(ExportConfig(random_vlm, "onnx", out))
    return out


@pytest.fixture(scope="module")
def no_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model, in a folder of its own."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    LlamaForCausalLM(LlamaConfig(**size)).save_pretrained(folder)
    return folder


def questions(path: Path, image: Path | str, **row: object) -> Path:
    rows = [{"id": str(i), "images": [str(image)], "question": f"is it {i}?", "answer": "yes"} | row for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(path: Path, model: Path, data: Path, **keys: object) -> Path:
    raw = {"student": str(model), "teachers": [{"model": str(model)}], "data": {"train": str(data), "validation": str(data)}, "out": "run"}
    small = {"answers": {"max_tokens": 2}, "train": {"dtype": "float32", "questions_per_step": 4}}
    path.write_text(yaml.safe_dump(raw | small | keys))
    return path


BAD_IMAGES = {"missing.jpg": "no image file", "truncated.jpg": "could not decode", "single.png": "1 x 1", "huge.png": "at most 100 megapixels"}


@pytest.mark.parametrize(("name", "found"), BAD_IMAGES.items())
def test_run_refuses_a_bad_image(bundle: Path, images: Path, name: str, found: str) -> None:
    assert_refused(masters("run", bundle, "what is it?", "--image", images / name), name, found)


@pytest.mark.parametrize(("name", "found"), BAD_IMAGES.items())
def test_check_refuses_a_bad_image(bundle: Path, images: Path, tmp_path: Path, name: str, found: str) -> None:
    assert_refused(masters("check", bundle, "--data", questions(tmp_path / "q.jsonl", images / name)), name, found)


@pytest.mark.parametrize(("name", "found"), BAD_IMAGES.items())
def test_distill_refuses_a_bad_image(random_vlm: Path, images: Path, tmp_path: Path, name: str, found: str) -> None:
    data = questions(tmp_path / "q.jsonl", images / name)
    assert_refused(masters("distill", recipe(tmp_path / "r.yaml", random_vlm, data)), name, found)
    assert not (tmp_path / "run" / "student").exists()
    assert not list((tmp_path / "run").rglob("*.parquet"))


@pytest.mark.parametrize(("name", "found"), BAD_IMAGES.items())
def test_export_refuses_a_bad_image_in_its_questions(random_vlm: Path, images: Path, tmp_path: Path, name: str, found: str) -> None:
    data = questions(tmp_path / "q.jsonl", images / name)
    assert_refused(masters("export", random_vlm, "--target", "onnx", "--out", tmp_path / "bundle", "--data", data), name, found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.jsonl"]


def test_missing_files(bundle: Path, random_vlm: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert_refused(masters("distill", nowhere), "nowhere")
    assert_refused(masters("export", nowhere, "--target", "onnx", "--out", tmp_path / "out"), "nowhere")
    assert_refused(masters("export", random_vlm, "--target", "onnx", "--out", tmp_path / "out", "--data", nowhere / "q.jsonl"), "q.jsonl")
    assert_refused(masters("run", nowhere, "what?"), "nowhere")
    assert_refused(masters("check", nowhere, "--data", nowhere), "nowhere")
    assert_refused(masters("check", bundle, "--data", nowhere / "q.jsonl"), "q.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_row_without_an_answer(bundle: Path, random_vlm: Path, images: Path, tmp_path: Path) -> None:
    data = questions(tmp_path / "q.jsonl", images / "whole.jpg", answer=None)
    assert_refused(masters("distill", recipe(tmp_path / "r.yaml", random_vlm, data)), "row 1", "no answer")
    assert_refused(masters("check", bundle, "--data", data), "row 1", "no answer")
    assert_refused(masters("export", random_vlm, "--target", "onnx", "--out", tmp_path / "out", "--data", data), "row 1", "no answer")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.jsonl", "r.yaml"]


def test_an_unknown_key_in_a_recipe(random_vlm: Path, images: Path, tmp_path: Path) -> None:
    data = questions(tmp_path / "q.jsonl", images / "whole.jpg")
    assert_refused(masters("distill", recipe(tmp_path / "r.yaml", random_vlm, data, objectiv={"beta": 1})), "'objectiv'", "did you mean 'objective'?")
    assert_refused(masters("distill", recipe(tmp_path / "r.yaml", random_vlm, data), "train.learning_rat=1"), "'train.learning_rat'", "learning_rate")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.jsonl", "r.yaml"]


@pytest.mark.parametrize("target", ["onnx", "coreml"])
def test_a_folder_that_is_no_vlm(no_vlm: Path, images: Path, tmp_path: Path, target: str) -> None:
    data = questions(tmp_path / "q.jsonl", images / "whole.jpg")
    assert_refused(masters("export", no_vlm, "--target", target, "--out", tmp_path / "out"), "llama")
    assert_refused(masters("distill", recipe(tmp_path / "r.yaml", no_vlm, data)), "llama")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.jsonl", "r.yaml"]


def test_a_bundle_with_one_byte_changed(bundle: Path, images: Path, tmp_path: Path) -> None:
    changed = tmp_path / "bundle"
    shutil.copytree(bundle, changed)
    file = max(changed.rglob("*.onnx*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    data = questions(tmp_path / "q.jsonl", images / "whole.jpg")
    assert_refused(masters("run", changed, "what is it?", "--image", images / "whole.jpg"), file.name, "changed")
    assert_refused(masters("check", changed, "--data", data), file.name, "changed")


def test_an_existing_bundle_is_kept(bundle: Path, random_vlm: Path) -> None:
    before = (bundle / "masters.json").read_bytes()
    assert_refused(masters("export", random_vlm, "--target", "onnx", "--out", bundle), "exists already", "--force")
    assert (bundle / "masters.json").read_bytes() == before


def test_demo_refuses_a_file_in_the_place_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert_refused(masters("demo", "--out", tmp_path / "out"), "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_run_and_check_print_to_stdout_and_exit_0(bundle: Path, images: Path, tmp_path: Path) -> None:
    answered = masters("run", bundle, "what is it?", "--image", images / "whole.jpg", "--max-tokens", 4)
    assert answered.exit_code == 0
    assert "first token after" in answered.stderr
    assert "first token after" not in answered.stdout
    data = questions(tmp_path / "q.jsonl", images / "whole.jpg")
    checked = masters("check", bundle, "--data", data, "--limit", 4, "--max-tokens", 2, "--sustained", 0, "--json")
    assert checked.exit_code == 0
    assert json.loads(checked.stdout)["accuracy"]["mean"]["count"] == 4


def test_check_exits_1_where_a_limit_is_missed(bundle: Path, images: Path, tmp_path: Path) -> None:
    data = questions(tmp_path / "q.jsonl", images / "whole.jpg")
    (tmp_path / "budget.yaml").write_text("bundle_mb: 0.001\n")
    result = masters(
        "check",
        bundle,
        "--data",
        data,
        "--limit",
        2,
        "--max-tokens",
        2,
        "--sustained",
        0.2,
        "--html",
        tmp_path / "check.html",
        "--budget",
        tmp_path / "budget.yaml",
    )
    assert result.exit_code == 1
    assert "fail" in result.stdout
