"""masters.json: what a bundle says of itself. Written by the export, read by the runtime and by the checks.

Every file stands in it with its size and SHA-256, every graph with its precision, inputs and outputs, beside the preprocessing,
the golden tensors, the parity measured at export, and the checks measured since.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import BundleError, DataError
from .files import link_file, read_json, sha256_file, write_json

NAME = "masters.json"
SCHEMA = 1
TARGETS = ("onnx", "coreml")
LINKED = 2**20  # bytes from which on equal files are stored once
PARTS = ("vision_encoder", "embed_tokens", "decoder")


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph; a dimension is a number or the name of a free axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Part:
    """One graph: its file (an .onnx file or an .mlpackage folder, relative to the bundle), precision and interface."""

    file: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class FileEntry:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Decoder:
    """The decoder's geometry, from which a cache is built."""

    layers: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    context: int  # the most positions a prompt and its answer may take together


@dataclass(frozen=True)
class Manifest:
    """The whole of masters.json."""

    target: str
    model_type: str  # the Hugging Face model_type, which names the family's file in runtime/families
    parameters: int
    source: dict[str, str]  # sha256 of the checkpoint, and of the recipe where the student came from one
    parts: dict[str, Part]
    decoder: Decoder
    preprocessing: dict[str, Any]  # the image processor's resolved settings
    generation: dict[str, Any]  # eos_token_ids, pad_token_id, image_token_id
    files: dict[str, FileEntry]
    golden: str | None = None  # an .npz of inputs and the PyTorch model's outputs, for the runtime's self-test
    parity: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    schema: int = SCHEMA


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / NAME, dataclasses.asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the bundle in `folder`. Raises BundleError if there is none, it is damaged, or of a newer schema."""
    if not (folder / NAME).is_file():
        raise BundleError(f"no {NAME} in {folder}; expected a bundle written by 'masters export'")
    try:
        raw = read_json(folder / NAME)
        if raw["schema"] != SCHEMA:
            raise BundleError(f"{folder / NAME} has schema {raw['schema']}, this version reads {SCHEMA}; export the bundle again")
        parts = {name: Part(p["file"], p["precision"], _specs(p["inputs"]), _specs(p["outputs"])) for name, p in raw.pop("parts").items()}
        files = {name: FileEntry(**entry) for name, entry in raw.pop("files").items()}
        return Manifest(parts=parts, files=files, decoder=Decoder(**raw.pop("decoder")), **raw)
    except (DataError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{folder / NAME} is damaged ({error}); export the bundle again") from None


def list_files(folder: Path) -> dict[str, FileEntry]:
    """Size and hash of every file below `folder` but the manifest itself, by relative path, sorted."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() != NAME)
    return {p.relative_to(folder).as_posix(): FileEntry(p.stat().st_size, sha256_file(p)) for p in found}


def link_equal(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Let equal large files of a bundle be one on the disk, where its file system can."""
    found: dict[str, str] = {}
    for name, entry in files.items():
        first = found.setdefault(entry.sha256, name)
        if first != name and entry.bytes >= LINKED:
            link_file(folder / first, folder / name)


def stored_bytes(files: Mapping[str, FileEntry]) -> int:
    """What the files take where equal large ones are stored once."""
    return sum({entry.sha256 if entry.bytes >= LINKED else name: entry.bytes for name, entry in files.items()}.values())


def verify_files(folder: Path, manifest: Manifest, but: Collection[str] = ()) -> None:
    """Compare every file `but` those with its entry. Raises BundleError, naming the first file that is missing, changed, or outside the bundle."""
    root = folder.resolve()
    for name in [*(part.file for part in manifest.parts.values()), *([manifest.golden] if manifest.golden else [])]:
        # A package is a folder: its files are listed, it is not.
        if name not in manifest.files and not any(file.startswith(f"{name}/") for file in manifest.files):
            raise BundleError(f"{folder / NAME} names '{name}' as part of the bundle but lists no such file with its hash; export the bundle again")
    for name, entry in manifest.files.items():
        if name in but:
            continue
        file = folder / name
        if not file.resolve().is_relative_to(root):
            raise BundleError(f"{folder / NAME} names '{name}', which lies outside the bundle; do not use it")
        if not file.is_file():
            raise BundleError(f"{file} is missing from the bundle; copy it again, or export again")
        if file.stat().st_size != entry.bytes or sha256_file(file) != entry.sha256:
            raise BundleError(f"{file} was changed since its export (its SHA-256 differs from {NAME}); copy it again, or export again")


def _specs(rows: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(row["name"], row["dtype"], tuple(row["shape"])) for row in rows)
