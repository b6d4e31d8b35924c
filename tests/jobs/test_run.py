"""A run from its rows to its tables and report, without a cluster: no row of these needs a worker."""

import html
from contextlib import closing

import pyarrow.parquet as pq
import pytest
from PIL import Image
from random_store import digest_of, metadata_of

import jobs.batch_personalize as job
import jobs.run
from jobs.ingest import Checked, Target
from jobs.ledger import Ledger
from jobs.metrics import RunMetrics
from jobs.room import WorkersRequest
from jobs.run import BatchRun
from objdrive.adapters.store import ArtifactStore
from objdrive.catalog.rows import Reject, Row
from objdrive.catalog.sources import SourceMark
from objdrive.errors import ObjdriveError
from objdrive.pictures import encode_picture


class AnyBase:
    fingerprint = "f" * 32


def commit(store, version, previews=None):
    metadata = metadata_of("mug", AnyBase, version=version, previews=previews)
    picture = encode_picture(Image.new("RGB", (8, 8)), "WEBP")
    store.commit({preview.file: picture for preview in metadata.previews}, metadata)
    return metadata.digest


def row(digest, *, outdated=False):
    source = SourceMark("mug.png", 9, "mark")
    return Checked(Row("mug", "mug.png", "", "mug", "", {}, "catalog.csv:2"), source, None, digest, ("mug",), outdated)


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(str(tmp_path / "store"))


@pytest.fixture
def rows(monkeypatch):
    """What reading the manifest yields."""
    rows = []
    monkeypatch.setattr(jobs.run, "find_cores", lambda on_wait: 1)
    monkeypatch.setattr(jobs.run, "ingest", lambda pieces, target, *, cores: iter(rows))
    return rows


def batch_run(store, ledger):
    target = Target(store.url, "r" * 32, AnyBase.fingerprint)
    return BatchRun(
        [],
        target,
        None,
        WorkersRequest(1, 1),
        ledger,
        RunMetrics("run"),
        prompt_fault=lambda names: "",
        limit=None,
        previews=0,
        stall_seconds=60,
    )


def test_a_committed_artifact_that_is_not_current_becomes_so_by_a_run_and_not_by_a_dry_one(store, rows):
    wanted, _ = commit(store, 0), commit(store, 1)
    rows.append(row(wanted, outdated=True))
    for work, current in ((BatchRun.plan_only, digest_of("mug", version=1)), (BatchRun.work_off, wanted)):
        with closing(Ledger()) as ledger:
            work(batch_run(store, ledger))
            assert ledger.counts == {"already": 1}
        assert store.current("mug").digest == current


@pytest.fixture
def run_job(tmp_path, store, rows, monkeypatch):
    """Run the job over `rows`; returns its exit status and the run's folder."""
    monkeypatch.setattr(job, "connect", lambda: None)
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("object_id,image,mask,class_name\n")

    def run_job(*options):
        status = job.main([str(manifest), "--store", store.url, *options])
        return status, next((tmp_path / "store").glob("runs/*"), None)

    return run_job


def test_a_run_that_breaks_off_tells_what_became_of_the_rows_until_then(rows, run_job, monkeypatch, capsys):
    def broken(pieces, target, *, cores):
        yield Reject("cup", "catalog.csv:3", "image_missing", "catalog.csv:3: there is no cup.png")
        raise ObjdriveError("part-7.parquet is truncated")

    monkeypatch.setattr(jobs.run, "ingest", broken)
    status, folder = run_job()
    assert status == 2
    assert pq.read_table(folder / "rejects.parquet").column("object_id").to_pylist() == ["cup"]
    assert "there is no cup.png" in (folder / "report.html").read_text()
    assert "part-7.parquet is truncated" in capsys.readouterr().err


def test_a_damaged_preview_is_noted_in_the_report(tmp_path, store, rows, run_job):
    digest = commit(store, 0, previews={"input": "input"})
    preview = tmp_path / "store/objects/mug" / digest / "previews/0.webp"
    preview.write_bytes(preview.read_bytes()[:-9])
    rows.append(row(digest))
    status, folder = run_job()
    assert status == 0
    assert "its previews can't be shown" in html.unescape((folder / "report.html").read_text())


@pytest.mark.parametrize(
    ("class_name", "scene", "objects"),
    [("стиральная машина с вертикальной загрузкой", "", 1), ("alarm clock", "five", 5)],  # noqa: RUF001
)
def test_a_dry_run_rejects_class_words_that_the_base_cannot_read(rows, run_job, capsys, class_name, scene, objects):
    source = SourceMark("a.png", 9, "mark")
    for number in range(objects):
        where = f"catalog.csv:{number + 2}"
        rows.append(Checked(Row(f"object-{number}", "a.png", "", class_name, scene, {}, where), source, None))
    status, folder = run_job("--dry-run")
    told = capsys.readouterr().out
    assert (status, folder) == (3, None)
    assert f"{objects} rows in" in told
    assert f"{objects} rejected" in told
    assert f"{objects} x class_too_long" in told
    assert "the base reads 32" in told
