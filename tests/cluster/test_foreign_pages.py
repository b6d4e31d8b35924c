"""Whether the page of another site gets anything of a server without keys, in a real browser: Chromium."""

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from playwright.sync_api import Error, Page, sync_playwright

from serve.local import local_app
from serve.settings import Settings

pytestmark = pytest.mark.cluster

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NAMES = ("shop.example", "a{b}.example", "a`b.example", "a_b.example")


@contextmanager
def listening(settings: Settings) -> Iterator[int]:
    with local_app(settings) as (app, _), socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def page() -> Iterator[Page]:
    """A tab of a browser for which every name leads to this machine."""
    if CHROMIUM is None:
        pytest.fail("this is tested in Chromium, and there is none: install it (Debian: apt-get install chromium)")
    options = ["--no-sandbox", "--host-resolver-rules=MAP *.example 127.0.0.1"]
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=options) as browser:
        yield browser.new_page()


def test_no_name_of_another_site_opens_the_server(tmp_path, page) -> None:
    settings = Settings.of(store=str(tmp_path), base="tiny64", no_auth=True, threads=1)
    with listening(settings) as port:
        assert page.goto(f"http://localhost:{port}/v1/models").status == 200
        asked = 0
        for name in NAMES:
            for path in ("/v1/models", "/readyz", "/metrics", "/"):
                try:
                    answer = page.goto(f"http://{name}:{port}{path}")
                except Error:
                    # The browser itself takes it for no address.
                    continue
                asked += 1
                assert answer.status in (400, 401), (name, path, answer.text())
        assert asked >= 4
