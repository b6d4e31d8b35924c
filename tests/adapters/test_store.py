import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from objdrive.adapters.artifact import (
    EMBEDDING_FILE,
    LORA_FILE,
    METADATA_FILE,
    ArtifactMetadata,
    BaseRef,
    FileRecord,
    SceneMember,
    SourceRecord,
    Sources,
)
from objdrive.adapters.store import CURRENT_FILE, ArtifactStore, Look
from objdrive.errors import CorruptArtifact, ObjdriveError, StoreError, UnknownObject

OBJECT = "mug-1"
DIGEST = "0123456789abcdef" * 2
OTHER_DIGEST = "fedcba9876543210" * 2
s3_requests = []
S3_KEYS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "objdrive.adapters.store", "s3fs"])


def files_of(writer):
    names = (EMBEDDING_FILE, LORA_FILE, "previews/0.png")
    return {name: f"{name} by {writer}. ".encode() * 500 for name in names}


def metadata_of(object_id=OBJECT, digest=DIGEST, writer="one"):
    return ArtifactMetadata(
        object_id=object_id,
        class_name="mug",
        token="<mug-1>",
        phrase="<mug-1> mug",
        digest=digest,
        members=[SceneMember(object_id=object_id, class_name="mug", token="<mug-1>")],
        base=BaseRef(id="tiny64", fingerprint="f"),
        recipe={"steps": 3},
        recipe_digest="r",
        method_version=1,
        metrics={"loss": 0.5},
        sources=Sources(image=SourceRecord(uri="mug.png", size=1, mark="m")),
        versions={},
        created=f"2026-11-22T18:45:00Z by {writer}",
    )


def commit(store, writer="one", object_id=OBJECT, digest=DIGEST, **options):
    return store.commit(files_of(writer), metadata_of(object_id, digest, writer), **options)


def gc(store, older_than_seconds, **options):
    """Collect garbage; all addresses that were removed."""
    swept = store.gc(older_than_seconds, **options)
    return [address for _, done in swept for address in done.result()]


def assert_whole(store, writers, object_id=OBJECT):
    """The current artifact is, in every file and in its metadata, that of one of `writers`."""
    metadata, files = store.read(object_id)
    writer = metadata.created.split(" by ")[1]
    assert writer in writers
    assert files == files_of(writer)
    assert metadata.files == {name: FileRecord.of(data) for name, data in files.items()}


@contextlib.contextmanager
def watched(store, writers):
    """Read the current artifact over and over meanwhile: it must be absent or whole every time."""
    done, failures, reads = threading.Event(), [], []

    def watch():
        while not done.is_set():
            try:
                if store.current(OBJECT) is not None:
                    assert_whole(store, writers)
                    reads.append(1)
            except (AssertionError, ObjdriveError) as error:
                failures.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
        while not reads and not failures:
            time.sleep(0.001)
    finally:
        done.set()
        thread.join()
    assert not failures


@pytest.fixture(scope="module")
def s3():
    """Address of a bucket on a real S3 server."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    moto, one_at_a_time = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def serve(environ, start_response):
        s3_requests.append(environ["REQUEST_METHOD"])
        # moto looks and then writes on If-None-Match; S3 does both at once.
        with one_at_a_time:
            return moto(environ, start_response)

    server = make_server("127.0.0.1", 0, serve, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in S3_KEYS.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        fsspec.filesystem("s3").mkdir("catalog")
        yield "s3://catalog"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["local", "memory", "s3"])
def url(request, tmp_path):
    if request.param == "local":
        return f"{tmp_path}/store"
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/store"
    return f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}/store"


@pytest.fixture
def store(url):
    return ArtifactStore(url, takeover_after=0.3)


def raw(store, path):
    """A filesystem and a path in it, to get at the stored bytes behind the store's back."""
    return fsspec.url_to_fs(f"{store.url}/{path}")


def stored(store):
    filesystem, root = raw(store, "")
    filesystem.invalidate_cache()
    return {path.strip("/").removeprefix(root.strip("/")).strip("/") for path in filesystem.find(root)}


def committed_paths(object_id=OBJECT, digest=DIGEST):
    folder = f"objects/{object_id}/{digest}"
    files = {f"{folder}/{name}" for name in (*files_of(""), METADATA_FILE)}
    return files | {f"objects/{object_id}/current.json"}


class TestEveryStorage:
    def test_commit_then_read(self, store):
        assert store.current(OBJECT) is None
        assert commit(store) is True
        assert_whole(store, {"one"})
        assert stored(store) == committed_paths()
        assert store.verify(OBJECT) == []
        assert store.has(OBJECT, DIGEST)
        metadata = store.current(OBJECT)
        assert metadata == store.metadata(OBJECT, DIGEST)
        assert store.read_file(metadata, LORA_FILE) == files_of("one")[LORA_FILE]

    def test_second_commit_keeps_the_first(self, store):
        commit(store, "one")
        assert commit(store, "two") is False
        assert_whole(store, {"one"})

    def test_second_commit_makes_it_current_again(self, store):
        commit(store, digest=DIGEST)
        commit(store, digest=OTHER_DIGEST)
        assert store.current(OBJECT).digest == OTHER_DIGEST
        assert commit(store, digest=DIGEST) is False
        assert store.current(OBJECT).digest == DIGEST
        assert store.digests(OBJECT) == [DIGEST, OTHER_DIGEST]

    @pytest.mark.parametrize("how", ["commit", "point"])
    def test_a_writer_that_comes_too_late_does_not_win_over_a_newer_one(self, store, how):
        commit(store, digest="0" * 32)
        stood_still, newer = Look("0" * 32, 100.0), Look("0" * 32, 200.0)
        commit(store, "newer", digest=OTHER_DIGEST, look=newer)
        commit(store, "late", look=stood_still)
        if how == "point":
            store.point(OBJECT, DIGEST, look=stood_still)
        assert store.has(OBJECT, DIGEST)
        assert_whole(store, {"newer"})
        # Who asks for it now gets it.
        store.point(OBJECT, DIGEST, look=Look(OTHER_DIGEST, 300.0))
        assert_whole(store, {"late"})

    def test_of_two_at_once_the_one_that_was_asked_for_later_wins(self, store):
        first, second = Look(None, 100.0), Look(None, 200.0)
        commit(store, "first", look=first)
        commit(store, "second", digest=OTHER_DIGEST, look=second)
        assert_whole(store, {"second"})

    def test_a_wrong_clock_does_not_hold_an_object_up(self, store):
        commit(store, digest=OTHER_DIGEST, look=Look(None, 1e11))
        commit(store, "one", look=Look(OTHER_DIGEST, 100.0))
        assert_whole(store, {"one"})

    def test_point(self, store):
        commit(store, digest=DIGEST)
        commit(store, digest=OTHER_DIGEST)
        store.point(OBJECT, DIGEST)
        assert store.current(OBJECT).digest == DIGEST
        with pytest.raises(ObjdriveError, match="not a committed artifact"):
            store.point(OBJECT, "0" * 32)
        assert store.current(OBJECT).digest == DIGEST

    def test_listing(self, store, monkeypatch):
        # Of the S3 server: keys in a page of a listing.
        monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
        assert list(store.object_ids()) == []
        for object_id in ("b", "a", "a.2", "c"):
            commit(store, object_id=object_id)
        filesystem, stray = raw(store, "objects/.not-an-id/file")
        filesystem.makedirs(stray.rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(stray, b"?")
        assert list(store.object_ids()) == ["a.2", "a", "b", "c"]
        assert store.digests("b") == [DIGEST]
        assert store.digests("nobody") == []

    def test_tells_a_missing_object_from_a_missing_store(self, tmp_path):
        folder = tmp_path / "store"
        new, existing = ArtifactStore(str(folder)), ArtifactStore(str(folder), must_exist=True, attempts=1)
        assert new.current(OBJECT) is None
        for store in (existing, pickle.loads(pickle.dumps(existing))):
            for read in (store.current, store.read):
                with pytest.raises(StoreError, match="mounted"):
                    read(OBJECT)
            with pytest.raises(StoreError, match="mounted"):
                list(store.object_ids())
        new.commit(files_of("one"), metadata_of())
        assert existing.current(OBJECT).digest == DIGEST
        assert existing.current("mug-2") is None
        assert existing.run_ids() == []

    def test_works_from_another_process_s_pickle(self, store):
        commit(store)
        again = pickle.loads(pickle.dumps(store))
        assert again.url == store.url
        assert_whole(again, {"one"})

    def test_run_files(self, store):
        store.write_run_file("run-7", "report.html", b"old")
        store.write_run_file("run-7", "report.html", b"new")
        with store.open_run_file("run-7", "results.parquet", "wb") as stream:
            stream.write(b"table")
        with store.open_run_file("run-7", "results.parquet") as stream:
            assert stream.read() == b"table"
        filesystem, path = fsspec.url_to_fs(store.run_path("run-7", "report.html"))
        assert filesystem.cat_file(path) == b"new"
        assert stored(store) == {"runs/run-7/report.html", "runs/run-7/results.parquet"}

    def test_one_read_looks_an_object_up(self, store, monkeypatch):
        assert store.look_up(OBJECT) is None
        commit(store, "one")
        commit(store, "two", digest=OTHER_DIGEST)
        store.point(OBJECT, DIGEST)
        reads = []
        read = store._files.read
        monkeypatch.setattr(store._files, "read", lambda path: reads.append(path) or read(path))
        assert store.look_up(OBJECT) == store.metadata(OBJECT, DIGEST)
        assert len(reads) == 2, "one of them to look up, one to compare"
        filesystem, path = raw(store, f"objects/{OBJECT}/{CURRENT_FILE}")
        # As the first stores have it.
        filesystem.pipe_file(path, json.dumps({"digest": OTHER_DIGEST}).encode())
        assert store.look_up(OBJECT).digest == OTHER_DIGEST

    def test_a_look_up_tells_damage_from_absence(self, store):
        commit(store, "one")
        filesystem, path = raw(store, f"objects/{OBJECT}/{CURRENT_FILE}")
        document = filesystem.cat_file(path)
        other = document.replace(OBJECT.encode(), b"mug-2")
        for bad in (b"", b"\xff", document[:-2], other, b"[]", b'{"digest": "../x"}'):
            filesystem.pipe_file(path, bad)
            with pytest.raises(CorruptArtifact, match=CURRENT_FILE):
                store.look_up(OBJECT)
        assert commit(store, "one") is False
        assert store.look_up(OBJECT) == store.current(OBJECT)
        filesystem.pipe_file(path, json.dumps({"digest": DIGEST}).encode())
        _, path = raw(store, f"objects/{OBJECT}/{DIGEST}/{METADATA_FILE}")
        filesystem.pipe_file(path, b"{")
        with pytest.raises(CorruptArtifact, match=METADATA_FILE):
            store.look_up(OBJECT)

    def test_the_table_of_all_objects(self, store):
        assert store.read_index() is None
        assert store.index_written() is None
        store.write_index(b"old")
        store.write_index(b"new")
        assert store.read_index() == b"new"
        assert store.index_written() > 0
        assert list(store.object_ids()) == []
        assert store.run_ids() == []

    def test_a_run_s_file_that_is_not_there_is_asked_for_once(self, store, monkeypatch):
        asked = []
        opened = type(store._files)._open
        monkeypatch.setattr(
            type(store._files), "_open", lambda files, path, mode: asked.append(path) or opened(files, path, mode)
        )
        with pytest.raises(StoreError, match="there is no file"):
            store.open_run_file("run-7", "results.parquet")
        assert len(asked) == 1

    @pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
    def test_damage_is_found_and_mended(self, store, harm):
        commit(store, "one")
        filesystem, path = raw(store, f"objects/{OBJECT}/{DIGEST}/{LORA_FILE}")
        data = filesystem.cat_file(path)
        if harm == "remove":
            filesystem.rm_file(path)
        else:
            flipped = data[:100] + bytes([data[100] ^ 1]) + data[101:]
            filesystem.pipe_file(path, data[:-1] if harm == "truncate" else flipped)
        with pytest.raises(ObjdriveError, match=LORA_FILE):
            store.read(OBJECT)
        (problem,) = store.verify(OBJECT)
        assert f"{DIGEST}/{LORA_FILE}" in problem
        assert commit(store, "two") is True
        assert_whole(store, {"two"})
        assert store.verify(OBJECT) == []
        assert stored(store) == committed_paths()

    def test_metadata_that_cannot_be_trusted(self, store):
        commit(store, "one")
        filesystem, path = raw(store, f"objects/{OBJECT}/{DIGEST}/{METADATA_FILE}")
        document = filesystem.cat_file(path)
        for bad in (b"", b"\xff", document[:-2], document.replace(b'"mug-1"', b'"mug-2"', 1), b"[]"):
            filesystem.pipe_file(path, bad)
            assert store.current(OBJECT) is None
            assert not store.has(OBJECT, DIGEST)
            problem, consequence = store.verify(OBJECT)
            assert METADATA_FILE in problem
            assert "current.json" in consequence
            with pytest.raises(CorruptArtifact, match=rf"(?s){METADATA_FILE}: .*personalize the object again"):
                store.read(OBJECT)
        assert commit(store, "two") is True
        assert_whole(store, {"two"})

    def test_a_pointer_that_cannot_be_trusted(self, store):
        commit(store)
        filesystem, path = raw(store, f"objects/{OBJECT}/current.json")
        for bad in (b"", b"{", b'{"digest": "../../x"}', b'{"digest": 3}', b"null"):
            filesystem.pipe_file(path, bad)
            assert store.current(OBJECT) is None
            (problem,) = store.verify(OBJECT)
            assert "current.json" in problem
        assert commit(store, "two") is False
        assert_whole(store, {"one"})

    def test_many_threads_one_winner(self, url):
        writers = [f"thread {number}" for number in range(8)]
        barrier, results = threading.Barrier(len(writers)), {}

        def work(writer):
            store = ArtifactStore(url)
            barrier.wait()
            results[writer] = commit(store, writer)

        with watched(ArtifactStore(url), writers):
            threads = [threading.Thread(target=work, args=(writer,)) for writer in writers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        winners = [writer for writer, won in results.items() if won]
        assert len(results) == len(writers)
        assert len(winners) == 1
        assert_whole(ArtifactStore(url), winners)
        assert ArtifactStore(url).verify(OBJECT) == []
        assert stored(ArtifactStore(url)) == committed_paths()

    def test_a_dead_writer_s_files_are_replaced(self, store):
        filesystem, folder = raw(store, f"objects/{OBJECT}/{DIGEST}")
        filesystem.makedirs(folder, exist_ok=True)
        filesystem.pipe_file(f"{folder}/.claim-0", b"dead")
        filesystem.pipe_file(f"{folder}/{EMBEDDING_FILE}", b"left over")
        filesystem.pipe_file(f"{folder}/stray.bin", b"left over")
        beats = []
        started = time.monotonic()
        assert commit(store, "two", alive=lambda: beats.append(1)) is True
        assert time.monotonic() - started >= 0.3
        assert beats
        assert_whole(store, {"two"})
        assert stored(store) == committed_paths()

    def test_gc_removes_what_is_superseded_or_left_over(self, store, monkeypatch):
        monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
        third = "0" * 32
        for digest in (DIGEST, third, OTHER_DIGEST):
            commit(store, digest=digest)
        commit(store, object_id="only")
        filesystem, objects = raw(store, "objects")
        leftovers = {f"{OBJECT}/{'1' * 32}/{LORA_FILE}", f"{OBJECT}/.tmp-a", f"only/{DIGEST}/.claim-0"}
        for leftover in leftovers:
            filesystem.makedirs(f"{objects}/{leftover.rpartition('/')[0]}", exist_ok=True)
            filesystem.pipe_file(f"{objects}/{leftover}", b"?")
        kept = committed_paths(OBJECT, OTHER_DIGEST) | committed_paths("only")
        before = stored(store)
        assert gc(store, 3600) == []
        named = gc(store, -60, dry_run=True)
        assert stored(store) == before
        assert sorted(named) == sorted(
            f"{store.url}/objects/{path}"
            for path in (
                *(f"{OBJECT}/{digest}" for digest in (DIGEST, third, "1" * 32)),
                f"{OBJECT}/.tmp-a",
                f"only/{DIGEST}/.claim-0",
            )
        )
        assert gc(store, -60) == named
        assert stored(store) == kept
        assert_whole(store, {"one"})
        assert store.verify(OBJECT) == store.verify("only") == []
        assert gc(store, -60) == []

    def test_calls_for_each_object_fail_alone_and_come_in_order(self, store):
        for object_id in ("b", "a-b", "a", "c"):
            commit(store, object_id=object_id)

        def call(object_id):
            if object_id == "a":
                raise StoreError("lost")
            return store.current(object_id).object_id

        listed = list(store.for_each(call))
        assert [object_id for object_id, _ in listed] == ["a-b", "a", "b", "c"]
        assert [None if done.exception() else done.result() for _, done in listed] == ["a-b", None, "b", "c"]
        assert [object_id for object_id, _ in store.for_each(call, ["c", "a"])] == ["c", "a"]

    def test_gc_keeps_committed_artifacts_of_an_object_without_a_current_one(self, store):
        commit(store)
        filesystem, path = raw(store, f"objects/{OBJECT}/current.json")
        filesystem.rm_file(path)
        assert gc(store, -60) == []
        assert store.has(OBJECT, DIGEST)

    def test_absent(self, store):
        with pytest.raises(UnknownObject, match="'mug-1' has no current artifact"):
            store.read(OBJECT)
        with pytest.raises(UnknownObject, match=f"has no artifact {DIGEST}"):
            store.read(OBJECT, DIGEST)
        commit(store)
        with pytest.raises(ObjdriveError, match=r"no file 'other\.bin'"):
            store.read_file(store.current(OBJECT), "other.bin")


@pytest.mark.parametrize("bad", ["", "..", "../x", "a/b", ".hidden", "x" * 129, "a\n", "ä"])
def test_names_are_checked_before_any_path_is_made(tmp_path, bad):
    store = ArtifactStore(f"{tmp_path}/store")
    for call in (
        lambda: store.current(bad),
        lambda: store.folder(bad, DIGEST),
        lambda: store.folder(OBJECT, bad),
        lambda: store.read(OBJECT, bad),
        lambda: store.write_run_file(bad, "x", b""),
        lambda: store.run_path("run", f"x/{bad}/../y"),
    ):
        with pytest.raises(ObjdriveError, match="not well formed"):
            call()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "previews/.claim-0", ".tmp-x", METADATA_FILE])
def test_files_that_no_artifact_may_hold(tmp_path, name):
    store = ArtifactStore(f"{tmp_path}/store")
    with pytest.raises(ObjdriveError, match=r"not well formed|leave it out"):
        store.commit({name: b""}, metadata_of())
    assert stored(store) == set()


def commit_in_process(url, writer, environment, barrier, results):
    os.environ.update(environment)
    store = ArtifactStore(url)
    barrier.wait()
    results.put((writer, commit(store, writer)))


def commit_many_files(url, environment):
    os.environ.update(environment)
    files = {f"previews/{number:03}.png": b"dying" for number in range(100)}
    ArtifactStore(url).commit(files, metadata_of(writer="dying"))


def die_at_step(url, step):
    """Die by SIGKILL just before the `step`-th change to the files under `url`."""
    changes = 0

    def count(event, args):
        nonlocal changes
        writes = event == "open" and isinstance(args[2], int) and args[2] & os.O_CREAT
        if (writes or event in {"os.link", "os.rename", "os.remove", "os.mkdir"}) and url in str(args[0]):
            changes += 1
            if changes == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def commit_until_step(url, step):
    die_at_step(url, step)
    commit(ArtifactStore(url), "dying")


def gc_until_step(url, step):
    die_at_step(url, step)
    gc(ArtifactStore(url), -60)


@pytest.fixture(params=["local", "s3"])
def shared_url(request, tmp_path):
    """An address that other processes can reach, and the environment that they need."""
    if request.param == "local":
        return f"{tmp_path}/store", {}
    address = f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}/store"
    return address, {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


class TestProcesses:
    def test_many_processes_one_winner(self, shared_url):
        url, environment = shared_url
        writers = [f"process {number}" for number in range(3)]
        barrier, results = processes.Barrier(len(writers)), processes.Queue()
        with watched(ArtifactStore(url), writers):
            workers = [
                processes.Process(target=commit_in_process, args=(url, writer, environment, barrier, results))
                for writer in writers
            ]
            for worker in workers:
                worker.start()
            won = dict(results.get(timeout=60) for _ in workers)
            for worker in workers:
                worker.join()
        winners = [writer for writer in writers if won[writer]]
        assert len(winners) == 1
        assert_whole(ArtifactStore(url), winners)
        assert ArtifactStore(url).verify(OBJECT) == []
        assert stored(ArtifactStore(url)) == committed_paths()

    def test_a_killed_writer_is_taken_over(self, shared_url):
        url, environment = shared_url
        worker = processes.Process(target=commit_many_files, args=(url, environment))
        worker.start()
        store = ArtifactStore(url, takeover_after=0.3)
        while len(stored(store)) < 5:
            assert worker.is_alive()
        worker.kill()
        worker.join()
        assert worker.exitcode == -signal.SIGKILL
        assert not store.has(OBJECT, DIGEST)
        with watched(store, {"heir"}):
            assert commit(store, "heir") is True
        assert store.verify(OBJECT) == []
        gc(store, -60)
        assert stored(store) == committed_paths()

    def test_a_writer_killed_at_any_step_leaves_nothing_half_there(self, tmp_path):
        step, alive = 0, False
        while not alive:
            step += 1
            url = f"{tmp_path}/{step}"
            worker = processes.Process(target=commit_until_step, args=(url, step))
            worker.start()
            worker.join()
            alive = worker.exitcode == 0
            assert alive or worker.exitcode == -signal.SIGKILL
            store = ArtifactStore(url, takeover_after=0.05)
            if store.current(OBJECT) is not None:
                assert_whole(store, {"dying"})
            assert store.verify(OBJECT) == [] or store.has(OBJECT, DIGEST)
            done = store.has(OBJECT, DIGEST)
            assert commit(store, "heir") is not done
            assert_whole(store, {"dying" if done else "heir"})
            gc(store, -60)
            assert stored(store) == committed_paths()
        assert step > 15

    def test_a_gc_killed_at_any_step_takes_nothing_that_lives(self, tmp_path):
        step, alive = 0, False
        while not alive:
            step += 1
            url = f"{tmp_path}/{step}"
            store = ArtifactStore(url, takeover_after=0.05)
            commit(store, "old", digest=DIGEST)
            commit(store, "new", digest=OTHER_DIGEST)
            worker = processes.Process(target=gc_until_step, args=(url, step))
            worker.start()
            worker.join()
            alive = worker.exitcode == 0
            assert alive or worker.exitcode == -signal.SIGKILL
            assert_whole(store, {"new"})
            assert store.verify(OBJECT) == []
            # What is half gone can be made again, and what is left is removed by the next one.
            commit(store, "heir", digest=DIGEST)
            assert store.current(OBJECT).digest == DIGEST
            assert store.verify(OBJECT) == []
            gc(store, -60)
            assert stored(store) == committed_paths(OBJECT, DIGEST)
        assert step > 5


class FaultyFileSystem(fsspec.AbstractFileSystem):
    """An object store whose calls a test can make fail or stall: `hook(moment, call, path)`."""

    protocol = "faulty"

    def __init__(self, **options):
        super().__init__(**options)
        self.inner = MemoryFileSystem(global_store=False, skip_instance_cache=True)
        self.hook = lambda moment, call, path: None

    def _hooked(self, call, path, *args, **options):
        self.hook("before", call, path)
        result = getattr(self.inner, call)(path, *args, **options)
        self.hook("after", call, path)
        return result

    def cat_file(self, path, **options):
        return self._hooked("cat_file", path, **options)

    def pipe_file(self, path, value, mode="overwrite", **options):
        return self._hooked("pipe_file", path, value, mode=mode, **options)

    def rm_file(self, path):
        return self._hooked("rm_file", path)

    def find(self, path, **options):
        return self._hooked("find", path, **options)

    def ls(self, path, detail=True, **options):
        return self._hooked("ls", path, detail=detail, **options)

    def modified(self, path):
        return self._hooked("modified", path)


class ConnectionLostError(Exception):
    """Stands for the exceptions of cloud clients that are not OSErrors."""


@pytest.fixture
def faulty():
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.clear_instance_cache()
    return fsspec.filesystem("faulty")


class TestFailingStorage:
    url = "faulty://store"

    @pytest.mark.parametrize(
        ("moment", "error"), [("before", OSError("reset")), ("after", ConnectionLostError("reset"))]
    )
    @pytest.mark.parametrize("number", range(6))
    def test_a_failed_write_is_tried_again(self, faulty, moment, error, number):
        writes = []

        def fail_once(when, call, path):
            if call == "pipe_file":
                if when == "before":
                    writes.append(path)
                if when == moment and len(writes) == number + 1:
                    raise error

        faulty.hook = fail_once
        store = ArtifactStore(self.url)
        assert commit(store) is True
        assert writes.count(writes[number]) == 2
        assert_whole(store, {"one"})
        assert stored(store) == committed_paths()

    def test_lasting_failure_is_reported_and_leaves_nothing_half_there(self, faulty):
        def full(when, call, path):
            if when == "before" and call == "pipe_file" and path.endswith(LORA_FILE):
                raise OSError(28, "No space left on device")

        faulty.hook = full
        store = ArtifactStore(self.url, attempts=2)
        with pytest.raises(StoreError, match=rf"create faulty://store/.*{LORA_FILE}.*No space.*2 times"):
            commit(store)
        assert store.current(OBJECT) is None
        assert store.verify(OBJECT) == []
        faulty.hook = lambda *_: None
        beats = []
        assert commit(store, "two", alive=lambda: beats.append(1)) is True
        assert not beats
        assert_whole(store, {"two"})

    def test_unreadable_storage_is_neither_absence_nor_damage(self, faulty):
        store = ArtifactStore(self.url, attempts=2)
        commit(store)
        changes = []

        def unreadable(when, call, path):
            if call == "cat_file":
                raise PermissionError("403")
            changes.append(call)

        faulty.hook = unreadable
        for call in (store.current, store.read, store.verify, lambda _: commit(store, "two")):
            changes.clear()
            with pytest.raises(StoreError, match="403"):
                call(OBJECT)
            assert set(changes) <= {"ls"}
        faulty.hook = lambda *_: None
        assert_whole(store, {"one"})

    def test_a_storage_that_corrupts_what_it_takes_is_reported(self, faulty):
        def corrupt(when, call, path):
            if when == "after" and call == "pipe_file" and path.endswith(LORA_FILE):
                faulty.inner.pipe_file(path, b"garbage")

        faulty.hook = corrupt
        with pytest.raises(StoreError, match="does not read back as written"):
            commit(ArtifactStore(self.url))
        faulty.hook = lambda *_: None
        assert ArtifactStore(self.url).current(OBJECT) is None

    @pytest.mark.parametrize("stop", [EMBEDDING_FILE, LORA_FILE, "previews/0.png", METADATA_FILE])
    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_a_writer_that_wakes_up_too_late_spoils_nothing(self, faulty, stop, moment):
        stopped, go_on, results = threading.Event(), threading.Event(), []

        def stall(when, call, path):
            asleep = threading.current_thread().name == "sleeper" and not stopped.is_set()
            if asleep and when == moment and call == "pipe_file" and path.endswith(stop):
                stopped.set()
                assert go_on.wait(30)

        faulty.hook = stall
        store = ArtifactStore(self.url, takeover_after=0.1)
        sleeper = threading.Thread(target=lambda: results.append(commit(store, "sleeper")), name="sleeper")
        sleeper.start()
        assert stopped.wait(30)
        committed = store.has(OBJECT, DIGEST)
        assert commit(store, "heir") is not committed
        go_on.set()
        sleeper.join()
        assert results == [committed]
        assert_whole(store, {"sleeper" if committed else "heir"})
        assert store.verify(OBJECT) == []
        gc(store, -60)
        assert stored(store) == committed_paths()

    def test_a_writer_that_wakes_up_while_its_heir_writes_stops(self, faulty):
        turns = {"sleeper": threading.Event(), "heir": threading.Event()}
        stopped = {"sleeper": threading.Event(), "heir": threading.Event()}
        results = {}

        def stall(when, call, path):
            name = threading.current_thread().name
            if name in turns and when == "before" and call == "pipe_file" and path.endswith(LORA_FILE):
                stopped[name].set()
                assert turns[name].wait(30)

        # fsspec gives every thread a filesystem of its own unless they share a store.
        store = ArtifactStore(self.url, takeover_after=0.1)
        artifact_json = f"store/objects/{OBJECT}/{DIGEST}/{METADATA_FILE}"
        vouched_while_waiting = []
        waiting = threading.Event()

        def wait():
            vouched_while_waiting.append(faulty.inner.exists(artifact_json))
            waiting.set()

        def work(name, alive):
            results[name] = commit(store, name, alive=alive)

        faulty.hook = stall
        sleeper = threading.Thread(target=work, args=("sleeper", wait), name="sleeper")
        heir = threading.Thread(target=work, args=("heir", lambda: None), name="heir")
        sleeper.start()
        assert stopped["sleeper"].wait(30)
        heir.start()
        assert stopped["heir"].wait(30)
        turns["sleeper"].set()
        assert waiting.wait(30)
        turns["heir"].set()
        sleeper.join()
        heir.join()
        # The sleeper's write that was under way landed among the heir's files; it went no further.
        assert vouched_while_waiting[0] is False
        assert sorted(results.values()) == [False, True]
        assert_whole(store, {name for name, won in results.items() if won})
        assert store.verify(OBJECT) == []

    def test_a_writer_whose_artifact_was_replaced_did_not_commit_it(self, faulty):
        heirs = []

        def replace(when, call, path):
            if when == "after" and call == "pipe_file" and path.endswith(METADATA_FILE) and not heirs:
                heirs.append("heir")
                faulty.inner.pipe_file(path.replace(METADATA_FILE, LORA_FILE), b"garbage")
                assert commit(ArtifactStore(self.url, takeover_after=0.1), "heir") is True

        faulty.hook = replace
        assert commit(ArtifactStore(self.url), "one") is False
        assert_whole(ArtifactStore(self.url), {"heir"})

    @pytest.mark.parametrize("cause", ["repair", "gc"])
    def test_files_are_removed_only_when_nothing_vouches_for_them(self, faulty, cause):
        store = ArtifactStore(self.url)
        commit(store)
        removed = []

        def look(when, call, path):
            if when == "before" and call == "rm_file" and f"{DIGEST}/" in path and ".claim" not in path:
                removed.append(path)
                assert path.endswith(METADATA_FILE) or not store.has(OBJECT, DIGEST)

        if cause == "gc":
            commit(store, digest=OTHER_DIGEST)
            faulty.hook = look
            gc(store, -60)
        else:
            faulty.inner.pipe_file(f"store/objects/{OBJECT}/{DIGEST}/{LORA_FILE}", b"garbage")
            faulty.hook = look
            commit(store, "two")
        assert len(removed) == len(files_of("")) + 1

    def bring_back_during_gc(self, faulty, step, bring_back):
        """Make a superseded artifact current again just before gc's `step`-th call to the storage.

        Returns whether gc came so far, and what `bring_back` failed with.
        """
        faulty.inner.store.clear()
        store = ArtifactStore(self.url)
        commit(store, "old", digest=DIGEST)
        commit(store, "new", digest=OTHER_DIGEST)
        for file in faulty.inner.store.values():
            file.modified = file.created = datetime.now(UTC) - timedelta(hours=48)
        calls, failures, ended_or_waiting = [], [], threading.Event()

        def work():
            try:
                bring_back(store, ended_or_waiting.set)
            except ObjdriveError as error:
                failures.append(error)
            ended_or_waiting.set()

        other = threading.Thread(target=work)

        def interfere(when, call, path):
            if when == "before" and threading.current_thread().name.startswith("objdrive-store"):
                calls.append(call)
                if len(calls) == step:
                    other.start()
                    assert ended_or_waiting.wait(30)

        faulty.hook = interfere
        gc(store, 3600)
        faulty.hook = lambda *_: None
        if len(calls) < step:
            return False, failures
        other.join()
        return True, failures

    def test_an_artifact_that_is_committed_again_survives_gc(self, faulty):
        step, reached = 0, True
        while reached:
            step += 1
            reached, failures = self.bring_back_during_gc(
                faulty, step, lambda store, alive: commit(store, "old", alive=alive)
            )
            store = ArtifactStore(self.url)
            assert not failures
            assert_whole(store, {"old" if reached else "new"})
            assert store.verify(OBJECT) == []
            assert not [path for path in stored(store) if ".claim" in path]
        assert step > 5

    def test_an_artifact_that_is_pointed_to_again_survives_gc_or_is_refused(self, faulty):
        def point(store, alive):
            # It can't say that it waits.
            alive()
            store.point(OBJECT, DIGEST)

        step, reached = 0, True
        while reached:
            step += 1
            reached, failures = self.bring_back_during_gc(faulty, step, point)
            store = ArtifactStore(self.url)
            assert store.current(OBJECT).digest == (DIGEST if reached and not failures else OTHER_DIGEST)
            assert_whole(store, {"old", "new"})
            assert store.verify(OBJECT) == []
        assert step > 5


class TestLocalAddresses:
    def test_a_relative_address_means_the_same_from_anywhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        store = ArtifactStore("store/")
        assert store.url == f"{tmp_path}/store"
        commit(store)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        assert_whole(pickle.loads(pickle.dumps(store)), {"one"})
        assert (tmp_path / "store/objects" / OBJECT / DIGEST / LORA_FILE).is_file()

    def test_a_store_where_a_file_is_says_so(self, tmp_path):
        (tmp_path / "store").write_text("a file")
        with pytest.raises(StoreError, match=f"{tmp_path}/store/objects"):
            commit(ArtifactStore(str(tmp_path / "store"), attempts=1))


def test_a_look_at_an_object_on_s3_is_two_requests(s3):
    store = ArtifactStore(f"{s3}/{uuid.uuid4().hex}")
    commit(store)
    s3_requests.clear()
    assert store.current(OBJECT).digest == DIGEST
    assert s3_requests == ["GET", "GET"]


@pytest.mark.usefixtures("s3")
def test_a_missing_bucket_says_so():
    store = ArtifactStore("s3://no-such-bucket/store", attempts=1)
    assert store.current(OBJECT) is None
    with pytest.raises(StoreError, match="s3://no-such-bucket/store"):
        commit(store)
