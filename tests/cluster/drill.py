"""A Ray cluster of several nodes on one machine, whose nodes are lost, cut off and brought back for real."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ENVIRONMENT
from ray.cluster_utils import Cluster
from ray.experimental import internal_kv

_STORE_BYTES = 100 * 2**20
# A node that gives no sign of life for half a minute is dead; one that refuses connections, in seconds.
_HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 5,
}


class Node:
    """A node, with all the processes that it started."""

    def __init__(self, node: Any) -> None:
        self.node = node
        self._raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)

    def processes(self) -> list[psutil.Process]:
        return [self._raylet, *self._raylet.children(recursive=True)]

    def runs(self, pid: int) -> bool:
        return any(process.pid == pid for process in self.processes())

    def kill(self) -> None:
        self._each(psutil.Process.kill)

    def cut_off(self) -> None:
        self._each(psutil.Process.suspend)

    def bring_back(self) -> None:
        self._each(psutil.Process.resume)

    def _each(self, what: Any) -> None:
        with suppress(psutil.NoSuchProcess):
            for process in self.processes():
                with suppress(psutil.NoSuchProcess):
                    what(process)


class Drill:
    """A head node without cores, as KubeRay starts it, and the nodes that a test adds."""

    def __init__(self, head: Cluster) -> None:
        self._cluster = head
        self._nodes: list[Node] = []
        self.address = str(head.address)

    def add(self, cpus: int = 1, gpus: int = 0) -> Node:
        size = {"num_cpus": cpus, "num_gpus": gpus, "object_store_memory": _STORE_BYTES}
        try:
            node = self._cluster.add_node(**size)
        except Exception:
            # Ray waits half a minute for a node: too short on a busy machine.
            node = self._cluster.add_node(**size)
        self._nodes.append(Node(node))
        return self._nodes[-1]

    def remove_all(self) -> None:
        for node in self._nodes:
            node.bring_back()
            node.kill()
            self._cluster.remove_node(node.node, allow_graceful=False)
        self._nodes.clear()


@contextmanager
def drill_cluster(home: Path) -> Iterator[Drill]:
    """A cluster that has only its head at first."""
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
    ):
        # In the default folder it would leave its address behind, for which other clusters' processes would take it.
        for name, value in (ENVIRONMENT | {"HOME": str(home), "RAY_TMPDIR": folder}).items():
            patch.setenv(name, value)
        # A head that is started makes its own keys this process's, which other clusters' tests still need.
        patch.setattr(internal_kv, "global_gcs_client", internal_kv.global_gcs_client)
        head = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "object_store_memory": _STORE_BYTES,
                "_system_config": _HEALTH,
            },
        )
        drill = Drill(head)
        try:
            yield drill
        finally:
            drill.remove_all()
            head.remove_node(head.head_node, allow_graceful=False)
