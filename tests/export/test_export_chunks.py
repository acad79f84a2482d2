"""Bundles whose weights lie in many data files, as those above 2 GB: what stands in them, and that the runtime, Node and a browser load all of them."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from int4_weights import EXACT, level_of
from test_export_transformers_js import HERE, STEPS, javascript_tokens, node_folder
from vision_once import reuse_vision

from masters import manifest
from masters.errors import MastersError
from masters.export import ExportConfig, export
from masters.export.awkward import awkward_images
from masters.export.reference import encode, greedy
from masters.export.source import Source
from masters.manifest import read_manifest, verify_files
from masters.runtime import load

__all__ = ["node_folder"]  # a fixture

QUESTION = "How many shapes are there?"
CHUNK_MB = 0.02
GRAPHS = ("vision_encoder", "embed_tokens_q4", "decoder_model_merged_q4")


@pytest.fixture(scope="module")
def chunked(lively_vlm: Path, bundle_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of 1.8 MB in data files of 0.02 MiB, laid out as one of 160 GB in files of 1.9 GB is."""
    out = tmp_path_factory.mktemp("chunks") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        reuse_vision(patch, bundle_of("fp32"))
        patch.setattr(manifest, "LINKED", 1)
        export(ExportConfig(lively_vlm, "onnx", out, EXACT, chunk_mb=CHUNK_MB, accuracy_level=level_of(EXACT)))
    return out


@pytest.fixture(scope="module")
def theirs(int4_source: Source) -> tuple[np.ndarray, dict[str, np.ndarray], list[int]]:
    """Prompt ids, pixels and PyTorch's greedy tokens."""
    prompt = encode(int4_source, QUESTION, [awkward_images()["plain"]])
    pixels = {name: tensor.numpy().astype(bool if "mask" in name else tensor.numpy().dtype) for name, tensor in prompt.pixels.items()}
    tokens, _ = greedy(int4_source, prompt, STEPS)
    return prompt.ids, pixels, tokens.tolist()


def test_every_chunk_is_counted_listed_and_small_enough(chunked: Path) -> None:
    files = {f"{name}.onnx": sorted((chunked / "onnx").glob(f"{name}.onnx_data*")) for name in GRAPHS}
    assert all(len(chunks) > 1 for chunks in files.values())
    table, decoder = (
        chunked / "onnx" / "embed_tokens_q4.onnx_data",
        sorted((chunked / "onnx").glob("decoder*_data_*"), key=lambda file: int(file.name.split("_")[-1])),
    )
    for own, heads in zip((table, table.with_name(f"{table.name}_1")), decoder[-2:], strict=True):  # codes and scales
        assert own.samefile(heads)
    settings = json.loads((chunked / "config.json").read_text())["transformers.js_config"]
    assert settings["use_external_data_format"] == {name: len(chunks) for name, chunks in files.items()}
    for name, chunks in files.items():
        assert {file.name for file in chunks} == {f"{name}_data", *(f"{name}_data_{number}" for number in range(1, len(chunks)))}
        named = {
            entry.value
            for tensor in onnx.load(chunked / "onnx" / name, load_external_data=False).graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert named == {file.name for file in chunks}
        assert all(file.stat().st_size <= CHUNK_MB * 2**20 or weights_in(chunked / "onnx" / name, file.name) == 1 for file in chunks)
    manifest = read_manifest(chunked)
    assert {f"onnx/{file.name}" for chunks in files.values() for file in chunks} < set(manifest.files)
    verify_files(chunked, manifest)


def weights_in(graph: Path, data: str) -> int:
    stored = onnx.load(graph, load_external_data=False).graph.initializer
    return sum(any((entry.key, entry.value) == ("location", data) for entry in tensor.external_data) for tensor in stored)


def test_the_runtime_gives_pytorchs_tokens(chunked: Path, theirs: tuple[Any, Any, list[int]]) -> None:
    assert list(load(chunked, threads=2).answer(QUESTION, [awkward_images()["plain"]], max_tokens=STEPS).token_ids) == theirs[2]
    assert len(set(theirs[2])) > 5, "the model repeats itself, nothing would be proven"


def test_a_chunk_that_is_lost_is_named(chunked: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(chunked, tmp_path / "copy"))
    (copy / "onnx" / "decoder_model_merged_q4.onnx_data_3").unlink()
    with pytest.raises(MastersError, match=r"decoder_model_merged_q4\.onnx_data_3 is missing"):
        load(copy)


def test_node_gives_pytorchs_tokens(chunked: Path, theirs: tuple[np.ndarray, dict[str, np.ndarray], list[int]], node_folder: Path, tmp_path: Path) -> None:
    assert javascript_tokens(node_folder, chunked, tmp_path, theirs[0], theirs[1]) == theirs[2]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A static server that remembers what it was asked for."""

    asked: ClassVar[list[str]] = []

    def log_message(self, *_: Any) -> None:
        self.asked.append(self.path)


@pytest.fixture
def site(chunked: Path, node_folder: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The page, the packages and the bundle on a server of this machine: its address and its folder."""
    (tmp_path / "node_modules").symlink_to(node_folder / "node_modules")
    (tmp_path / "bundle").symlink_to(chunked)
    shutil.copyfile(HERE / "generate.html", tmp_path / "generate.html")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_browser_gives_pytorchs_tokens(chunked: Path, theirs: tuple[np.ndarray, dict[str, np.ndarray], list[int]], site: tuple[str, Path]) -> None:
    """Chromium with ONNX Runtime's wasm, which holds each data file in a buffer of its own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package 'playwright' drives the browser")
    if not (chromium := shutil.which("chromium")):
        pytest.skip("no chromium here: apt-get install chromium")
    (url, folder), (ids, pixels, tokens) = site, theirs
    for name, array in pixels.items():
        (folder / name).write_bytes(np.ascontiguousarray(array).tobytes())
    tensors = {name: dict(type=str(array.dtype), dims=array.shape, file=f"{url}/{name}") for name, array in pixels.items()}
    request = dict(bundle="bundle", input_ids=ids.tolist(), max_new_tokens=STEPS, tensors=tensors)
    with playwright.sync_playwright() as driver:
        # As root, as in a container, Chromium has no sandbox.
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"{url}/generate.html")
        page.wait_for_function("window.ready")
        found = page.evaluate("request => window.generate(request)", request)
        browser.close()
    assert found == tokens
    fetched = {path.removeprefix("/bundle/onnx/") for path in Quiet.asked if "onnx_data" in path}
    assert fetched == {file.name for file in (chunked / "onnx").glob("*_data*")}


@pytest.mark.parametrize("chunk_mb", [0, -1, 2048, float("nan")])
def test_a_size_that_no_loader_can_hold_is_refused(lively_vlm: Path, tmp_path: Path, chunk_mb: float) -> None:
    with pytest.raises(MastersError, match="MiB"):
        export(ExportConfig(lively_vlm, "onnx", tmp_path / "out", chunk_mb=chunk_mb))
    assert not (tmp_path / "out").exists()
