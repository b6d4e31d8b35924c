"""Nodes under a service that is in use: what infra/kuberay/base relies on when a pod is stopped, and when one dies."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ENVIRONMENT
from test_ray_job import PATIENCE, RAY, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

StartNode = Callable[..., subprocess.Popen[bytes]]
DRAIN_SECONDS = 25
CLIENTS = 8


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[StartNode]:
    """Start a node as KubeRay does: ``ray start --block`` with these options, in an environment of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {**ENVIRONMENT, "HOME": str(tmp_path), "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(PATIENCE)}
    environment |= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_SECONDS)}
    nodes: list[subprocess.Popen[bytes]] = []

    def start(*options: str, **further: str) -> subprocess.Popen[bytes]:
        command = [RAY, "start", "--block", "--object-store-memory", str(100 * 2**20), *options]
        command += ["--dashboard-agent-listen-port", str(free_port())]
        with (tmp_path / f"node-{len(nodes)}.log").open("w") as log:
            node = subprocess.Popen(command, env=environment | further, stdout=log, stderr=log, start_new_session=True)
        nodes.append(node)
        return node

    yield start
    for node in nodes:
        kill(node)


def kill(node: subprocess.Popen[bytes]) -> None:
    """Kill all the processes of a node at once, as the loss of its pod does."""
    if node.poll() is None:
        for process in [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    node.wait()


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.5)


class Load:
    """Clients that ask again and again: how often each process has answered, and what went wrong."""

    def __init__(self, url: str) -> None:
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []
        self._url = url
        self._stop = threading.Event()
        self._clients = [threading.Thread(target=self._ask, daemon=True) for _ in range(CLIENTS)]

    def __enter__(self) -> "Load":
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        for client in self._clients:
            client.join()

    def _ask(self) -> None:
        while not self._stop.is_set():
            try:
                with urllib.request.urlopen(self._url, timeout=60) as answer:
                    self.answers[answer.read().decode()] += 1
            except OSError as error:
                self.failures.append(str(error))


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """A Redis server of its own, where a head keeps what it must know when it is back; its address."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.fail(
            "a head keeps its memory in Redis, and there is none: install it (Debian: apt-get install redis-server)"
        )
    port = free_port()
    command = [program, "--port", str(port), "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        yield f"127.0.0.1:{port}"
        server.terminate()


class Service:
    """`slow_answers` on nodes that a test starts."""

    def __init__(self, folder: Path, start_node: StartNode) -> None:
        self._folder, self._start_node = folder, start_node
        self._gcs, self._dashboard, self.port = free_port(), free_port(), free_port()

    def start_head(self, **environment: str) -> subprocess.Popen[bytes]:
        return self._start_node(
            "--head", "--num-cpus", "0", "--port", str(self._gcs), "--dashboard-port", str(self._dashboard),
            "--temp-dir", tempfile.mkdtemp(prefix="ray-"), **environment,
        )  # fmt: skip

    def start_worker(self, **environment: str) -> subprocess.Popen[bytes]:
        return self._start_node("--address", f"127.0.0.1:{self._gcs}", "--num-cpus", "1", **environment)

    def deploy(self, *, proxies: str, replicas: int) -> None:
        config = {
            "proxy_location": proxies,
            "http_options": {"host": "127.0.0.1", "port": self.port},
            "applications": [
                {
                    "name": "slow",
                    "import_path": "slow_answers:app",
                    "deployments": [{"name": "Slow", "num_replicas": replicas}],
                }
            ],
        }
        path = self._folder / "serve.yaml"
        path.write_text(yaml.safe_dump(config))
        until(lambda: not self._serve("deploy", str(path)).returncode)

    def replicas(self) -> int:
        """How many replicas run, by a head that answers."""
        told = yaml.safe_load(self._serve("status").stdout) or {}
        deployments = told.get("applications", {}).get("slow", {}).get("deployments", {})
        return int(deployments.get("Slow", {}).get("replica_states", {}).get("RUNNING", 0))

    def _serve(self, what: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("serve")), what]
        command += ["--address", f"http://127.0.0.1:{self._dashboard}", *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_node_that_is_told_to_stop_drops_no_request(start_node: StartNode, tmp_path: Path) -> None:
    service = Service(tmp_path, start_node)
    service.start_head()
    # Nodes on one machine share its ports.
    service.deploy(proxies="HeadOnly", replicas=2)
    url = f"http://127.0.0.1:{service.port}/"
    first = service.start_worker()
    until(lambda: answers(url))
    service.start_worker()
    with Load(url) as load:
        until(lambda: len(load.answers) == 2)
        # What a pod's first process gets when the pod is deleted.
        first.terminate()
        first.wait(timeout=DRAIN_SECONDS + 30)
        before = load.answers.copy()
        until(lambda: load.answers.total() > before.total() + 2 * CLIENTS)
        after = load.answers - before
    assert load.failures == []
    assert len(after) == 1


def test_a_service_answers_while_its_head_is_dead_and_is_in_hand_again_afterwards(
    redis: str, start_node: StartNode, tmp_path: Path
) -> None:
    service = Service(tmp_path, start_node)
    on_worker = free_port()
    environment = {"RAY_REDIS_ADDRESS": redis, "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(on_worker)}
    # As long as KubeRay has workers wait for their head.
    environment["RAY_gcs_rpc_server_reconnect_timeout_s"] = "600"
    head = service.start_head(**environment)
    service.deploy(proxies="EveryNode", replicas=1)
    service.start_worker(**environment)
    until(lambda: service.replicas() == 1)
    url = f"http://127.0.0.1:{on_worker}/"
    until(lambda: answers(url))
    with Load(url) as load:
        until(lambda: load.answers.total() >= CLIENTS)
        kill(head)
        without = load.answers.total()
        until(lambda: load.answers.total() > without + 2 * CLIENTS)
        service.start_head(**environment)
        until(lambda: service.replicas() == 1)
        back = load.answers.total()
        until(lambda: load.answers.total() > back + 2 * CLIENTS)
    assert load.failures == []
    # By the same process all the while.
    assert len(load.answers) == 1
    # It takes changes again.
    service.start_worker(RAY_REDIS_ADDRESS=redis, RAY_SERVE_WORKER_PROXY_HTTP_PORT=str(free_port()))
    service.deploy(proxies="EveryNode", replicas=2)
    until(lambda: service.replicas() == 2)


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=60).status == 200)
    except OSError:
        return False
