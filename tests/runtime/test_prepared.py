"""Graphs packed for this processor: the bundle's own answers, from files that are verified, mapped, and given back while they rest."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_reference import picture

from masters.errors import BundleError
from masters.export import ExportConfig, export
from masters.runtime import Vlm, load, prepared
from masters.runtime.graphs import OnnxParts
from masters.runtime.session import HASHES, SELF_TEST


@pytest.fixture(scope="module")
def place(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the bundle has been prepared once."""
    into = tmp_path_factory.mktemp("prepared")
    load(bundle, threads=1, prepared=into)
    return into


def the_folder(place: Path) -> Path:
    (folder,) = place.iterdir()
    return folder


def test_the_answers_are_the_bundles(bundle: Path, place: Path, vlm: Vlm) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in the_folder(place).iterdir()}
    packed = load(bundle, threads=2, prepared=place)
    assert {file.name: file.stat().st_mtime_ns for file in the_folder(place).iterdir()} == before, "it was there already"
    pixels = vlm.see([picture(3)])[0]
    for _ in range(2):  # given back in between
        assert np.array_equal(packed.encode(pixels), vlm.encode(pixels))
        question = ("what colour is it?", [picture(3), picture(4)])
        assert packed.answer(*question, max_tokens=8).token_ids == vlm.answer(*question, max_tokens=8).token_ids


@pytest.mark.parametrize("level", [1, 4])
def test_int4_gives_its_own_answers_whatever_can_be_packed(lively_vlm: Path, tmp_path: Path, level: int) -> None:
    """Sums in int8 are not read back as they were packed by onnxruntime 1.31; then the decoder is opened as it is in the bundle."""
    bundle = tmp_path / "bundle"
    export(ExportConfig(lively_vlm, "onnx", bundle, "int4", accuracy_level=level, allow_mismatch=True))
    own, packed = (load(bundle, threads=1, test=False, prepared=where) for where in (None, tmp_path / "prepared"))
    question = ("what colour is it?", [picture(3)])
    assert packed.answer(*question, max_tokens=8).token_ids == own.answer(*question, max_tokens=8).token_ids
    assert packed.prepared
    assert "vision_encoder" in packed.prepared.graphs
    assert level == 4 or "decoder" in packed.prepared.graphs


def test_weights_are_pages_of_files_and_rest_outside(bundle: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody writes to them, or giving them back would lose what was written; and only the graph that works is in memory."""
    if sys.platform != "linux":
        pytest.skip("this system has no /proc/self/smaps")
    vlm = load(bundle, threads=1, prepared=place)

    def held(part: str) -> tuple[int, int]:
        file = re.escape(str(the_folder(place) / f"{part}.onnx_data"))
        found = re.findall(rf"{file}\nSize:[^/]*?\nRss: +(\d+) kB[^/]*?Anonymous: +(\d+) kB", Path("/proc/self/smaps").read_text())
        assert found
        return sum(int(rss) for rss, _ in found), sum(int(written) for _, written in found)

    assert isinstance(vlm.parts, OnnxParts)
    tower, meanwhile = vlm.parts.vision, []

    class Watched:
        get_inputs = tower.get_inputs

        def run(self, *order: Any) -> Any:
            meanwhile.append((held("decoder"), held("vision_encoder")[0] > 100))
            return tower.run(*order)

    monkeypatch.setattr(vlm.parts, "vision", Watched())
    for number in (3, 4):
        assert vlm.answer("what is it?", [picture(number)], max_tokens=4).token_ids
        assert held("vision_encoder") == (0, 0)
        decoder, written = held("decoder")
        assert decoder > 100
        assert written == 0
    assert set(meanwhile) == {((0, 0), True)}


def test_a_self_test_that_passed_is_not_run_again(bundle: Path, place: Path) -> None:
    assert load(bundle, threads=1, prepared=place, test=False).unverified == ()
    record = the_folder(place) / prepared.TESTED
    told = json.loads(record.read_text())
    assert set(told["libraries"]) == {"numpy", "onnxruntime", "PIL", "tokenizers"}
    record.write_text(json.dumps(told | {"libraries": told["libraries"] | {"numpy": "1.0"}}))
    assert load(bundle, threads=1, prepared=place, test=False).unverified == (SELF_TEST,)
    assert load(bundle, threads=1, prepared=place).unverified == ()
    assert json.loads(record.read_text()) == told


def test_a_changed_file_is_found(bundle: Path, place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    into = shutil.copytree(place, tmp_path / "prepared")
    data = the_folder(into) / "decoder.onnx_data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(BundleError, match=r"decoder\.onnx_data is missing or was changed since it was prepared; remove .*, it is made again"):
        load(bundle, threads=1, prepared=into)
    late = load(bundle, threads=1, prepared=into, verify=False)
    assert late.unverified == (HASHES,)
    assert "opened without comparing" in caplog.text
    with pytest.raises(BundleError, match="was changed since it was prepared"):
        late.verify()
    # And what is read of the bundle itself.
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    with pytest.raises(BundleError, match=r"tokenizer\.json was changed since its export"):
        load(folder, threads=1, prepared=place)


def test_only_a_whole_bundle_is_prepared(bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    graph = folder / "onnx" / "vision_encoder.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(BundleError, match="was changed since its export"):
        load(folder, threads=1, prepared=tmp_path / "prepared", verify=False)
    assert not (tmp_path / "prepared").exists()
    with pytest.raises(BundleError, match="can't be prepared for the provider 'cuda'; expected 'cpu'"):
        load(bundle, provider="cuda", prepared=tmp_path)


def test_another_processor_gets_its_own(bundle: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    into = shutil.copytree(place, tmp_path / "prepared")
    monkeypatch.setattr(prepared, "_processor", lambda: ["another"])
    with caplog.at_level(logging.INFO, "masters.runtime"):
        load(bundle, threads=1, prepared=into)
    assert len(list(into.iterdir())) == 2
    assert "packing the weights of" in caplog.text
