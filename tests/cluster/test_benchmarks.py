"""The benchmarks of scale, tried out: they reach into parts that change."""

import os
import subprocess
import sys

import pytest
from documents import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("store.py", ["ratio", "peak MiB", "processor time of s3fs"]),
        ("routing.py", ["found in:", "spilled:", "router:"]),
        ("sizing.py", ["its commit", "GPU hours"]),
        ("control_plane.py", ["leases/s", "queue's core"]),
        ("pictures.py", ["pictures/s", "driver's MiB"]),
    ],
)
def test_a_benchmark_in_miniature(cluster, script, words, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--smoke"]
    environment = os.environ | {"RAY_ADDRESS": cluster}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(word in done.stdout for word in words), done.stdout
