"""What happens to a service that is in use while it is changed."""

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ray_processes
from test_serving import GENERATORS, PATIENCE, Application, application  # noqa: F401

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

CLIENTS = 4


def test_a_rolling_update_under_load_fails_no_request(application: Application) -> None:  # noqa: F811
    from ray import serve

    from serve.app import build

    stop = threading.Event()
    answers: Counter[int] = Counter()

    def ask_on_and_on(client: int) -> None:
        seed = 0
        while not stop.is_set():
            seed += 1
            answers[application.ask(model=f"mug-{client}", seed=seed, steps=5).status_code] += 1

    before = {process.pid for process in ray_processes("Generator")}
    assert len(before) == GENERATORS
    with ThreadPoolExecutor(CLIENTS) as threads:
        clients = [threads.submit(ask_on_and_on, number) for number in range(CLIENTS)]
        try:
            until(lambda: answers[200] >= CLIENTS)
            serve.run(build(application.settings | {"refresh_seconds": "2"}), name="objdrive")
            until(lambda: not before & {process.pid for process in ray_processes("Generator")})
            drawn = answers[200]
            until(lambda: answers[200] >= drawn + CLIENTS)
        finally:
            stop.set()
        for client in clients:
            client.result()
    assert set(answers) == {200}, answers


def until(there) -> None:
    deadline = time.monotonic() + 2 * PATIENCE
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.1)
