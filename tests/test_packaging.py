"""The base install in an environment of its own: light, without torch, and enough to run a bundle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What pip says when it can't reach an index at all, as opposed to finding no fitting version there.
UNREACHABLE = ("Failed to establish a new connection", "Temporary failure in name resolution", "Network is unreachable", "Connection refused")
# Our own dependencies and theirs, all of them: one more is a decision, not an accident.
OURS = {"masters", "click", "jinja2", "numpy", "onnxruntime", "pillow", "pyyaml", "tokenizers", "tqdm"}
THEIRS = {"flatbuffers", "markupsafe", "packaging", "protobuf"} | {
    *("anyio", "filelock", "fsspec", "h11", "hf-xet", "httpcore2", "httpx2", "huggingface-hub", "idna", "truststore", "typing-extensions")
}
DOWNLOAD_MB, INSTALLED_MB = 80, 200


@dataclass(frozen=True)
class Installed:
    python: Path
    source: Path
    wheels: Path

    def run(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.run([str(self.python), *arguments], cwd=cwd, env=environment, capture_output=True, text=True)

    def files(self) -> list[Path]:
        """Every installed file of the site-packages but pip's own and the bytecode that each Python writes for itself."""
        [place] = self.python.parent.parent.glob("lib/python*/site-packages")
        own = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence")
        found = [path for path in place.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        return [path for path in found if not path.relative_to(place).parts[0].startswith(own)]


def pip(python: Path | str, *arguments: str) -> None:
    done = subprocess.run([str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], capture_output=True, text=True)
    if done.returncode and any(words in done.stderr for words in UNREACHABLE) and not os.environ.get("CI"):
        pytest.skip("pip reaches no package index here")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    place = tmp_path_factory.mktemp("packaging")
    # A copy: building in the working tree would leave a build/ there, whose old files a later build picks up.
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/", "docs/")):
            (place / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, place / "source" / name)
    pip(sys.executable, "wheel", "--constraint", str(ROOT / "constraints.txt"), "--wheel-dir", str(place / "wheels"), str(place / "source"))
    venv.create(place / "venv", with_pip=True)
    python = place / "venv" / "bin" / "python"
    pip(python, "install", "--no-index", "--find-links", str(place / "wheels"), "masters")
    return Installed(python, place / "source", place / "wheels")


def test_nothing_but_the_runtimes_needs(installed: Installed, tmp_path: Path) -> None:
    listed = installed.run("-m", "pip", "list", "--format=freeze", "--exclude", "pip", "--exclude", "setuptools", cwd=tmp_path)
    names = {line.partition("==")[0].lower().replace("_", "-") for line in listed.stdout.splitlines()}
    assert names >= OURS
    assert names - OURS - THEIRS == set()


def test_size(installed: Installed) -> None:
    download = sum(path.stat().st_size for path in installed.wheels.glob("*.whl")) / 1e6
    on_disk = sum(path.stat().st_size for path in installed.files()) / 1e6
    print(f"base install: {download:.0f} MB to download, {on_disk:.0f} MB installed without bytecode")
    assert download < DOWNLOAD_MB
    assert on_disk < INSTALLED_MB


def test_every_module_of_the_package_is_there(installed: Installed) -> None:
    """A folder forgotten in pyproject's list of packages would import here, from the working tree, and nowhere else."""
    [place] = installed.python.parent.parent.glob("lib/python*/site-packages/masters")
    source = installed.source
    here = {path.relative_to(source) for folder in (".", "demo/**", "distill/**", "export/**", "runtime/**") for path in source.glob(f"{folder}/*.py")}
    assert len(here) > 30
    assert {path.relative_to(place) for path in place.rglob("*.py")} == here
    assert (place / "runtime" / "page.html").read_bytes() == (source / "runtime" / "page.html").read_bytes()


@pytest.mark.parametrize(
    "code",
    [
        "import masters.runtime",
        "import masters.cli, masters.samples, masters.images, masters.scoring, masters.bootstrap, masters.manifest",
        "import importlib.util as u; assert not [n for n in ('torch', 'transformers', 'onnx', 'scipy', 'sklearn') if u.find_spec(n)]",
    ],
)
def test_imports(installed: Installed, tmp_path: Path, code: str) -> None:
    done = installed.run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_command(installed: Installed, tmp_path: Path) -> None:
    command = installed.python.with_name("masters")
    shown = subprocess.run([str(command), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert {"demo", "distill", "export", "run", "check"} <= set(shown.stdout.split())
    version = subprocess.run([str(command), "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert PROJECT["version"] in version.stdout


def test_command_that_needs_an_extra_says_which(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("{}")
    refused = subprocess.run([str(installed.python.with_name("masters")), "distill", "recipe.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "pip install 'masters[distill]'" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr
