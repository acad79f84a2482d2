"""Answer questions about images on a device, from a bundle that `masters export` wrote.

>>> from masters.runtime import load
>>> print(load("bundle").answer("What does the sign say?", ["street.jpg"]).text)

Importing this brings only what reads a bundle's manifest. The libraries follow in `load`, while files are hashed and graphs are opened.
"""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BundleError
from ..manifest import Manifest, read_manifest, verify_files
from .memory import give_back_freed
from .prepared import Prepared, prepare
from .providers import log

if TYPE_CHECKING:
    from .answer import Answer, Stream, Timings
    from .graphs import Parts
    from .session import Chat, Vlm

__all__ = ["Answer", "Chat", "Parts", "Stream", "Timings", "Vlm", "load"]

_HOMES = {"Answer": "answer", "Chat": "session", "Parts": "graphs", "Stream": "answer", "Timings": "answer", "Vlm": "session"}


def __getattr__(name: str) -> Any:
    """The classes of `__all__`, from their modules once they are asked for."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def load(
    bundle: Path | str,
    provider: str = "cpu",
    threads: int | None = None,
    *,
    verify: bool = True,
    test: bool = True,
    fallback: bool = False,
    image_cache_mb: float = 0,
    prepared: Path | str | None = None,
) -> Vlm:
    """Open the ONNX bundle in the folder `bundle` on `provider`, with `threads` threads (None: one a core).

    With `verify` every file is compared with its hash, with `test` the golden self-test runs; what is deferred is logged, stands in the model's
    `unverified`, and is made up for by its `verify()`. With `fallback` a provider that is not here may be replaced by the CPU, which is logged too;
    `parts.placement` says what really runs. `image_cache_mb` bounds the memory for features of images that may be shown again.

    `prepared` names a folder for graphs whose weights are packed for this processor (prepared.py): the first load writes them, further ones take less
    memory, and a self-test that passed on these files with these libraries is not run again.

    Raises BundleError for a bundle that is incomplete, changed, made for another target or off its golden tensors, and for a provider that does not run
    here, or is not the CPU where graphs are to be prepared.
    """
    folder = Path(bundle)
    if threads is not None and threads < 1:
        raise BundleError(f"threads is {threads}; expected at least 1, or None for one a core")
    if prepared is not None and provider != "cpu":
        raise BundleError(f"graphs can't be prepared for the provider '{provider}'; expected 'cpu', or leave `prepared` away")
    manifest = read_manifest(folder)
    if manifest.target != "onnx":
        raise BundleError(f"{folder} is made for '{manifest.target}', this runtime runs 'onnx'; use it on its own device, or export with --target onnx")
    packed = prepare(folder, manifest, Path(prepared), threads) if prepared is not None else None
    with ThreadPoolExecutor(1) as beside:
        hashed = beside.submit(packed.verify if packed else verify_files, folder, manifest) if verify else None
        try:
            vlm = _open(folder, manifest, provider, threads, fallback, image_cache_mb, packed)
        finally:
            if hashed:
                hashed.result()  # raises: a changed file is the reason for whatever else failed
    _test(vlm, verify, test)
    return vlm


def _open(folder: Path, manifest: Manifest, provider: str, threads: int | None, fallback: bool, image_cache_mb: float, packed: Prepared | None) -> Vlm:
    """The graphs are opened beside the imports and the tokenizer, which are Python's own work: onnxruntime does not hold its lock meanwhile."""
    import onnxruntime  # noqa: F401 - before everything else, so that the graphs are begun with

    from .graphs import OnnxParts

    with ThreadPoolExecutor(1) as beside:
        parts = beside.submit(OnnxParts, folder, manifest, provider, threads, fallback, packed.graphs if packed else None)
        from .chat import read_chat_format
        from .session import Vlm

        chat_format = read_chat_format(folder)
        vlm = Vlm(manifest, folder, parts.result(), image_cache_mb, chat_format)
    vlm.prepared = packed
    give_back_freed()
    return vlm


def _test(vlm: Vlm, verify: bool, test: bool) -> None:
    """The self-test, unless it is deferred or has passed before; what is deferred is logged."""
    from .session import HASHES, SELF_TEST

    untested = vlm.manifest.golden and not (vlm.prepared and vlm.prepared.passed())
    vlm.unverified = (*(() if verify else (HASHES,)), *((SELF_TEST,) if untested else ()))
    if test:
        vlm.verify(SELF_TEST)
    if vlm.unverified:
        log.warning("%s was opened without %s; verify() of the model makes up for it", vlm.folder, " and ".join(vlm.unverified))
