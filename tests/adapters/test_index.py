import io
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from random_store import metadata_of

from objdrive.adapters.index import DAMAGED, compact, index_row, read_index, run_batches
from objdrive.adapters.store import ArtifactStore
from objdrive.errors import StoreError


class AnyBase:
    fingerprint = "f" * 32


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(str(tmp_path / "store"))


def run(store, run_id, *rows):
    table = io.BytesIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    pq.write_table(pa.Table.from_pylist([dict.fromkeys(columns) | row for row in rows]), table)
    store.write_run_file(run_id, "results.parquet", table.getvalue())


def row(object_id, class_name="mug", **free):
    return {"object_id": object_id, "status": "committed", "digest": "d", "class_name": class_name, **free}


def rows(store):
    return [one for batch in read_index(store).batches() for one in batch]


def test_the_index_holds_what_the_runs_say_the_newest_last(store):
    assert read_index(store) is None
    assert compact(store) is False
    run(store, "20260101-a", row("b", title="Blue"), row("c"))
    assert compact(store) is True
    run(store, "20260102-a", row("a"), row("b", "vase", title="Red", where="line 3"))
    assert compact(store) is True
    assert rows(store) == [("a", "mug", "a\nmug"), ("b", "vase", "b\nvase\nred"), ("c", "mug", "c\nmug")]
    assert read_index(store).runs == {"20260101-a", "20260102-a"}
    assert compact(store) is False


def test_a_row_says_what_the_artifact_says(store):
    run(store, "run-1", row("x", "lamp", title="Fine Lamp", note=None, price=3.5))
    artifact = metadata_of("x", AnyBase, class_name="lamp", row={"title": "Fine Lamp", "note": None, "price": 3.5})
    assert [list(batch) for batch in run_batches(store, "run-1")] == [[index_row(artifact)]]


def test_runs_without_a_table_are_left_for_later(store):
    store.write_run_file("run-1", "rejects.parquet", b"")
    store.write_run_file("run-2", "results.parquet", b"PAR1 not really")
    run(store, "run-3", row("a"))
    assert compact(store) is True
    assert read_index(store).runs == {"run-3"}
    with pytest.raises(StoreError):
        next(run_batches(store, "run-1"))
    run(store, "run-1", row("b"))
    assert compact(store) is True
    assert [one.object_id for one in rows(store)] == ["a", "b"]


def test_a_table_with_a_damaged_page_keeps_no_other_run_out(store, tmp_path):
    run(store, "run-1", *(row(f"o-{number:04}", title=f"{number * 7919:x}") for number in range(3000)))
    [path] = tmp_path.rglob("results.parquet")
    data = bytearray(path.read_bytes())
    data[4:2000] = bytes(1996)
    path.write_bytes(data)
    with pytest.raises(OSError, match="page"):
        list(run_batches(store, "run-1"))
    run(store, "run-2", row("a"))
    assert compact(store) is True
    assert read_index(store).runs == {"run-2"}


def test_a_few_rows_more_are_not_worth_a_new_table(store):
    run(store, "run-1", *(row(f"o-{number:04}") for number in range(1000)))
    assert compact(store) is True
    run(store, "run-2", row("p"))
    assert compact(store) is False
    for number in range(3, 40):
        run(store, f"run-{number}", row("p"))
    assert compact(store) is True
    assert rows(store)[-1].object_id == "p"


def test_two_runs_that_end_at_once_lose_nothing(store, monkeypatch):
    run(store, "run-1", row("a"))
    written = store.write_index

    def beside(data):
        # Another run ends between this one's look and its write.
        monkeypatch.setattr(store, "write_index", written)
        run(store, "run-2", row("b"))
        compact(store)
        written(data)

    monkeypatch.setattr(store, "write_index", beside)
    compact(store)
    assert read_index(store).runs == {"run-1"}
    compact(store)
    assert [one.object_id for one in rows(store)] == ["a", "b"]


@pytest.mark.parametrize("damage", ["page", "bit", "cut"])
def test_an_index_of_which_a_part_is_damaged_is_written_anew(store, tmp_path, damage):
    run(store, "run-1", *(row(f"o-{number:04}", title=f"{number * 7919:x}") for number in range(3000)))
    assert compact(store) is True
    whole = rows(store)
    [path] = (one for one in tmp_path.rglob("*.parquet") if one.name != "results.parquet")
    data = bytearray(path.read_bytes())
    if damage == "page":
        data[1000:3000] = bytes(2000)
    elif damage == "bit":
        data[2000] ^= 1
    path.write_bytes(data[:-500] if damage == "cut" else data)
    assert compact(store) is True
    assert rows(store) == whole
    assert compact(store) is False


def test_an_index_that_is_damaged_is_written_anew(store):
    run(store, "run-1", row("a"))
    store.write_index(b"PAR1 not really")
    with pytest.raises(DAMAGED):
        read_index(store)
    assert compact(store) is True
    assert rows(store) == [("a", "mug", "a\nmug")]
    store.write_index(store.read_index().replace(b"class_name", b"class_nine"))
    with pytest.raises(ValueError, match="class_nine"):
        read_index(store)
    assert compact(store) is True
    assert rows(store) == [("a", "mug", "a\nmug")]


def test_any_bit_of_an_index_may_be_wrong(store):
    run(store, "run-1", row("a"), row("b", "vase", title="Blue"))
    assert compact(store) is True
    whole, data = rows(store), store.read_index()
    # The footer, of which nothing has a checksum: every third byte, each time another bit of it.
    for place in range(len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data), 3):
        store.write_index(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        compact(store)
        assert rows(store) == whole


def test_what_can_be_read_of_a_damaged_index_outlives_its_runs(store, tmp_path):
    run(store, "run-1", *(row(f"o-{number:05}", title=f"{number * 7919:x}") for number in range(12_000)))
    assert compact(store) is True
    whole, data = rows(store), store.read_index()
    shutil.rmtree(tmp_path / "store/runs/run-1")
    run(store, "run-2", row("o-00007", "vase"))
    store.write_index(data[:1000] + bytes(100) + data[1100:])
    assert compact(store) is True
    # The first of three row groups is lost.
    assert rows(store) == [("o-00007", "vase", "o-00007\nvase"), *whole[5000:]]
    assert read_index(store).runs == {"run-2"}
    assert compact(store) is False

    shutil.rmtree(tmp_path / "store/runs")
    store.write_index(data[:1000] + bytes(100) + data[1100:])
    assert compact(store) is True
    assert rows(store) == whole[5000:]
    assert read_index(store).runs == set()
