"""What the base install weighs: `python benchmarks/install_size.py` makes an empty environment, runs `pip install .` with the pinned versions, and counts.

Prints megabytes (10^6 bytes) to download (the wheels) and on disk, with and without the bytecode that Python adds, by package.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import venv
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MB = 1e6


def install(environment: Path, report: Path) -> None:
    """`pip install .` into a new environment without pip itself, as an image or an application would carry it."""
    venv.create(environment, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(environment / "bin" / "python")]
    subprocess.run([*pip, "install", "--report", str(report), "--constraint", str(ROOT / "constraints.txt"), str(ROOT)], check=True)


def download(report: Path, folder: Path) -> float:
    """The sum of the wheels that pip's report names, in MB; ours left out."""
    pins = [f"{item['metadata']['name']}=={item['metadata']['version']}" for item in json.loads(report.read_text())["install"]]
    wanted = [pin for pin in pins if not pin.startswith("masters==")]
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps", "--dest", str(folder), *wanted], check=True)
    return sum(wheel.stat().st_size for wheel in folder.iterdir()) / MB


def weigh(environment: Path) -> tuple[dict[str, float], float]:
    """MB by distribution without bytecode, and MB of bytecode."""
    packages = next(environment.glob("lib/python*/site-packages"))
    sizes: dict[str, float] = defaultdict(float)
    for found in importlib.metadata.distributions(path=[str(packages)]):
        for file in found.files or ():
            path = Path(str(found.locate_file(file)))
            if path.suffix != ".pyc" and path.is_file():
                sizes[found.name] += path.stat().st_size / MB
    return sizes, sum(path.stat().st_size for path in packages.rglob("*.pyc")) / MB


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        install(place / "env", place / "report.json")
        fetched = download(place / "report.json", place / "wheels")
        sizes, bytecode = weigh(place / "env")
    print(f"{platform.system()} {platform.machine()}, Python {platform.python_version()}: {len(sizes)} packages")
    print(f"to download {fetched:.0f} MB, on disk {sum(sizes.values()):.0f} MB, with bytecode {sum(sizes.values()) + bytecode:.0f} MB")
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size:8.1f}  {name}")


if __name__ == "__main__":
    main()
