"""Make docs/page.png, the page in Chromium over the store that ``make demo`` filled.

``python docs/make_page_picture.py demo-store`` needs Playwright (of the extra ``dev``) and a Chromium on the path.
"""

import re
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from serve.local import local_app
from serve.settings import Settings

RUNS = (("sailboat-01", "under water", 3), ("cupcake-01", "in the snow", 3))
"""Object, context and first seed of what is drawn; the last run is on top."""
PICTURES = 2
WIDTH, HEIGHT = 1280, 1000
PATIENCE = 120_000  # milliseconds


def main(url: str) -> None:
    """Draw each of `RUNS` on the page, beside the photo and the base alone, and take the picture."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("there is no Chromium: install it (Debian: apt-get install chromium)")
    out = Path(__file__).with_name("page.png")
    with listening(url) as address, sync_playwright() as playwright:
        # Chromium's sandbox does not start as root, as which containers run; only this repository's page is loaded.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        expect.set_options(timeout=PATIENCE)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(address)
        for run in RUNS:
            draw(page, *run)
        page.screenshot(path=out)
        browser.close()
    with Image.open(out) as picture:
        # 256 colours make it a quarter of the size, and are hardly seen.
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)


@contextmanager
def listening(url: str) -> Iterator[str]:
    """Serve a store on a free port: the page's address."""
    with local_app(Settings.of(store=url, no_auth=True)) as (app, _), socket.create_server(("127.0.0.1", 0)) as free:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [free]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{free.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


def draw(page: Page, object_id: str, context: str, seed: int) -> None:
    """Draw an object in a context, and wait until its pictures are finished."""
    page.get_by_role("option", name=re.compile(f"^{object_id}")).click()
    page.get_by_role("button", name=context, exact=True).click()
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_label("Pictures").select_option(str(PICTURES))
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.get_by_role("heading", name=f"a photo of {object_id} {context}")).to_be_visible()
    newest = page.locator("article").first
    expect(newest.get_by_role("button", name="Download")).to_have_count(PICTURES + 1)
    expect(page.get_by_text(re.compile("^Done in"))).to_be_visible()


if __name__ == "__main__":
    main(sys.argv[1])
