"""What `pip install objdrive` gives without its extras."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.cluster

EXTRAS = (
    "ray",
    "fastapi",
    "starlette",
    "uvicorn",
    "prometheus_client",
    "itsdangerous",
    "python_multipart",
    "scipy",
    "matplotlib",
)
"""Packages that only extras install."""


def _without_extras(program: str) -> subprocess.CompletedProcess[str]:
    block = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r}))\n"
    return subprocess.run([sys.executable, "-c", block + program], capture_output=True, text=True, check=False)


def test_the_library_fine_tunes_draws_and_reports_without_extras():
    rooms = "objdrive.cli, objdrive.generate, objdrive.training.personalize, objdrive.evaluation.report"
    found = _without_extras(f"import {rooms}, objdrive.sampling.engine")
    assert found.returncode == 0, found.stderr


def test_a_server_without_its_extra_says_what_to_install():
    found = _without_extras("from objdrive.cli import main; sys.exit(main(['serve', '--store', 'there', '--no-auth']))")
    assert found.returncode == 2
    assert "pip install 'objdrive[serve]'" in found.stderr
