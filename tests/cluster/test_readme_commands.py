"""The README's and the API page's commands that need Ray or a server, run as they are written."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from documents import ROOT, Block, blocks, link_repository, run_shell
from PIL import Image

from objdrive.adapters.artifact import SourceRecord, Sources
from objdrive.adapters.store import ArtifactStore

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

ADDRESS = "http://127.0.0.1:8000"
OBJECTS = {"alarm-clock-01": "alarm clock", "jeans-01": "jeans", "high-heel-01": "high heel"}
CATALOG = ROOT / "examples" / "catalog"
FAST = " --set steps=2 --set prototype_steps=1 --set class_pool=1 --set sample_steps=2 --previews 0"


def block(document: str, begins: str) -> Block:
    [found] = [one for one in blocks(ROOT / document) if one.text.startswith(begins)]
    return found


def test_the_first_catalog(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    catalog = link_repository(tmp_path) / "catalog"
    for folder in ("photos", "masks"):
        (catalog / folder).mkdir(parents=True)
    shutil.copy(CATALOG / "images" / "drum-01.jpg", catalog / "photos" / "drum.jpg")
    shutil.copy(CATALOG / "masks" / "drum-01.png", catalog / "masks" / "drum.png")
    shutil.copy(CATALOG / "images" / "abacus-01.png", catalog / "photos" / "abacus.png")
    (catalog / "manifest.csv").write_text(block("README.md", "object_id,").text)
    dry, wet = block("README.md", "python jobs/batch_personalize.py").text.splitlines()
    assert "2 to train" in run_shell(dry, tmp_path)
    assert not (tmp_path / "my-store").exists()
    run_shell(wet + FAST, tmp_path)
    [results] = (tmp_path / "my-store").glob("runs/*/results.parquet")
    assert pq.read_table(results)["status"].to_pylist() == ["committed"] * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny64: object, put_adapter: Callable[..., object]) -> Path:
    """Where a reader stands after `make demo`, with random adapters that are drawn in two steps."""
    folder = link_repository(tmp_path_factory.mktemp("readme"))
    store = ArtifactStore(str(folder / "demo-store"))
    for seed, (object_id, class_name) in enumerate(OBJECTS.items()):
        recipe = {"sample_steps": 2, "guidance_scale": 3.0}
        photos = {name: CATALOG / name / "drum-01" for name in ("images", "masks")}
        sources = Sources(
            image=SourceRecord(uri=str(photos["images"].with_suffix(".jpg")), size=None, mark=""),
            mask=SourceRecord(uri=str(photos["masks"].with_suffix(".png")), size=None, mark=""),
        )
        put_adapter(store, tiny64, object_id, seed, rank=2, class_name=class_name, recipe=recipe, sources=sources)
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The README's server, on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    [words] = block("README.md", "objdrive serve").commands
    process = subprocess.Popen(
        [sys.executable, "-m", "objdrive.cli", *words[1:], "--port", str(port)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    try:
        yield wait_until_ready(f"http://127.0.0.1:{port}", process)
    finally:
        process.terminate()
        process.wait(60)


def wait_until_ready(address: str, process: subprocess.Popen[bytes]) -> str:
    while True:
        assert process.poll() is None, "the server ended before it was ready"
        try:
            with urllib.request.urlopen(f"{address}/readyz", timeout=10):
                return address
        except OSError:
            time.sleep(0.2)


def run_python(text: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def assert_picture(path: Path) -> None:
    with Image.open(path) as picture:
        assert picture.size == (64, 64)


def test_the_first_pictures(cluster: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    output = run_shell(block("README.md", "python jobs/batch_generate.py").text, folder)
    assert "36 drawn" in output
    pictures = list((folder / "demo-pictures" / "pictures").glob("*/*.webp"))
    assert len(pictures) == 36
    assert_picture(pictures[0])


def test_the_first_server(address: str, folder: Path) -> None:
    run_shell(block("README.md", "curl -s").text.replace(ADDRESS, address), folder)
    run_python(block("README.md", "import base64").text.replace(ADDRESS, address), folder)
    assert_picture(folder / "clock.png")
    assert_picture(folder / "pair.png")


def test_every_call_of_the_api_page(address: str, folder: Path) -> None:
    calls = blocks(ROOT / "docs" / "api.md")
    assert {one.language for one in calls} <= {"bash", "python", "json", "yaml"}
    for one in calls:
        text = one.text.replace(ADDRESS, address)
        if one.language == "python":
            run_python(text, folder)
        elif one.language == "bash" and "curl" in text:
            run_shell(text, folder)
    for name in ("linked.png", "exact.png", "cut-out.png", "around.png"):
        assert_picture(folder / name)
    assert_picture(folder / "snow.png")
