"""What became of every row: counts, and the tables in the store."""

import sys
import threading
import tracemalloc
from contextlib import closing
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.ingest import Checked
from jobs.ledger import REJECTS_FILE, Ledger
from jobs.outcomes import RowOutcome
from objdrive.adapters.store import RESULTS_FILE, ArtifactStore
from objdrive.catalog.rows import Reject, Row
from objdrive.catalog.sources import SourceMark

DIGEST = "0123456789abcdef" * 2
METRICS = {"loss_object": 0.25, "loss_class": 0.5, "steps": 2.0, "seconds": 1.5}
RUN = "20261122-190000-abcdef"


@pytest.fixture
def ledger():
    ledger = Ledger()
    yield ledger
    ledger.close()


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(str(tmp_path / "store"))


def checked(object_id="mug", *, scene="", digest="", members=(), **metadata):
    row = Row(object_id, "mug.png", "mask.png", "mug", scene, metadata, f"catalog.csv:{object_id}")
    return Checked(row, SourceMark("mug.png", 100, "m"), None, digest, members)


def reject(object_id="bad", code="mask_empty"):
    return Reject(object_id, "catalog.csv:9", code, "the mask is empty")


def tables(ledger, store):
    """(results, rejects) as a reader of the store finds them."""
    ledger.write(store, RUN)
    return [pq.read_table(store.run_path(RUN, name)) for name in (RESULTS_FILE, REJECTS_FILE)]


def test_every_row_is_told_of_with_its_status_and_the_reason_if_it_is_lost():
    told = []
    with closing(Ledger(lambda status, reason: told.append((status, reason)))) as ledger:
        ledger.outcome(checked("new"), RowOutcome("committed", DIGEST, metrics=METRICS))
        ledger.committed_before(checked("old", digest=DIGEST))
        ledger.repeated(checked("new"))
        ledger.reject(reject())
        # A free column named as one of the rejects' is no reason.
        ledger.outcome(checked("free", code="sale"), RowOutcome("committed", DIGEST, metrics=METRICS))
        ledger.outcome(checked("broke"), RowOutcome("failed", code="diverged", message="the loss is not finite"))
    ok = [("committed", ""), ("already", ""), ("repeated", "")]
    assert told == [*ok, ("rejected", "mask_empty"), ("committed", ""), ("failed", "diverged")]


def test_results_and_rejects_are_all_rows(ledger, store):
    ledger.outcome(checked("new", scene="table"), RowOutcome("committed", DIGEST, warning="unknown", metrics=METRICS))
    ledger.outcome(checked("raced"), RowOutcome("already", DIGEST))
    ledger.committed_before(checked("old", digest=DIGEST, members=("old",)))
    ledger.repeated(checked("new"))
    ledger.reject(reject())
    ledger.outcome(checked("broke"), RowOutcome("failed", code="diverged", message="the loss is not finite"))
    results, rejects = (table.to_pylist() for table in tables(ledger, store))
    none = dict.fromkeys(METRICS)
    common = {"class_name": "mug", "scene": "", "warning": ""}
    assert results == [
        common
        | {"object_id": "new", "status": "committed", "digest": DIGEST, "where": "catalog.csv:new"}
        | {"scene": "table", "warning": "unknown"}
        | METRICS,
        common | {"object_id": "raced", "status": "already", "digest": DIGEST, "where": "catalog.csv:raced"} | none,
        common | {"object_id": "old", "status": "already", "digest": DIGEST, "where": "catalog.csv:old"} | none,
        common | {"object_id": "new", "status": "repeated", "digest": "", "where": "catalog.csv:new"} | none,
    ]
    assert rejects == [
        {"object_id": "bad", "where": "catalog.csv:9", "code": "mask_empty", "message": "the mask is empty"},
        {"object_id": "broke", "where": "catalog.csv:broke"}
        | {"code": "diverged", "message": "the loss is not finite"},
    ]
    assert ledger.counts == {"committed": 1, "already": 2, "repeated": 1, "rejected": 1, "failed": 1}
    assert ledger.reasons == {"mask_empty": 1, "diverged": 1}
    assert ledger.warned == 1


def test_what_was_assumed_to_read_a_row_is_told_with_what_a_worker_warns_of(ledger, store):
    for outcome in (RowOutcome("committed", DIGEST, warning="unknown"), RowOutcome("already", DIGEST)):
        record = checked()
        ledger.outcome(replace(record, row=replace(record.row, warnings=("a float",))), outcome)
    assert tables(ledger, store)[0]["warning"].to_pylist() == ["a float; unknown", "a float"]
    assert ledger.warned == 2


def test_a_run_without_rows_has_tables_too(ledger, store):
    results, rejects = tables(ledger, store)
    assert results.num_rows == rejects.num_rows == 0
    assert results.column_names[:3] == ["object_id", "status", "digest"]
    assert rejects.column_names == ["object_id", "where", "code", "message"]


def test_the_first_lines_can_be_looked_at_before_the_tables_are_written(ledger):
    for name in "abc":
        ledger.repeated(checked(name))
        ledger.reject(reject(name))
    assert [line["object_id"] for line in ledger.results(2)] == ["a", "b"]
    assert [line["object_id"] for line in ledger.rejects(5)] == ["a", "b", "c"]


# Metadata


def column(ledger, store, values, name="extra"):
    for number, value in enumerate(values):
        ledger.repeated(checked(f"object-{number}", **{name: value}))
    results, _ = tables(ledger, store)
    return results[name].type, results[name].to_pylist()


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2, None], pa.int64()),
        ([1, 2**63 - 1, 1 - 2**63], pa.int64()),
        ([1, 2.5, None], pa.float64()),
        ([True, False, None], pa.bool_()),
        (["a", "", None], pa.string()),
        ([None, None], pa.string()),
    ],
)
def test_metadata_keeps_its_type(ledger, store, values, kind):
    assert column(ledger, store, values) == (kind, values)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([1, "two", 3.5, True, None], ["1", "two", "3.5", "true", None]),
        ([True, 1], ["true", "1"]),
        ([["red", "blue"], {"width": 3}], ['["red", "blue"]', '{"width": 3}']),
        ([1, 123456789012345678901], ["1", "123456789012345678901"]),
        ([0.5, 2**53 + 1], ["0.5", "9007199254740993"]),
    ],
    ids=["mixed", "bool and int", "nested", "beyond 64 bits", "beyond a float's integers"],
)
def test_metadata_that_fits_no_type_becomes_text(ledger, store, values, texts):
    assert column(ledger, store, values) == (pa.string(), texts)


def test_a_column_that_only_some_rows_have_is_null_in_the_others(ledger, store):
    ledger.repeated(checked("a"))
    ledger.repeated(checked("b", price=9))
    results, _ = tables(ledger, store)
    assert results["price"].to_pylist() == [None, 9]


def test_a_column_that_bears_the_name_of_ours_is_renamed(ledger, store):
    ledger.outcome(checked("a", status="on sale", seconds=7), RowOutcome("committed", DIGEST, metrics=METRICS))
    (line,) = tables(ledger, store)[0].to_pylist()
    assert (line["status"], line["row_status"]) == ("committed", "on sale")
    assert (line["seconds"], line["row_seconds"]) == (1.5, 7)


# Threads and memory


def test_threads_lose_no_line_and_no_count(ledger, store):
    threads, rows = 4, 200
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def note(thread):
        for number in range(rows):
            ledger.reject(reject(f"{thread}-{number}"))
            ledger.outcome(checked(f"{thread}-{number}"), RowOutcome("already", DIGEST, warning="unknown"))

    try:
        running = [threading.Thread(target=note, args=(number,)) for number in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    results, rejects = tables(ledger, store)
    everything = {f"{thread}-{number}" for thread in range(threads) for number in range(rows)}
    assert results.num_rows == rejects.num_rows == threads * rows
    assert set(results["object_id"].to_pylist()) == set(rejects["object_id"].to_pylist()) == everything
    assert ledger.counts == {"rejected": threads * rows, "already": threads * rows}
    assert ledger.reasons == {"mask_empty": threads * rows}
    assert ledger.warned == threads * rows


def test_lines_are_kept_on_disk(ledger):
    record = checked(title="A mug to drink from, with a handle and a lid" * 10)
    ledger.repeated(record)
    tracemalloc.start()
    try:
        for _ in range(20_000):
            ledger.repeated(record)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert ledger.counts["repeated"] == 20_001
