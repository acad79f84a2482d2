"""Masked checkpoints on disk: the logits of the model masked in place, one file open at a time, and nothing half-written."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_families import ASKED, FAMILIES, encoder, made
from transformers import AutoModelForImageTextToText, AutoProcessor

from masters.cli import main
from masters.distill.families import family_of
from masters.distill.mask import TensorMask, apply_mask, maskable, plan_masks
from masters.distill.materialize import MaterializeConfig, materialize, write_masked
from masters.distill.models import load_model, skeleton
from masters.distill.recipe import Recipe, build_recipe
from masters.distill.stored import read_header, stored_weights, weight_files
from masters.errors import MastersError, ModelError, RecipeError

RATIO = 0.3


def recipe_of(teacher: Path, questions: Path, **changes: Any) -> Recipe:
    data = {"train": str(questions / "train.jsonl"), "validation": str(questions / "validation.jsonl")}
    return build_recipe({"student": str(teacher), "teachers": [{"model": str(teacher)}], "data": data, "out": "run"} | changes)


@pytest.fixture
def sharded(models: Any, tmp_path: Path) -> Path:
    """The teacher in several files, as large ones come, with what else such a folder holds."""
    folder = tmp_path / "sharded"
    shutil.copytree(models.teacher, folder)
    model = load_model(folder, torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="300KB")
    assert len(weight_files(folder)) >= 6
    return folder


def masks_of(model: Any, ratio: float = RATIO) -> list[TensorMask]:
    return plan_masks(maskable(model, family_of(model.config.model_type).LANGUAGE), [ratio])


def logits(model: Any, name: str) -> torch.Tensor:
    """Of a question with an image, by the model's own forward."""
    prompt = encoder(name).prompt(ASKED[0])
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=prompt.ids[None], **prompt.pixels, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_folder_loads_and_gives_the_logits_of_the_model_masked_in_place(name: str, tmp_path: Path):
    """Of every family, tied heads and renamed weights included, by the Auto class that any program uses."""
    source, out = tmp_path / "source", tmp_path / "masked"
    made(name).build(seed=1).save_pretrained(source, max_shard_size="100KB")
    made(name).processor.save_pretrained(source)
    in_place = load_model(source, torch.float32).eval()
    unmasked = logits(in_place, name)
    chosen = maskable(in_place, family_of(name).LANGUAGE)
    masks = plan_masks(chosen, [RATIO])
    apply_mask(chosen, masks, RATIO)
    assert write_masked(source, out, masks, RATIO) == out

    loaded = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    expected = logits(in_place, name)
    assert torch.equal(logits(loaded, name), expected)
    assert not torch.allclose(unmasked, expected, atol=1e-3), "the mask changes the answer"
    ours, theirs = dict(in_place.named_parameters()), dict(loaded.named_parameters())
    assert set(ours) == set(theirs)
    assert all(torch.equal(p, theirs[key]) for key, p in ours.items())
    before = {file.relative_to(source): file for file in source.rglob("*")}
    assert {file.relative_to(out) for file in out.rglob("*")} == {*before, Path("mask.json")}
    for relative, file in before.items():
        if file.suffix != ".safetensors":
            assert (out / relative).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("stored", "computed"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16"), ("bfloat16", "bfloat16")])
def test_a_recipes_teacher_is_masked_as_in_a_run_whatever_type_its_files_have(stored: str, computed: str, models: Any, questions: Path, tmp_path: Path):
    source, dtype = tmp_path / "source", getattr(torch, computed)
    shutil.copytree(models.teacher, source)
    weights = {key: t.float() * 1.2345 for key, t in load_file(models.teacher / "model.safetensors").items()}
    save_file({key: t.to(getattr(torch, stored)) for key, t in weights.items()}, source / "model.safetensors", metadata={"format": "pt"})
    recipe = recipe_of(source, questions, train={"dtype": computed})
    out = materialize(MaterializeConfig(recipe, RATIO, tmp_path / "out"))

    masked, loaded = load_model(source, dtype), load_model(out, dtype)
    chosen = maskable(masked, family_of(masked.config.model_type).LANGUAGE)
    apply_mask(chosen, plan_masks(chosen, [RATIO]), RATIO)
    theirs = dict(loaded.named_parameters())
    assert all(torch.equal(p, theirs[key]) for key, p in masked.named_parameters())
    before, after = (stored_weights(folder, skeleton(masked.config)) for folder in (source, out))
    assert {key: dataclasses.replace(place, file=out) for key, place in before.items()} == {k: dataclasses.replace(p, file=out) for k, p in after.items()}
    written = json.loads((out / "mask.json").read_text())
    assert written["ratio"] == RATIO
    assert {row["name"] for row in written["tensors"]} == set(chosen)
    for row in written["tensors"]:
        assert row["reached"]["0.3"] == int((chosen[row["name"]] == 0).sum()) / row["weights"] == pytest.approx(RATIO, abs=0.01)


def test_no_more_than_one_file_of_weights_is_open_at_a_time(sharded: Path, tmp_path: Path):
    """Asked of the kernel whenever a file is opened: descriptors and mappings of this process, of the source and of what is written."""
    masks = masks_of(load_model(sharded, torch.bfloat16))
    seen: set[str] = set()
    most: list[frozenset[str]] = []
    watching = True

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal watching
        if watching and event == "open" and isinstance(args[0], str | os.PathLike) and str(args[0]).endswith(".safetensors"):
            watching = False  # what is read here is no event of interest
            opened = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
            mapped = [line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
            here = [path for path in (*opened, *mapped, str(args[0])) if path.startswith(str(tmp_path))]
            shards = {os.path.basename(path) for path in here if path.endswith(".safetensors")}
            seen.update(shards)
            most.append(frozenset(shards))
            watching = True

    sys.addaudithook(watch)
    try:
        write_masked(sharded, tmp_path / "out", masks, RATIO)
        alone, most = max(map(len, most)), []
        kept = [open(file, "rb") for file in weight_files(sharded)[:2]]  # noqa: SIM115 - open on purpose
        shutil.rmtree(tmp_path / "out")
        write_masked(sharded, tmp_path / "out", masks, RATIO)
        for handle in kept:
            handle.close()
        more = max(map(len, most))
    finally:
        watching = False  # a hook stays for good
    assert len(seen) == len(weight_files(sharded)), "every file was seen"
    assert alone == 1
    assert more > 1, "the check would notice"


def test_a_full_disk_is_one_line_and_leaves_nothing(sharded: Path, small_disk: Path):
    masks = masks_of(load_model(sharded, torch.bfloat16))
    with pytest.raises(MastersError, match=r"could not write .*masked: No space left on device; free some space") as caught:
        write_masked(sharded, small_disk / "masked", masks, RATIO)
    assert "\n" not in str(caught.value)
    assert list(small_disk.iterdir()) == []


def killed(source: Path, out: Path, begun: Any) -> None:
    """Materialise, and stand still in the second file."""
    module: Any = importlib.import_module("masters.distill.materialize")
    original, count = module._zero_in, 0

    def slow(*args: Any) -> None:
        nonlocal count
        count += 1
        original(*args)
        if count == 10:
            begun.set()
            time.sleep(600)

    module._zero_in = slow
    write_masked(source, out, masks_of(load_model(source, torch.bfloat16)), RATIO)


def test_killed_in_the_middle_nothing_has_the_final_name_and_a_second_try_succeeds(sharded: Path, tmp_path: Path):
    begun = processes.context.Event()
    process = processes.context.Process(target=killed, args=(sharded, tmp_path / "out", begun), daemon=True)
    process.start()
    assert begun.wait(120)
    assert list(tmp_path.glob(".out.*.part/*.safetensors")), "it was at work"
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    masks = masks_of(load_model(sharded, torch.bfloat16))
    write_masked(sharded, tmp_path / "out", masks, RATIO)
    assert len(weight_files(tmp_path / "out")) == len(weight_files(sharded))


def test_the_source_is_left_as_it_is_and_links_and_leftovers_are_not_taken_over(sharded: Path, tmp_path: Path):
    """A download's cache holds links to read-only files, and often the same weights in other forms."""
    blobs, linked = tmp_path / "blobs", tmp_path / "linked"
    shutil.move(sharded, blobs)
    linked.mkdir()
    for file in blobs.iterdir():
        file.chmod(0o444)
        (linked / file.name).symlink_to(file)
    for leftover in ("pytorch_model.bin", "consolidated.safetensors", ".gitattributes"):
        (linked / leftover).write_bytes(b"other")
    (linked / "more_templates").mkdir()
    (linked / "more_templates" / "tool.jinja").write_text("{{ tool }}")
    before = {file.name: file.read_bytes() for file in blobs.iterdir()}
    out = write_masked(linked, tmp_path / "out", masks_of(load_model(linked, torch.bfloat16)), RATIO)
    assert {file.name: file.read_bytes() for file in blobs.iterdir()} == before
    assert {file.name for file in out.iterdir()} == {*before, "mask.json", "more_templates"}
    assert (out / "more_templates" / "tool.jinja").read_text() == "{{ tool }}"
    assert not any(file.is_symlink() for file in out.rglob("*"))
    assert AutoProcessor.from_pretrained(out).chat_template == AutoProcessor.from_pretrained(linked).chat_template


def test_a_quantised_checkpoint_is_refused(models: Any, questions: Path, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(models.teacher, source)
    weights = load_file(source / "model.safetensors")
    small = {key: t.to(torch.float8_e4m3fn) if key.endswith("proj.weight") else t for key, t in weights.items()}
    save_file(small, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="unquantised"):
        materialize(MaterializeConfig(recipe_of(source, questions), RATIO, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_can_not_be_is_refused_before_any_work(models: Any, questions: Path, tmp_path: Path):
    recipe, out = recipe_of(models.teacher, questions), tmp_path / "out"
    with pytest.raises(RecipeError, match=r"ratio is 1\.0; expected at least 0 and less than 1"):
        materialize(MaterializeConfig(recipe, 1.0, out))
    with pytest.raises(RecipeError, match="no teacher 1; expected a number from 0 to 0"):
        materialize(MaterializeConfig(recipe, 0.2, out, teacher=1))
    out.mkdir()
    with pytest.raises(MastersError, match=r"exists already.*--force"):
        materialize(MaterializeConfig(recipe, 0.2, out))
    assert list(out.iterdir()) == []


def test_the_command_writes_the_folder_and_prints_it(models: Any, questions: Path, tmp_path: Path):
    data = {split: str(questions / f"{split}.jsonl") for split in ("train", "validation")}
    raw = {"student": str(models.student), "teachers": [{"model": str(models.teacher)}], "data": data, "out": "run"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    wanted = ["materialize", str(tmp_path / "recipe.yaml"), "mask.exclude=[down_proj]", "--ratio", "0.2", "--out", str(tmp_path / "masked")]
    done = CliRunner().invoke(main, wanted)
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'masked'}\n"), done.output
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "masked", dtype="auto")
    zeros = {name: int((p == 0).sum()) / p.numel() for name, p in model.named_parameters() if "text_model.layers" in name and p.ndim == 2}
    assert all(share == pytest.approx(0.0 if "down_proj" in name else 0.2, abs=0.01) for name, share in zeros.items())
    again = CliRunner().invoke(main, wanted)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert CliRunner().invoke(main, [*wanted, "--force"]).exit_code == 0


def test_weights_are_masked_where_their_files_hold_them(sharded: Path, tmp_path: Path):
    """Bytes that belong to no masked weight are the source's own."""
    model = load_model(sharded, torch.bfloat16)
    out = write_masked(sharded, tmp_path / "out", masks_of(model), RATIO)
    stored = stored_weights(sharded, model)
    masked = {place.key for name, place in stored.items() if name in maskable(model, family_of(model.config.model_type).LANGUAGE)}
    for file in weight_files(sharded):
        before, after = file.read_bytes(), (out / file.name).read_bytes()
        assert read_header(file)[0].start == read_header(out / file.name)[0].start
        for place in read_header(file):
            same = before[place.start : place.stop] == after[place.start : place.stop]
            assert same != (place.key in masked), place.key
