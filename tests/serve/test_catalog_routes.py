import json

import pytest
from answers import error, pixels
from conftest import serving
from random_store import STEPS, commit, digest_of

from objdrive.adapters.store import ArtifactStore


def test_pages_follow_one_another(open_server):
    with open_server.client() as client:
        first = client.get("/v1/models", params={"limit": 3}).json()
        assert [model["id"] for model in first["data"]] == ["acme-lamp-1", "acme-mug-1", "acme-mug-2"]
        assert first["has_more"] is True
        second = client.get("/v1/models", params={"limit": 3, "after": first["last_id"]}).json()
        assert [model["id"] for model in second["data"]] == ["other-chair-1"]
        assert second["has_more"] is False
        page = client.get("/objects", params={"limit": 2}).json()
        following = client.get("/objects", params={"limit": 2, "after": page["next"]}).json()
        assert [one["object_id"] for one in page["data"] + following["data"]] == [
            "acme-lamp-1",
            "acme-mug-1",
            "acme-mug-2",
            "other-chair-1",
        ]
        full = client.get("/objects", params={"limit": 4}).json()
        assert len(full["data"]) == 4
        assert full["next"] is None
        assert client.get("/v1/models", params={"limit": 2, "after": "acme-mug-1"}).json()["has_more"] is False
        for limit in (0, 101, "x"):
            assert error(client.get("/objects", params={"limit": limit}), 400) == "invalid_request"


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"q": "MUG-"}, ["acme-mug-1", "acme-mug-2"]),
        ({"q": "fine la"}, ["acme-lamp-1"]),
        ({"q": "%_"}, ["acme-lamp-1", "acme-mug-1", "acme-mug-2", "other-chair-1"]),
        ({"q": "_mug"}, []),
        ({"class_name": "chair"}, ["other-chair-1"]),
        ({"class_name": "mug", "q": "2"}, ["acme-mug-2"]),
    ],
)
def test_a_search(open_server, wanted, found):
    with open_server.client() as client:
        answer = client.get("/objects", params=wanted)
    assert [one["object_id"] for one in answer.json()["data"]] == found


def test_an_object_and_its_pictures(open_server, small_base):
    with open_server.client() as client:
        one = client.get("/objects/acme-mug-1").json()
        assert one["digest"] == digest_of("acme-mug-1")
        assert one["class_name"] == "mug"
        assert one["steps"] == STEPS
        assert one["base"]["fingerprint"] == small_base.fingerprint
        assert "secret" not in json.dumps(one)
        reference, thumbnail = client.get(one["reference"]), client.get(one["thumbnail"])
        assert reference.headers["content-type"] == thumbnail.headers["content-type"] == "image/webp"
        assert reference.content != thumbnail.content
        assert pixels(reference.content).size == (8, 8)
        assert error(client.get("/objects/nope"), 404) == "unknown_object"
        assert error(client.get("/objects/nope/thumbnail"), 404) == "unknown_object"


def test_a_mended_objects_thumbnail_is_a_picture_of_it(small_base, tmp_path):
    store = ArtifactStore(str(tmp_path / "store"))
    previews = {
        "input": "input",
        "mask": "mask",
        "mended_mask": "mended mask",
        "prototype": "prototype only: a photo of {} on grass",
        "picture": "a photo of {} on grass",
    }
    commit(store, small_base, "mug-1", previews=previews)
    artifact = store.current("mug-1")
    with serving(small_base, store, tmp_path) as server, server.client() as client:
        thumbnail, reference = client.get("/objects/mug-1/thumbnail"), client.get("/objects/mug-1/reference")
    assert thumbnail.content == store.read_file(artifact, artifact.previews[4].file)
    assert reference.content == store.read_file(artifact, artifact.previews[0].file)


def test_an_object_without_pictures(small_base, tmp_path):
    store = ArtifactStore(str(tmp_path / "store"))
    commit(store, small_base, "mug-1", previews={})
    with serving(small_base, store, tmp_path) as server, server.client() as client:
        one = client.get("/objects/mug-1").json()
        assert one["thumbnail"] is one["reference"] is None
        assert error(client.get("/objects/mug-1/thumbnail"), 404) == "not_found"
