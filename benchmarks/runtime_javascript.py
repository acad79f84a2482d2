"""transformers.js as a peer: our own bundle in Node, with its own processor and its own generation loop.

$TRANSFORMERS_JS is a folder in which `npm install --ignore-scripts @huggingface/transformers` has run; without it the one that the tests keep is taken.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from runtime_bytes import bytes_read, own_peak
from runtime_models import bundle_folder

SCRIPT = Path(__file__).with_suffix(".mjs")


class JavaScript:
    """A Node process that takes the same orders."""

    def __init__(self, shape: str, precision: str, threads: int) -> None:
        if shape.startswith("internvl"):
            raise RuntimeError("transformers.js 4.3 has no InternVL")
        node = shutil.which("node")
        if not node:
            raise RuntimeError("node is not on PATH")
        # A script's packages are looked for beside it.
        self.place = tempfile.TemporaryDirectory()
        script = shutil.copy(SCRIPT, self.place.name)
        (Path(self.place.name) / "node_modules").symlink_to(packages() / "node_modules")
        bundle = bundle_folder(shape, precision)
        self.weights, self.position = bytes_read(bundle)
        command = [node, script, str(bundle), str(threads)]
        self.node = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.detail: dict[str, Any] = {}
        self._reply()

    def answer(self, picture: Path, question: str, tokens: int) -> list[float]:
        return self._ask(do="answer", picture=str(picture), question=question, tokens=tokens)

    def decode(self, context: int, tokens: int) -> list[float]:
        return self._ask(do="decode", context=context, tokens=tokens)

    def peak(self) -> int:
        return own_peak(self.node.pid)

    def _ask(self, **order: Any) -> list[float]:
        assert self.node.stdin is not None
        self.node.stdin.write(json.dumps(order) + "\n")
        self.node.stdin.flush()
        found = self._reply()
        self.detail["prompt"] = found["prompt"]
        return [float(second) for second in found["times"]]

    def _reply(self) -> dict[str, Any]:
        assert self.node.stdout is not None
        for line in self.node.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError(f"node ended with {self.node.wait()}")


def packages() -> Path:
    """A folder whose node_modules holds transformers.js."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "masters-tests"
    chosen = os.environ.get("TRANSFORMERS_JS")
    places = [Path(chosen)] if chosen else sorted(cache.glob("transformers_js-*"))
    found = [place for place in places if (place / "node_modules" / "@huggingface" / "transformers").is_dir()]
    if not found:
        raise RuntimeError(
            "transformers.js is not installed; run npm install --ignore-scripts @huggingface/transformers and set TRANSFORMERS_JS to that folder"
        )
    return found[-1]
