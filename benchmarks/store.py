"""`objdrive store ls`, `verify` and `gc`: one call to the storage at a time against many, at a given latency.

Usage: ``python benchmarks/store.py`` (``--smoke`` tries it out in seconds). The storage is a stand-in for S3: a file
system that answers every call after ``--latency`` seconds, a listing in pages of a thousand keys. Its objects are made
up as they are asked for, so that a million take no memory. Every hundredth has a superseded artifact. The serial runs
are of fewer objects (``--serial-objects``); ratios are of objects a second, in turns. Then: what a request costs the
real client (s3fs) in processor time, against a local server of HTTP.
"""

import argparse
import asyncio
import hashlib
import itertools
import multiprocessing
import os
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any
from unittest import mock

import fsspec
from aiohttp import web
from fsspec import AbstractFileSystem
from made_up import metadata_of

from objdrive.adapters import parallel
from objdrive.adapters.artifact import LORA_FILE, METADATA_FILE, FileRecord
from objdrive.adapters.store import CURRENT_FILE, ArtifactStore

CURRENT, SUPERSEDED = "c" * 32, "0" * 32
_WEIGHTS = b"weights " * 16
_PAGE = 1000
_GARBAGE_EVERY = 100
_WRITTEN = datetime(2026, 1, 1, tzinfo=UTC)
_ROOT = "bucket/store/objects/"


class StandIn(AbstractFileSystem):
    """S3 with a latency, of `objects` objects that nobody ever wrote; removed and new files are remembered."""

    protocol = ("standin", "s3")
    req_kw: dict[str, str] = {}  # noqa: RUF012  as s3fs has it

    def __init__(self, objects: int, latency: float, **options: Any) -> None:
        super().__init__(**options)
        self.objects = objects
        self.latency = latency
        self.calls = 0
        self._changes: dict[str, bytes | None] = {}
        self._lock = threading.Lock()

    def cat_file(self, path: str, **_: Any) -> bytes:
        self._answer()
        data = self._changes.get(path, self._made_up(path))
        if data is None:
            raise FileNotFoundError(path)
        return data

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self._answer()
        with self._lock:
            if mode == "create" and self._changes.get(path) is not None:
                raise FileExistsError(path)
            self._changes[path] = value

    def rm_file(self, path: str) -> None:
        self._answer()
        with self._lock:
            self._changes[path] = None

    def find(self, path: str, detail: bool = False, **_: Any) -> Any:
        self._answer()
        object_id = path.removeprefix(_ROOT).partition("/")[0] if path.startswith(_ROOT) else ""
        names = [f"{_ROOT}{object_id}/{name}" for name in self._names(object_id)] if object_id else []
        return {name: {"LastModified": _WRITTEN} for name in names if name.startswith(f"{path}/")}

    def call_s3(self, method: str, *, Prefix: str, Delimiter: str = "", ContinuationToken: str = "0", **_: Any) -> Any:  # noqa: N803
        self._answer()
        within = f"bucket/{Prefix}".removeprefix(_ROOT)
        if within.startswith("bucket/"):
            return {}
        if within:
            heads = {name.partition("/")[0] for name in self._names(within.rstrip("/")) if "/" in name}
            return {"CommonPrefixes": [{"Prefix": f"{Prefix}{head}/"} for head in sorted(heads)]}
        first = int(ContinuationToken)
        # A flat listing's pages end with an object here; an object has about three keys.
        size = _PAGE if Delimiter else _PAGE // 3
        ids = [f"object-{number:07}" for number in range(first, min(self.objects, first + size))]
        last = first + len(ids) == self.objects
        page = {"IsTruncated": not last, "NextContinuationToken": str(first + len(ids))}
        if Delimiter:
            return page | {"CommonPrefixes": [{"Prefix": f"{Prefix}{one}/"} for one in ids]}
        return page | {"Contents": [{"Key": f"{Prefix}{one}/{name}"} for one in ids for name in self._names(one)]}

    def invalidate_cache(self, path: str | None = None) -> None:
        pass

    def _answer(self) -> None:
        with self._lock:
            self.calls += 1
        time.sleep(self.latency)

    def _names(self, object_id: str) -> list[str]:
        digests = [CURRENT, SUPERSEDED] if int(object_id[-7:]) % _GARBAGE_EVERY == 0 else [CURRENT]
        made_up = [CURRENT_FILE, *(f"{digest}/{name}" for digest in digests for name in (METADATA_FILE, LORA_FILE))]
        if digests == [CURRENT]:
            return made_up
        home = f"{_ROOT}{object_id}/"
        with self._lock:
            changed = {path.removeprefix(home): data for path, data in self._changes.items() if path.startswith(home)}
        kept = {name for name in made_up if changed.get(name, b"") is not None}
        return sorted(kept | {name for name, data in changed.items() if data is not None})

    def _made_up(self, path: str) -> bytes | None:
        object_id, _, name = path.removeprefix(_ROOT).partition("/")
        digest, _, file = name.partition("/")
        if name == CURRENT_FILE:
            return b'{"digest": "%s"}' % CURRENT.encode()
        known = digest == CURRENT or (digest == SUPERSEDED and int(object_id[-7:]) % _GARBAGE_EVERY == 0)
        return {METADATA_FILE: _document(object_id, digest), LORA_FILE: _WEIGHTS}.get(file) if known else None


def _document(object_id: str, digest: str) -> bytes:
    weights = FileRecord(size=len(_WEIGHTS), sha256=hashlib.sha256(_WEIGHTS).hexdigest())
    return metadata_of(object_id, digest, token="<t>", files={LORA_FILE: weights}).model_dump_json().encode()


def ls(store: ArtifactStore) -> Iterator[Any]:
    return (looked.result() for _, looked in store.for_each(store.current))


def verify(store: ArtifactStore) -> Iterator[Any]:
    return (verified.result() for _, verified in store.for_each(store.verify))


def gc(store: ArtifactStore) -> Iterator[Any]:
    return (swept.result() for _, swept in store.gc(3600))


COMMANDS: dict[str, Callable[[ArtifactStore], Iterator[Any]]] = {"ls": ls, "verify": verify, "gc": gc}


def measure(command: str, objects: int, latency: float) -> tuple[float, float, int]:
    """Objects a second, seconds to the first result, and calls to the storage."""
    fsspec.register_implementation("standin", StandIn, clobber=True)
    StandIn.clear_instance_cache()
    storage = fsspec.filesystem("standin", objects=objects, latency=latency)
    with mock.patch.object(fsspec, "url_to_fs", lambda url: (storage, url.removeprefix("standin://"))):
        store = ArtifactStore("standin://bucket/store")
    started = time.perf_counter()
    results = COMMANDS[command](store)
    found = [len(one) if isinstance(one, list) else 0 for one in itertools.islice(results, 1)]
    first = time.perf_counter() - started
    total = sum(found) + sum(len(one) for one in results if isinstance(one, list))
    seconds = time.perf_counter() - started
    expected = {"ls": 0, "verify": 0, "gc": len(range(0, objects, _GARBAGE_EVERY))}[command]
    if total != expected:
        raise RuntimeError(f"{command} found {total} of {expected}")
    return objects / seconds, first, storage.calls


def compare(command: str, arguments: argparse.Namespace) -> None:
    """Serial against parallel, in turns."""
    ratios, serial, many = [], [], []
    for _ in range(arguments.rounds):
        with mock.patch.object(parallel, "THREADS", 1):
            serial.append(measure(command, arguments.serial_objects, arguments.latency)[0])
        many.append(measure(command, 10 * arguments.serial_objects, arguments.latency)[0])
        ratios.append(many[-1] / serial[-1])
    print(
        f"{command:6}   {statistics.median(serial):10.1f}   {statistics.median(many):12.1f}   "
        f"{statistics.median(ratios):6.1f} ({min(ratios):.1f} to {max(ratios):.1f})",
        flush=True,
    )


def whole(command: str, objects: int, latency: float) -> None:
    """A store of many objects, in a process of its own: peak memory is a process's own."""
    per_second, first, calls = measure(command, objects, latency)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{command:6}   {objects:9,}   {objects / per_second:7.0f}   {first:5.1f}   {calls:9,}   {peak:4.0f}",
        flush=True,
    )


def serve_http(port: "multiprocessing.Queue[int]") -> None:
    """Answer listings with a page of a thousand keys, and all else with a small file."""
    key = "objects/object-0000000/cccccccccccccccccccccccccccccccc/artifact.json"
    entry = (
        f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;a&quot;</ETag>"
        "<Size>900</Size><StorageClass>STANDARD</StorageClass></Contents>"
    )
    page = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entry * _PAGE}</ListBucketResult>".encode()

    async def answer(request: web.Request) -> web.Response:
        listing = "list-type" in request.query
        return web.Response(body=page if listing else b"x" * 900, content_type="application/xml")

    async def run() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port.put(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


def client_cost(reads: int) -> None:
    """Processor time of this process for a small file, and for a page of a listing."""
    processes = multiprocessing.get_context("spawn")
    port = processes.Queue()
    server = processes.Process(target=serve_http, args=(port,), daemon=True)
    server.start()
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
    with mock.patch.dict(os.environ, keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port.get(timeout=60)}"}):
        store = ArtifactStore("s3://bucket/store")
        costs = []
        for count, call in ((reads, store.current), (reads // 20, lambda _: list(store.object_ids()))):
            with ThreadPoolExecutor(parallel.THREADS) as threads:
                # The connections.
                list(threads.map(call, ["object-0000000"] * parallel.THREADS))
            begun = time.process_time()
            with ThreadPoolExecutor(parallel.THREADS) as threads:
                list(threads.map(call, ["object-0000000"] * count))
            costs.append((time.process_time() - begun) / count * 1000)
    server.terminate()
    server.join()
    print(f"processor time of s3fs: {costs[0]:.2f} ms a small file, {costs[1]:.0f} ms a page of {_PAGE} keys")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.03, help="seconds a call (%(default)s)")
    parser.add_argument(
        "--serial-objects", type=int, default=200, help="in a serial run; ten times as many in parallel"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--objects", type=int, default=0, help="a whole store of so many as well, without a serial run")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--smoke", action="store_true", help="few objects, little latency: tries it all out")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.latency, arguments.serial_objects, arguments.rounds, arguments.objects = 0.002, 20, 1, 500
    print("           serial/s     parallel/s    ratio", flush=True)
    for command in arguments.commands:
        compare(command, arguments)
    if arguments.objects:
        print("             objects   seconds   first       calls   peak MiB", flush=True)
        for command in arguments.commands:
            child = multiprocessing.get_context("spawn").Process(
                target=whole, args=(command, arguments.objects, arguments.latency)
            )
            child.start()
            child.join()
            if child.exitcode:
                raise SystemExit(child.exitcode)
    client_cost(100 if arguments.smoke else 2000)


if __name__ == "__main__":
    main()
