"""A program that we did not write loads the bundle as it is: onnxruntime-genai, with its own image processing, tokenizer, positions and cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from int4_weights import with_int4_weights

from masters.export import graph
from masters.export.awkward import awkward_images
from masters.export.embedding import build_embedding, own_table
from masters.export.genai import DECODER, EMBEDDING
from masters.export.graph import save_graph
from masters.export.onnx_target import write_parts
from masters.export.precision import Storage, parse_precision
from masters.export.reference import encode, greedy
from masters.export.source import Source
from masters.runtime.chat import read_chat_format, user_message

STEPS = 24
QUESTION = "Which colour is the largest shape?"
Bundles = Callable[[str, str], Path]


def generate(model: Any, inputs: Any, length: int) -> list[int]:
    genai = pytest.importorskip("onnxruntime_genai")
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=length + STEPS, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.set_inputs(inputs)
    tokens: list[int] = []
    while not generator.is_done() and len(tokens) < STEPS:
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


@pytest.mark.parametrize("shown", [["plain"], ["plain", "grey"], ["plain", "plain"], []], ids=["one image", "two sizes", "two of one size", "no image"])
@pytest.mark.parametrize("precision", ["fp32", "decoder=int4,embed=int4"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_every_greedy_token_is_pytorchs(
    family: str, precision: str, shown: list[str], qwen_source: Callable[[str], Source], qwen_bundle: Bundles, tmp_path: Path
) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    source = qwen_source(family) if precision == "fp32" else with_int4_weights(qwen_source(family))
    bundle = qwen_bundle(family, precision)
    files = []
    for number, name in enumerate(shown):
        files.append(tmp_path / f"{number}.png")
        files[-1].write_bytes(awkward_images()[name])
    prompt = encode(source, QUESTION, files)
    theirs, _ = greedy(source, prompt, STEPS)
    model = genai.Model(str(bundle))
    text = read_chat_format(bundle).render([user_message(QUESTION, len(files))])
    inputs = model.create_multimodal_processor()(text, images=genai.Images.open(*map(str, files)) if files else None)
    assert inputs["input_ids"].as_numpy().ravel().tolist() == prompt.ids.tolist()
    if len(set(shown)) == 1:  # of several sizes it pads all to the largest one's patches, which no longer fit their grids
        pixels = inputs["pixel_values"].as_numpy().reshape(prompt.pixels["pixel_values"].shape)
        largest = float(np.abs(pixels - prompt.pixels["pixel_values"].numpy()).max())
        assert largest < 0.02, f"its own pixels differ by {largest}: a level of 255 in the resize"
    if files:
        inputs["pixel_values"] = np.ascontiguousarray(prompt.pixels["pixel_values"].numpy())
        assert inputs["image_grid_thw"].as_numpy().tolist() == prompt.pixels["image_grid_thw"].tolist()
    assert generate(model, inputs, len(prompt.ids)) == theirs.tolist()


def test_weights_are_stored_once(qwen_source: Callable[[str], Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where graphs have data files, the two graphs beside them name the same ones and hold next to nothing themselves."""
    monkeypatch.setattr(save_graph, "__defaults__", (0, graph.CHUNK_BYTES, ()))
    source = qwen_source("qwen3_vl")
    write_parts(source.model, source.processor, tmp_path, parse_precision("fp32"))
    parts = ("decoder_model_merged", "embed_tokens", "vision_encoder")
    table = "decoder_model_merged.onnx_data_1"
    assert {file.name for file in (tmp_path / "onnx").glob("*_data*")} == {*(f"{name}.onnx_data" for name in parts), table}
    assert (tmp_path / "onnx" / table).read_bytes() == (tmp_path / "onnx" / "embed_tokens.onnx_data").read_bytes()
    for file, data in ((EMBEDDING, {"embed_tokens.onnx_data"}), (DECODER, {"decoder_model_merged.onnx_data", table})):
        stored = onnx.load(tmp_path / file, load_external_data=False)
        places = {entry.value for tensor in stored.graph.initializer for entry in tensor.external_data if entry.key == "location"}
        assert places == data
        assert (tmp_path / file).stat().st_size < 0.2 * sum((tmp_path / "onnx" / name).stat().st_size for name in data)
        onnxruntime.InferenceSession(str(tmp_path / file))


def test_features_take_the_places_of_image_tokens(qwen_source: Callable[[str], Source], tmp_path: Path) -> None:
    embedding = qwen_source("qwen3_vl").model.get_input_embeddings()
    save_graph(build_embedding(own_table(embedding, Storage("fp32")), embedding.embedding_dim, 1, image_token=7), tmp_path / "embedding.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "embedding.onnx"))
    ids = np.array([[1, 7, 7, 2], [7, 3, 4, 5]])
    features = np.random.default_rng(0).standard_normal((3, 2 * embedding.embedding_dim)).astype(np.float32)
    expected = np.pad(embedding.weight.detach().numpy()[ids], ((0, 0), (0, 0), (0, embedding.embedding_dim)))
    expected[ids == 7] = features
    np.testing.assert_array_equal(session.run(None, {"input_ids": ids, "image_features": features})[0], expected)
    (text,) = session.run(None, {"input_ids": ids[1:, 1:], "image_features": features[:0]})
    np.testing.assert_array_equal(text, expected[1:, 1:])


def test_config_names_files_that_are_there(qwen_bundle: Bundles) -> None:
    bundle = qwen_bundle("qwen2_5_vl", "int4")
    model = json.loads((bundle / "genai_config.json").read_text())["model"]
    assert model["type"] == "qwen2_5_vl"
    for part in ("decoder", "embedding", "vision"):
        assert (bundle / model[part]["filename"]).is_file()
    assert (bundle / model["vision"]["config_filename"]).is_file()
