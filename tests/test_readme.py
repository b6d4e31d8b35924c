"""Every block of the README is run, or checked by what it names.

A block is known by its first line: one that is new, or whose first line changes, fails until it is put down here.
Those that need Ray or a server are run in tests/cluster/test_readme_commands.py.
"""

import ast

import pytest
from documents import ROOT, SHELL, Block, blocks, check_command, link_repository, run_shell
from PIL import Image

from objdrive.adapters.artifact import ArtifactKey
from objdrive.adapters.store import ArtifactStore
from objdrive.catalog.manifest import read_manifest
from objdrive.catalog.rows import Row

README = blocks(ROOT / "README.md")
RUN_BY = {
    "flowchart LR": "test_the_drawing_names_every_station",
    "make demo": "test_make_runs_the_job_over_the_example_catalog",
    "objdrive generate": "test_pictures_are_generated",
    "from pathlib import Path": "test_stock_diffusers_loads_the_folder",
    "object_id,": "test_the_manifest_is_one",
    "python jobs/batch_personalize.py": "cluster/test_readme_commands.py::test_the_first_catalog",
    "python jobs/batch_generate.py": "cluster/test_readme_commands.py::test_the_first_pictures",
    "objdrive serve": "cluster/test_readme_commands.py::test_the_first_server",
    "curl -s": "cluster/test_readme_commands.py::test_the_first_server",
    "import base64": "cluster/test_readme_commands.py::test_the_first_server",
    # Needs a cluster of one's own: the job is submitted by cluster/test_ray_job.py, the application run by
    # cluster/test_serving.py, and the words are checked here.
    "ray job submit": "test_every_command_is_taken_by_its_parser",
}
"""How each block begins, and the test that runs it."""


def block(begins: str) -> Block:
    [found] = [one for one in README if one.text.startswith(begins)]
    return found


def test_every_block_is_run_by_a_test_that_there_is():
    for one in README:
        assert any(one.text.startswith(begins) for begins in RUN_BY), f"{one.where}: no test runs this block"
    for begins, test in RUN_BY.items():
        block(begins)
        path, _, name = test.rpartition("::")
        source = ROOT / "tests" / (path or "test_readme.py")
        names = {node.name for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.FunctionDef)}
        assert name in names


def test_it_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("one", [one for one in README if one.language in SHELL], ids=lambda one: one.where)
def test_every_command_is_taken_by_its_parser(one):
    for words in one.commands:
        check_command(words)


def test_the_drawing_names_every_station():
    stations = ("manifest", "Ray Data", "leases", "Ray Train", "store", "Ray Serve")
    places = [block("flowchart LR").text.index(f"{station}") for station in stations]
    assert places == sorted(places)


def test_make_runs_the_job_over_the_example_catalog():
    assert block("make demo").commands == [["make", "demo"], ["make", "test"]]
    makefile = (ROOT / "Makefile").read_text()
    [recipe] = [line for line in makefile.splitlines() if "batch_personalize.py" in line]
    words = recipe.split()[1:]
    assert words[1:] == ["examples/catalog/manifest.csv", "--store", "demo-store"]
    check_command(["python", *words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny64, put_adapter):
    """Where a reader stands after `make demo`, with random adapters that are drawn in two steps."""
    folder = link_repository(tmp_path_factory.mktemp("readme"))
    store = ArtifactStore(str(folder / "demo-store"))
    key = put_adapter(store, tiny64, "alarm-clock-01", 1, class_name="alarm clock", recipe={"sample_steps": 2})
    assert isinstance(key, ArtifactKey)
    return folder


def test_pictures_are_generated(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run_shell(block("objdrive generate").text, folder)
    pictures = sorted(path.name for path in folder.glob("alarm-clock-01-*.png"))
    assert pictures == [f"alarm-clock-01-{seed}.png" for seed in (10, 7, 8, 9)]


@pytest.mark.filterwarnings("ignore")
def test_stock_diffusers_loads_the_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    source = block("from pathlib import Path")
    exec(compile(source.text, source.where, "exec"), {})
    with Image.open(folder / "clock.png") as picture:
        assert picture.size == (64, 64)


def test_the_manifest_is_one(tmp_path):
    (tmp_path / "manifest.csv").write_text(block("object_id,").text)
    rows = list(read_manifest(str(tmp_path / "manifest.csv")))
    assert len(rows) == 2
    assert all(isinstance(row, Row) for row in rows)
