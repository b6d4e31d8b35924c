"""The Serve application with two generators, over a store in a bucket."""

import base64
import io
import json
import os
import random
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import httpx2
import monitoring
import numpy as np
import pytest
import ray
import torch
from conftest import Storage, ray_processes
from PIL import Image
from random_store import commit, digest_of
from under_fire import STYLES, Catalog, draw_alone, least_difference

from objdrive.adapters.artifact import ArtifactKey
from objdrive.adapters.store import ArtifactStore
from objdrive.base.stable_diffusion import Base
from objdrive.pictures import to_pictures
from objdrive.sampling.requests import DrawRequest
from serve.metrics import MEASURED, READ

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

OBJECTS = [f"mug-{number}" for number in range(6)]
GENERATORS, BATCH, QUEUE = 2, 2, 4
ADMITTED = GENERATORS * (BATCH + QUEUE) + QUEUE
"""Requests that the application takes at once: in the generators, and at the ingress."""
SLOTS = 4
PATIENCE = 120


@dataclass
class Application:
    url: str
    store: ArtifactStore
    base: Base
    client: httpx2.Client
    settings: dict[str, str]

    def ask(self, **asked: Any) -> httpx2.Response:
        options = {name: asked.pop(name) for name in ("headers", "timeout") if name in asked}
        asked = {"prompt": "a photo of {}", "model": "mug-0", "seed": 1} | asked
        return self.client.post(f"{self.url}/v1/images/generations", json=asked, **options)

    def stream(self, **asked: Any) -> AbstractContextManager[httpx2.Response]:
        asked = {"prompt": "a photo of {}", "model": "mug-0", "seed": 1, "stream": True} | asked
        return self.client.stream("POST", f"{self.url}/v1/images/generations", json=asked)

    def until(self, wanted: Any, **asked: Any) -> httpx2.Response:
        """Ask until the answer is as wanted."""
        deadline = time.monotonic() + PATIENCE
        while not wanted(answer := self.ask(**asked)):
            assert time.monotonic() < deadline, answer.text[:500]
        return answer


@pytest.fixture(scope="module")
def application(
    cluster: str, sd15: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Application]:
    from ray import serve

    from serve.app import build

    snapshot, clip = (str(path) for path in sd15)
    base = Base.load(snapshot, clip=clip, device="cpu", dtype=torch.float32)
    # A bucket of its own for each module that serves: they share the storage.
    bucket = tmp_path_factory.mktemp("serving").name
    fsspec.filesystem("s3").mkdir(bucket)
    store = ArtifactStore(f"s3://{bucket}/store")
    for object_id in OBJECTS:
        commit(store, base, object_id)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings = {"store": store.url, "base": snapshot, "clip": clip, "no_auth": "true", "generators": str(GENERATORS)}
    limits = {
        "batch_size": str(BATCH),
        "queue_limit": str(QUEUE),
        "slots": str(SLOTS),
        "threads": "1",
        "refresh_seconds": "1",
    }
    settings |= limits
    serve.run(build(settings), name="objdrive")
    # A connection for each request, as from as many clients.
    with httpx2.Client(
        timeout=PATIENCE, limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    ) as client:
        application = Application(f"http://127.0.0.1:{port}", store, base, client, settings)
        application.until(drawn)
        yield application
    serve.shutdown()


def drawn(answer: httpx2.Response) -> bool:
    return answer.status_code == 200


def code(answer: httpx2.Response) -> str:
    return answer.json()["error"]["code"]


def png(answer: httpx2.Response) -> bytes:
    assert answer.status_code == 200, answer.text[:500]
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def events(stream: httpx2.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]


def picture(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64)))).astype(int)


def test_draws_streams_and_links(application: Application) -> None:
    drawn = application.ask(headers={"x-request-timeout-seconds": "0.001"})
    assert drawn.headers["x-objdrive-digest"] == digest_of("mug-0")
    streamed = application.ask(stream=True, partial_images=1)
    assert streamed.text.count("event: image_generation.partial_image") == 1
    assert base64.b64encode(png(drawn)).decode() in streamed.text
    link = application.ask(response_format="url").json()["data"][0]["url"]
    assert httpx2.get(link, timeout=PATIENCE).content == png(drawn)
    pair = application.ask(model="mug-1+mug-2", prompt="{} and {}")
    assert pair.headers["x-objdrive-digest"] == f"{digest_of('mug-1')},{digest_of('mug-2')}"
    assert code(application.ask(model="mug-9")) == "unknown_object"
    assert application.ask(prompt="").status_code == 400
    models = httpx2.get(f"{application.url}/v1/models", timeout=PATIENCE).json()["data"]
    assert [model["id"] for model in models] == OBJECTS


def test_a_retrained_object_is_swapped_and_a_removed_one_is_gone(application: Application) -> None:
    old = application.ask(model="mug-5")
    new = commit(application.store, application.base, "mug-5", version=1)
    swapped = application.until(lambda answer: answer.headers["x-objdrive-digest"] == new, model="mug-5")
    assert png(swapped) != png(old)
    fsspec.filesystem("s3").rm(f"{application.store.url}/objects/mug-5", recursive=True)
    gone = application.until(lambda answer: answer.status_code != 200, model="mug-5")
    assert gone.status_code == 404


class FireClient:
    """Asks for one picture after the other; now and then it hangs up, or an object is retrained."""

    def __init__(self, application: Application, catalog: Catalog, names: list[str], number: int) -> None:
        self._application, self._catalog, self._names = application, catalog, names
        self._dice = random.Random(number)
        self.answers: list[tuple[dict[str, Any], httpx2.Response]] = []
        self.hung_up = 0
        self.too_late = 0

    def draw(self, count: int) -> None:
        for _ in range(count):
            if self._dice.random() < 0.1:
                self._catalog.retrain(self._dice.randrange(len(self._names)))
            names = [self._names[number] for number in self._catalog.some(self._dice)]
            prompt = " and ".join(["{}"] * len(names))
            asked = {"model": "+".join(names), "prompt": prompt, **self._dice.choice(STYLES)}
            if self._dice.random() < 0.1:
                self._hang_up(asked)
            else:
                self.answers.append((asked, self._application.until(self._drawn_at_last, **asked)))

    @staticmethod
    def _drawn_at_last(answer: httpx2.Response) -> bool:
        assert answer.status_code in (200, 429), answer.text[:500]
        return drawn(answer)

    def _hang_up(self, asked: dict[str, Any]) -> None:
        if self._dice.random() < 0.5:
            with self._application.stream(**asked) as answer:
                self._count_as_hung_up(hung_up=answer.status_code == 200)
            return
        try:
            self._application.ask(timeout=httpx2.Timeout(PATIENCE, read=0.05), **asked)
        except httpx2.ReadTimeout:
            self._count_as_hung_up(hung_up=True)
        else:
            self._count_as_hung_up(hung_up=False)

    def _count_as_hung_up(self, *, hung_up: bool) -> None:
        """Unless the answer, or a refusal, came first."""
        self.hung_up += hung_up
        self.too_late += not hung_up


def test_every_picture_is_the_one_drawn_alone(application: Application) -> None:
    # More than all the generators' slots hold together.
    names = [f"cup-{number:02}" for number in range(GENERATORS * SLOTS + 2)]
    requests, clients = 320, 16

    def commit_version(number: int, version: int) -> ArtifactKey:
        name = names[number]
        return ArtifactKey(name, commit(application.store, application.base, name, version=version, previews={}))

    catalog = Catalog(application.store, len(names), commit_version)
    fire = [FireClient(application, catalog, names, number) for number in range(clients)]
    with ThreadPoolExecutor(clients) as threads:
        for done in [threads.submit(client.draw, requests // clients) for client in fire]:
            done.result()
    answers = [one for client in fire for one in client.answers]
    assert len(answers) + sum(client.hung_up + client.too_late for client in fire) == requests
    assert sum(client.hung_up for client in fire) > requests * 0.05
    assert catalog.retrainings > requests * 0.05
    digests = {digest for _, answer in answers for digest in answer.headers["x-objdrive-digest"].split(",")}
    assert len(digests) > len(names)
    assert_drawn_as_alone(answers, application)


def assert_drawn_as_alone(answers: list[tuple[dict[str, Any], httpx2.Response]], application: Application) -> None:
    base, expected = application.base, {}
    for asked, answer in answers:
        names, digests = asked["model"].split("+"), answer.headers["x-objdrive-digest"].split(",")
        objects = tuple(ArtifactKey(*key) for key in zip(names, digests, strict=True))
        request = DrawRequest(objects=objects, seed=1, **{k: v for k, v in asked.items() if k != "model"})
        if request not in expected:
            latents = draw_alone(base, application.store, request)
            [alone] = to_pictures(base.decode_latents(latents[None]))
            expected[request] = torch.from_numpy(np.array(alone)).float()
        drawn = Image.open(io.BytesIO(png(answer)))
        assert drawn.text["objdrive:model"] == "+".join(map(str, objects))
        assert np.abs(np.asarray(drawn) - expected[request].numpy()).max() <= 4, request
    # Were two of them alike, equality would prove nothing.
    assert least_difference(expected) > 8


def test_a_dead_generator_costs_no_picture(application: Application) -> None:
    # More than one generator is sent before the router spills to the other: both draw.
    asked = [{"model": f"mug-{number % 4}", "seed": number, "steps": 30} for number in range(8)]
    generators = ray_processes("Generator")
    assert len(generators) == GENERATORS
    with ExitStack() as stack:
        streams = [stack.enter_context(application.stream(partial_images=3, **one)) for one in asked]
        assert [stream.status_code for stream in streams] == [200] * len(asked)
        os.kill(generators[0].pid, signal.SIGKILL)
        with ThreadPoolExecutor(len(asked)) as threads:
            told = list(threads.map(events, streams))
    for one, its in zip(asked, told, strict=True):
        assert "error" not in its[-1]
        assert [event.get("partial_image_index") for event in its] == [0, 1, 2, None]
        alone = picture(base64.b64encode(png(application.ask(**one))).decode())
        assert np.abs(picture(its[-1]["b64_json"]) - alone).max() <= 4
    wait_for_generators(killed=generators[0].pid)
    assert application.ask().status_code == 200


def wait_for_generators(*, killed: int) -> None:
    """Until all generators run, without the one that was killed."""
    from ray import serve

    deadline = time.monotonic() + 2 * PATIENCE
    while True:
        running = serve.status().applications["objdrive"].deployments["Generator"].replica_states
        processes = {process.pid for process in ray_processes("Generator")}
        # Until Serve has noticed, the dead one counts as running.
        if running == {"RUNNING": GENERATORS} and len(processes - {killed}) == GENERATORS:
            return
        assert time.monotonic() < deadline, (running, processes)
        time.sleep(0.2)


def test_objects_in_use_are_drawn_while_the_store_is_away(application: Application, storage: Storage) -> None:
    before = png(application.ask(model="mug-1"))
    storage.stop()
    try:
        assert len(png(application.ask(model="mug-1"))) == pytest.approx(len(before), rel=0.05)
        cold = application.ask(model="mug-7")
        assert (cold.status_code, code(cold)) == (503, "store_unreachable")
        assert "retry-after" in cold.headers
    finally:
        storage.start()
    commit(application.store, application.base, "mug-7")
    back = application.until(lambda answer: answer.status_code == 200, model="mug-7")
    assert back.headers["x-objdrive-digest"] == digest_of("mug-7")


def test_too_many_requests_are_refused_and_the_others_drawn(application: Application) -> None:
    def ask(seed: int) -> tuple[httpx2.Response, float, float]:
        asked = time.monotonic()
        return application.ask(seed=seed, steps=10), asked, time.monotonic()

    with ThreadPoolExecutor(10 * ADMITTED) as threads:
        answers = list(threads.map(ask, range(10 * ADMITTED)))
    statuses = Counter(answer.status_code for answer, _, _ in answers)
    assert set(statuses) == {200, 429}, statuses
    assert statuses[200] >= GENERATORS * BATCH
    for answer, _, _ in answers:
        if answer.status_code == 429:
            assert code(answer) == "queue_full"
            assert int(answer.headers["retry-after"]) >= 1
    # Who is let in finds fewer than ADMITTED before it, and some more are drawn while it is on its way; were all let
    # in, the last would see nine times as many drawn.
    waits = [(asked, done) for answer, asked, done in answers if drawn(answer)]
    before = [sum(asked < other <= done for _, other in waits) for asked, done in waits]
    assert max(before) <= 2 * ADMITTED, sorted(before)
    assert application.ask().status_code == 200


def test_ray_exports_what_dashboards_and_alerts_are_made_of(application: Application) -> None:
    assert application.ask().status_code == 200
    assert code(application.ask(model="mug-99")) == "unknown_object"
    servers = {**MEASURED, **{name: reading.metric for name, reading in READ.items()}}
    wanted = {series for name, metric in servers.items() for series in monitoring.series_of(name, metric)}
    # Those of GPUs and of the autoscaler aside, which are not here.
    wanted |= {name for name in monitoring.RAY_METRICS if not re.match("autoscaler_|ray_node_g", name)}
    deadline = time.monotonic() + PATIENCE
    while missing := wanted - (exported := monitoring.scraped([ray.nodes()[0]["MetricsExportPort"]])).keys():
        assert time.monotonic() < deadline, missing
        time.sleep(1.0)
    known = monitoring.known_series()
    for name in wanted:
        for labels, _ in exported[name]:
            assert known[name] - monitoring.RAY_LABELS - {"le"} <= labels.keys(), name
    outcomes = {labels["outcome"] for labels, _ in exported["ray_objdrive_http_requests_total"]}
    assert outcomes >= {"ok", "unknown_object"}
    assert {value for _, value in exported["ray_objdrive_batch_limit"]} == {BATCH}
    healthy = exported["ray_serve_deployment_replica_healthy"]
    assert {labels["deployment"] for labels, value in healthy if value == 1} == {"Api", "Generator"}


def test_what_is_being_drawn_is_finished_before_the_end(application: Application) -> None:
    from ray import serve

    with application.stream(steps=60, partial_images=1) as stream, ThreadPoolExecutor(1) as threads:
        assert stream.status_code == 200
        end = threads.submit(serve.delete, "objdrive")
        assert events(stream)[-1]["type"] == "image_generation.completed"
        end.result()
    assert application.ask().status_code in (404, 503)
