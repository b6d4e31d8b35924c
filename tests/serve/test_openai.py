"""OpenAI's own client, unchanged."""

import base64
import io
import threading

import openai
import pytest
from conftest import serving
from openai.pagination import SyncCursorPage
from openai.types import Model
from PIL import Image
from random_store import commit, digest_of, metadata_of

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


@pytest.fixture(scope="module")
def aliased(small_base, filled, tmp_path_factory):
    """A server with other names for models."""
    aliases = {"gpt-image-2": "acme-mug-1", "dall-e-3": "base"}
    with serving(small_base, filled, tmp_path_factory.mktemp("aliases"), model_aliases=aliases) as server:
        yield server


class TestImages:
    """The calls of openai-python's own tests, with pictures that are some."""

    @pytest.fixture
    def client(self, aliased):
        with openai.OpenAI(base_url=f"{aliased.url}/v1", api_key="none", max_retries=0) as client:
            yield client

    @pytest.fixture
    def photo(self):
        return png_file("RGB", 255), png_file("RGBA", 0)

    def test_generates(self, client):
        assert client.images.generate(prompt="A cute baby sea otter").data[0].b64_json

    @pytest.mark.parametrize("stream", [False, True])
    def test_generates_with_all_fields(self, client, stream):
        answer = client.images.generate(
            prompt="A cute baby sea otter",
            background="opaque",
            model="gpt-image-2",
            moderation="low",
            n=1,
            output_compression=100,
            output_format="png",
            partial_images=1,
            quality="medium",
            response_format="url",
            size="auto",
            stream=stream,
            style="vivid",
            user="user-1234",
        )
        if stream:
            completed = list(answer)[-1]
            assert completed.type == "image_generation.completed"
            assert completed.model.startswith("acme-mug-1@")
        else:
            assert answer.data[0].url

    def test_a_transparent_background_wants_exact(self, client):
        with pytest.raises(openai.BadRequestError, match="exact") as refused:
            client.images.generate(prompt="A cute baby sea otter", model="gpt-image-2", background="transparent")
        assert refused.value.param == "background"

    def test_edits(self, client, photo):
        image, mask = photo
        answer = client.images.edit(image=image, mask=mask, prompt="A cute baby sea otter wearing a beret")
        assert picture(answer.data[0].b64_json).size == (96, 64)

    @pytest.mark.parametrize("stream", [False, True])
    def test_edits_with_all_fields(self, client, photo, stream):
        image, mask = photo
        answer = client.images.edit(
            image=[image],
            prompt="A cute baby sea otter wearing a beret",
            background="opaque",
            input_fidelity="high",
            mask=mask,
            model="gpt-image-2",
            n=1,
            output_compression=100,
            output_format="webp",
            partial_images=1,
            quality="high",
            response_format="url",
            size="96x64",
            stream=stream,
            user="user-1234",
            extra_body={"seed": 7, "steps": 2, "exact": False},
        )
        if stream:
            events = list(answer)
            assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
            assert picture(events[-1].b64_json).format == "WEBP"
        else:
            assert answer.data[0].url

    def test_aliases_name_an_object_or_the_base(self, client):
        for alias, drawn in (("gpt-image-2", f"acme-mug-1@{digest_of('acme-mug-1')}"), ("dall-e-3", "base")):
            answer = client.images.generate(model=alias, prompt="a photo of a mug", extra_body={"steps": 1})
            assert answer.data[0].model == drawn
            assert client.models.retrieve(alias).id == alias

    def test_a_name_that_is_none_tells_where_the_names_are(self, client):
        with pytest.raises(openai.NotFoundError, match="GET /v1/models"):
            client.images.generate(model="gpt-image-1", prompt="a mug")


def png_file(mode, alpha):
    """A file of 96 x 64 pixels, of which a part has this alpha."""
    image = Image.new(mode, (96, 64), (200, 100, 50, 255)[: len(mode)])
    image.paste((0, 0, 0, alpha)[: len(mode)], (16, 16, 64, 64))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return ("image.png", buffer.getvalue(), "image/png")


IDS = [f"mug-{number:04}" for number in range(230)]


@pytest.fixture(scope="module")
def many(small_base, tmp_path_factory):
    """A server of more objects than a page lists."""
    store = ArtifactStore(str(tmp_path_factory.mktemp("many")))
    for object_id in IDS:
        store.commit({}, metadata_of(object_id, small_base))
    with serving(small_base, store, tmp_path_factory.mktemp("models")) as server:
        yield server


class TestModels:
    @pytest.fixture
    def client(self, many):
        with openai.OpenAI(base_url=f"{many.url}/v1", api_key="none", max_retries=0) as client:
            yield client

    def test_the_list_goes_to_the_end(self, client):
        """This client never asks for a second page of models, so all must come at once."""
        page = client.models.list()
        assert [model.id for model in page] == IDS
        assert not page.has_next_page()
        assert (page.first_id, page.last_id, page.has_more) == (IDS[0], IDS[-1], False)

    def test_its_cursor_pages_go_to_the_end(self, client):
        pages = client.get_api_list(
            "/models", page=SyncCursorPage[Model], model=Model, options={"params": {"limit": 100}}
        )
        assert len(pages.data) == 100
        assert [model.id for model in pages] == IDS

    def test_a_page_after_an_id(self, client):
        page = client.models.list(extra_query={"limit": 3, "after": "mug-0009"})
        assert [model.id for model in page.data] == ["mug-0010", "mug-0011", "mug-0012"]
        assert page.has_more
