"""`ray job submit` against a running cluster, as the README says."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, FAST, ROOT, assert_whole

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

RAY = str(Path(sys.executable).with_name("ray"))
PATIENCE = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A head node of its own with a job server; the server's address and the environment to talk to it."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    path = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    # Another cluster may be starting beside it.
    patience = {"RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(PATIENCE)}
    environment |= {**ENVIRONMENT, **patience, "HOME": str(tmp_path), "PATH": path}
    dashboard = free_port()
    command = [RAY, "start", "--head", "--block", "--num-cpus", "2", "--object-store-memory", str(200 * 2**20)]
    command += ["--port", str(free_port()), "--dashboard-port", str(dashboard)]
    # Another node on this machine, such as the other tests', has the default port of this one's job agent.
    command += ["--dashboard-agent-listen-port", str(free_port())]
    # In the default folder it would leave its address behind, for which other clusters' processes would take it.
    command += ["--temp-dir", tempfile.mkdtemp(prefix="ray-")]
    with (tmp_path / "head.log").open("w") as log:
        node = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + PATIENCE
    while subprocess.run([RAY, "job", "list", "--address", address], env=environment, capture_output=True).returncode:
        assert node.poll() is None, (tmp_path / "head.log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "head.log").read_text()
    yield address, environment
    os.killpg(node.pid, signal.SIGKILL)
    node.wait()


def test_a_submitted_job_commits_the_manifest(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, environment = head
    command = [RAY, "job", "submit", "--address", address, "--working-dir", str(ROOT), "--", "python"]
    command += ["jobs/batch_personalize.py", "examples/catalog/manifest.csv", "--limit", "2"]
    command += ["--store", str(tmp_path / "store"), *(word for setting in FAST for word in ("--set", setting))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rows in" in done.stdout
    assert "2 committed" in done.stdout
    assert_whole(tmp_path / "store", ["high-heel-01", "jeans-01"])
