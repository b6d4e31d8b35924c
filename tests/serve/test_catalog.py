import io
import shutil
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from random_store import metadata_of

from objdrive.adapters.store import ArtifactStore
from objdrive.errors import StoreError
from serve.catalog import Catalog


class AnyBase:
    fingerprint = "f" * 32


def commit(store, object_id, class_name="mug", row=None, version=0):
    store.commit({}, metadata_of(object_id, AnyBase, class_name=class_name, row=row, version=version))


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(str(tmp_path / "store"))


@pytest.fixture
def catalog(store):
    catalog = Catalog(store)
    yield catalog
    catalog.close()


def test_follows_the_store(store, catalog, tmp_path):
    assert catalog.page(10) == []
    commit(store, "b")
    commit(store, "a")
    catalog.refresh()
    assert catalog.page(10) == ["a", "b"]
    commit(store, "c", "lamp")
    shutil.rmtree(tmp_path / "store/objects/a")
    catalog.refresh()
    assert catalog.page(10) == ["b", "c"]
    assert catalog.classes(10) == [("lamp", 1), ("mug", 1)]
    commit(store, "a", "lamp")
    catalog.refresh()
    assert catalog.page(10, class_name="lamp") == ["a", "c"]
    assert catalog.classes(1) == [("lamp", 2)]


def test_pages_cover_every_object_once(store, catalog):
    ids = sorted(f"{shop}-{number}" for shop in ("acme", "acme.b", "Z") for number in range(40))
    for object_id in ids:
        commit(store, object_id)
    catalog.refresh()
    for limit in (1, 7, 120, 500):
        seen, after = [], ""
        while page := catalog.page(limit, after=after):
            seen += page
            after = page[-1]
        assert seen == ids
    assert catalog.page(500, prefix="acme-") == [one for one in ids if one.startswith("acme-")]
    assert catalog.page(2, prefix="acme-", after="acme-5") == ["acme-6", "acme-7"]


def test_searches_ids_classes_and_free_columns_as_they_are_written(store, catalog):
    commit(store, "x1", "alarm clock", {"title": "Twin-Bell, 100% Ä_", "price": 19.9})
    commit(store, "x2", "mug")
    catalog.refresh()
    for q in ("X1", "LARM c", "twin-bell", "100%", "ä_", "' or 1=1 --"):
        assert catalog.page(10, q=q) == (["x1"] if "or" not in q else [])
    assert catalog.page(10, q="_") == ["x1"]
    assert catalog.page(10, class_name="alarm") == []


def test_what_a_run_wrote_down_is_not_read_from_the_artifacts(store, catalog, monkeypatch):
    rows = [{"object_id": f"o{number}", "class_name": "vase", "title": f"No {number}"} for number in range(5)]
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), table)
    store.write_run_file("20260101-000000-a", "results.parquet", table.getvalue())
    for row in rows:
        commit(store, row["object_id"], "vase")
    monkeypatch.setattr(store, "current", None)
    catalog.refresh()
    assert catalog.page(10, class_name="vase", q="no 3") == ["o3"]


def test_a_run_under_way_or_with_a_broken_table_changes_nothing(store, catalog):
    store.write_run_file("run-1", "rejects.parquet", b"")
    store.write_run_file("run-2", "results.parquet", b"PAR1 not really")
    commit(store, "a", "lamp")
    catalog.refresh()
    assert catalog.page(10, class_name="lamp") == ["a"]


def test_stays_as_it_is_while_the_store_is_away(store, catalog, monkeypatch):
    commit(store, "a")
    catalog.refresh()

    def away():
        raise StoreError("away")
        yield

    monkeypatch.setattr(store, "object_ids", away)
    with pytest.raises(StoreError):
        catalog.refresh()
    assert catalog.page(10) == ["a"]


def test_stays_as_it_is_while_the_store_s_folder_is_away(store, tmp_path):
    commit(store, "a")
    catalog = Catalog(ArtifactStore(store.url, must_exist=True, attempts=1))
    catalog.refresh()
    (tmp_path / "store").rename(tmp_path / "unmounted")
    with pytest.raises(StoreError):
        catalog.refresh()
    assert catalog.page(10) == ["a"]
    catalog.close()


def test_follows_the_store_on_whatever_befalls_a_refresh(store, monkeypatch):
    failed = threading.Event()
    object_ids = store.object_ids

    def once():
        monkeypatch.setattr(store, "object_ids", object_ids)
        failed.set()
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(store, "object_ids", once)
    catalog = Catalog(store, refresh_seconds=0.01)
    commit(store, "a")
    catalog.start()
    assert failed.wait(30)
    deadline = time.monotonic() + 30
    while catalog.page(10) != ["a"]:
        assert time.monotonic() < deadline
    catalog.close()
