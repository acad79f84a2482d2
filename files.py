"""Writing files whole: under a temporary name first, then renamed, so that a killed process or a full disk leaves nothing half-written."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import DataError, MastersError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, on any failure removed."""
    # The suffix stays last: several writers (numpy, PIL, parquet) choose the format by it.
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(part, path)
    except OSError as error:
        raise _unwritten(path, part, error) from error
    finally:
        with suppress(OSError):
            part.unlink()


@contextmanager
def whole_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it becomes `path` in one rename, on any failure it is removed.

    With `replace` an existing folder changes names with the new one in a single step and is removed afterwards: killed at any moment, one of the two
    stands there, whole. Without, it is a MastersError.
    """
    if path.exists() and not replace:
        raise MastersError(f"{path} exists already; choose another output folder, or pass --force to replace it")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        if not path.exists() or not _exchanged(part, path):
            if path.exists():
                os.replace(path, old)
            os.replace(part, path)
    except OSError as error:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise _unwritten(path, part, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def link_file(first: Path, second: Path) -> None:
    """Let `second` be another name of the equal file `first`; it stays a copy where the file system knows no such links."""
    part = second.with_name(f".{second.name}.{os.getpid()}.part")
    with suppress(OSError):
        try:
            os.link(first, part)
            os.replace(part, second)
        finally:
            part.unlink(missing_ok=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two paths change names in one step, which Python has no function for; False where this system or file system has none either."""
    exchange = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
    if os.name != "posix":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(library, "renameat2"):
        here = -100  # AT_FDCWD: paths are relative to the working folder
        failed = library.renameat2(here, names[0], here, names[1], exchange)
    elif hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, exchange)
    else:
        return False
    if failed and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
    return not failed


def _unwritten(path: Path, part: Path, error: OSError) -> Exception:
    """What to raise when writing `path` failed: an error about another file, as when an input is missing, stays itself."""
    names = [Path(name) for name in (error.filename, error.filename2) if name]  # a copy names two
    if names and not any(name == path or name in path.parents or part in (name, *name.parents) for name in names):
        return error
    return MastersError(f"could not write {path}: {error.strerror or error}; free some space or choose another place, then run again")


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, keys in insertion order, so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in `path`; a missing or damaged file is a DataError that names the place."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no file at {path}; expected a JSON file there") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); expected a whole JSON file, write it again") from None


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in 1 MiB pieces."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_folder(path: Path, suffixes: tuple[str, ...] = ()) -> str:
    """Hex SHA-256 over the names and contents of a folder's files, in sorted order; `suffixes` restricts which."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and (not suffixes or p.suffix in suffixes)):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()
