"""A matrix that is embedding and head: the same bytes for both graphs, one file on the disk, the same rows from either, in every precision."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from vision_once import reuse_vision

from masters import manifest
from masters.export import graph
from masters.export.graph import save_graph
from masters.export.onnx_target import write_parts
from masters.export.precision import Precision, parse_precision
from masters.export.source import Source
from masters.files import link_file
from masters.manifest import link_equal, list_files, stored_bytes

Bundles = Callable[[str], Path]
LOST = {"fp32": 0.0, "fp16": 1e-3, "int8": 0.02, "int4": 0.1}


@pytest.fixture
def write(lively_source: Source, bundle_of: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Precision], Path]:
    """write(precision): the graphs of a bundle with all their weights in data files, as those of large models."""
    reuse_vision(monkeypatch, bundle_of("fp32"))
    monkeypatch.setattr(save_graph, "__defaults__", (0, graph.CHUNK_BYTES, ()))
    monkeypatch.setattr(manifest, "LINKED", 1)

    def written(precision: Precision) -> Path:
        write_parts(lively_source.model, lively_source.processor, tmp_path, precision)
        return tmp_path / "onnx"

    return written


@pytest.mark.parametrize(("word", "method"), [*((word, "rtn") for word in LOST), ("int4", "k-quant")])
def test_both_graphs_read_one_file(word: str, method: str, write: Callable[[Precision], Path], lively_source: Source) -> None:
    folder = write(parse_precision(f"vision=int8,decoder={word},embed={word}", method=method))
    (table,), chunks = folder.glob("embed_tokens*_data"), sorted(folder.glob("decoder_model_merged*_data*"))
    assert len(chunks) == 2
    assert table.read_bytes() == chunks[1].read_bytes()
    files = list_files(folder)
    link_equal(folder, files)
    assert table.samefile(chunks[1])
    assert list_files(folder) == files
    assert stored_bytes(files) == sum({file.stat().st_ino: file.stat().st_size for file in folder.iterdir()}.values())
    assert stored_bytes(files) == sum(entry.bytes for entry in files.values()) - table.stat().st_size
    embedding, decoder = (onnxruntime.InferenceSession(str(file)) for file in (next(folder.glob("embed*.onnx")), next(folder.glob("decoder*.onnx"))))
    ids = np.array([[0, 5, 7, 5]])
    (rows,) = embedding.run(None, {"input_ids": ids})
    theirs = lively_source.model.get_input_embeddings().weight.detach().numpy()[ids]
    assert np.linalg.norm(rows - theirs) <= LOST[word] * np.linalg.norm(theirs)
    assert decoder.get_outputs()[0].shape[-1] == len(lively_source.model.get_input_embeddings().weight)


@pytest.mark.parametrize(("decoder", "embed"), [("int4", "int8"), ("int8", "fp32"), ("fp32", "int4")])
def test_parts_that_are_stored_otherwise_keep_tables_of_their_own(decoder: str, embed: str, write: Callable[[Precision], Path]) -> None:
    folder = write(parse_precision(f"vision=int8,decoder={decoder},embed={embed}"))
    assert len({entry.sha256 for entry in list_files(folder).values()}) == 6
    assert len(list(folder.glob("decoder*_data*"))) == 1


def test_int4_follows_the_head_of_a_tied_model_alone() -> None:
    assert str(parse_precision("int4").of_model(tied=True)) == "vision=int8,decoder=int4,embed=int4"
    assert str(parse_precision("int4").of_model(tied=False)) == "vision=int8,decoder=int4,embed=int8"
    assert str(parse_precision("decoder=int4,embed=int8").of_model(tied=True)) == "vision=fp32,decoder=int4,embed=int8"


def test_a_file_system_without_links_keeps_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError("not supported")

    (tmp_path / "a").write_text("same")
    (tmp_path / "b").write_text("same")
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refused)
        link_file(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "a").samefile(tmp_path / "b")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]
    for _ in range(2):  # what is linked already stays so
        link_file(tmp_path / "a", tmp_path / "b")
        assert (tmp_path / "a").samefile(tmp_path / "b")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]
    assert (tmp_path / "b").read_text() == "same"
