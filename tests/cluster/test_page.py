"""The page in a real browser: Chromium, driven by Playwright, against the API over an engine in this process."""

import base64
import io
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect, sync_playwright
from random_store import commit

from objdrive.adapters.store import ArtifactStore
from objdrive.base.stable_diffusion import Base
from serve.auth import new_key
from serve.local import local_app
from serve.settings import Settings

pytestmark = pytest.mark.cluster

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL_CLASS = "<img src=x onerror='window.hacked=1'>"
EVIL_TITLE = "</span><script>window.hacked=1</script>"
STEPS = "4"
PARTIALS = 3
PATIENCE = 20_000  # milliseconds


@pytest.fixture(scope="module")
def base(sd15: tuple[Path, Path]) -> Base:
    snapshot, clip = sd15
    return Base.load(str(snapshot), clip=str(clip), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def store(base: Base, tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    """28 mugs, 28 roses, and an object whose row of the manifest attacks the page."""
    store = ArtifactStore(str(tmp_path_factory.mktemp("shop")))
    for kind in ("mug", "rose"):
        for number in range(28):
            row = {"title": f"{kind.title()} no. {number}"}
            commit(store, base, f"{kind}-{number:02}", class_name=kind, row=row)
    commit(store, base, "zz-evil", class_name=EVIL_CLASS, row={"title": EVIL_TITLE, "tags": [EVIL_TITLE]})
    return store


@pytest.fixture(scope="module")
def open_shop(sd15: tuple[Path, Path], store: ArtifactStore) -> Iterator[Callable[..., str]]:
    """Start a server over the store on a free port, with more settings: its address."""
    snapshot, clip = sd15
    with ExitStack() as servers:

        def start(**settings: object) -> str:
            known = Settings(
                store=store.url, base=str(snapshot), clip=str(clip), batch_size=4, slots=4, threads=1, **settings
            )
            app, _ = servers.enter_context(local_app(known))
            return servers.enter_context(listening(app))

        yield start


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def shop(open_shop: Callable[..., str]) -> str:
    return open_shop(no_auth=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.fail("the page is tested in Chromium, and there is none: install it (Debian: apt-get install chromium)")
    # Its sandbox does not start as root, as which containers run tests; only this repository's page is loaded.
    options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
    with sync_playwright() as playwright, playwright.chromium.launch(**options) as browser:
        expect.set_options(timeout=PATIENCE)
        yield browser


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open a server's page in a context of its own. At the end, nothing may have failed in the page unnoticed."""
    contexts, errors = [], []

    def visit(
        url: str, width: int = 1280, height: int = 900, before: Callable[[Page], object] = lambda page: None
    ) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": height}, permissions=["clipboard-read", "clipboard-write"]
        )
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        # Chromium notes every answer above 399 as an error of the console.
        page.on("console", lambda note: errors.append(note.text) if is_fault(note) else None)
        before(page)
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert errors == []


def is_fault(note: ConsoleMessage) -> bool:
    return note.type == "error" and not note.text.startswith("Failed to load resource")


def objects(page: Page) -> Locator:
    return page.get_by_role("listbox").get_by_role("option")


def pick(page: Page, object_id: str) -> None:
    page.get_by_role("option", name=re.compile(f"^{object_id}")).click()


def ask(page: Page, *, seed: int = 7) -> None:
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_label("Steps").fill(STEPS)
    page.get_by_role("button", name="Draw", exact=True).click()


def figure(page: Page, caption: str) -> Locator:
    return page.locator("figure").filter(has_text=caption).first


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=int)


def drawn(page: Page, caption: str = "drawn") -> np.ndarray:
    """(R, R, 3) pixels of a finished picture."""
    expect(figure(page, caption).get_by_role("button", name="Download")).to_be_visible()
    address = figure(page, caption).locator("img").get_attribute("src")
    return pixels(base64.b64decode(address.removeprefix("data:image/png;base64,")))


def asked_for(page: Page, **fields: object) -> np.ndarray:
    """What the API draws without the page."""
    answer = page.request.post(f"{page.url}v1/images/generations", data={"seed": 7, "steps": int(STEPS)} | fields)
    assert answer.ok, answer.text()
    return pixels(base64.b64decode(answer.json()["data"][0]["b64_json"]))


def assert_fits(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


class TestCatalog:
    def test_is_browsed_searched_and_filtered(self, shop, visit):
        page = visit(shop)
        expect(objects(page)).to_have_count(48)
        expect(objects(page).first).to_have_text("mug-00mug")
        objects(page).last.scroll_into_view_if_needed()
        expect(objects(page)).to_have_count(57)
        expect(page.get_by_text("57 objects")).to_be_visible()

        page.get_by_label("Class").select_option("rose")
        expect(objects(page)).to_have_count(28)
        page.get_by_label("Search objects").fill("rose no. 2")
        expect(objects(page)).to_have_count(9)
        page.get_by_label("Search objects").fill("teapot")
        expect(page.get_by_text("Nothing matches.")).to_be_visible()

    def test_shows_what_a_manifest_holds_as_text(self, shop, visit):
        page = visit(shop)
        page.get_by_label("Search objects").fill("evil")
        expect(objects(page)).to_have_count(1)
        pick(page, "zz-evil")
        place = page.get_by_role("group", name="Objects to draw")
        for text in (EVIL_CLASS, EVIL_TITLE):
            expect(place).to_contain_text(text)
        page.get_by_label("Class").select_option(EVIL_CLASS)
        expect(objects(page)).to_contain_text([EVIL_CLASS])
        assert page.locator("[src=x]").count() == 0
        assert page.locator("script").count() == 1
        assert page.evaluate("window.hacked") is None


class TestDrawing:
    def test_one_object_with_partial_pictures_beside_its_reference_and_the_base_alone(self, shop, store, visit):
        page = visit(shop)
        page.evaluate(
            """() => {
                window.seen = [];
                new MutationObserver(changes => {
                    for (const { target } of changes)
                        if (target.matches('.run img') && target.src) seen.push(target.src);
                }).observe(document.querySelector('#runs'), { subtree: true, attributeFilter: ['src'] });
            }"""
        )
        pick(page, "mug-03")
        page.get_by_role("button", name="in the snow").click()
        expect(page.get_by_label("Prompt")).to_have_value("a photo of {} in the snow")
        ask(page)

        expect(page.get_by_text(re.compile(r"^Done in"))).to_be_visible()
        expect(page.get_by_role("heading", name="a photo of mug-03 in the snow")).to_be_visible()
        wanted = {"model": "mug-03", "prompt": "a photo of {} in the snow"}
        np.testing.assert_allclose(drawn(page), asked_for(page, **wanted), atol=2)
        np.testing.assert_allclose(drawn(page, "base alone"), asked_for(page, **wanted, adapter_scale=0), atol=2)
        assert np.abs(drawn(page) - drawn(page, "base alone")).max() > 10
        # The reference, and for both drawings the partial pictures and the last one.
        assert len(set(page.evaluate("window.seen"))) == 1 + 2 * (PARTIALS + 1)
        digest = store.current("mug-03").digest
        expect(figure(page, "drawn")).to_contain_text(f"seed 7 · {digest[:8]}")
        with page.expect_download() as download:
            figure(page, "drawn").get_by_role("button", name="Download").click()
        assert download.value.suggested_filename == "mug-03-7.png"
        np.testing.assert_array_equal(pixels(Path(download.value.path()).read_bytes()), drawn(page))

    def test_two_objects_in_one_picture(self, shop, visit):
        page = visit(shop)
        pick(page, "mug-01")
        page.get_by_role("button", name="+ Second object").click()
        pick(page, "mug-02")
        expect(page.get_by_label("Prompt")).to_have_value("a photo of {} and {} on grass")
        ask(page)
        wanted = {"model": "mug-01+mug-02", "prompt": "a photo of {} and {} on grass"}
        np.testing.assert_allclose(drawn(page), asked_for(page, **wanted), atol=2)
        expect(page.get_by_role("img", name="Reference of mug-02")).to_be_visible()
        page.get_by_role("button", name="Remove mug-01").click()
        expect(page.get_by_label("Prompt")).to_have_value("a photo of {} on grass")

    def test_with_the_keyboard_alone(self, shop, visit):
        page = visit(shop)
        expect(objects(page)).to_have_count(48)

        def tab_to(target: Locator) -> None:
            for _ in range(45):
                page.keyboard.press("Tab")
                assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
                if target.evaluate("node => node === document.activeElement"):
                    return
            raise AssertionError(f"Tab never reaches {target}")

        tab_to(objects(page).first)
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        expect(objects(page).nth(1)).to_have_attribute("aria-selected", "true")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Shift+Enter")
        second = page.locator("[role=option][data-place='2']")
        expect(second).to_be_focused()
        second_id = second.locator("span").first.inner_text()
        tab_to(page.get_by_label("Steps"))
        page.keyboard.type(STEPS)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name=f"a photo of mug-01 and {second_id} on grass")).to_be_visible()
        assert drawn(page).shape == (128, 128, 3)
        tab_to(figure(page, "drawn").get_by_role("button", name="Code"))
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_be_hidden()
        expect(figure(page, "drawn").get_by_role("button", name="Code")).to_be_focused()

    def test_more_objects_leave_the_keyboard_its_place(self, shop, visit):
        page = visit(shop)
        expect(objects(page)).to_have_count(48)
        objects(page).first.focus()
        # The button comes into view, which brings the rest of the catalog.
        page.keyboard.press("Tab")
        expect(objects(page)).to_have_count(57)
        expect(objects(page).nth(48)).to_be_focused()
        page.keyboard.press("Enter")
        expect(objects(page).nth(48)).to_have_attribute("aria-selected", "true")

    def test_on_a_phone(self, shop, visit):
        page = visit(shop, width=360, height=740)
        expect(objects(page)).to_have_count(48)
        assert_fits(page)
        pick(page, "mug-00")
        page.get_by_role("button", name="+ Second object").click()
        pick(page, "mug-01")
        ask(page)
        drawn(page)
        assert_fits(page)
        figure(page, "drawn").get_by_role("button", name="Code").click()
        assert_fits(page)

    def test_on_a_phone_the_pictures_come_into_sight(self, shop, visit):
        page = visit(shop, width=360, height=740)
        pick(page, "mug-00")
        ask(page)
        expect(page.locator(".run .frame").first).to_be_in_viewport()
        drawn(page)
        expect(page.locator("#status")).to_have_text(re.compile("^Done in"))
        expect(page.locator("#status")).to_be_in_viewport()
        expect(figure(page, "drawn")).to_be_in_viewport()

    def test_on_a_phone_what_went_wrong_comes_into_sight(self, shop, visit):
        page = visit(shop, width=360, height=740)
        pick(page, "mug-00")
        page.get_by_label("Prompt").fill("a photo of \0 on grass")
        ask(page)
        expect(page.get_by_role("alert")).to_be_in_viewport()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A photo of 96 x 64 pixels."""
    path = tmp_path / "a scene.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)).save(path)
    return path


def drag(page: Page, *points: tuple[float, float]) -> None:
    """Over the photo, by parts of its sides."""
    page.locator("#scene-canvas").scroll_into_view_if_needed()
    box = page.locator("#scene-canvas").bounding_box()
    places = [(box["x"] + across * box["width"], box["y"] + down * box["height"]) for across, down in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place)
    page.mouse.up()


def assert_drawn_within(page: Page, photo: Path, left: float, top: float, right: float, bottom: float) -> None:
    """The photo is another in this box alone, by parts of its sides."""
    before, after = pixels(photo.read_bytes()), drawn(page)
    changed = (before != after).any(axis=-1)
    inside = np.zeros_like(changed)
    inside[round(top * 64) : round(bottom * 64), round(left * 96) : round(right * 96)] = True
    assert not changed[~inside].any()
    assert changed[inside].mean() > 0.2


class TestPhotos:
    def test_an_object_is_drawn_into_a_box_of_a_photo(self, shop, visit, photo):
        page = visit(shop)
        pick(page, "mug-03")
        page.locator("#photo").set_input_files(photo)
        drag(page, (0.25, 0.25), (0.75, 0.75))
        ask(page)
        assert_drawn_within(page, photo, 0.25, 0.25, 0.75, 0.75)
        assert np.abs(drawn(page) - drawn(page, "base alone")).max() > 10
        with page.expect_download() as download:
            figure(page, "drawn").get_by_role("button", name="Mask").click()
        assert download.value.suggested_filename == "mask.png"

    def test_a_photo_is_dropped_and_painted_on(self, shop, visit, photo):
        page = visit(shop)
        pick(page, "mug-03")
        data = base64.b64encode(photo.read_bytes()).decode()
        transfer = page.evaluate_handle(
            """data => {
                const transfer = new DataTransfer();
                const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
                transfer.items.add(new File([bytes], 'dropped.png', { type: 'image/png' }));
                return transfer;
            }""",
            data,
        )
        page.locator("#compose").dispatch_event("drop", {"dataTransfer": transfer})
        expect(page.locator("#scene-note")).to_have_text("dropped.png")
        page.get_by_label("Brush").check()
        drag(page, (0.3, 0.5), (0.7, 0.5))
        ask(page)
        assert_drawn_within(page, photo, 0.2, 0.35, 0.8, 0.65)

    def test_by_the_keyboard(self, shop, visit, photo):
        page = visit(shop)
        pick(page, "mug-03")
        page.locator("#photo").set_input_files(photo)
        expect(page.locator("#scene-canvas")).to_be_focused()
        for key in ("ArrowDown", "Shift+ArrowLeft", "ArrowRight"):
            page.keyboard.press(key)
        ask(page)
        assert_drawn_within(page, photo, 0.25, 0.25, 0.78, 0.75)

    def test_a_place_is_asked_for(self, shop, visit, photo):
        page = visit(shop)
        pick(page, "mug-03")
        page.locator("#photo").set_input_files(photo)
        ask(page)
        expect(page.get_by_role("alert")).to_contain_text("no_place")
        page.get_by_role("button", name="Remove the photo").click()
        ask(page)
        expect(page.get_by_role("alert")).to_be_hidden()
        assert drawn(page).shape == (128, 128, 3)

    def test_what_is_no_photo(self, shop, visit, tmp_path):
        (tmp_path / "no.png").write_bytes(b"no picture")
        page = visit(shop)
        page.locator("#photo").set_input_files(tmp_path / "no.png")
        expect(page.get_by_role("alert")).to_contain_text("invalid_image")


class TestFaults:
    def test_what_the_api_refuses_is_shown_with_its_code(self, shop, visit):
        page = visit(shop)
        ask(page)
        expect(page.get_by_role("alert")).to_contain_text("no_object")
        pick(page, "mug-00")
        page.get_by_label("Prompt").fill("a photo of \0 on grass")
        ask(page)
        expect(page.get_by_role("alert")).to_contain_text("invalid_prompt")
        expect(page.get_by_role("alert")).to_contain_text("Change what the message names")
        expect(page.get_by_role("button", name="Try again")).to_be_hidden()
        expect(page.locator("figure")).to_have_count(0)
        page.get_by_role("button", name="Dismiss").click()
        expect(page.get_by_role("alert")).to_be_hidden()

    def test_a_lost_connection_is_tried_again(self, shop, visit):
        page = visit(shop)
        pick(page, "mug-00")
        page.route("**/v1/images/generations", lambda route: route.abort())
        ask(page)
        expect(page.get_by_role("alert")).to_contain_text("unreachable")
        page.unroute("**/v1/images/generations")
        page.get_by_role("button", name="Try again").click()
        drawn(page)
        expect(page.get_by_role("alert")).to_be_hidden()

    def test_without_a_key_the_page_is_quiet(self, open_shop, visit, keys):
        asked = []

        def watch(page: Page) -> None:
            page.clock.install()
            page.on("request", lambda request: asked.append(request.url))

        page = visit(open_shop(api_keys=keys.file), before=watch)
        expect(page.get_by_role("alert")).to_contain_text("invalid_api_key")
        expect(page.get_by_text("No objects yet")).to_have_count(0)
        page.get_by_role("button", name="Dismiss").click()
        page.get_by_label("Prompt").fill("a photo")
        before = list(asked)
        page.clock.run_for(30_000)
        # Behind all that the page may have asked meanwhile.
        assert page.evaluate("fetch('healthz').then(response => response.ok)")
        assert asked[len(before) :] == [f"{page.url}healthz"]
        expect(page.get_by_label("Prompt")).to_be_focused()
        expect(page.get_by_role("alert")).to_be_hidden()

    def test_an_empty_store_is_asked_again_without_a_word(self, sd15, base, visit, tmp_path):
        store = ArtifactStore(str(tmp_path / "empty"))
        (tmp_path / "empty").mkdir()
        known = Settings(
            store=store.url, base=str(sd15[0]), clip=str(sd15[1]), no_auth=True, threads=1, refresh_seconds=0.2
        )
        with local_app(known) as (app, _), listening(app) as url:
            page = visit(url, before=lambda page: page.clock.install())
            expect(page.get_by_text("No objects yet")).to_be_visible()
            page.route("**/classes", lambda route: route.abort())
            page.get_by_label("Prompt").fill("a photo")
            page.clock.run_for(10_000)
            commit(store, base, "mug-01")
            for _ in range(100):
                page.clock.run_for(3_000)
                if objects(page).count():
                    break
                page.wait_for_timeout(100)
            expect(objects(page)).to_have_count(1)
            expect(page.get_by_role("alert")).to_be_hidden()
            expect(page.get_by_label("Prompt")).to_be_focused()

    def test_a_key_that_no_header_takes_is_named_as_such(self, open_shop, visit, keys):
        page = visit(open_shop(api_keys=keys.file))
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type("od-ключ")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("This is no API key")
        expect(page.get_by_role("alert")).not_to_contain_text("unreachable")
        page.get_by_label("API key").fill(keys.secret)
        page.keyboard.press("Enter")
        expect(objects(page)).to_have_count(28)
        expect(page.get_by_role("alert")).to_be_hidden()

    def test_a_key_is_asked_for_and_kept_to_the_tab(self, open_shop, visit, tmp_path):
        secret, entry = new_key("team", prefix="rose-")
        (tmp_path / "keys.yaml").write_text(f"keys: [{entry.model_dump_json()}]")
        page = visit(open_shop(api_keys=tmp_path / "keys.yaml"))
        expect(page.get_by_role("alert")).to_contain_text("invalid_api_key")
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type(secret)
        page.keyboard.press("Enter")
        expect(objects(page)).to_have_count(28)
        expect(page.get_by_role("alert")).to_be_hidden()
        pick(page, "rose-00")
        ask(page)
        drawn(page)
        page.wait_for_function("[...document.querySelectorAll('#grid img')].every(image => image.naturalWidth)")
        figure(page, "drawn").get_by_role("button", name="Code").click()
        expect(page.locator("#curl")).to_contain_text("$OBJDRIVE_API_KEY")
        assert secret not in page.content()
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.keyboard.press("Escape")
        page.reload()
        expect(objects(page)).to_have_count(28)
        page.get_by_role("button", name="Forget API key").click()
        expect(page.get_by_label("API key")).to_be_visible()


@pytest.fixture
def keys(tmp_path: Path) -> SimpleNamespace:
    """A file with a key, and the key."""
    secret, entry = new_key("team", prefix="rose-")
    (tmp_path / "keys.yaml").write_text(f"keys: [{entry.model_dump_json()}]")
    return SimpleNamespace(file=tmp_path / "keys.yaml", secret=secret)


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_the_copied_call_edits_the_same_photo(shop, visit, tmp_path, photo, language):
    page = visit(shop)
    pick(page, "mug-05")
    page.locator("#photo").set_input_files(photo)
    drag(page, (0.25, 0.25), (0.75, 0.75))
    page.get_by_label("Prompt").fill("""@{}, it's "$HOME" `id` \\ on größerem Grund""")
    ask(page)
    shown = drawn(page)
    with page.expect_download() as download:
        figure(page, "drawn").get_by_role("button", name="Mask").click()
    download.value.save_as(tmp_path / "mask.png")
    figure(page, "drawn").get_by_role("button", name="Code").click()
    call = page.locator(f"#{language.lower()}").inner_text()
    command = ["bash", "-c", call] if language == "curl" else [sys.executable, "-c", call]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    np.testing.assert_allclose(pixels((tmp_path / "mug-05-7.png").read_bytes()), shown, atol=2)


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_the_copied_call_draws_the_same_picture(shop, visit, tmp_path, language):
    page = visit(shop)
    pick(page, "mug-05")
    page.get_by_label("Prompt").fill("""a photo of {}, it's "$HOME" `id` \\ on größerem Grund""")
    page.get_by_label("Guidance").fill("2.5")
    ask(page)
    shown = drawn(page)
    figure(page, "drawn").get_by_role("button", name="Code").click()
    page.get_by_role("heading", name=language).locator("..").get_by_role("button", name="Copy").click()
    expect(page.get_by_text(f"Copied the {language} call.")).to_be_visible()
    call = page.evaluate("navigator.clipboard.readText()")
    command = ["bash", "-c", call] if language == "curl" else [sys.executable, "-c", call]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    np.testing.assert_allclose(pixels((tmp_path / "mug-05-7.png").read_bytes()), shown, atol=2)
