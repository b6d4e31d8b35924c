"""What the job refuses before it starts anything."""

import io
import sqlite3

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from jobs import batch_personalize
from jobs.batch_personalize import main
from objdrive.adapters.index import compact
from objdrive.adapters.store import RESULTS_FILE, ArtifactStore
from objdrive.errors import ObjdriveError


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "manifest.csv"
    path.write_text("object_id,image,mask,class_name\nmug,mug.png,mask.png,mug\n")
    return path


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Call it with the job's words: what it says when it exits with 2, before there is any Ray process or file."""
    monkeypatch.chdir(tmp_path)

    def refused(*words):
        before = sorted(tmp_path.rglob("*"))
        try:
            status = main([str(word) for word in words])
        except SystemExit as exit:
            status = exit.code
        output, error = capsys.readouterr()
        assert (status, output) == (2, "")
        assert not ray.is_initialized()
        assert sorted(tmp_path.rglob("*")) == before
        return error

    return refused


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--group-size", "0", "must be a whole number of at least 1, got '0'"),
        ("--group-size", "many", "must be a whole number of at least 1, got 'many'"),
        ("--limit", "-3", "must be a whole number of at least 1, got '-3'"),
        ("--limit", "1.5", "must be a whole number of at least 1, got '1.5'"),
        ("--previews", "all", "'all'"),
        ("--stall-seconds", "0", "must be a number of at least 2, got '0'"),
        ("--stall-seconds", "nan", "must be a number of at least 2, got 'nan'"),
        ("--gpus-per-worker", "-1", "must be a number of at least 0, got '-1'"),
        ("--gpus-per-worker", "half", "must be a number of at least 0, got 'half'"),
        ("--allow-hosts", "", "must be hosts"),
        ("--allow-hosts", "https://shop.example", "without http://"),
        ("--gpus-per-worker", "1.5", "a part of one GPU, or whole GPUs"),
        ("--workers", "many", "give a number, or MIN:MAX"),
        ("--workers", "0", "MIN must be at least 1"),
        ("--workers", "4:2", "MIN must be at least 1 and at most MAX"),
        ("--colour", "red", "unrecognized arguments: --colour=red"),
    ],
)
def test_bad_values(refused, manifest, option, value, message):
    error = refused(manifest, f"{option}={value}")
    assert option in error
    assert message in error


def test_what_was_assumed_to_read_the_manifest_is_told_once(manifest, capsys):
    manifest.write_text("object_id;image;mask;class_name\n")
    assert main([str(manifest), "--recipe", "nosuch"]) == 2
    assert capsys.readouterr().out == "note        manifest.csv: fields are separated by ';'\n"


def test_allowed_hosts_reach_those_who_read(manifest, monkeypatch):
    targets = []

    def stop(pieces, target, *_, **options):
        targets.append(target)
        raise ObjdriveError("far enough")

    monkeypatch.setattr(batch_personalize, "connect", lambda: None)
    monkeypatch.setattr(batch_personalize, "BatchRun", stop)
    assert main([str(manifest), "--allow-hosts", "cdn.example, *.shop.example"]) == 2
    assert main([str(manifest)]) == 2
    assert [target.hosts for target in targets] == [("cdn.example", "*.shop.example"), ()]


def test_no_manifest_given(refused):
    assert "manifest" in refused()


@pytest.mark.parametrize("name", ["missing.csv", "missing-*.csv", "file:///nowhere/missing.csv"])
def test_a_manifest_that_is_not_there(refused, name):
    error = refused(name)
    assert error.startswith("objdrive: there is no manifest at ")
    assert name in error


def test_a_manifest_without_the_columns_it_needs(refused, manifest):
    manifest.write_text("id,picture\n1,mug.png\n")
    error = refused(manifest)
    assert str(manifest) in error
    assert "object_id, image, mask, class_name" in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--set", "stepz=3"), ["stepz", "3"]),
        (("--set", "steps=many"), ["steps", "'many'"]),
        (("--set", "steps"), ["'steps'", "key=value"]),
        (("--recipe", "nosuch"), ["'nosuch'", "textual_inversion"]),
    ],
)
def test_a_recipe_that_can_not_be(refused, manifest, options, words):
    error = refused(manifest, *options)
    assert error.startswith("objdrive: ")
    assert all(word in error for word in words), error


def test_a_recipe_file_with_an_unknown_field(refused, manifest, tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps: 3\nstepz: 4\n")
    assert "stepz" in refused(manifest, "--recipe", "recipe.yaml")


def test_a_folder_that_is_no_base(refused, manifest, tmp_path):
    (tmp_path / "bases" / "empty").mkdir(parents=True)
    error = refused(manifest, "--base", "bases/empty")
    assert "unet" in error
    assert str(tmp_path / "bases" / "empty") in error


def test_a_store_that_workers_would_not_share(refused, manifest):
    assert "--store memory://shop: memory is not shared" in refused(manifest, "--store", "memory://shop")


def test_an_index_that_cannot_be_written_ends_no_run(tmp_path, capsys):
    store = ArtifactStore(str(tmp_path))
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"object_id": "mug-1", "class_name": "mug"}]), table)
    store.write_run_file("run-1", RESULTS_FILE, table.getvalue())
    (tmp_path / "catalog").write_text("a file where the index's folder would be")
    batch_personalize._keep_index(store)
    assert "the catalog's index stays as it was" in capsys.readouterr().out


def test_a_full_disk_for_temporary_files_ends_no_run(tmp_path, capsys, monkeypatch):
    store = ArtifactStore(str(tmp_path))
    connect = sqlite3.connect

    def tiny(path):
        connection = connect(path)
        # SQLite then says "database or disk is full".
        connection.execute("pragma max_page_count = 1")
        return connection

    monkeypatch.setattr(sqlite3, "connect", tiny)
    with pytest.raises(sqlite3.OperationalError, match="full"):
        compact(store)
    batch_personalize._keep_index(store)
    assert "the catalog's index stays as it was" in capsys.readouterr().out
