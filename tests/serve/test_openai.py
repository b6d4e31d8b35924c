"""OpenAI's own client, unchanged."""

import base64
import io

import openai
import pytest
from conftest import serving
from PIL import Image
from random_store import digest_of


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


def test_links(client, server):
    answer = client.images.generate(model="acme-mug-1", prompt="{}", response_format="url")
    with server.client() as anyone:
        assert Image.open(io.BytesIO(anyone.get(answer.data[0].url).content)).size == (128, 128)


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
