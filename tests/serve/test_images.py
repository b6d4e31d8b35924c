import base64
import io
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote, urlsplit

import pytest
from answers import error, pixels, png, until
from conftest import serving
from PIL import Image
from random_store import RANK, STEPS, commit, digest_of
from starlette.testclient import TestClient

from objdrive.adapters.artifact import METADATA_FILE, ArtifactKey
from objdrive.adapters.store import CURRENT_FILE, ArtifactStore
from objdrive.sampling.engine import Engine
from objdrive.sampling.requests import DrawRequest
from serve.local import local_app
from serve.settings import Settings


def alone(base, store, request):
    """The picture that an engine draws that draws nothing else."""
    with Engine(base, store, batch_size=1, slots=4, rank=RANK, host_bytes=2**26, queue_limit=1) as engine:
        return engine.submit(request).result(60).image


class TestDrawing:
    def test_the_picture_is_the_one_that_the_engine_draws_for_the_request(self, small_base, filled, tmp_path):
        asked = {"model": "acme-mug-1", "prompt": "a photo of {} on grass", "seed": 5}
        key = ArtifactKey("acme-mug-1", digest_of("acme-mug-1"))
        expected = alone(small_base, filled, DrawRequest(asked["prompt"], 5, (key,), steps=STEPS, guidance_scale=3.0))
        with serving(small_base, filled, tmp_path) as server, server.client() as client:
            drawn = server.draw(client, **asked)
        assert pixels(png(drawn)).tobytes() == expected.tobytes()

    def test_the_answer_names_what_drew_it(self, open_server, small_base):
        with open_server.client() as client:
            drawn = open_server.draw(client, model="acme-mug-1+acme-lamp-1", prompt="{} and {}", seed=3, n=2)
        digests = [digest_of("acme-mug-1"), digest_of("acme-lamp-1")]
        model = f"acme-mug-1@{digests[0]}+acme-lamp-1@{digests[1]}"
        assert drawn.headers["x-objdrive-model"] == model
        assert drawn.headers["x-objdrive-digest"] == ",".join(digests)
        assert drawn.headers["x-objdrive-seed"] == "3,4"
        assert drawn.headers["x-objdrive-base"] == f"{small_base.name}@{small_base.fingerprint}"
        for index, seed in enumerate((3, 4)):
            text = Image.open(io.BytesIO(png(drawn, index))).text
            assert text["objdrive:model"] == model
            assert text["objdrive:seed"] == str(seed)
            assert text["objdrive:base"] == f"{small_base.name}@{small_base.fingerprint}"
            assert text["objdrive:prompt"] == "{} and {}"
            assert text["objdrive:steps"] == str(STEPS)
        assert [image["seed"] for image in drawn.json()["data"]] == [3, 4]

    # Of diffusers' DPM-Solver with NumPy 2.
    @pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
    def test_the_same_request_gives_the_same_picture_and_others_give_others(self, open_server):
        variants = [
            {"model": "acme-mug-1"},
            {"model": "acme-mug-1", "seed": 2},
            {"model": "acme-mug-2"},
            {"model": "acme-mug-1", "steps": 3},
            {"model": "acme-mug-1", "guidance_scale": 1.0},
            {"model": "acme-mug-1", "adapter_scale": 0.5},
            {"model": "acme-mug-1", "negative_prompt": "snow"},
            {"model": "acme-mug-1", "scheduler": "dpmsolver++", "steps": 3},
            {"prompt": "a photo of mug"},
        ]
        with open_server.client() as client:
            pictures = [png(open_server.draw(client, **{"seed": 1} | asked)) for asked in [*variants, variants[0]]]
        looks = [pixels(picture).tobytes() for picture in pictures]
        assert looks[-1] == looks[0]
        assert len(set(looks)) == len(variants)

    def test_without_a_seed_every_request_gets_one_of_its_own(self, open_server):
        with open_server.client() as client:
            seeds = {open_server.draw(client, model="acme-mug-1").headers["x-objdrive-seed"] for _ in range(3)}
        assert len(seeds) == 3

    def test_many_clients_at_once_each_get_their_own_object(self, open_server):
        names = ["acme-mug-1", "acme-mug-2", "acme-lamp-1", "other-chair-1"]

        def draw(name):
            with open_server.client() as client:
                return pixels(png(open_server.draw(client, model=name, seed=1))).convert("L")

        single = {name: draw(name) for name in names}
        with ThreadPoolExecutor(8) as threads:
            drawn = list(threads.map(draw, names * 4))
        for name, picture in zip(names * 4, drawn, strict=True):
            difference = max(abs(a - b) for a, b in zip(picture.tobytes(), single[name].tobytes(), strict=True))
            assert difference <= 2

    def test_streams_partial_pictures_and_then_the_picture(self, open_server):
        asked = {"model": "acme-mug-1", "prompt": "{}", "seed": 1, "stream": True, "partial_images": 2, "steps": 4}
        with (
            open_server.client() as client,
            client.stream("POST", "/v1/images/generations", json=asked) as answer,
        ):
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.headers["x-objdrive-digest"] == digest_of("acme-mug-1")
            events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
        kinds = [event["type"].removeprefix("image_generation.") for event in events]
        assert kinds == ["partial_image", "partial_image", "completed"]
        assert [event["partial_image_index"] for event in events[:2]] == [0, 1]
        assert {event["size"] for event in events} == {"128x128"}
        with open_server.client() as client:
            whole = png(open_server.draw(client, model="acme-mug-1", prompt="{}", seed=1, steps=4))
        assert base64.b64decode(events[-1]["b64_json"]) == whole

    def test_a_stream_has_no_more_partial_pictures_than_steps(self, open_server):
        asked = {"model": "acme-mug-1", "prompt": "{}", "seed": 1, "stream": True, "partial_images": 3, "steps": 1}
        with open_server.client() as client:
            answer = client.post("/v1/images/generations", json=asked)
        assert answer.status_code == 200, answer.text
        assert answer.text.count("event: image_generation.partial_image") <= 1
        assert answer.text.count("event: image_generation.completed") == 1

    def test_a_base_in_a_folder_of_any_name(self, sd15, filled, tmp_path):
        folder = shutil.copytree(sd15[0], tmp_path / "モデル")
        settings = Settings.of(store=filled.url, base=str(folder), clip=str(sd15[1]), no_auth=True)
        with local_app(settings) as (app, _), TestClient(app, "http://127.0.0.1", client=("127.0.0.1", 4711)) as client:
            drawn = client.post("/v1/images/generations", json={"prompt": "a mug", "steps": 1})
        assert drawn.status_code == 200, drawn.text
        assert unquote(drawn.headers["x-objdrive-base"]).startswith(f"{folder}@")


class TestRefusals:
    @pytest.mark.parametrize(
        ("asked", "status", "code", "param"),
        [
            ({"prompt": ""}, 400, "invalid_request", "prompt"),
            ({"prompt": "ab " * 500}, 422, "invalid_prompt", "prompt"),
            ({"prompt": "x", "negative_prompt": "ab " * 500}, 422, "invalid_prompt", "prompt"),
            ({"n": 0}, 400, "invalid_request", "n"),
            ({"n": 11}, 400, "invalid_request", "n"),
            ({"steps": 0}, 400, "invalid_request", "steps"),
            ({"seed": -1}, 400, "invalid_request", "seed"),
            ({"guidence_scale": 3}, 400, "invalid_request", "guidence_scale"),
            ({"size": "1024x1024"}, 400, "invalid_request", "size"),
            ({"stream": True, "n": 2}, 400, "invalid_request", "n"),
            ({"model": "a+b+c+d+e"}, 400, "invalid_request", "model"),
            ({"model": "acme-mug-1+acme-mug-1"}, 400, "invalid_request", "model"),
            ({"model": "acme-mug-9"}, 404, "unknown_object", "model"),
            ({"model": "../objects"}, 404, "unknown_object", "model"),
            ({"model": "acme-mug-1+"}, 404, "unknown_object", "model"),
            ({"model": "acme-mug-1", "prompt": "{} {} \0"}, 422, "invalid_prompt", "prompt"),
            ({"model": "acme-mug-1+acme-mug-2", "prompt": "only {}"}, 422, "invalid_prompt", "prompt"),
            ({"model": "acme-mug-1", "prompt": "{} " + "word " * 150}, 422, "invalid_prompt", "prompt"),
        ],
    )
    def test_bad_input(self, open_server, asked, status, code, param):
        with open_server.client() as client:
            answer = open_server.draw(client, **asked)
        assert error(answer, status) == code
        assert answer.json()["error"]["param"] == param

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"prompt": NaN}'])
    def test_a_body_that_is_no_request(self, open_server, body):
        with open_server.client() as client:
            answer = client.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})
        assert error(answer, 400) == "invalid_request"

    def test_what_is_wrong_with_a_body_is_said_in_plain_words(self, open_server):
        kind = {"content-type": "application/json"}
        with open_server.client() as client:
            cut = client.post("/v1/images/generations", content=b'{"prompt": ', headers=kind)
            untold = client.post(
                "/v1/images/generations", content=b'{"prompt": "x"}', headers={"content-type": "text/plain"}
            )
            listed = client.post("/v1/images/generations", content=b"[]", headers=kind)
        for answer, words in ((cut, "not JSON"), (untold, "content-type: application/json"), (listed, "a JSON object")):
            assert error(answer, 400) == "invalid_request"
            assert answer.json()["error"]["param"] is None
            assert words in answer.json()["error"]["message"]

    def test_the_message_for_a_pair_shows_a_place_for_each(self, open_server):
        with open_server.client() as client:
            answer = open_server.draw(client, model="acme-mug-1+acme-lamp-1", prompt="a photo of {} on grass")
        assert error(answer, 422) == "invalid_prompt"
        assert '"a photo of {} and {} on grass"' in answer.json()["error"]["message"]

    @pytest.mark.parametrize("spoil", [METADATA_FILE, CURRENT_FILE])
    def test_an_artifact_whose_papers_are_damaged(self, small_base, tmp_path, caplog, spoil):
        store = ArtifactStore(str(tmp_path / "store"))
        home = tmp_path / "store/objects/mug-1"
        digest = commit(store, small_base, "mug-1")
        commit(store, small_base, "mug-2")
        path = home / digest / METADATA_FILE if spoil == METADATA_FILE else home / CURRENT_FILE
        path.write_bytes(path.read_bytes()[:40] if spoil == METADATA_FILE else b"")
        with serving(small_base, store, tmp_path) as server, server.client() as client:
            answer = server.draw(client, model="mug-1")
            assert error(answer, 409) == "corrupt_artifact"
            assert str(tmp_path) not in answer.text
            assert str(path) in caplog.text
            assert [one["id"] for one in client.get("/v1/models").json()["data"]][-1] == "mug-2"

    def test_an_artifact_of_another_base(self, small_base, tmp_path):
        store = ArtifactStore(str(tmp_path / "store"))
        commit(store, small_base, "mug-1", fingerprint="f" * 32)
        with serving(small_base, store, tmp_path) as server, server.client() as client:
            answer = server.draw(client, model="mug-1")
        assert error(answer, 409) == "wrong_base"
        assert answer.headers["x-should-retry"] == "false"

    def test_a_damaged_artifact_is_named_without_addresses(self, small_base, tmp_path):
        store = ArtifactStore(str(tmp_path / "store"))
        digest = commit(store, small_base, "mug-1")
        weights = next((tmp_path / "store/objects/mug-1" / digest).glob("*lora*"))
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
        commit(store, small_base, "mug-2")
        with serving(small_base, store, tmp_path) as server, server.client() as client:
            answer = server.draw(client, model="mug-1")
            assert error(answer, 409) == "corrupt_artifact"
            assert str(tmp_path) not in answer.text
            assert server.draw(client, model="mug-2").status_code == 200

    def test_a_full_queue(self, small_base, filled, tmp_path):
        with (
            serving(small_base, filled, tmp_path, queue_limit=2, batch_size=1) as server,
            ThreadPoolExecutor(8) as threads,
        ):

            def draw(seed):
                with server.client() as client:
                    return server.draw(client, model="acme-mug-1", seed=seed, steps=8)

            answers = list(threads.map(draw, range(8)))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert error(answer, 429) == "queue_full"
                assert int(answer.headers["retry-after"]) >= 1

    def test_a_picture_that_takes_too_long(self, small_base, filled, tmp_path):
        with serving(small_base, filled, tmp_path, draw_seconds=0.2) as server, server.client() as client:
            answer = server.draw(client, model="acme-mug-1", steps=100)
        assert error(answer, 408) == "timeout"
        # Clients would draw it three times over.
        assert answer.headers["x-should-retry"] == "false"


class TestChanges:
    def test_a_retrained_object_is_drawn_anew_and_a_removed_one_is_gone(self, small_base, tmp_path):
        store = ArtifactStore(str(tmp_path / "store"))
        old = commit(store, small_base, "mug-1")
        with serving(small_base, store, tmp_path) as server, server.client() as client:
            before = server.draw(client, model="mug-1", seed=1)
            assert before.headers["x-objdrive-digest"] == old
            new = commit(store, small_base, "mug-1", version=1)
            started = time.monotonic()
            while (after := server.draw(client, model="mug-1", seed=1)).headers["x-objdrive-digest"] != new:
                assert time.monotonic() - started < 60
            assert pixels(png(after)).tobytes() != pixels(png(before)).tobytes()
            shutil.rmtree(tmp_path / "store/objects/mug-1")
            started = time.monotonic()
            while (answer := server.draw(client, model="mug-1")).status_code == 200:
                assert time.monotonic() - started < 60
            assert error(answer, 404) == "unknown_object"

    def test_a_store_whose_folder_vanishes_is_unreachable_and_what_is_in_memory_is_drawn_on(
        self, sd15, small_base, tmp_path
    ):
        folder, gone = tmp_path / "store", tmp_path / "unmounted"
        for object_id in ("mug-1", "mug-2", "mug-3"):
            commit(ArtifactStore(str(folder)), small_base, object_id)
        snapshot, clip = map(str, sd15)
        settings = Settings.of(store=str(folder), base=snapshot, clip=clip, no_auth=True, refresh_seconds=0.2)
        with local_app(settings) as (app, _), TestClient(app, "http://127.0.0.1", client=("127.0.0.1", 4711)) as client:

            def draw(model):
                return client.post("/v1/images/generations", json={"model": model, "prompt": "{}", "seed": 1})

            before = png(draw("mug-1"))
            assert draw("mug-2").status_code == 200
            shutil.rmtree(folder / "objects/mug-2")
            assert error(until(lambda: draw("mug-2"), 404), 404) == "unknown_object"
            folder.rename(gone)
            assert error(draw("mug-3"), 503) == "store_unreachable"
            assert png(draw("mug-1")) == before
            assert error(client.get("/objects/mug-1/thumbnail"), 503) == "store_unreachable"
            # Where a file system is unmounted, its empty mount point stays.
            folder.mkdir()
            assert error(draw("mug-4"), 503) == "store_unreachable"
            folder.rmdir()
            gone.rename(folder)
            assert until(lambda: draw("mug-3"), 200).status_code == 200
            assert error(draw("mug-4"), 404) == "unknown_object"

    def test_an_artifact_that_goes_between_look_and_load(self, small_base, tmp_path):
        store = ArtifactStore(str(tmp_path / "store"))
        digest = commit(store, small_base, "mug-1")
        with serving(small_base, store, tmp_path) as server, server.client() as client:
            assert client.get("/objects/mug-1").status_code == 200
            (tmp_path / "store/objects/mug-1" / digest / METADATA_FILE).unlink()
            assert error(server.draw(client, model="mug-1"), 404) == "unknown_object"


class TestLinks:
    def test_a_link_shows_the_picture_until_it_expires(self, small_base, filled, tmp_path):
        with serving(small_base, filled, tmp_path, keys=[("shop", {})]) as server:
            with server.client("shop") as client:
                drawn = server.draw(client, model="acme-mug-1", seed=4, response_format="url")
                kept = png(server.draw(client, model="acme-mug-1", seed=4))
            url = drawn.json()["data"][0]["url"]
            assert "b64_json" not in drawn.json()["data"][0]
            with server.client() as client:
                shown = client.get(url)
                assert shown.headers["content-type"] == "image/png"
                assert shown.headers["x-objdrive-seed"] == "4"
                assert shown.content == kept
                server.clock.now += 3599
                assert client.get(url).status_code == 200
                server.clock.now += 2
                assert error(client.get(url), 403) == "link_expired"

    def test_another_replica_draws_the_same_picture(self, small_base, filled, tmp_path):
        with serving(small_base, filled, tmp_path) as one, one.client() as client:
            url = one.draw(client, model="acme-mug-1", seed=4, response_format="url").json()["data"][0]["url"]
            shown = client.get(url).content
        with serving(small_base, filled, tmp_path) as other, other.client() as client:
            assert client.get(urlsplit(url).path).content == shown

    def test_a_link_that_was_changed_opens_nothing(self, open_server):
        with open_server.client() as client:
            drawn = open_server.draw(client, model="acme-mug-1", response_format="url")
            url = drawn.json()["data"][0]["url"]
            for bad in (url[:-2] + "AA", url.replace("results/", "results/A"), url.rpartition(".")[0], url[:-1] + "ü"):
                assert error(client.get(bad), 403) == "invalid_signature"

    def test_a_link_ends_with_the_key_that_asked_for_it(self, small_base, filled, tmp_path):
        with serving(small_base, filled, tmp_path, keys=[("shop", {}), ("other", {})]) as server:
            with server.client("shop") as client:
                url = server.draw(client, model="acme-mug-1", response_format="url").json()["data"][0]["url"]
            path = tmp_path / "keys.yaml"
            path.write_text(path.read_text().replace("name: shop", "name: shop-was"))
            server.services.gate.refresh()
            with server.client() as client:
                assert error(client.get(url), 403) == "invalid_signature"
