"""Whose folder is whose: a run folder belongs to one recipe and one process, a buffer of responses to all recipes that would make the same."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..errors import RunError
from ..files import sha256_file, sha256_folder, write_text
from ..progress import say
from . import ranks
from .recipe import Recipe, recipe_values
from .skipped import SKIPPED, read_skipped

# Settings of the answers that change none of them: a server may move, and a run goes on with another limit.
PASSING = ("endpoint", "vllm", "processes", "max_failed")
WATCHED = {"track", "project", "baseline", "mask_trial", "machine"}  # what a run that was begun may change
ANSWERED = ("responses", "teacher", "checkpoints", "metrics.jsonl", "student")  # what depends on the mask ratios
READ = (".safetensors", ".json", ".jinja")  # the files that decide what a model folder is


@contextmanager
def locked(out: Path, what: str = "a run", wait: bool = False) -> Iterator[None]:
    """Hold a folder for this run's processes alone; the lock goes with the main one, however it ends. What a killed one was writing is removed."""
    if not ranks.is_main():
        ranks.wait()
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a")  # noqa: SIM115 - closed below
    except OSError as error:
        raise RunError(f"{out} can't hold {what} ({error.strerror}); expected a folder that can be written to, choose another one") from None
    with lock as handle:
        os.register_at_fork(after_in_child=handle.close)  # or a child that outlives a killed run would hold its folder
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if not wait:
                raise RunError(f"another process is working in {out}; wait for it, or choose another 'out'") from None
            say(f"waiting for the process that is working in {out}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        for part in out.rglob(".*.part*"):
            shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
        ranks.wait()
        yield


def claim(recipe: Recipe) -> None:
    """Write recipe.yaml, or make sure that the one that is there is the same, models and questions included."""
    values = recipe_values(recipe) | {"fingerprints": fingerprints(recipe)}
    path = recipe.out / "recipe.yaml"
    if path.exists() and not any((recipe.out / name).exists() for name in ANSWERED) and _differ_in_r_max(path, values):
        write_text(path, yaml.safe_dump(values, sort_keys=False))  # what was measured there decides it
    claim_file(path, values, "the run folder")


def answers_values(recipe: Recipe) -> dict[str, Any]:
    """What responses, masks and the teacher's states depend on, and nothing else, so that runs which differ elsewhere can share them."""
    values = lasting(recipe_values(recipe))
    # A student that answers after it has been trained is one that this recipe has made.
    trained = len(recipe.teachers) > 1 or recipe.answers.refresh == "stage"
    keys = ("answers", "judge", "mask", "longest", "seed") + (("objective", "train", "preset") if trained else ())
    kept = {key: values[key] for key in keys} | {"dtype": recipe.train.dtype}
    return kept | {"limit": recipe.data.limit, "r_max": [t.r_max for t in recipe.teachers], "fingerprints": fingerprints(recipe)}


def training_mark(recipe: Recipe) -> str:
    """A hash of all that decides what a checkpoint holds; where the run stands on disk does not."""
    elsewhere = ("out", "buffer", "student", "teachers", "data", "teacher_signal")
    values = {key: value for key, value in lasting(recipe_values(recipe)).items() if key not in elsewhere}
    values |= {"fingerprints": fingerprints(recipe), "limit": recipe.data.limit, "r_max": [t.r_max for t in recipe.teachers]}
    return digest(values)


def digest(values: Mapping[str, Any]) -> str:
    """Hex SHA-256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """Hashes of the models' and the questions' files, and of which questions are skipped: an image that comes later changes what is asked when."""
    folders = {"student": recipe.student} | {f"teacher {i}": teacher.model for i, teacher in enumerate(recipe.teachers)}
    if recipe.judge.kind == "model" and recipe.judge.model:
        folders["judge"] = recipe.judge.model
    found = {name: _hash(folder, _state(folder)) for name, folder in folders.items() if folder.is_dir()}
    files = {"train": recipe.data.train, "tokenizer": recipe.student / "tokenizer.json"}
    found |= {name: _hash(path, _state(path)) for name, path in files.items() if path.is_file()}
    left_out = read_skipped(recipe.out / SKIPPED) if (recipe.out / SKIPPED).exists() else []
    ids = [row.id for row in left_out if row.file == "train"]
    return found | ({"skipped": digest({"ids": ids})} if ids else {})


def claim_file(path: Path, values: dict[str, Any], what: str) -> None:
    """Write `values` where nothing is yet; otherwise raise RunError if what is there differs in more than how the run is watched. The main process does."""
    if not ranks.is_main():
        return
    if not path.exists():
        write_text(path, yaml.safe_dump(values, sort_keys=False))
        return
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        changed = differing(lasting(values), lasting(before))
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError):
        raise RunError(f"{path} is damaged; remove {path.parent} to begin anew") from None
    if changed:
        raise RunError(f"{what} {path.parent} was begun with another recipe ({', '.join(changed)} differ); choose another folder, or remove that one")


def lasting(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's plain values less those that change neither answers nor weights."""
    answers, judge = values.get("answers"), values.get("judge")
    kept = {"answers": {key: value for key, value in answers.items() if key not in PASSING}} if isinstance(answers, dict) else {}
    if isinstance(judge, dict):  # whose weights it has stands among the fingerprints
        kept["judge"] = {"kind": judge["kind"], "max_tokens": judge["max_tokens"], "endpoint": {"model": judge["endpoint"]["model"]}}
    return {key: value for key, value in {**values, **kept}.items() if key not in WATCHED}


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The keys under which two recipes differ, as dotted names."""
    found = []
    for key in sorted(ours.keys() | theirs.keys()):
        left, right = ours.get(key), theirs.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += [f"{key}.{name}" for name in differing(left, right)]
        elif left != right:
            found.append(key)
    return found


def _differ_in_r_max(path: Path, values: Mapping[str, Any]) -> bool:
    """Whether the recipe in `path` is that of `values` but for the ratios at which the teachers start."""
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        ours, theirs = (dict(v, teachers=[{**teacher, "r_max": None} for teacher in v["teachers"]]) for v in map(lasting, (values, before)))
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, ValueError):
        return False  # damaged, which will be said of it
    return ours == theirs and values["teachers"] != before["teachers"]


def _state(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files that are hashed: while they stay, so does the hash, which takes minutes for a large teacher."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return tuple((str(file), stat.st_size, stat.st_mtime_ns) for file in files if file.is_file() for stat in [file.stat()])


@cache
def _hash(path: Path, state: tuple[tuple[str, int, int], ...]) -> str:
    return sha256_folder(path, READ) if path.is_dir() else sha256_file(path)
