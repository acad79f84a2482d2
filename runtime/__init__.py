"""Answer questions about images on a device, from a bundle that `masters export` wrote.

>>> from masters.runtime import load
>>> print(load("bundle").answer("What does the sign say?", ["street.jpg"]).text)
"""

from __future__ import annotations

from pathlib import Path

from ..errors import BundleError
from ..manifest import read_manifest, verify_files
from .answer import Answer, Stream, Timings
from .graphs import OnnxParts, Parts
from .providers import log
from .session import HASHES, SELF_TEST, Chat, Vlm

__all__ = ["Answer", "Chat", "Parts", "Stream", "Timings", "Vlm", "load"]


def load(
    bundle: Path | str,
    provider: str = "cpu",
    threads: int | None = None,
    *,
    verify: bool = True,
    test: bool = True,
    fallback: bool = False,
    image_cache_mb: float = 0,
) -> Vlm:
    """Open the ONNX bundle in the folder `bundle` on `provider`, with `threads` threads (None: one a core).

    With `verify` every file is compared with its hash, with `test` the golden self-test runs; what is deferred is logged, stands in the model's
    `unverified`, and is made up for by its `verify()`. With `fallback` a provider that is not here may be replaced by the CPU, which is logged too;
    `parts.placement` says what really runs. `image_cache_mb` bounds the memory for features of images that may be shown again. Raises BundleError
    for a bundle that is incomplete, changed, made for another target or off its golden tensors, and for a provider that does not run here.
    """
    folder = Path(bundle)
    if threads is not None and threads < 1:
        raise BundleError(f"threads is {threads}; expected at least 1, or None for one a core")
    manifest = read_manifest(folder)
    if manifest.target != "onnx":
        raise BundleError(f"{folder} is made for '{manifest.target}', this runtime runs 'onnx'; use it on its own device, or export with --target onnx")
    if verify:
        verify_files(folder, manifest)
    vlm = Vlm(manifest, folder, OnnxParts(folder, manifest, provider, threads, fallback), image_cache_mb)
    vlm.unverified = (*(() if verify else (HASHES,)), *((SELF_TEST,) if manifest.golden else ()))
    if test:
        vlm.verify(SELF_TEST)
    if vlm.unverified:
        log.warning("%s was opened without %s; verify() of the model makes up for it", folder, " and ".join(vlm.unverified))
    return vlm
