import asyncio
import io
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from random_store import metadata_of

from objdrive.adapters.index import compact
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
    monkeypatch.setattr(store, "look_up", None)
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


def results(store, run_id, *rows):
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"class_name": "vase", "title": None, **row} for row in rows]), table)
    store.write_run_file(run_id, "results.parquet", table.getvalue())


def test_a_catalog_is_there_before_the_store_is_listed(store, monkeypatch):
    results(store, "run-1", {"object_id": "a"}, {"object_id": "b", "title": "Blue"})
    assert compact(store)
    results(store, "run-2", {"object_id": "c"}, {"object_id": "b", "title": "Red"})
    listed, go_on = threading.Event(), threading.Event()

    def slowly():
        listed.set()
        assert go_on.wait(30)
        yield from ("b", "c")

    monkeypatch.setattr(store, "object_ids", slowly)
    monkeypatch.setattr(store, "look_up", None)
    catalog = Catalog(store)
    catalog.start()
    try:
        assert listed.wait(30)
        assert catalog.page(10) == ["a", "b", "c"]
        assert catalog.page(10, q="red") == ["b"]
        assert catalog.page(10, q="blue") == []
    finally:
        go_on.set()
        catalog.close()


def test_a_damaged_index_is_told_once_and_the_runs_are_read_instead(store, catalog, tmp_path, caplog):
    results(store, "run-1", *({"object_id": f"o-{number:04}", "title": f"{number:x}"} for number in range(3000)))
    commit(store, "o-0007", "vase")
    assert compact(store)
    [path] = (one for one in tmp_path.rglob("*.parquet") if one.name != "results.parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[:1000] + bytes(2000) + whole[3000:])
    for _ in range(3):
        catalog.refresh()
    assert catalog.page(10, class_name="vase") == ["o-0007"]
    assert len([one for one in caplog.records if "is damaged" in one.getMessage()]) == 1
    assert compact(store)
    commit(store, "o-0008", "vase")
    catalog.refresh()
    assert catalog.page(10, class_name="vase") == ["o-0007", "o-0008"]
    path.write_bytes(path.read_bytes().replace(b"class_name", b"class_nine"))
    caplog.clear()
    for _ in range(3):
        catalog.refresh()
    assert len([one for one in caplog.records if "is damaged" in one.getMessage()]) == 1
    assert catalog.page(10, class_name="vase") == ["o-0007", "o-0008"]


def test_the_index_is_read_when_it_has_changed(store, catalog, monkeypatch):
    results(store, "run-1", {"object_id": "a"})
    commit(store, "a", "vase")
    compact(store)
    catalog.refresh()
    monkeypatch.setattr("serve.catalog.read_index", None)
    monkeypatch.setattr("serve.catalog.run_batches", None)
    catalog.refresh()
    assert catalog.classes(10) == [("vase", 1)]


def test_a_refresh_writes_only_what_has_changed(store, catalog, monkeypatch):
    results(store, "run-1", *({"object_id": f"o-{number}"} for number in range(50)))
    for number in range(50):
        commit(store, f"o-{number}", "vase")
    catalog.refresh()
    written = []
    opened = catalog._open

    def watched():
        writer = opened()
        writer.set_trace_callback(
            lambda sql: written.append(sql) if sql.lower().startswith(("insert", "update", "delete", "--")) else None
        )
        return writer

    monkeypatch.setattr(catalog, "_open", watched)
    catalog.refresh()
    assert written == []
    commit(store, "new")
    catalog.refresh()
    assert 0 < len([sql for sql in written if not sql.startswith("--")]) < 15
    assert catalog.page(100)[0] == "new"


def test_a_run_without_results_is_asked_about_once_a_refresh(store, catalog, monkeypatch):
    store.write_run_file("run-1", "rejects.parquet", b"")
    opened = []
    kind = type(store._files)
    ask = kind._open
    monkeypatch.setattr(kind, "_open", lambda self, path, mode: opened.append(path) or ask(self, path, mode))
    catalog.refresh()
    catalog.refresh()
    assert len(opened) == 2


def test_searches_find_the_same_with_and_without_the_index(store, monkeypatch):
    random = Random(1)
    words = ["mug", "Fine", "Äpfel", "100%", "a_b", '"quoted"', "mugs", "*", "OR", "NEAR(", "ß", "x y"]
    for number in range(60):
        commit(store, f"o-{number:02}", random.choice(["mug", "vase"]), {"title": " ".join(random.choices(words, k=4))})
    catalog = Catalog(store)
    catalog.refresh()
    asked = [*words, "MUG", "fine m", "o-1", "-1", "äpf", "b 100", "quoted", "e\nm", "NOT mug", "mug*", "\0mug"]
    with_index = [catalog.page(100, q=q) for q in asked]
    assert any(with_index)
    monkeypatch.setattr(catalog, "_searchable", False)
    assert with_index == [catalog.page(100, q=q) for q in asked]
    monkeypatch.setattr(catalog, "_searchable", True)
    monkeypatch.setattr("serve.catalog._FEW", 1)
    assert with_index == [catalog.page(100, q=q) for q in asked]
    catalog.close()


def test_what_changes_is_found_by_its_new_words(store, catalog):
    commit(store, "a", "lamp")
    catalog.refresh()
    assert catalog.page(10, q="lamp") == ["a"]
    results(store, "run-1", {"object_id": "a", "title": "A Vessel"})
    catalog.refresh()
    assert catalog.page(10, q="lamp") == []
    assert catalog.page(10, q="vessel") == ["a"]


def test_searches_do_not_wait_for_one_another(store, catalog):
    commit(store, "a")
    catalog.refresh()
    meet = threading.Barrier(4, timeout=30)

    def search():
        catalog.page(1)
        meet.wait()
        return catalog.page(1)

    async def at_once():
        return await asyncio.gather(*(catalog.aside(search) for _ in range(4)))

    assert asyncio.run(at_once()) == [["a"]] * 4


def test_searches_wait_for_no_other_work_in_threads(store, catalog):
    commit(store, "a")
    catalog.refresh()
    done = threading.Event()

    async def search():
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        other = loop.run_in_executor(None, done.wait, 60)
        try:
            return await asyncio.wait_for(catalog.aside(catalog.page, 1), 30)
        finally:
            done.set()
            await other

    assert asyncio.run(search()) == ["a"]


def test_a_damaged_object_is_left_out(store, catalog, tmp_path, caplog):
    commit(store, "a")
    commit(store, "b")
    (tmp_path / "store/objects/a/current.json").write_bytes(b"")
    catalog.refresh()
    assert catalog.page(10, class_name="mug") == ["b"]
    assert "objects/a/current.json" in caplog.text
