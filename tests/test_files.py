"""Whole files or none: real kills, real full disks, and folders replaced in one step."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from masters import files
from masters.errors import DataError, MastersError
from masters.files import read_json, sha256_file, sha256_folder, whole_file, whole_folder, write_json, write_text


def run_until_half_written(code: str) -> subprocess.Popen[str]:
    """Start `code`, which prints a line in the middle of its write and then waits for ever."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    return process


@pytest.mark.parametrize("before", [None, "old content"])
def test_killed_writer_leaves_the_name_alone(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "rows.jsonl"
    if before:
        path.write_text(before)
    process = run_until_half_written(
        f"""
import time
from pathlib import Path
from masters.files import whole_file
with whole_file(Path({str(path)!r})) as part, open(part, "w") as handle:
    handle.write("half")
    handle.flush()
    print("half", flush=True)
    time.sleep(600)
"""
    )
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (path.read_text() if path.exists() else None) == before
    write_text(path, "whole")
    assert path.read_text() == "whole"


@pytest.mark.parametrize("before", [False, True])
def test_killed_writer_of_a_folder_leaves_the_name_alone(tmp_path: Path, before: bool) -> None:
    path = tmp_path / "student"
    if before:
        path.mkdir()
        (path / "config.json").write_text("old")
    process = run_until_half_written(
        f"""
import time
from pathlib import Path
from masters.files import whole_folder
with whole_folder(Path({str(path)!r}), replace=True) as part:
    (part / "config.json").write_text("new")
    print("half", flush=True)
    time.sleep(600)
"""
    )
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert sorted(p.name for p in path.rglob("*")) == (["config.json"] if before else [])
    with whole_folder(path, replace=True) as part:
        (part / "model.bin").write_bytes(b"1")
    assert [p.name for p in path.iterdir()] == ["model.bin"]


@pytest.fixture
def small_disk(disk_of: Callable[[str], Path]) -> Path:
    """A file system of 256 KiB."""
    return disk_of("256k")


def test_full_disk_is_one_line_and_leaves_nothing(small_disk: Path) -> None:
    with pytest.raises(MastersError) as caught:
        write_text(small_disk / "big.txt", "x" * 1_000_000)
    assert str(caught.value) == f"could not write {small_disk / 'big.txt'}: No space left on device; free some space or choose another place, then run again"
    assert list(small_disk.iterdir()) == []


def test_full_disk_keeps_the_folder_that_was_there(small_disk: Path) -> None:
    bundle = small_disk / "bundle"
    with whole_folder(bundle) as part:
        (part / "a").write_bytes(bytes(50_000))
    before = sha256_folder(bundle)
    with pytest.raises(MastersError, match="No space left"), whole_folder(bundle, replace=True) as part:
        _ = [(part / str(number)).write_bytes(bytes(50_000)) for number in range(20)]
    assert sha256_folder(bundle) == before
    assert [p.name for p in small_disk.iterdir()] == ["bundle"]


def test_file_size_limit(tmp_path: Path) -> None:
    """The same without a mount: the kernel refuses to let the file grow."""
    path = tmp_path / "big.txt"
    code = f"""
import resource, signal
from pathlib import Path
from masters.errors import MastersError
from masters.files import write_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_text(Path({str(path)!r}), "x" * 1_000_000)
except MastersError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"could not write {path}: File too large; free some space or choose another place, then run again\n"
    assert list(tmp_path.iterdir()) == []


def test_failure_inside_keeps_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "out") as part:
        (part / "a").write_text(str(1 / 0))
    with pytest.raises(FileNotFoundError, match="input"), whole_file(tmp_path / "out.txt") as part:
        part.write_text((tmp_path / "input").read_text())
    assert list(tmp_path.iterdir()) == []


def test_name_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(MastersError, match=r"could not write .*out: Is a directory"):
        write_text(tmp_path / "out", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MastersError, match=r"could not write .*a\.txt: (Not a directory|File exists)"):
        write_text(tmp_path / "file" / "a.txt", "text")


def test_missing_parents_are_made_and_the_suffix_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "golden.npz"
    with whole_file(path) as part:
        assert part.suffix == ".npz"
        np.savez(part, x=np.arange(3))
    assert np.load(path)["x"].tolist() == [0, 1, 2]
    assert [p.name for p in path.parent.iterdir()] == ["golden.npz"]


def test_folder_that_exists_is_replaced_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    with whole_folder(path) as part:
        (part / "old").write_text("1")
    with pytest.raises(MastersError, match=r"exists already.*--force"), whole_folder(path):
        pytest.fail("the body must not run")
    with whole_folder(path, replace=True) as part:
        (part / "new").write_text("2")
    assert [p.name for p in path.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


KILLED_AT_EVERY_STEP = """
import os, signal, sys
from pathlib import Path
from masters.files import whole_folder

path, steps = Path(sys.argv[1]), 0

def count(event, arguments):  # every call to the system that Python makes known, before it happens
    global steps
    if event.startswith(("os.", "shutil.", "ctypes.", "open")):
        steps += 1
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)

for last in range(1, 500):
    child = os.fork()
    if not child:
        sys.addaudithook(count)
        with whole_folder(path, replace=True) as part:
            for name in ("first", "last"):
                (part / name).write_text(str(last))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    names = sorted(file.name for file in path.iterdir())
    contents = {file.read_text() for file in path.iterdir()}
    assert names == ["first", "last"] and len(contents) == 1, f"killed before step {last}: {names} {contents}"
    if status == 0:
        print(last)
        break
"""


def test_killed_at_any_step_a_replaced_folder_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    path.mkdir()
    for name in ("first", "last"):
        (path / name).write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED_AT_EVERY_STEP, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 8, "no step was seen"
    assert (path / "first").read_text() == done.stdout.strip()


def test_where_names_can_not_be_exchanged_the_folder_is_moved_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    for number in range(2):
        with whole_folder(tmp_path / "bundle", replace=True) as part:
            (part / str(number)).touch()
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()] == ["bundle/1"]


def test_failed_replacement_keeps_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    with whole_folder(path) as part:
        (part / "old").write_text("1")
    with pytest.raises(ZeroDivisionError), whole_folder(path, replace=True) as part:
        (part / "new").write_text(str(1 / 0))
    assert [(p.name, p.read_text()) for p in path.iterdir()] == [("old", "1")]
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_json_round_trip_and_equal_bytes(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": {"ü": "\u2028"}}
    write_json(tmp_path / "a.json", value)
    write_json(tmp_path / "b.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):  # a file that other programs could not read
        write_json(tmp_path / "c.json", float("nan"))
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no file at"), (b'{"a": ', "is not valid JSON"), (b"\xff", "is not valid JSON"), (b"", "is not valid JSON")]
)
def test_unreadable_json_is_one_line(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_json(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hashes(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "big").write_bytes(content)
    assert sha256_file(tmp_path / "big") == hashlib.sha256(content).hexdigest()


def test_folder_hash_tells_names_contents_and_depth_apart(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
        return sha256_folder(tmp_path / name)

    one = folder("one", {"a": "1", "b/c": "2"})
    assert folder("same", {"b/c": "2", "a": "1"}) == one
    others = [{"a": "1", "b/c": "3"}, {"a": "1", "b/d": "2"}, {"a": "1", "c": "2"}, {"a": "1"}, {"a": "2", "b/c": "1"}]
    assert len({one, *(folder(str(number), files) for number, files in enumerate(others))}) == 6
    assert sha256_folder(tmp_path / "one", suffixes=(".json",)) != one
