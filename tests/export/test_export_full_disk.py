"""An export onto a disk that fills up at one moment or another: one line, and what stood there before stands there still."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from vision_once import reuse_vision

from masters.errors import MastersError
from masters.export import ExportConfig, export
from masters.files import sha256_folder


@pytest.mark.parametrize("size", ["400k", "1900k", "2300k"], ids=["in the decoder", "in the tower", "in the files beside the graphs"])
@pytest.mark.parametrize("before", [False, True], ids=["nothing before", "a bundle before"])
def test_a_full_disk(
    lively_vlm: Path, bundle_of: Callable[[str], Path], disk_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, size: str, before: bool
) -> None:
    reuse_vision(monkeypatch, bundle_of("fp32"))
    disk = disk_of(size)
    out = disk / "bundle"
    if before:
        out.mkdir()
        (out / "masters.json").write_text("an earlier bundle")
    standing = sha256_folder(disk)
    with pytest.raises(MastersError, match="No space left on device") as caught:
        export(ExportConfig(lively_vlm, "onnx", out, force=before))
    assert "\n" not in str(caught.value)
    assert "free some space" in str(caught.value)
    assert sha256_folder(disk) == standing
    assert [path.name for path in disk.iterdir()] == (["bundle"] if before else [])
