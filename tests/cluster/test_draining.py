"""A node that is told to stop, as Kubernetes stops a pod, drops no request: what infra/kuberay/base relies on."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ENVIRONMENT
from test_ray_job import PATIENCE, RAY, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

DRAIN_SECONDS = 25
CLIENTS = 8


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a node as KubeRay does: ``ray start --block`` with these options, in an environment of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {**ENVIRONMENT, "HOME": str(tmp_path), "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(PATIENCE)}
    environment |= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_SECONDS)}
    nodes: list[subprocess.Popen[bytes]] = []

    def start(*options: str) -> subprocess.Popen[bytes]:
        command = [RAY, "start", "--block", "--object-store-memory", str(100 * 2**20), *options]
        command += ["--dashboard-agent-listen-port", str(free_port())]
        with (tmp_path / f"node-{len(nodes)}.log").open("w") as log:
            node = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        nodes.append(node)
        return node

    yield start
    for node in nodes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
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


def test_a_node_that_is_told_to_stop_drops_no_request(
    start_node: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    gcs, dashboard, port = free_port(), free_port(), free_port()
    start_node(
        "--head", "--num-cpus", "0", "--port", str(gcs), "--dashboard-port", str(dashboard),
        "--temp-dir", tempfile.mkdtemp(prefix="ray-"),
    )  # fmt: skip
    serve = [str(Path(sys.executable).with_name("serve")), "deploy", "--address", f"http://127.0.0.1:{dashboard}"]
    config = {
        # Nodes on one machine share its ports.
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [{"name": "slow", "import_path": "slow_answers:app"}],
    }
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    until(lambda: not subprocess.run([*serve, str(tmp_path / "serve.yaml")], capture_output=True).returncode)
    url = f"http://127.0.0.1:{port}/"
    first = start_node("--address", f"127.0.0.1:{gcs}", "--num-cpus", "1")
    until(lambda: answers(url))
    start_node("--address", f"127.0.0.1:{gcs}", "--num-cpus", "1")
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


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=60).status == 200)
    except OSError:
        return False
