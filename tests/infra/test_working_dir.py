"""What `ray job submit --working-dir .` sends from a checkout, by Ray's own packaging."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from documents import ROOT
from ray._private.runtime_env.packaging import create_package, get_uri_for_directory

FEW_MEGABYTES = 4 * 2**20
CODE = ("jobs", "objdrive", "serve", "examples")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout as it looks after a day's work."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in (".rayignore", ".gitignore", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    for name in CODE:
        shutil.copytree(ROOT / name, folder / name, symlinks=True)
    (folder / "shiny.yaml").write_text("preset: objdrive\n")
    for bulk in (".venv/lib/torch.so", ".git/objects/pack/1.pack", "my-store/objects/a/1/previews/1.webp",
                 "catalog/photos/drum.jpg", "figures/runs/1.png", "jobs/__pycache__/run.pyc"):  # fmt: skip
        (folder / bulk).parent.mkdir(parents=True, exist_ok=True)
        with (folder / bulk).open("wb") as file:
            file.truncate(FEW_MEGABYTES)
    return folder


def packed(folder: Path, package: Path) -> list[str]:
    create_package(str(folder), package, include_gitignore=True)
    return zipfile.ZipFile(package).namelist()


def uri(folder: Path) -> str:
    return str(get_uri_for_directory(str(folder), include_gitignore=True))


def test_a_few_megabytes_are_sent(checkout: Path, tmp_path: Path) -> None:
    names = packed(checkout, tmp_path / "package.zip")
    assert (tmp_path / "package.zip").stat().st_size < FEW_MEGABYTES
    assert {name.partition("/")[0] for name in names} == {*CODE, "shiny.yaml"}


def test_all_code_is_sent(checkout: Path, tmp_path: Path) -> None:
    names = set(packed(checkout, tmp_path / "package.zip"))
    files = [path for name in CODE for path in (ROOT / name).rglob("*") if path.is_file()]
    left = ("__pycache__", "bases")
    wanted = {str(path.relative_to(ROOT)) for path in files if not set(left) & set(path.parts)}
    assert len(wanted) > 100
    assert wanted <= names


@pytest.mark.parametrize("path", ["jobs/run.py", "objdrive/training/losses.py", "serve/page.html", "shiny.yaml"])
def test_what_was_changed_is_sent_anew(checkout: Path, path: str) -> None:
    before = uri(checkout)
    (checkout / path).write_text((checkout / path).read_text() + "\n")
    assert uri(checkout) != before


def test_what_is_not_sent_sends_nothing_anew(checkout: Path) -> None:
    before = uri(checkout)
    (checkout / "my-store" / "objects" / "a" / "1" / "previews" / "1.webp").write_bytes(b"another")
    assert uri(checkout) == before


def find_tiny64(*path: Path) -> subprocess.CompletedProcess[str]:
    program = "from objdrive.base.files import find_base; print(find_base('tiny64').snapshot)"
    environment = {"PYTHONPATH": ":".join(map(str, path)), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True)


def test_code_without_bases_finds_those_of_the_installed_package(checkout: Path) -> None:
    shutil.rmtree(checkout / "objdrive" / "bases")
    found = find_tiny64(checkout, ROOT)
    assert Path(found.stdout.strip()) == ROOT / "objdrive" / "bases" / "tiny64", found.stderr
