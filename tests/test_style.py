"""The rules of CONTRIBUTING.md that a machine can check: lint, format, types, sizes, names, and which way imports point."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
# The checks that CI, `make lint` and the pre-commit hooks all run.
CHECKS = ("ruff check .", "ruff format --check .", "mypy")
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_README = 500, 80, 150
VAGUE = {"utils", "util", "helpers", "helper", "manager", "factory", "handler", "registry", "common", "misc", "base"}
RUNTIME_NEEDS = {"numpy", "onnxruntime", "tokenizers", "PIL", "jinja2", "click", "yaml", "tqdm"}
# What the `serve` extra adds, for the files that only `masters serve` loads.
SERVE_NEEDS, SERVE_FILES = {"starlette", "uvicorn", "prometheus_client"}, {"serve.py", "service.py", "jobs.py", "metrics.py"}
PACKAGES = {"demo", "distill", "export", "runtime"}


def files(pattern: str = "") -> list[Path]:
    """What is tracked or about to be, whatever git ignores left out."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "--", pattern or "."], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def sources() -> list[Path]:
    found = files("*.py")
    assert len(found) > 20
    return found


@cache
def run(command: str) -> subprocess.CompletedProcess[str]:
    link = ROOT / ".venv" / "typing" / "masters"
    if not link.exists():  # an environment that make did not create
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to("../..")
    return subprocess.run([sys.executable, "-m", *shlex.split(command)], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("command", CHECKS)
def test_check_is_clean(command: str) -> None:
    done = run(command)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy_reads_the_whole_package() -> None:
    """It must find more than the root's files: a wrong path would check little and report success."""
    count = re.search(r"(?:checked|in) (\d+) source files", run("mypy").stdout)
    assert count, run("mypy").stdout
    assert int(count[1]) >= len([path for path in sources() if path.relative_to(ROOT).parts[0] in PACKAGES])


def test_make_and_hooks_run_the_same_checks() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    assert tuple(line.strip().removeprefix("$(BIN)/") for line in recipe.splitlines()[1:]) == CHECKS
    [repo] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    commands = [hook["entry"] for hook in repo["hooks"]]
    assert commands[:-1] == [f".venv/bin/{command}" for command in CHECKS]
    program, *arguments = shlex.split(commands[-1])
    assert (program, arguments[:2]) == (".venv/bin/python", ["-m", "pytest"])
    assert arguments[2:], "the last hook runs the quick tests"
    assert [name for name in arguments[2:] if not (ROOT / name).is_file()] == []
    assert all(hook["language"] == "system" and hook["pass_filenames"] is False for hook in repo["hooks"])


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}
    readme = ROOT / "README.md"
    assert not readme.exists() or len(readme.read_text().splitlines()) <= LONGEST_README


def long_functions(source: str) -> dict[str, int]:
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    return {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}


def test_functions_are_short() -> None:
    assert long_functions("def f():\n" + "    x = 1\n" * 80) == {"f": 81}
    assert {str(path.relative_to(ROOT)): found for path in sources() if (found := long_functions(path.read_text()))} == {}


def test_files_are_named_after_the_thing() -> None:
    assert [str(path) for path in files() if {part.split(".")[0].lower() for part in path.relative_to(ROOT).parts} & VAGUE] == []


# Put together here, so that this file does not hold what it looks for.
MACHINE = re.compile("/(" + "|".join(["root/", r"home/\w", r"Users/\w", "work/main", "work/shared", "opt/wheels", "opt/pypi"]) + ")")
HOSTS = re.compile("|".join(["pypi" + r"\.org", "registry" + r"\.npmjs", "pythonhosted" + r"\.org", "deb" + r"\.debian\.org"]))


def test_no_place_of_one_machine_is_written_down() -> None:
    assert MACHINE.search("see /" + "home/me/x")
    found = []
    for path in files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and images
        found += [(str(path.relative_to(ROOT)), match[0]) for match in MACHINE.finditer(text)]
        if path.name != "package-lock.json":
            found += [(str(path.relative_to(ROOT)), match[0]) for match in HOSTS.finditer(text)]
    assert found == []


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Every module that `source`, at the dotted name `module`, imports anywhere, relative names resolved; `from . import x` counts as x."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            start = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def test_imports_are_resolved() -> None:
    source = "import torch.nn\nfrom ..errors import A\nfrom . import chat\ndef f():\n    from ...distill import x\n"
    assert list(imports(source, "masters.runtime.session", False)) == ["torch.nn", "masters.errors.A", "masters.runtime.chat", "distill.x"]
    assert list(imports("from .errors import A\nfrom . import x", "masters.runtime", True)) == ["masters.runtime.errors.A", "masters.runtime.x"]
    assert list(imports("from ...distill import x", "masters.runtime.families.a", False)) == ["masters.distill.x"]


def package_imports(path: Path) -> Iterator[str]:
    relative = path.relative_to(ROOT)
    is_package = relative.name == "__init__.py"
    parts = ["masters", *relative.with_suffix("").parts]
    return imports(path.read_text(), ".".join(parts[:-1] if is_package else parts), is_package)


def within(folder: str) -> list[Path]:
    found = [path for path in sources() if path.relative_to(ROOT).parts[0] == folder]
    assert found
    return found


DIRECTION = {"distill": {"export", "runtime", "cli"}, "export": {"distill", "demo", "cli"}, "runtime": {"distill", "export", "demo", "cli"}}


@pytest.mark.parametrize("folder", DIRECTION)
def test_packages_import_in_one_direction(folder: str) -> None:
    forbidden = tuple(f"masters.{name}" for name in DIRECTION[folder])
    assert [(str(path.relative_to(ROOT)), name) for path in within(folder) for name in package_imports(path) if name.startswith(forbidden)] == []


def test_runtime_needs_the_base_install_alone() -> None:
    """Also in functions: a lazy import of torch would work on a developer's machine and nowhere else."""
    allowed = RUNTIME_NEEDS | {"masters"} | set(sys.stdlib_module_names)
    found = [(path, name) for path in within("runtime") for name in package_imports(path) if name.split(".")[0] not in allowed]
    found = [(path, name) for path, name in found if (path.name, name) != ("grammar.py", "llguidance")]  # an extra too
    assert [(str(path.relative_to(ROOT)), name) for path, name in found if path.name not in SERVE_FILES or name.split(".")[0] not in SERVE_NEEDS] == []
    loaded = {name.split(".")[2] + ".py" for path in within("runtime") if path.name not in SERVE_FILES for name in package_imports(path) if name.count(".") > 1}
    assert not loaded & SERVE_FILES, "a module of the base install loads one of the extra's"


def test_shared_modules_import_no_package() -> None:
    shared = [path for path in sources() if path.parent == ROOT and path.name != "cli.py"]
    assert len(shared) >= 8
    wrong = [(path.name, name) for path in shared for name in package_imports(path) if name.startswith("masters.") and name.split(".")[1] in PACKAGES | {"cli"}]
    assert wrong == []


def test_a_family_stands_in_its_own_files() -> None:
    """Outside families/ no code names an architecture: it is found by the checkpoint's model_type."""
    families = {path.stem for path in sources() if path.parent.name == "families" and path.stem not in ("__init__", "default")}
    assert "idefics3" in families
    code = [path for folder in ("distill", "export", "runtime") for path in within(folder) if path.parent.name != "families"]
    strings = {(str(path.relative_to(ROOT)), node.value) for path in code for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    assert {(path, value) for path, value in strings if value in families} == set()


def test_test_files_have_names_of_their_own() -> None:
    """The folders of tests are no packages, so pytest imports by base name."""
    names = [path.name for path in sources() if path.relative_to(ROOT).parts[0] == "tests" and path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
