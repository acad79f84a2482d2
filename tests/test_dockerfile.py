"""The Dockerfile in step with pyproject.toml, the constraints and the command line: no engine builds it in the tests, so drift must show here."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from masters.cli import main

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@dataclass(frozen=True)
class Stage:
    """One FROM and what follows it: (instruction, argument), in order."""

    name: str
    image: str
    lines: tuple[tuple[str, str], ...]

    def all(self, instruction: str) -> list[str]:
        return [argument for name, argument in self.lines if name == instruction]


def parse(text: str) -> dict[str, Stage]:
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"\\\n\s*", "", text)
    stages: dict[str, Stage] = {}
    for block in re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]:
        head, *lines = [line for line in block.splitlines() if line.strip()]
        image, _, name = head.partition(" AS ")
        stages[name] = Stage(name, image, tuple((line.split()[0], line.split(maxsplit=1)[1]) for line in lines))
    return stages


STAGES = parse((ROOT / "Dockerfile").read_text())


def installs() -> list[tuple[str, str]]:
    """Every shell command of every RUN line that calls pip, with its stage."""
    found = [(stage.name, part.strip()) for stage in STAGES.values() for run in stage.all("RUN") for part in run.split("&&") if part.strip().startswith("pip ")]
    assert len(found) == 3
    return found


def test_targets() -> None:
    assert list(STAGES) == ["wheel", "distill", "runtime"]  # the last is what `docker build .` makes


def test_pip_installs_with_the_constraints_and_known_extras() -> None:
    extras = {}
    for stage, command in installs():
        words = shlex.split(command)
        if words[1] == "wheel":
            assert "--no-deps" in words
            continue
        assert words[words.index("--constraint") + 1] == "/wheels/constraints.txt"
        [target] = [word for word in words if ".whl" in word]
        extras[stage] = re.findall(r"\[(.*)\]", target)[0].split(",")
    assert extras == {"distill": ["all"], "runtime": ["serve"]}
    assert set(PROJECT["optional-dependencies"]) >= {extra for named in extras.values() for extra in named}


def test_images_pythons_satisfy_pyproject() -> None:
    lowest = tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    for name in ("wheel", "runtime"):
        version = re.fullmatch(r"python:(\d+)\.(\d+)-slim-bookworm", STAGES[name].image)
        assert version, STAGES[name].image
        assert (int(version[1]), int(version[2])) == lowest, "the images run what the tests run on"
    # Ubuntu 24.04 has Python 3.12.
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04", STAGES["distill"].image)
    assert lowest <= (3, 12)


def test_cuda_base_is_of_torchs_major() -> None:
    """torch 2.13's wheels bring CUDA 13; its next constraint must be looked at together with the base image."""
    [pin] = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    assert pin == "torch==2.13.0"
    assert STAGES["distill"].image.startswith("nvidia/cuda:13.")


def test_distill_has_what_its_lines_use() -> None:
    apt = " ".join(run for run in STAGES["distill"].all("RUN") if "apt-get" in run)
    assert apt.startswith("apt-get update && apt-get install -y --no-install-recommends ")
    assert apt.endswith("rm -rf /var/lib/apt/lists/*")
    assert {"python3", "python3-venv", "python3-dev", "gcc", "libc6-dev"} <= set(apt.split())
    assert "python3 -m venv /opt/masters" in STAGES["distill"].all("RUN")
    assert STAGES["distill"].all("ENV") == ["PATH=/opt/masters/bin:$PATH"]


def test_every_copied_source_exists_and_reaches_the_build() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for stage in STAGES.values():
        for argument in stage.all("COPY"):
            *sources, _ = argument.split()
            if sources[0].startswith("--from="):
                assert sources[0].removeprefix("--from=") in STAGES
                continue
            for source in sources:
                assert list(ROOT.glob(source)), source
                assert source in allowed, f"{source} is not let through by .dockerignore"


def test_copies_cover_the_package() -> None:
    """What setuptools packages and what the build's metadata needs is in the wheel stage."""
    copied = {source for argument in STAGES["wheel"].all("COPY") for source in argument.split()[:-1]}
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {package.split(".")[1] for package in packages if "." in package} | {"*.py", "pyproject.toml", "constraints.txt"} <= copied
    assert {PROJECT["readme"], *PROJECT["license-files"]} <= copied


def test_runtime_user_is_not_root() -> None:
    stage = STAGES["runtime"]
    [user] = stage.all("USER")
    assert int(user) > 0
    assert any(re.fullmatch(rf"useradd --uid {user} .*masters", run) for run in stage.all("RUN"))
    order = [name for name, _ in stage.lines]
    assert order.index("USER") > max(index for index, name in enumerate(order) if name in ("RUN", "COPY"))


def test_healthcheck_asks_the_port_that_is_served() -> None:
    stage = STAGES["runtime"]
    [check] = stage.all("HEALTHCHECK")
    program, flag, code = json.loads(check.partition("CMD ")[2])
    assert (program, flag) == ("python", "-c")
    compile(code, "healthcheck", "exec")
    [port] = stage.all("EXPOSE")
    assert f"'http://127.0.0.1:{port}/health'" in code
    [command] = map(json.loads, stage.all("CMD"))
    assert command[:2] == ["serve", "/bundle"]
    assert command[command.index("--port") + 1] == port
    assert command[command.index("--host") + 1] == "0.0.0.0"  # else nothing outside the container reaches it


@pytest.mark.parametrize("name", ["distill", "runtime"])
def test_entry_point_is_the_projects_command(name: str) -> None:
    [entry] = map(json.loads, STAGES[name].all("ENTRYPOINT"))
    assert entry == ["masters"]
    assert PROJECT["scripts"]["masters"] == "masters.cli:main"


def test_commands_exist() -> None:
    started = [json.loads(argument)[0] for stage in STAGES.values() for argument in stage.all("CMD")]
    documented = re.findall(r"^#.* masters-\w+ (\w+)", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    used = {word for word in started + documented if not word.startswith("-")}
    assert {"serve", "distill"} <= used
    assert used <= set(main.commands)


def test_the_container_asks_for_a_key_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server listens to other machines."""
    monkeypatch.delenv("MASTERS_API_KEY", raising=False)
    [command] = map(json.loads, STAGES["runtime"].all("CMD"))
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2
    [line] = refused.stderr.strip().splitlines()
    assert "set MASTERS_API_KEY" in line
    monkeypatch.setenv("MASTERS_API_KEY", "a-key")
    [line] = CliRunner().invoke(main, command).stderr.strip().splitlines()
    assert "no masters.json in /bundle" in line
    [example] = re.findall(r"docker run .* masters-runtime$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert " -e MASTERS_API_KEY " in example
