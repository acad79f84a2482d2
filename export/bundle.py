"""The way from a Hugging Face folder to a bundle, the same for every target: files, graphs, golden tensors, proof, manifest."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from optimum.utils.normalized_config import NormalizedTextConfigWithGQA

from .. import manifest as manifests
from ..errors import MastersError, ParityError
from ..files import read_json, sha256_file, sha256_folder, whole_folder, write_json, write_text
from ..manifest import Decoder, Manifest, Part
from ..progress import say
from ..runtime.session import Vlm
from ..samples import read_samples
from . import ExportConfig
from .calibration import Asked, ask
from .drop import measure_drop
from .fitting import fit_int4
from .golden import GOLDEN, lightest, smallest, write_golden
from .int4 import Blocks
from .mobile import check_graphs
from .parity import check_parity, check_stored, failures, rows_json
from .precision import AUTO, Precision, parse_precision
from .products import all_products, is_tied
from .source import Source, load_source
from .written import Written

MIB = 2**20
# Copied as they are: the program that loads the bundle reads what was trained with.
COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "chat_template.jinja", "chat_template.json"),
)


def write_bundle(config: ExportConfig) -> Manifest:
    """See `masters.export.export`."""
    precision = _precision(config)
    student, out = config.student.resolve(), config.out.resolve()
    if out == student or out in student.parents:
        raise MastersError(f"the output folder {config.out} holds the model to be exported; choose another output folder")
    for data in (config.data, config.calibrate):
        if data is not None:
            read_samples(data, need_answers=data is config.data)  # a row that can't be used shows now, not after the work
    with whole_folder(config.out, replace=config.force) as folder:
        if precision.decoder == AUTO:
            from .budget import write_within

            manifest = write_within(config, precision, folder)
        else:
            source = load_source(config.student)
            if config.target == "onnx":  # a Core ML package looks up no int4 rows
                precision = precision.of_model(is_tied(*source.family.text_parts(source.model)))
            manifest = write_whole(source, config, precision, folder)[0]
        manifests.write_manifest(folder, manifest)
    return manifest


def _precision(config: ExportConfig) -> Precision:
    """What `config` asks for; what it leaves open is what docs/precision.md has measured to be best."""
    onnx = config.target == "onnx"
    method = config.int4_method or ("gptq" if config.calibrate is not None and onnx else "rtn")
    block = config.block_size if config.block_size is not None else 64 if onnx else 32
    return parse_precision(config.precision, block, config.accuracy_level, method)


def write_whole(source: Source, config: ExportConfig, precision: Precision, folder: Path, questions: Sequence[Asked] = ()) -> tuple[Manifest, Vlm]:
    """All files of a bundle, proven; its manifest, not yet written, and the bundle as a model. `source` is changed where something is quantised.

    GPTQ fits int4 to `questions`, or to those of config.calibrate where none are given.
    """
    calibrated: dict[str, Blocks] = {}
    if precision.method == "gptq" and "int4" in (precision.vision, precision.decoder):
        calibrated = _fitted(config, precision, questions)
    manifest, written = _write_files(source, config, precision, calibrated, folder)
    graphs = check_graphs(folder, manifest.parts, config.mobile) if config.target == "onnx" else []
    manifest, vlm = _prove(source, config, precision, manifest, written, folder)
    return replace(manifest, checks=graphs + manifest.checks), vlm


def _fitted(config: ExportConfig, precision: Precision, questions: Sequence[Asked]) -> dict[str, Blocks]:
    """On a model of its own, which is gone afterwards: fitting changes it."""
    source = load_source(config.student)
    if not questions:
        assert config.calibrate is not None
        questions = ask(source, config.calibrate)
    return fit_int4(source, all_products(source.model, source.family), precision, questions)


def load_target(name: str) -> ModuleType:
    """The module of a target: write_parts, load_parts, MOST_CONTEXT."""
    if name == "onnx":
        from . import onnx_target

        return onnx_target
    from . import coreml

    return coreml


def open_bundle(folder: Path) -> Vlm:
    """A verified bundle of any target as a model; a Core ML bundle runs, away from Apple's systems, on the interpreter that proved it."""
    manifest = manifests.read_manifest(folder)
    manifests.verify_files(folder, manifest)
    return Vlm(manifest, folder, load_target(manifest.target).load_parts(folder, manifest))


def _write_files(source: Source, config: ExportConfig, precision: Precision, calibrated: Mapping[str, Blocks], folder: Path) -> tuple[Manifest, Written]:
    """Everything but the proof, and what the target says of it; the manifest lists no files yet."""
    target = load_target(config.target)
    if config.target == "onnx":
        written = target.write_parts(source.model, source.processor, folder, precision, calibrated, int(config.chunk_mb * MIB))
        config_json = target.model_config(read_json(source.folder / "config.json"), folder, precision)
    else:
        written = target.write_parts(source.model, source.processor, folder, precision)
        config_json = read_json(source.folder / "config.json")
    write_json(folder / "config.json", config_json)
    _write_processor(source, folder)
    return _manifest(source, config.target, target, written.parts), written


def _write_processor(source: Source, folder: Path) -> None:
    """Tokenizer, template and preprocessing: the folder's own files, and in the names that other programs read where it lacks them."""
    for name in COPIED:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    if not (folder / "tokenizer.json").is_file():
        source.processor.tokenizer.save_pretrained(folder)
    if not (folder / "preprocessor_config.json").is_file():  # transformers 5 keeps it inside processor_config.json, other programs don't look there
        write_json(folder / "preprocessor_config.json", source.processor.image_processor.to_dict())
    if not (folder / "chat_template.jinja").is_file() and isinstance(source.processor.chat_template, str):
        write_text(folder / "chat_template.jinja", source.processor.chat_template)
    if not (folder / "generation_config.json").is_file():
        write_json(folder / "generation_config.json", source.model.generation_config.to_diff_dict())
    # transformers.js looks for both where transformers kept them before: without them it finds neither its processor nor a template.
    _complete(folder / "preprocessor_config.json", "processor_class", type(source.processor).__name__)
    _complete(folder / "tokenizer_config.json", "chat_template", source.processor.chat_template)


def _complete(file: Path, key: str, value: Any) -> None:
    settings = read_json(file) if file.is_file() else {}
    if value is not None and key not in settings:
        write_json(file, settings | {key: value})


def _manifest(source: Source, name: str, target: ModuleType, parts: dict[str, Part]) -> Manifest:
    model, text = source.model, source.model.config.get_text_config()
    settings = model.generation_config
    checkpoint = {"checkpoint": sha256_folder(source.folder, (".safetensors", ".json", ".jinja"))}
    recipe = source.folder.parent / "recipe.yaml"
    return Manifest(
        target=name,
        model_type=source.model_type,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        source=checkpoint | ({"recipe": sha256_file(recipe)} if recipe.is_file() else {}),
        parts=parts,
        decoder=_geometry(text, target.MOST_CONTEXT),
        preprocessing=source.preprocessing,
        generation={
            "eos_token_ids": sorted(source.end_tokens()),
            "pad_token_id": settings.pad_token_id if settings.pad_token_id is not None else text.pad_token_id,
            "image_token_id": model.config.image_token_id,
            **getattr(target, "GENERATION", {}),
        },
        files={},
    )


def _geometry(text: Any, most_context: int) -> Decoder:
    """The decoder's sizes, by optimum's names for them; its list of model types knows no text part of a vision-language model."""
    sizes = NormalizedTextConfigWithGQA(text)
    return Decoder(
        layers=sizes.num_layers,
        kv_heads=sizes.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads,
        hidden_size=sizes.hidden_size,
        vocab_size=sizes.vocab_size,
        context=min(text.max_position_embeddings, most_context),
    )


def _prove(source: Source, config: ExportConfig, precision: Precision, manifest: Manifest, written: Written, folder: Path) -> tuple[Manifest, Vlm]:
    """Golden tensors, parity and the score on the user's questions; the manifest with all of it and with every file's hash."""
    target = load_target(config.target)
    vlm = Vlm(manifest, folder, target.load_parts(folder, manifest))
    # How Core ML's kernels round is Apple's, there is nothing to follow.
    followed = bool(written.products) and target.follows(precision, written.products)
    found, references = check_parity(vlm, source, judge=not followed)
    if followed:
        files = {part: folder / manifest.parts[name].file for part, name in (("decoder", "decoder"), ("vision", "vision_encoder"), ("embed", "embed_tokens"))}
        target.store_weights(source, precision, written.products, files)
        found += check_stored(vlm, source, lightest(references), precision)
    parity, notes = [*written.rows, *found], []
    if failed := failures(parity):
        if not config.allow_mismatch:
            raise ParityError(f"{failed[0]}; nothing was written, --allow-mismatch keeps such a bundle, marked")
        notes = [f"kept in spite of a mismatch: {line}" for line in failed]
        say(notes[0])
    if references:
        write_golden(folder / GOLDEN, vlm, smallest(references))
    checks: list[dict[str, Any]] = []
    if config.data is not None:
        checks.append(measure_drop(vlm, load_source(config.student) if followed else source, config.data, config.max_drop, config.answers))
    listed = manifests.list_files(folder)
    manifests.link_equal(folder, listed)  # last: onnx and onnx-ir refuse weights in a file of several names
    proven = replace(
        manifest,
        golden=GOLDEN if references else None,
        parity=rows_json(parity),
        checks=checks,
        notes=notes,
        files=listed,
    )
    return proven, vlm
