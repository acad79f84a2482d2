"""A bundle's graphs as this machine computes with them: optimised, their weights packed for its processor, in files that are mapped into memory.

ONNX Runtime packs weights anew at every start, into memory that no other process shares and that the system can't take back. Packed once, into a folder,
they are pages of a file: read when they are used, shared between processes, and given back while the other graph runs. A folder belongs to one bundle, one
processor and one onnxruntime; under other circumstances another is made. ONNX Runtime compares what it is given with what it would pack itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path

from ..errors import BundleError, MastersError
from ..files import read_json, sha256_file, whole_folder, write_json
from ..manifest import FileEntry, Manifest, list_files, verify_files
from .providers import log

PACKED = ("vision_encoder", "decoder")  # the third graph is a table
LIST, TESTED = "prepared.json", "self-test.json"


@dataclass(frozen=True)
class Prepared:
    """A folder of packed graphs, PART.onnx each, and what it held when it was written."""

    folder: Path
    files: dict[str, FileEntry]

    @property
    def graphs(self) -> dict[str, Path]:
        return {part: self.folder / f"{part}.onnx" for part in PACKED if f"{part}.onnx" in self.files}

    def verify(self, bundle: Path, manifest: Manifest) -> None:
        """Compare every file that is read, here and in the bundle, with its hash. Raises BundleError, naming the first that was changed."""
        replaced = tuple(manifest.parts[part].file for part in self.graphs)
        verify_files(bundle, manifest, [name for name in manifest.files if name.startswith(replaced)])
        for name, entry in self.files.items():
            file = self.folder / name
            if not file.is_file() or file.stat().st_size != entry.bytes or sha256_file(file) != entry.sha256:
                raise BundleError(f"{file} is missing or was changed since it was prepared; remove {self.folder}, it is made again by the next start")

    def passed(self) -> bool:
        """Whether the bundle's self-test passed with these graphs and today's libraries."""
        return (self.folder / TESTED).is_file() and read_json(self.folder / TESTED)["libraries"] == _libraries()

    def note_passed(self) -> None:
        """For later loads; where nothing can be written, those test again."""
        try:
            write_json(self.folder / TESTED, {"date": date.today().isoformat(), "libraries": _libraries()})
        except MastersError as error:
            log.warning("the self-test passed, which could not be noted: %s", error)


def prepare(bundle: Path, manifest: Manifest, into: Path, threads: int | None) -> Prepared:
    """The packed graphs of `bundle` below `into`, made where they are not there yet: in seconds, from files whose hashes are right, about 1.7 times its bytes.

    Raises BundleError for a bundle whose files were changed, and a graph that can't be opened.
    """
    folder = into / _name(manifest)
    if not folder.exists():
        from .graphs import open_session, usable_cores

        log.info("packing the weights of %s for this processor into %s", bundle, folder)
        verify_files(bundle, manifest)
        with whole_folder(folder, replace=True) as part:
            for name in PACKED:
                open_session(bundle / manifest.parts[name].file, "cpu", threads or usable_cores(), packed=part / f"{name}.onnx")
            if not _same_logits(bundle, manifest, part / "decoder.onnx"):
                log.warning("this onnxruntime can't read the decoder of %s back as packed; only its tower is prepared", bundle)
                for file in part.glob("decoder.onnx*"):
                    file.unlink()
            write_json(part / LIST, {name: dataclasses.asdict(entry) for name, entry in list_files(part).items()})
    return Prepared(folder, {name: FileEntry(**entry) for name, entry in read_json(folder / LIST).items()})


def _same_logits(bundle: Path, manifest: Manifest, packed: Path) -> bool:
    """Whether the packed decoder computes what the bundle's own does: of int4 products that sum in int8, onnxruntime 1.31 writes the weights before their
    scales are in them, and gives zeros."""
    import numpy as np

    from .graphs import OnnxParts

    ids = np.arange(4)
    own, other = (OnnxParts(bundle, manifest, threads=1, prepared=given) for given in (None, {"decoder": packed}))
    ours, theirs = (parts.decode(parts.embed(ids), parts.new_cache(len(ids))) for parts in (own, other))
    return bool(np.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(np.abs(ours).max())))


def _name(manifest: Manifest) -> str:
    """Of the bundle's files, the processor and the library, shortened."""
    # Its version stands there; importing it takes as long as hashing half of the files, which can begin meanwhile.
    spec = find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    library = Path(spec.origin).read_text(encoding="utf-8")
    files = {name: entry.sha256 for name, entry in manifest.files.items()}
    told = json.dumps([files, library, _processor()], sort_keys=True)
    return f"{manifest.model_type}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def _processor() -> list[str]:
    """The processor's name and, where the system tells, what it can."""
    info = Path("/proc/cpuinfo")
    first = info.read_text().partition("\n\n")[0].splitlines() if info.is_file() else []
    known = [line for line in first if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return [platform.machine(), *(known or [platform.processor()])]


def _libraries() -> dict[str, str]:
    """What the self-test goes through, by version."""
    import numpy
    import onnxruntime
    import PIL
    import tokenizers

    return {library.__name__: library.__version__ for library in (numpy, onnxruntime, PIL, tokenizers)}
