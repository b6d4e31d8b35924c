"""Drawing into given pictures, and with an object's own pixels."""

import base64
import gc
import io
import json
import re
import socket
import time
import xml.etree.ElementTree as ET
from urllib.parse import urlsplit

import numpy as np
import pytest
from answers import error, pixels, png
from conftest import serving
from PIL import Image
from random_store import commit, digest_of
from raw import connect

from objdrive.adapters.artifact import SourceRecord, Sources
from objdrive.adapters.store import ArtifactStore
from serve import exactness
from serve.errors import ApiError
from serve.kept import Kept
from serve.uploads import Uploads

SIZE = (200, 150)
BOX = (40, 30, 120, 110)


def scene(mode="RGB", size=SIZE):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).convert(mode)


def file(picture, kind="PNG"):
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def mask(size=SIZE, box=BOX):
    picture = Image.new("RGBA", size, (0, 0, 0, 255))
    picture.paste((0, 0, 0, 0), box)
    return file(picture)


def edit(client, image=None, masked=True, **fields):
    files = {"image": ("photo.png", file(scene()) if image is None else image)}
    if masked is not False:
        files["mask"] = ("mask.png", mask() if masked is True else masked)
    data = {"prompt": "a photo of {}", "model": "acme-mug-1", "seed": "7"} | fields
    return client.post("/v1/images/edits", data=data, files=files)


def outside(box=BOX, size=SIZE):
    keep = np.ones((size[1], size[0]), bool)
    keep[box[1] : box[3], box[0] : box[2]] = False
    return keep


def array(data, mode="RGB"):
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode))


class TestEdits:
    def test_the_object_is_drawn_in_the_place_and_the_rest_stays_to_the_bit(self, open_server):
        with open_server.client() as client:
            first, second = (png(edit(client, model=model)) for model in ("acme-mug-1", "acme-lamp-1"))
        before = np.asarray(scene())
        for one in (first, second):
            assert array(one).shape == before.shape
            assert (array(one)[outside()] == before[outside()]).all()
            assert (array(one)[~outside()] != before[~outside()]).mean() > 0.8
        assert (array(first) != array(second)).any()

    def test_the_same_edit_gives_the_same_picture(self, open_server):
        with open_server.client() as client:
            answer = edit(client)
            assert png(edit(client)) == png(answer)
            assert png(edit(client, seed="8")) != png(answer)
        assert answer.headers["x-objdrive-model"] == f"acme-mug-1@{digest_of('acme-mug-1')}"
        text = Image.open(io.BytesIO(png(answer))).text
        assert text["objdrive:seed"] == "7"
        assert "compositeWithTrainedAlgorithmicMedia" in text["XML:com.adobe.xmp"]

    def test_without_a_mask_the_pictures_own_transparency_is_the_place(self, open_server):
        picture = scene("RGBA")
        picture.paste((0, 0, 0, 0), BOX)
        with open_server.client() as client:
            drawn = array(png(edit(client, file(picture), masked=False)), "RGBA")
        assert (drawn[outside()] == np.asarray(picture)[outside()]).all()
        assert (drawn[..., 3] == 255).all()

    def test_several_pictures_with_fields_as_text(self, open_server):
        fields = {"n": "2", "steps": "1", "guidance_scale": "2.5", "size": "auto", "stream": "false", "user": "me"}
        with open_server.client() as client:
            answer = edit(client, **fields)
        assert answer.headers["x-objdrive-seed"] == "7,8"
        assert png(answer, 0) != png(answer, 1)
        assert Image.open(io.BytesIO(png(answer))).text["objdrive:guidance_scale"] == "2.5"

    def test_streams(self, open_server):
        with open_server.client() as client:
            whole = png(edit(client, steps="3"))
            answer = edit(client, steps="3", stream="true", partial_images="1")
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
        assert [event["type"] for event in events] == ["image_edit.partial_image", "image_edit.completed"]
        assert {event["size"] for event in events} == {"200x150"}
        assert base64.b64decode(events[-1]["b64_json"]) == whole
        partial = array(base64.b64decode(events[0]["b64_json"]))
        assert (partial[outside()] == np.asarray(scene())[outside()]).all()

    def test_a_link_shows_it_while_it_is_kept(self, small_base, filled, tmp_path):
        with serving(small_base, filled, tmp_path) as server, server.client() as client:
            whole = png(edit(client))
            url = edit(client, response_format="url").json()["data"][0]["url"]
            assert client.get(url).content == whole
            server.services.results._pictures.clear()
            assert error(client.get(url), 404) == "not_found"

    def test_the_base_alone_draws_too(self, open_server):
        with open_server.client() as client:
            data = {"prompt": "a mug", "seed": "1"}
            answer = client.post("/v1/images/edits", data=data, files={"image": file(scene()), "mask": mask()})
        assert answer.headers["x-objdrive-model"] == "base"
        assert png(answer)


class TestRefusals:
    @pytest.mark.parametrize(
        ("sent", "status", "code", "param"),
        [
            ({"image": b"Example data"}, 400, "invalid_image", "image"),
            ({"image": file(scene())[:-60]}, 400, "invalid_image", "image"),
            ({"image": file(scene(size=(10, 10)))}, 400, "invalid_image", "image"),
            ({"masked": b"Example data"}, 400, "invalid_image", "mask"),
            ({"masked": mask((199, 150))}, 400, "invalid_image", "mask"),
            ({"masked": file(Image.new("L", SIZE))}, 400, "invalid_image", "mask"),
            ({"masked": mask(box=(0, 0, 0, 0))}, 400, "invalid_image", "mask"),
            ({"masked": False}, 400, "invalid_image", "image"),
            ({"steps": "many"}, 400, "invalid_request", "steps"),
            ({"n": "11"}, 400, "invalid_request", "n"),
            ({"size": "1024x1024"}, 400, "invalid_request", "size"),
            ({"guidence_scale": "3"}, 400, "invalid_request", "guidence_scale"),
            ({"place": "0.5"}, 400, "invalid_request", "place"),
            ({"background": "transparent"}, 400, "invalid_request", "background"),
            ({"model": "nope"}, 404, "unknown_object", "model"),
            ({"model": "acme-mug-1+acme-mug-2", "prompt": "{} {}", "exact": "true"}, 400, "invalid_request", "exact"),
        ],
    )
    def test_bad_input(self, open_server, sent, status, code, param):
        with open_server.client() as client:
            answer = edit(client, **sent)
        assert error(answer, status) == code
        assert answer.json()["error"]["param"] == param

    def test_what_is_no_form(self, open_server):
        with open_server.client() as client:
            assert error(client.post("/v1/images/edits", json={"prompt": "x"}), 400) == "invalid_request"
            assert error(client.post("/v1/images/edits", data={"prompt": "x"}), 400) == "invalid_request"
            broken = client.post(
                "/v1/images/edits", content=b"x", headers={"content-type": "multipart/form-data; boundary=y"}
            )
            assert error(broken, 400) == "invalid_request"
            several = [("image[]", file(scene())), ("image[]", file(scene()))]
            answer = client.post("/v1/images/edits", data={"prompt": "x"}, files=several)
            assert "one is edited at a time" in answer.json()["error"]["message"]

    def test_an_upload_that_breaks_off_is_a_client_that_left(self, open_server):
        with connect(open_server.url) as connection:
            connection.sendall(
                b"POST /v1/images/edits HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n"
                b"content-type: multipart/form-data; boundary=y\r\n\r\n--y\r\ncontent-disposition: form-data"
            )
        counted = re.compile(r'http_requests_total{outcome="(.*)",route="/v1/images/edits",status="(499|500)"} 1.0')
        deadline = time.monotonic() + 60
        with open_server.client() as client:
            while not (found := counted.search(client.get("/metrics").text)):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert found.groups() == ("cancelled", "499")

    @pytest.mark.parametrize(("kind", "longest"), [("webp", 16383), ("jpeg", 65500)])
    def test_a_picture_that_is_too_long_for_its_format_is_refused_before_it_is_drawn(self, open_server, kind, longest):
        size = (longest + 1, 16)
        with open_server.client() as client:
            answer = edit(client, file(scene(size=size)), masked=mask(size, (0, 0, 16, 16)), output_format=kind)
        assert error(answer, 400) == "invalid_request"
        assert answer.json()["error"]["param"] == "output_format"
        assert f"{longest + 1} pixels long" in answer.json()["error"]["message"]

    def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(self, open_server):
        bomb = file(Image.new("1", (9000, 9000)))
        assert len(bomb) < 100_000
        with open_server.client() as client:
            answer = edit(client, bomb, masked=False)
        assert error(answer, 400) == "invalid_image"
        assert "64000000 pixels" in answer.json()["error"]["message"]

    def test_the_key_is_looked_at_before_the_form(self, small_base, filled, tmp_path):
        with serving(small_base, filled, tmp_path, keys=[("shop", {})]) as server:
            host, port = urlsplit(server.url).netloc.split(":")
            with socket.create_connection((host, int(port)), timeout=60) as client:
                # Of the announced body nothing is sent, and the answer comes all the same.
                client.sendall(
                    b"POST /v1/images/edits HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000000\r\n"
                    b"content-type: multipart/form-data; boundary=y\r\n\r\n"
                )
                assert client.recv(12) == b"HTTP/1.1 401"


class TestMemory:
    def test_edits_under_way_have_a_bound(self, small_base, filled, tmp_path):
        # The picture and its mask, decoded, and their files.
        one = 9 * SIZE[0] * SIZE[1] + len(file(scene())) + len(mask())
        uploads = Uploads(2 * one)
        with serving(small_base, filled, tmp_path, uploads=uploads) as server, server.client() as client:
            with uploads.room() as other:
                other.take(one + 1)
                refused = edit(client)
                assert error(refused, 429) == "queue_full"
                assert int(refused.headers["retry-after"]) >= 1
                assert uploads.nbytes == one + 1
            assert png(edit(client, steps="1"))
            until_zero(uploads)
            assert error(edit(client, b"Example data"), 400) == "invalid_image"
            until_zero(uploads)

    @pytest.mark.parametrize(
        "asked", [{"steps": "100"}, {"steps": "100", "n": "2"}, {"steps": "100", "stream": "true"}]
    )
    def test_an_edit_that_fails_gives_it_back_at_once(self, small_base, filled, tmp_path, asked):
        uploads = Uploads()
        with (
            serving(small_base, filled, tmp_path, uploads=uploads, draw_seconds=0.3) as server,
            server.client() as client,
        ):
            gc.disable()
            try:
                assert "timeout" in edit(client, **asked).text
                until_zero(uploads)
            finally:
                gc.enable()

    def test_an_edit_alone_has_room_and_a_picture_in_use_keeps_it(self):
        uploads, picture = Uploads(10), scene()
        with uploads.room() as room:
            room.take(8)
            room.take(8)
            with uploads.room() as second, pytest.raises(ApiError) as refused:
                second.take(1)
            assert refused.value.status == 429
            room.until_gone(picture)
        assert uploads.nbytes == 16
        del picture
        assert uploads.nbytes == 0


def until_zero(uploads):
    """Until what was edited is gone; the server's threads may still be on their way out."""
    deadline = time.monotonic() + 20
    while uploads.nbytes:
        assert time.monotonic() < deadline, uploads.nbytes
        time.sleep(0.01)


class TestExact:
    @pytest.fixture
    def photo(self, tmp_path):
        """A texture before white, and its mask."""
        texture = np.random.default_rng(3).integers(0, 255, (64, 64, 3), np.uint8)
        image = np.full((100, 100, 3), 255, np.uint8)
        image[20:84, 20:84] = texture
        shape = np.zeros((100, 100), np.uint8)
        shape[20:84, 20:84] = 255
        Image.fromarray(image).save(tmp_path / "image.png")
        Image.fromarray(shape).save(tmp_path / "mask.png")
        return texture

    @pytest.fixture
    def store(self, small_base, photo, tmp_path):
        """With an object of that photo."""
        store = ArtifactStore(str(tmp_path / "store"))
        files = {
            name: SourceRecord(uri=str(tmp_path / f"{name}.png"), size=None, mark="") for name in ("image", "mask")
        }
        commit(store, small_base, "mug-1", sources=Sources(**files))
        return store

    @pytest.fixture
    def server(self, small_base, store, tmp_path):
        commit(store, small_base, "mug-2", sources=Sources(image=SourceRecord(uri="/gone.png", size=1, mark="")))
        with serving(small_base, store, tmp_path) as server:
            yield server

    def test_the_objects_own_pixels_are_in_the_picture(self, server, photo):
        asked = {"model": "mug-1", "prompt": "a photo of {} on grass", "seed": 1, "exact": True, "place": "0.5@0.5,0.6"}
        with server.client() as client:
            drawn, other = (png(server.draw(client, **asked | {"seed": seed})) for seed in (1, 2))
        # Half of 128 pixels, the photo's own scale; the edge is soft.
        assert (array(drawn)[48:106, 35:93] == photo[3:61, 3:61]).all()
        assert (array(drawn)[:40] != array(other)[:40]).any()
        text = Image.open(io.BytesIO(drawn)).text
        assert text["objdrive:adapter_scale"] == "0"
        assert "compositeWithTrainedAlgorithmicMedia" in text["XML:com.adobe.xmp"]

    @pytest.mark.parametrize("kind", ["png", "webp"])
    def test_alone_before_nothing(self, server, photo, kind):
        asked = {"model": "mug-1", "exact": True, "place": "0.5", "background": "transparent", "output_format": kind}
        with server.client() as client:
            answer = server.draw(client, **asked)
        shown = array(png(answer), "RGBA")
        assert shown[0, 0, 3] == 0
        assert (shown[48:106, 35:93, :3] == photo[3:61, 3:61]).all()
        assert answer.json()["background"] == "transparent"
        assert b"lgorithmicMedia" not in png(answer)
        assert server.services.generators._engine.stats().requests == {}

    def test_in_a_place_of_a_picture(self, server, photo):
        with server.client() as client:
            drawn = array(png(edit(client, model="mug-1", exact="true", masked=mask(box=(40, 30, 104, 130)))))
        assert (drawn[69:127, 43:101] == photo[3:61, 3:61]).all()
        kept = outside((40, 30, 104, 130))
        assert (drawn[kept] == np.asarray(scene())[kept]).all()

    @pytest.mark.parametrize(
        ("asked", "status", "code", "param"),
        [
            ({"model": "mug-2"}, 409, "photo_unreadable", "model"),
            ({"model": "mug-2", "place": "huge"}, 400, "invalid_request", "place"),
            ({"model": "mug-1+mug-2", "prompt": "{} {}"}, 400, "invalid_request", "exact"),
            ({"prompt": "a mug"}, 400, "invalid_request", "exact"),
            ({"model": "mug-1", "place": "huge"}, 400, "invalid_request", "place"),
            ({"model": "mug-1", "place": "0.9@0.1,0.5"}, 400, "invalid_request", "place"),
            ({"model": "mug-1", "place": "0.5", "exact": False}, 400, "invalid_request", "place"),
            (
                {"model": "mug-1", "background": "transparent", "output_format": "jpeg"},
                400,
                "invalid_request",
                "background",
            ),
            ({"model": "mug-1", "background": "transparent", "exact": False}, 400, "invalid_request", "background"),
        ],
    )
    def test_refusals(self, server, tmp_path, asked, status, code, param):
        with server.client() as client:
            answer = server.draw(client, **{"exact": True} | asked)
        assert error(answer, status) == code
        assert answer.json()["error"]["param"] == param
        assert "gone.png" not in answer.text

    def test_what_draws_nothing_is_not_counted(self, small_base, store, tmp_path):
        alone = {"model": "mug-1", "exact": True, "background": "transparent"}
        with (
            serving(small_base, store, tmp_path, keys=[("shop", {"burst": 1})]) as server,
            server.client("shop") as client,
        ):
            png(server.draw(client, **alone))
            # More than the key may draw at once: a debt is left.
            png(server.draw(client, model="mug-1", n=2, steps=1))
            png(server.draw(client, **alone))
            assert error(server.draw(client, model="mug-1"), 429) == "rate_limit_exceeded"

    @pytest.mark.parametrize("draw", ["generation", "edit"])
    def test_what_was_drawn_for_a_proxy_that_gave_up_is_not_counted_again(self, small_base, store, tmp_path, draw):
        keys = [("shop", {"burst": 1, "requests_per_minute": 1})]
        with (
            # Every drawing outlasts such a proxy.
            serving(small_base, store, tmp_path, keys=keys, kept=Kept(proxy_seconds=0)) as server,
            server.client("shop") as client,
        ):

            def drawn(seed):
                if draw == "edit":
                    return edit(client, model="mug-1", exact="true", seed=str(seed), steps="1")
                return server.draw(client, model="mug-1", exact=True, seed=seed, steps=1)

            first = png(drawn(5))
            assert png(drawn(5)) == first
            assert error(drawn(6), 429) == "rate_limit_exceeded"

    def test_a_key_that_is_over_its_rate_has_no_photo_read(self, small_base, store, tmp_path, monkeypatch):
        reads, read = [], exactness.read_photo
        monkeypatch.setattr(exactness, "read_photo", lambda artifact: reads.append(1) or read(artifact))
        keys = [("shop", {"burst": 2, "requests_per_minute": 1})]
        with serving(small_base, store, tmp_path, keys=keys) as server, server.client("shop") as client:
            # What is refused once its photo was read is not counted.
            assert error(server.draw(client, model="mug-1", exact=True, place="0.9@0.1,0.5"), 400) == "invalid_request"
            for _ in range(2):
                png(server.draw(client, model="mug-1", exact=True, steps=1))
            assert len(reads) == 3
            assert error(server.draw(client, model="mug-1", exact=True), 429) == "rate_limit_exceeded"
            assert error(edit(client, model="mug-1", exact="true"), 429) == "rate_limit_exceeded"
            assert len(reads) == 3

    def test_storage_that_hangs_holds_up_no_other_request(self, small_base, tmp_path, monkeypatch):
        monkeypatch.setattr(exactness, "PHOTO_SECONDS", 0.2)
        store = ArtifactStore(str(tmp_path / "store"))
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"http://127.0.0.1:{silent.getsockname()[1]}/mug.png"
            commit(store, small_base, "mug-1", sources=Sources(image=SourceRecord(uri=address, size=1, mark="")))
            with serving(small_base, store, tmp_path) as server, server.client() as client:
                for _ in range(8):
                    assert error(server.draw(client, model="mug-1", exact=True), 503) == "unavailable"
                assert png(edit(client, model="mug-1"))


class TestFormats:
    @pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
    def test_the_asked_one_with_what_made_it(self, open_server, kind):
        with open_server.client() as client:
            plain = png(open_server.draw(client, model="acme-mug-1", seed=4))
            answer = open_server.draw(client, model="acme-mug-1", seed=4, output_format=kind)
            smaller = open_server.draw(client, model="acme-mug-1", seed=4, output_format=kind, output_compression=30)
        shown = Image.open(io.BytesIO(png(answer)))
        assert shown.format == kind.upper()
        assert answer.json()["output_format"] == kind
        xmp = shown.info["xmp"]
        [told] = [one.attrib for one in ET.fromstring(xmp).iter() if one.tag.endswith("Description")]
        assert told["{urn:objdrive:}model"] == f"acme-mug-1@{digest_of('acme-mug-1')}"
        assert told["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"].endswith(
            "/trainedAlgorithmicMedia"
        )
        if kind == "png":
            assert error(smaller, 400) == "invalid_request"
            assert smaller.json()["error"]["param"] == "output_compression"
        else:
            assert len(png(smaller)) < len(png(answer))
        if kind == "webp":
            assert pixels(png(answer)).tobytes() == pixels(plain).tobytes()

    def test_a_link_has_it_after_its_picture_is_forgotten_too(self, small_base, filled, tmp_path):
        with serving(small_base, filled, tmp_path) as server, server.client() as client:
            asked = {"model": "acme-mug-1", "response_format": "url", "output_format": "webp", "output_compression": 50}
            url = server.draw(client, **asked).json()["data"][0]["url"]
            kept = client.get(url)
            assert kept.headers["content-type"] == "image/webp"
            server.services.results._pictures.clear()
            assert client.get(url).content == kept.content

    def test_streams(self, open_server):
        with open_server.client() as client:
            asked = {"model": "acme-mug-1", "stream": True, "partial_images": 1, "steps": 3, "output_format": "jpeg"}
            answer = open_server.draw(client, **asked, response_format="url")
            events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
            assert [Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))).format for one in events] == ["JPEG"] * 2
            assert {one["output_format"] for one in events} == {"jpeg"}
            assert client.get(events[-1]["url"]).content == base64.b64decode(events[-1]["b64_json"])
