import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest
import yaml
from random_store import commit

from objdrive.adapters.store import ArtifactStore
from objdrive.cli import main
from serve.auth import read_keys

ROOT = Path(__file__).parents[2]


@pytest.fixture
def started():
    """Start ``objdrive serve``; ``started(*options)`` returns the process and its address once it is ready."""
    processes = []

    def start(*options):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "objdrive.cli", "serve", "--port", str(port), *map(str, options)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        processes.append(process)
        url = f"http://127.0.0.1:{port}"
        while True:
            assert process.poll() is None, process.stdout.read()
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{url}/readyz").status_code == 200:
                    return process, url
            time.sleep(0.1)

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.cluster
def test_serves_and_finishes_what_it_draws_when_told_to_stop(started, tmp_path, small_base, capsys):
    store = ArtifactStore(str(tmp_path / "store"))
    commit(store, small_base, "mug-1")
    assert main(["api-key", "shop", "--prefix", "mug-"]) == 0
    printed = capsys.readouterr().out
    secret = re.search(r"od-\S+", printed)[0]
    keys = tmp_path / "keys.yaml"
    keys.write_text("keys:\n" + printed)
    assert [(key.name, key.prefix) for key in read_keys(keys)] == [("shop", "mug-")]

    options = ["--store", store.url, "--base", small_base.name, "--clip", small_base.files.clip, "--api-keys", keys]
    process, url = started(*options, "--set", "batch_size=2", "--set", "threads=1")
    answers = []

    def draw():
        asked = {"model": "mug-1", "prompt": "{}", "steps": 60}
        headers = {"authorization": f"Bearer {secret}"}
        answers.append(httpx2.post(f"{url}/v1/images/generations", json=asked, headers=headers, timeout=120))

    thread = threading.Thread(target=draw)
    thread.start()
    while "objdrive_engine_running 1.0" not in httpx2.get(f"{url}/metrics").text:
        assert thread.is_alive()
    process.send_signal(signal.SIGTERM)
    thread.join()
    assert answers[0].status_code == 200
    process.wait(60)
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/healthz")


def test_answers_without_keys_only_on_loopback(capsys):
    assert main(["serve", "--store", "s", "--no-auth", "--host", "0.0.0.0"]) == 2
    assert "--api-keys" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", "--store", "s"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "batch_size"], "NAME=VALUE"),
        (["--set", "batchsize=3"], "batchsize"),
        (["--set", "no_auth=false"], "--no-auth"),
        (["--base", "no/such base"], "no/such base"),
    ],
)
def test_says_what_is_wrong(tmp_path, capsys, options, message):
    assert main(["serve", "--store", str(tmp_path), "--no-auth", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_name_that_no_key_can_have(capsys):
    assert main(["api-key", "two words"]) == 2
    assert "two words" in capsys.readouterr().err
    assert yaml.safe_load(capsys.readouterr().out) is None


@pytest.mark.parametrize("name", ["2024", "1e5", "true", "null", "0x10", "shop"])
def test_the_entry_of_a_key_of_any_name_is_read(tmp_path, capsys, name):
    assert main(["api-key", name, "--prefix", name]) == 0
    (tmp_path / "keys.yaml").write_text("keys:\n" + capsys.readouterr().out)
    assert [(key.name, key.prefix) for key in read_keys(tmp_path / "keys.yaml")] == [(name, name)]
