"""masters.json: what is written comes back equal, and no change to a bundle goes unnoticed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from masters.errors import BundleError
from masters.manifest import NAME, Decoder, FileEntry, Manifest, Part, TensorSpec, list_files, read_manifest, verify_files, write_manifest


def tensors(*names: str) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, "float32", ("batch_size", "sequence_length", 64)) for name in names)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "onnx").mkdir(parents=True)
    (folder / "decoder.mlpackage" / "Data").mkdir(parents=True)
    (folder / "onnx" / "vision_encoder.onnx").write_bytes(bytes(range(256)) * 8)
    (folder / "decoder.mlpackage" / "Data" / "weight.bin").write_bytes(b"weights")
    (folder / "golden.npz").write_bytes(b"golden")
    parts = {
        "vision_encoder": Part("onnx/vision_encoder.onnx", "fp32", tensors("pixel_values"), tensors("image_features")),
        "decoder": Part("decoder.mlpackage", "int8", tensors("inputs_embeds"), tensors("logits", "present.0.key")),
    }
    manifest = Manifest(
        target="onnx",
        model_type="idefics3",
        parameters=123_456,
        source={"checkpoint": "ab" * 32},
        parts=parts,
        decoder=Decoder(layers=3, kv_heads=1, head_dim=32, hidden_size=64, vocab_size=512, context=512),
        preprocessing={"size": {"longest_edge": 64}, "image_mean": [0.5, 0.5, 0.5]},
        generation={"eos_token_ids": [2], "image_token_id": 7},
        files=list_files(folder),
        golden="golden.npz",
        parity=[{"stage": "logits", "largest": 1e-6}],
        notes=["naïve"],
    )
    write_manifest(folder, manifest)
    return folder


def test_round_trip(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.parts["decoder"].outputs[1] == TensorSpec("present.0.key", "float32", ("batch_size", "sequence_length", 64))
    assert manifest.files["golden.npz"] == FileEntry(6, hashlib.sha256(b"golden").hexdigest())
    before = (bundle / NAME).read_bytes()
    write_manifest(bundle, manifest)
    assert (bundle / NAME).read_bytes() == before
    assert read_manifest(bundle) == manifest
    verify_files(bundle, manifest)


def test_manifest_lists_every_file_but_itself(bundle: Path) -> None:
    assert list(list_files(bundle)) == ["decoder.mlpackage/Data/weight.bin", "golden.npz", "onnx/vision_encoder.onnx"]


def flip_a_bit(bundle: Path) -> None:
    path = bundle / "onnx" / "vision_encoder.onnx"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def truncate(bundle: Path) -> None:
    path = bundle / "onnx" / "vision_encoder.onnx"
    path.write_bytes(path.read_bytes()[:-1])


def swap_for_outside(bundle: Path) -> None:
    """The same bytes, but by a link that leaves the bundle: what lies there may change after the check."""
    outside = bundle.parent / "weights"
    (bundle / "onnx" / "vision_encoder.onnx").rename(outside)
    (bundle / "onnx" / "vision_encoder.onnx").symlink_to(outside)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (flip_a_bit, "vision_encoder.onnx was changed since its export"),
        (truncate, "vision_encoder.onnx was changed since its export"),
        (lambda bundle: (bundle / "golden.npz").unlink(), "golden.npz is missing from the bundle"),
        (lambda bundle: (bundle / "decoder.mlpackage" / "Data" / "weight.bin").write_bytes(b"Weights"), "weight.bin was changed"),
        (swap_for_outside, "lies outside the bundle"),
    ],
)
def test_changed_bundle_is_refused(bundle: Path, change: Callable[[Path], None], words: str) -> None:
    manifest = read_manifest(bundle)
    verify_files(bundle, manifest)
    change(bundle)
    with pytest.raises(BundleError) as caught:
        verify_files(bundle, manifest)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../secret", "onnx/../../secret", "{absolute}"])
def test_path_that_leaves_the_bundle(bundle: Path, name: str) -> None:
    secret = bundle.parent / "secret"
    secret.write_text("s")
    manifest = read_manifest(bundle)
    entry = list_files(bundle.parent)["secret"]
    bad = dataclasses.replace(manifest, files={**manifest.files, name.format(absolute=secret): entry})
    with pytest.raises(BundleError, match="lies outside the bundle; do not use it"):
        verify_files(bundle, bad)


def test_part_without_a_hash(bundle: Path) -> None:
    """A graph that no hash covers could be anything, however well the listed files agree."""
    manifest = read_manifest(bundle)
    stray = dataclasses.replace(manifest.parts["decoder"], file="../evil.onnx")
    with pytest.raises(BundleError, match=r"'\.\./evil\.onnx' .* lists no such file"):
        verify_files(bundle, dataclasses.replace(manifest, parts={**manifest.parts, "decoder": stray}))
    with pytest.raises(BundleError, match=r"'other\.npz'"):
        verify_files(bundle, dataclasses.replace(manifest, golden="other.npz"))


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        raw = json.loads(text)
        change(raw)
        return json.dumps(raw)

    return edit


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "", "is damaged"),
        (lambda text: "[]", "is damaged"),
        (lambda text: "null", "is damaged"),
        (edited(lambda raw: raw.pop("decoder")), "'decoder'"),
        (edited(lambda raw: raw.pop("target")), "target"),
        (edited(lambda raw: raw.update(parts=[])), "is damaged"),
        (edited(lambda raw: raw["parts"]["decoder"].pop("file")), "'file'"),
        (edited(lambda raw: raw["files"].update(x=3)), "is damaged"),
        (edited(lambda raw: raw["decoder"].update(heads=3)), "heads"),
        (edited(lambda raw: raw.update(colour="red")), "colour"),
        (edited(lambda raw: raw.update(schema=2)), "has schema 2, this version reads 1"),
    ],
)
def test_damaged_manifest_is_one_line(bundle: Path, damage: Callable[[str], str], words: str) -> None:
    (bundle / NAME).write_text(damage((bundle / NAME).read_text()))
    with pytest.raises(BundleError) as caught:
        read_manifest(bundle)
    assert words in str(caught.value)
    assert "export the bundle again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no masters\.json in .*; expected a bundle written by 'masters export'"):
        read_manifest(tmp_path)
