"""OpenAI's own client, unchanged."""

import base64
import io
import threading

import openai
import pytest
from conftest import serving
from PIL import Image
from random_store import commit, digest_of

from objdrive.adapters.store import ArtifactStore


@pytest.fixture(scope="module")
def server(small_base, filled, tmp_path_factory):
    with serving(small_base, filled, tmp_path_factory.mktemp("openai"), keys=[("shop", {"burst": 4})]) as server:
        yield server


@pytest.fixture
def client(server):
    server.clock.now += 60
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.secrets["shop"], max_retries=0) as client:
        yield client


def picture(b64):
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def test_generates_pictures(client):
    answer = client.images.generate(model="acme-mug-1", prompt="a photo of {} on grass", n=2, size="auto", user="me")
    assert [picture(image.b64_json).size for image in answer.data] == [(128, 128)] * 2
    assert answer.data[0].revised_prompt == "a photo of {} on grass"
    assert answer.output_format == "png"


def test_passes_our_own_fields(client):
    asked = {"seed": 7, "steps": 3, "guidance_scale": 2.0, "adapter_scale": 0.5, "negative_prompt": "snow"}
    answer = client.images.with_raw_response.generate(
        model="acme-mug-1", prompt="{}", response_format="b64_json", quality="auto", extra_body=asked
    )
    assert answer.headers["x-objdrive-seed"] == "7"
    assert answer.headers["x-objdrive-digest"] == digest_of("acme-mug-1")
    assert picture(answer.parse().data[0].b64_json).text["objdrive:steps"] == "3"


def test_streams(client):
    events = list(client.images.generate(model="acme-mug-1", prompt="{}", stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    partial, completed = events
    assert partial.partial_image_index == 0
    assert picture(partial.b64_json).size == picture(completed.b64_json).size == (128, 128)
    assert completed.usage.total_tokens == 0


class TestStreamsThatFail:
    """After the answer's 200 has been sent, an error can only come as an event."""

    @pytest.fixture
    def store(self, small_base, tmp_path):
        store = ArtifactStore(str(tmp_path / "store"))
        for object_id in ("mug-1", "mug-2"):
            commit(store, small_base, object_id)
        return store

    def stream(self, server, **asked):
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.images.generate(prompt="{}", stream=True, **asked)
            assert stream.response.status_code == 200
            told = []
            with pytest.raises(openai.APIError) as failed:
                # Unlike a list of the stream, this keeps what came before the error.
                told.extend(event.type for event in stream)
        assert not isinstance(failed.value, openai.APIConnectionError | openai.APIStatusError)
        assert set(failed.value.body) == {"message", "type", "param", "code"}
        return told, failed.value

    def test_the_device_fails_in_the_middle(self, small_base, store, tmp_path):
        with serving(small_base, store, tmp_path) as server:
            unet, passes = server.services.generators._engine._base.unet, []

            def fail(*_):
                passes.append(1)
                if len(passes) == 3:
                    raise RuntimeError("the device is lost")

            fault = unet.register_forward_pre_hook(fail)
            told, error = self.stream(server, model="mug-1", partial_images=3, extra_body={"steps": 4})
            assert told == ["image_generation.partial_image"] * 2
            assert (error.code, error.type) == ("drawing_failed", "server_error")
            assert "device" not in error.message
            fault.remove()
            with server.client() as client:
                assert server.draw(client, model="mug-1").status_code == 200

    def test_the_artifact_is_damaged(self, small_base, store, tmp_path):
        weights = next((tmp_path / "store/objects/mug-1" / digest_of("mug-1")).glob("*lora*"))
        weights.write_bytes(weights.read_bytes()[:-1])
        with serving(small_base, store, tmp_path) as server:
            told, error = self.stream(server, model="mug-1")
            assert told == []
            assert (error.code, error.param) == ("corrupt_artifact", "model")
            assert str(tmp_path) not in error.message

    def test_the_server_ends(self, small_base, store, tmp_path):
        with serving(small_base, store, tmp_path) as server:
            engine = server.services.generators._engine
            ending = threading.Thread(target=engine.close)
            engine._base.unet.register_forward_pre_hook(lambda *_: ending.is_alive() or ending.start())
            _, error = self.stream(server, model="mug-2", extra_body={"steps": 100})
            assert error.code == "draining"
            ending.join()

    def test_the_picture_takes_too_long(self, small_base, store, tmp_path):
        with serving(small_base, store, tmp_path, draw_seconds=0.5) as server:
            _, error = self.stream(server, model="mug-1", extra_body={"steps": 100})
            assert error.code == "timeout"


def test_links(client, server):
    answer = client.images.generate(model="acme-mug-1", prompt="{}", response_format="url")
    with server.client() as anyone:
        assert Image.open(io.BytesIO(anyone.get(answer.data[0].url).content)).size == (128, 128)


def test_sizes_are_drawn_and_linked(client, server):
    drawn = client.images.generate(model="acme-mug-1", prompt="{}", size="80x128", extra_body={"seed": 1})
    assert picture(drawn.data[0].b64_json).size == (80, 128)
    linked = client.images.generate(model="acme-mug-1", prompt="{}", size="80x128", response_format="url")
    # As after a restart, when the picture has to be drawn again.
    server.services.results._pictures.clear()
    with server.client() as anyone:
        assert Image.open(io.BytesIO(anyone.get(linked.data[0].url).content)).size == (80, 128)


def test_lists_models(client):
    assert [model.id for model in client.models.list()] == ["acme-lamp-1", "acme-mug-1", "acme-mug-2", "other-chair-1"]
    assert client.models.retrieve("acme-mug-1").owned_by == "objdrive"


def test_raises_its_own_errors(client, server):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.images.generate(model="nope", prompt="{}")
    assert unknown.value.code == "unknown_object"
    assert unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="1024x1024"):
        client.images.generate(model="acme-mug-1", prompt="{}", size="1024x1024")
    with pytest.raises(openai.UnprocessableEntityError):
        client.images.generate(model="acme-mug-1", prompt="{} " + "word " * 150)
    with pytest.raises(openai.APIError, match="tokens"):
        list(client.images.generate(model="acme-mug-1", prompt="{} " + "word " * 150, stream=True))
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="od-wrong").models.list()
    with pytest.raises(openai.RateLimitError) as limited:
        [client.images.generate(model="acme-mug-1", prompt="{}", extra_body={"steps": 1}) for _ in range(5)]
    assert limited.value.code == "rate_limit_exceeded"
