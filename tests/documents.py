"""Fenced blocks of the documents, and a check of the commands in them by the real argument parsers."""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from serve.settings import Settings

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "objdrive" / "bases" / "tiny64" / "README.md"]
)
SHELL = ("bash", "sh")
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_ASSIGNMENT = re.compile(r"^\w+=\$\(")
_OTHER_TOOLS = ("curl", "git", "npm", "apt-get", "docker", "helm", "kind", "openssl", "aws")
"""Commands that are not the project's: nothing here can tell whether their options are right."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the document that it begins in."""

    path: Path
    language: str
    text: str
    line: int

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a shell block; what a pipe follows with is left out."""
        lines = [_ASSIGNMENT.sub("", line) for line in self.text.replace("\\\n", " ").splitlines()]
        words = [shlex.split(line, comments=True) for line in lines]
        return [line[: line.index("|")] if "|" in line else line for line in words if line]


def blocks(path: Path) -> list[Block]:
    """All fenced blocks of a document."""
    text = path.read_text(encoding="utf-8")
    return [
        Block(path, match[2], textwrap.dedent(match[3]), text.count("\n", 0, match.start()) + 1)
        for match in _FENCE.finditer(text)
    ]


class _Parsed(Exception):
    """The arguments were understood; the script goes no further."""


def check_command(words: list[str]) -> None:
    """Fail unless the project's own parsers take the command as it is written.

    A word in capitals stands for a value of the reader's. A command that no rule knows fails.
    """
    match words:
        case ["make", *targets]:
            known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
            assert set(targets) <= known, f"make has no {set(targets) - known}"
        case ["python", "-m", module, *arguments]:
            _check_script(ROOT / f"{module.replace('.', '/')}.py", arguments)
        case ["python", script, *arguments]:
            _check_script(ROOT / script, arguments)
        case ["objdrive", *arguments]:
            _check_script(ROOT / "objdrive" / "cli.py", arguments)
        case ["ray", "job", "submit", *rest]:
            check_command(rest[rest.index("--") + 1 :])
        case ["serve", "run", "serve.app:build", *settings]:
            Settings.of(**dict(setting.split("=", 1) for setting in settings))
        case ["serve", "deploy", config]:
            assert (ROOT / config).is_file()
        case ["kubectl", *arguments]:
            _check_kubectl(arguments)
        case ["docker", "build", *arguments]:
            _check_build(arguments)
        case ["pip", "install", *what]:
            _check_extras(what)
        case ["pytest", *_] | ["ruff", *_] | ["mypy", *_]:
            pass
        case [tool, *_] if tool in _OTHER_TOOLS:
            pass
        case _:
            pytest.fail(f"no rule checks {shlex.join(words)!r}: add one to {__name__}.check_command")


def _check_script(script: Path, arguments: list[str]) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, args: list[str] | None = None, namespace: None = None) -> None:
        parse(parser, args, namespace)
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.syspath_prepend(str(script.parent))
        try:
            runpy.run_path(str(script), run_name="__main__")
        except _Parsed:
            return
        except SystemExit as stopped:
            pytest.fail(f"{script.name} refuses {shlex.join(arguments)!r} (exit status {stopped.code})")
    pytest.fail(f"{script.name} parsed no arguments")


def _check_kubectl(arguments: list[str]) -> None:
    # With --help it does nothing, but still refuses what it does not know.
    kubectl = Path(sys.executable).with_name("kubectl")
    own, inside = (arguments, []) if "--" not in arguments else _split(arguments, "--")
    done = subprocess.run([kubectl, *own, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for option in {"-k", "kustomize"} & set(own):
        folder = ROOT / own[own.index(option) + 1]
        assert (folder / "kustomization.yaml").is_file(), f"{folder} is no folder of kustomize"
    if inside:
        check_command(inside)


def _split(words: list[str], at: str) -> tuple[list[str], list[str]]:
    return words[: words.index(at)], words[words.index(at) + 1 :]


def _check_build(arguments: list[str]) -> None:
    dockerfile = (ROOT / arguments[arguments.index("--file") + 1]).read_text()
    for name in (arguments[at + 1] for at, word in enumerate(arguments) if word == "--build-arg"):
        assert re.search(rf"^ARG {name.partition('=')[0]}\b", dockerfile, re.MULTILINE), f"there is no argument {name}"


def _check_extras(what: list[str]) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    asked = {one for word in what for one in re.findall(r"\[(.*?)\]", word) for one in one.split(",")}
    assert asked <= known, f"there are no extras {asked - known}"


def run_shell(script: str, folder: Path, *, timeout: float = 500) -> str:
    """Run a shell block as a reader would, in `folder`; its output. Any command that fails fails the test."""
    preamble = (
        "set -euo pipefail\n"
        f'python() {{ {shlex.quote(sys.executable)} "$@"; }}\n'
        'objdrive() { python -m objdrive.cli "$@"; }\n'
        'curl() { command curl --fail-with-body "$@"; }\n'
    )
    done = subprocess.run(
        ["bash", "-c", preamble + script], cwd=folder, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def link_repository(folder: Path) -> Path:
    """Make `folder` look like the repository's root to what only reads there."""
    for name in ("objdrive", "jobs", "serve", "examples", "infra", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    return folder
