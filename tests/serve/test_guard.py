import json

from answers import error
from conftest import serving
from starlette.testclient import TestClient

from serve.api import create_app


def test_a_body_that_is_too_long(open_server):
    body = json.dumps({"prompt": "x" * 70_000}).encode()
    with open_server.client() as client:
        headers = {"content-type": "application/json"}
        told = client.post("/v1/images/generations", content=body, headers=headers)
        untold = client.post("/v1/images/generations", content=iter([body[:100], body[100:]]), headers=headers)
    assert error(told, 413) == "body_too_large"
    assert error(untold, 413) == "body_too_large"


def test_no_such_route_or_method(open_server):
    with open_server.client() as client:
        assert error(client.get("/v2/images"), 404) == "not_found"
        refused = client.get("/v1/images/generations")
        assert error(refused, 405) == "method_not_allowed"
        assert refused.headers["allow"] == "POST"


def test_only_the_health_is_answered_while_draining(small_base, filled, tmp_path):
    with serving(small_base, filled, tmp_path) as server, server.client() as client:
        server.services.drain.begin()
        answer = server.draw(client, model="acme-mug-1")
        assert error(answer, 503) == "draining"
        assert "retry-after" in answer.headers
        assert error(client.get("/readyz"), 503) == "draining"
        assert client.get("/healthz").status_code == 200


def test_what_breaks_is_counted_as_broken(open_server, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("the index is gone")

    client = TestClient(create_app(open_server.services), "http://127.0.0.1", client=("127.0.0.1", 4711))
    monkeypatch.setattr(open_server.services.catalog, "page", broken)
    answer = client.get("/objects")
    assert error(answer, 500) == "internal_error"
    assert "the index is gone" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    counted = 'objdrive_http_requests_total{outcome="internal_error",route="/objects",status="500"} 1.0'
    assert counted in client.get("/metrics").text
