"""The image's recipe: built by nobody here, but linted, and held to the project's own lists."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from documents import ROOT

HADOLINT = Path(sys.executable).with_name("hadolint")
DOCKERFILE = ROOT / "infra" / "Dockerfile"
LINES = DOCKERFILE.read_text().replace("\\\n", " ").splitlines()


def instructions(name: str) -> list[str]:
    return [line.removeprefix(name).strip() for line in LINES if line.startswith(f"{name} ")]


def lint(dockerfile: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HADOLINT, "-"], input=dockerfile, capture_output=True, text=True, check=False)


def test_hadolint_has_no_complaint() -> None:
    linted = lint(DOCKERFILE.read_text())
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize(
    ("was", "becomes", "rule"),
    [(":2.60.0-py311-cpu", "", "DL3006"), ("--no-cache-dir ", "", "DL3042"), ("USER 1000:100", "USER root", "DL3002")],
)
def test_hadolint_complains_of_a_worse_one(was: str, becomes: str, rule: str) -> None:
    worse = DOCKERFILE.read_text().replace(was, becomes)
    assert worse != DOCKERFILE.read_text()
    assert rule in lint(worse).stdout


def test_rays_image_is_of_the_pinned_version() -> None:
    [ray] = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    python = re.search(r"^PYTHON \?= python([\d.]+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    tag = f"rayproject/ray:{ray}-py{python.replace('.', '')}"
    assert instructions("FROM") == [f"{tag}-cpu AS cpu", f"{tag}-gpu AS gpu", "${DEVICE}"]


def test_nodes_are_not_root() -> None:
    [user] = instructions("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_dependencies_are_those_of_the_constraints() -> None:
    [command] = [shlex.split(run) for run in instructions("RUN") if "[" in run]
    assert command[command.index("--constraint") + 1] == "constraints.txt"
    extras = set(re.search(r"\[(.*)\]", command[-1])[1].split(","))
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras == {"ray", "serve", "s3", "heif"}
    assert extras <= known.keys()


def test_the_builder_is_sent_what_is_copied_and_no_more() -> None:
    copied = {word for copy in instructions("COPY") for word in copy.split()[1:-1]}
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)
