"""The machine that a check ran on, and what this process took of it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .graphs import usable_cores

LIBRARIES = ("onnxruntime", "numpy", "pillow", "tokenizers")


@dataclass(frozen=True)
class Device:
    """What a latency means nothing without."""

    cpu: str
    cores: int  # that this process may use
    memory_gb: float | None
    system: str
    libraries: dict[str, str]

    def __str__(self) -> str:
        memory = f", {self.memory_gb:.0f} GB" if self.memory_gb else ""
        versions = ", ".join(f"{name} {version}" for name, version in self.libraries.items())
        return f"{self.cpu}, {self.cores} cores{memory}; {self.system}; {versions}"


def this_device() -> Device:
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}
    return Device(_cpu_model(), usable_cores(), _memory_gb(), f"{platform.system()} {platform.release()} {platform.machine()}", versions)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        return subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False).stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):
        return None
