import dataclasses
import json
import logging
import re

import pytest
from answers import error
from conftest import serving
from random_store import commit
from raw import exchange
from starlette.testclient import TestClient

from objdrive.adapters.store import ArtifactStore
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


NO_HOST = [
    (b"Host: a{b}.example",),
    (b"Host: a`b.example",),
    (b'Host: a"b.example',),
    (b"Host:",),
    (),
    (b"Host: 127.0.0.1", b"Host: evil.example"),
    (b"Host: 127.0.0.1, evil.example",),
    (b"Host: me@127.0.0.1",),
]
PATHS = [b"/objects/acme-mug-1", b"/v1/models", b"/metrics", b"/readyz", b"/healthz", b"/"]


@pytest.mark.parametrize("lines", NO_HOST, ids=lambda lines: b"+".join(lines).decode())
def test_a_request_without_one_host_that_can_be_read_is_refused(open_server, lines):
    for path in PATHS:
        status, answer = exchange(open_server.url, b"GET %s HTTP/1.1" % path, *lines)
        assert status == 400, answer


def test_without_keys_other_names_see_nothing_of_the_server(open_server):
    for path in PATHS:
        status, answer = exchange(open_server.url, b"GET %s HTTP/1.1" % path, b"Host: evil.example")
        assert status == (200 if path == b"/healthz" else 401), answer
        assert exchange(open_server.url, b"GET %s HTTP/1.1" % path, b"Host: LocalHost:1")[0] == 200


@pytest.mark.parametrize("origin", ["https://shop.example", "null", "localhost", ""])
def test_without_keys_no_page_of_another_site_has_pictures_drawn(open_server, origin):
    form = {"data": {"prompt": "a mug"}, "files": {"image": b"x"}}
    with open_server.client() as client:
        before = open_server.services.generators._engine.stats().requests
        refused = client.post("/v1/images/edits", **form, headers={"origin": origin})
        assert error(refused, 403) == "forbidden_origin"
        assert "another site" in refused.json()["error"]["message"]
        client.headers["origin"] = origin
        assert error(open_server.draw(client, model="acme-mug-1"), 403) == "forbidden_origin"
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        preflight = client.options("/v1/images/generations", headers=asked)
        assert error(preflight, 403) == "forbidden_origin"
        assert "www-authenticate" not in preflight.headers
        assert not [name for name in preflight.headers if name.startswith("access-control-")]
        assert open_server.services.generators._engine.stats().requests == before
        assert client.get("/v1/models", headers={"origin": origin}).status_code == 200


def test_without_keys_a_page_of_its_own_may_draw(open_server):
    for origin in (open_server.url, "http://localhost:3000"):
        with open_server.client() as client:
            client.headers["origin"] = origin
            assert open_server.draw(client, model="acme-mug-1", steps=1).status_code == 200


def test_metrics_can_be_switched_off(open_server):
    services = dataclasses.replace(open_server.services, metrics=False)
    client = TestClient(create_app(services), "http://127.0.0.1", client=("127.0.0.1", 4711))
    assert error(client.get("/metrics"), 404) == "not_found"


@pytest.mark.parametrize("headers", [{f"x-{number}": "1" for number in range(101)}, {"x-long": "a" * 17_000}])
def test_a_head_that_is_too_long(open_server, headers):
    with open_server.client() as client:
        assert error(client.get("/healthz", headers=headers), 431) == "headers_too_large"


def test_a_request_has_an_id_in_its_answer_and_in_the_log(small_base, tmp_path, caplog):
    store = ArtifactStore(str(tmp_path / "store"))
    digest = commit(store, small_base, "mug-1")
    (tmp_path / "store/objects/mug-1" / digest / "artifact.json").write_bytes(b"{")
    with serving(small_base, store, tmp_path) as server, server.client() as client, caplog.at_level(logging.WARNING):
        told = client.get("/healthz", headers={"x-request-id": "shop-1:2.3_4"})
        assert told.headers.get_list("x-request-id") == ["shop-1:2.3_4"]
        made = {client.get("/nowhere").headers["x-request-id"] for _ in range(2)}
        assert len(made) == 2
        for bad in ("two words", "a" * 129, "a%s", "{}"):
            other = client.get("/healthz", headers={"x-request-id": bad}).headers["x-request-id"]
            assert re.fullmatch("[0-9a-f]{32}", other)
        asked = {"model": "mug-1", "prompt": "{}"}
        refused = client.post("/v1/images/generations", json=asked, headers={"x-request-id": "find-me"})
    assert error(refused, 409) == "corrupt_artifact"
    assert any("find-me" in record.getMessage() for record in caplog.records), caplog.text
