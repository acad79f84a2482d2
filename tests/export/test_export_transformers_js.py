"""A program that we did not write loads the bundle as it is: transformers.js on Node, offline, on the pixels that PyTorch saw."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from int4_weights import with_int4_weights

from masters.export.awkward import awkward_images
from masters.export.reference import encode, greedy, refer
from masters.export.source import Source
from masters.files import whole_folder
from masters.runtime import load
from masters.runtime.chat import user_message

HERE = Path(__file__).parent / "transformers_js"
NODE = 18  # the oldest major version that transformers.js runs on
STEPS = 24
QUESTION = "How many shapes are there?"


@pytest.fixture(scope="module")
def node_folder() -> Path:
    """A folder outside the repository with transformers.js installed at the version of package.json; installed once a machine."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        pytest.skip("node and npm are not on PATH")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").split(".")[0]) < NODE:
        pytest.skip(f"node is {version}, transformers.js needs {NODE} or newer")
    package = HERE / "package.json"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "masters-tests"
    folder = cache / f"transformers_js-{hashlib.sha256(package.read_bytes()).hexdigest()[:12]}"
    if not folder.exists():
        with whole_folder(folder) as part:
            shutil.copyfile(package, part / package.name)
            # The binary for the CPU is inside the package; its scripts would download others.
            subprocess.run([npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], cwd=part, check=True, timeout=300)
    return folder


def run_script(name: str, folder: Path, work: Path, *words: str) -> Any:
    """What a script says on its last line. It imports its packages from where it lies, so it is copied there."""
    shutil.copyfile(HERE / name, work / name)
    (work / "node_modules").symlink_to(folder / "node_modules")
    done = subprocess.run(["node", str(work / name), *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def javascript_tokens(folder: Path, bundle: Path, work: Path, ids: np.ndarray, pixels: dict[str, np.ndarray]) -> list[int]:
    """What transformers.js generates."""
    tensors = {}
    for name, array in pixels.items():
        (work / name).write_bytes(np.ascontiguousarray(array).tobytes())
        tensors[name] = dict(type=str(array.dtype), dims=array.shape, file=str(work / name))
    request = dict(bundle=str(bundle), input_ids=ids.tolist(), max_new_tokens=STEPS, tensors=tensors)
    (work / "request.json").write_text(json.dumps(request))
    answer = run_script("generate.mjs", folder, work, str(work / "request.json"))
    assert answer["files"] == ["decoder_model_merged", "embed_tokens", "vision_encoder"]
    return [int(token) for token in answer["tokens"]]


@pytest.mark.parametrize("precision", ["fp32", "decoder=int4,embed=int4"])
def test_every_greedy_token_is_pytorchs(
    lively_source: Source, int4_source: Source, bundle_of: Callable[[str], Path], node_folder: Path, tmp_path: Path, precision: str
) -> None:
    source = lively_source if precision == "fp32" else int4_source
    image = awkward_images()["plain"]
    reference = refer(source, "plain", image, QUESTION, encode(source, QUESTION, [image]), STEPS)
    pixels = {name: tensor.numpy() for name, tensor in reference.prompt.pixels.items()}
    pixels["pixel_attention_mask"] = pixels["pixel_attention_mask"].astype(bool)
    tokens = javascript_tokens(node_folder, bundle_of(precision), tmp_path, reference.prompt.ids, pixels)
    assert len(set(tokens)) > 5, "the model repeats itself, nothing would be proven"
    assert tokens == reference.tokens.tolist()


@pytest.mark.parametrize("precision", ["fp32", "decoder=int4,embed=int4"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_every_greedy_token_of_qwen_is_pytorchs(
    qwen_source: Callable[[str], Source], qwen_bundle: Callable[[str, str], Path], node_folder: Path, tmp_path: Path, family: str, precision: str
) -> None:
    """Two images of other sizes: grids, positions of three axes and features of middle layers pass through a program that knows nothing of the last."""
    source = qwen_source(family) if precision == "fp32" else with_int4_weights(qwen_source(family))
    prompt = encode(source, QUESTION, [awkward_images()["plain"], awkward_images()["rotated"]])
    theirs, _ = greedy(source, prompt, STEPS)
    pixels = {name: tensor.numpy() for name, tensor in prompt.pixels.items()}
    tokens = javascript_tokens(node_folder, qwen_bundle(family, precision), tmp_path, prompt.ids, pixels)
    assert len(set(tokens)) > 5, "the model repeats itself, nothing would be proven"
    assert tokens == theirs.tolist()


@pytest.mark.parametrize(("name", "images"), [("smolvlm", 1), ("smolvlm", 2), ("llava_onevision", 2), ("llava_onevision", 3)])
def test_every_greedy_token_of_families_in_tiles_is_pytorchs(
    name: str, images: int, family_source: Callable[[str], Source], family_bundle: Callable[[str, str], Path], node_folder: Path, tmp_path: Path
) -> None:
    """SmolVLM's tiles with partial masks; LLaVA-OneVision's pictures, one tile each: those of one alone transformers.js does not pack."""
    source = family_source(name)
    prompt = encode(source, QUESTION, list(awkward_images().values())[:images])
    theirs, _ = greedy(source, prompt, STEPS)
    inputs = source.family.graph_pixels(prompt.pixels) if name == "llava_onevision" else prompt.pixels
    pixels = {key: tensor.numpy().astype(bool if "mask" in key else tensor.numpy().dtype) for key, tensor in inputs.items()}
    tokens = javascript_tokens(node_folder, family_bundle(name, "fp32"), tmp_path, prompt.ids, pixels)
    assert len(set(tokens)) > 5, "the model repeats itself, nothing would be proven"
    assert tokens == theirs.tolist()


def test_own_processor_gives_the_same_prompt(bundle_of: Callable[[str], Path], lively_source: Source) -> None:
    """The ids fed above are those that the bundle's own tokenizer and template give."""
    image = awkward_images()["plain"]
    vlm = load(bundle_of("fp32"))
    theirs = encode(lively_source, QUESTION, [image]).ids
    assert vlm.prompt_ids([user_message(QUESTION, 1)], vlm.see([image])[0].grids).tolist() == theirs.tolist()


@pytest.mark.parametrize("family", ["idefics3", "qwen2_5_vl", "qwen3_vl"])
def test_its_own_processor_gives_the_same_prompt(
    family: str, bundle_of: Callable[[str], Path], qwen_bundle: Callable[[str, str], Path], node_folder: Path, tmp_path: Path
) -> None:
    """From an image file and a question alone, as a page has them: the class of the processor, the template and the number of image tokens are found."""
    bundle = bundle_of("fp32") if family == "idefics3" else qwen_bundle(family, "fp32")
    image = tmp_path / "image.png"
    image.write_bytes(awkward_images()["plain"])
    vlm = load(bundle, test=False)
    [pixels] = vlm.see([image])
    theirs = run_script("prompt.mjs", node_folder, tmp_path, str(bundle), str(image), QUESTION)
    assert theirs["ids"] == vlm.prompt_ids([user_message(QUESTION, 1)], pixels.grids).tolist()
    assert list(theirs["dims"]) == list(pixels.values.shape)
