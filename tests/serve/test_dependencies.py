from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from answers import error
from conftest import serving
from starlette.testclient import TestClient

from serve.api import create_app


@pytest.fixture(scope="module")
def server(small_base, filled, tmp_path_factory):
    """A server with three keys."""
    keys = [("all", {}), ("acme", {"prefix": "acme-"}), ("slow", {"requests_per_minute": 6, "burst": 3})]
    with serving(small_base, filled, tmp_path_factory.mktemp("keys"), keys=keys) as server:
        yield server


@pytest.mark.parametrize("path", ["/v1/models", "/objects", "/classes", "/objects/acme-mug-1", "/v1/models/x"])
def test_nothing_without_a_key(server, path):
    with server.client() as client:
        refused = client.get(path)
        assert error(refused, 401) == "invalid_api_key"
        assert refused.headers["www-authenticate"] == "Bearer"
        wrong = client.get(path, headers={"authorization": "Bearer od-guess"})
        assert error(wrong, 401) == "invalid_api_key"
        assert error(server.draw(client, model="acme-mug-1"), 401) == "invalid_api_key"
        assert client.get("/healthz").status_code == 200


def test_a_tenant_sees_only_its_own(server):
    with server.client("acme") as client:
        models = client.get("/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["acme-lamp-1", "acme-mug-1", "acme-mug-2"]
        assert {one["class_name"] for one in client.get("/classes").json()} == {"mug", "lamp"}
        found = client.get("/objects", params={"q": "chair"}).json()["data"]
        assert found == []
        for path in ("/objects/{}", "/v1/models/{}", "/objects/{}/thumbnail", "/objects/{}/reference"):
            there = client.get(path.format("other-chair-1"))
            nowhere = client.get(path.format("other-chair-9"))
            assert error(there, 403) == error(nowhere, 403) == "forbidden_object"
            assert there.json() == nowhere.json()
        assert error(server.draw(client, model="other-chair-1"), 403) == "forbidden_object"
        mixed = server.draw(client, model="acme-mug-1+other-chair-1", prompt="{} and {}")
        assert error(mixed, 403) == "forbidden_object"
        assert server.draw(client, model="acme-mug-1").status_code == 200


def test_the_rate_is_counted_by_picture(server):
    with server.client("slow") as client:
        assert server.draw(client, model="acme-mug-1", n=2).status_code == 200
        refused = server.draw(client, model="acme-mug-1", n=2)
        assert error(refused, 429) == "rate_limit_exceeded"
        assert int(refused.headers["retry-after"]) in (10, 11)
        server.clock.now += 10
        assert server.draw(client, model="acme-mug-1", n=2).status_code == 200
    with server.client("all") as client:
        assert server.draw(client, model="acme-mug-1").status_code == 200


def test_what_is_refused_does_not_count(server):
    server.clock.now += 60
    with server.client("slow") as client:
        for refused in ({"prompt": "ab " * 500}, {"prompt": "{} and {}", "model": None}, {"model": "nobody"}) * 3:
            assert server.draw(client, **{"model": "acme-mug-1"} | refused).status_code in (404, 422)
        assert server.draw(client, model="acme-mug-1", n=3).status_code == 200
        assert error(server.draw(client, model="acme-mug-1"), 429) == "rate_limit_exceeded"


def test_those_without_a_place_do_not_use_up_the_rate(small_base, filled, tmp_path):
    keys = [("shop", {"requests_per_minute": 1, "burst": 20})]
    with (
        serving(small_base, filled, tmp_path, keys=keys, queue_limit=2, batch_size=1) as server,
        ThreadPoolExecutor(40) as threads,
    ):

        def draw(seed):
            with server.client("shop") as client:
                return server.draw(client, model="acme-mug-1", seed=seed, steps=20)

        assert draw(0).status_code == 200
        answers = list(threads.map(draw, range(40)))
    codes = Counter("drawn" if one.status_code == 200 else error(one, 429) for one in answers)
    assert set(codes) == {"drawn", "queue_full"}, codes


def test_looking_is_not_drawing(server):
    server.clock.now += 60
    paths = [
        "/objects",
        "/objects/acme-mug-1",
        "/objects/acme-mug-1/thumbnail",
        "/objects/acme-mug-1/reference",
        "/v1/models",
        "/v1/models/acme-mug-1",
        "/classes",
    ]
    with server.client("slow") as client:
        assert {client.get(path).status_code for path in paths * 10} == {200}
        assert server.draw(client, model="acme-mug-1", n=3).status_code == 200
        assert error(server.draw(client, model="acme-mug-1"), 429) == "rate_limit_exceeded"
        assert {client.get(path).status_code for path in paths} == {200}


def test_without_keys_only_this_machine_is_answered(open_server):
    app = create_app(open_server.services)
    away = TestClient(app, "http://127.0.0.1", client=("192.0.2.7", 4711))
    # What a page of another site sees once the site's name leads here.
    under_another_name = TestClient(app, "http://shop.example", client=("127.0.0.1", 4711))
    for client in (away, under_another_name):
        assert error(client.get("/objects/acme-mug-1"), 401) == "invalid_api_key"
        assert client.get("/healthz").status_code == 200
    for name in ("127.0.0.1:8000", "localhost:8000", "[::1]:8000"):
        here = TestClient(app, f"http://{name}", client=("127.0.0.1", 4711))
        assert here.get("/objects/acme-mug-1").status_code == 200
