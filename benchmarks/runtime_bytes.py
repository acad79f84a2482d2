"""The bytes that a token reads of a bundle, and those that a process has held."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from masters.manifest import read_manifest


def bytes_read(bundle: Path) -> tuple[int, int]:
    """What a token reads of a bundle's decoder: all its weights, and keys and values for each position of the cache."""
    manifest = read_manifest(bundle)
    decoder, geometry = manifest.parts["decoder"], manifest.decoder
    weights = sum(entry.bytes for name, entry in manifest.files.items() if name.startswith(decoder.file))
    past = next(spec for spec in decoder.inputs if spec.name.startswith("past_key_values."))
    return weights, 2 * geometry.layers * geometry.kv_heads * geometry.head_dim * np.dtype(past.dtype).itemsize


def own_peak(process: int | str = "self") -> int:
    """The most memory that a process has held, in bytes; 0 where Linux's /proc is missing."""
    status = Path(f"/proc/{process}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
