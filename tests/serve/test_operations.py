import re

from conftest import serving


def test_ready_tells_the_base(open_server, small_base):
    with open_server.client() as client:
        ready = client.get("/readyz").json()
    assert ready["base"]["fingerprint"] == small_base.fingerprint
    assert ready["resolution"] == 128


def test_metrics_count_without_naming_objects(open_server):
    with open_server.client() as client:
        assert open_server.draw(client, model="acme-mug-1").status_code == 200
        text = client.get("/metrics").text
    assert "acme" not in text
    for name in (
        'objdrive_pictures_total{outcome="ok"}',
        'objdrive_http_requests_total{outcome="ok",route="/v1/images/generations",status="200"}',
        "objdrive_step_seconds_bucket",
        "objdrive_batch_size_sum",
        "objdrive_queue_seconds_count",
        "objdrive_swap_seconds_count",
        'objdrive_adapter_hits_total{tier="store"}',
        "objdrive_adapters_resident",
    ):
        assert name in text


def test_requests_are_counted_by_the_code_of_their_error(small_base, filled, tmp_path):
    with serving(small_base, filled, tmp_path) as server, server.client() as client:
        server.draw(client, model="nobody")
        server.draw(client, model="acme-mug-1", n=99)
        client.get("/v1/images/generations")
        text = client.get("/metrics").text
    for status, outcome in ((404, "unknown_object"), (400, "invalid_request"), (405, "method_not_allowed")):
        assert re.search(
            rf'objdrive_http_requests_total{{outcome="{outcome}",route="[^"]*",status="{status}"}} 1\.0', text
        )


def test_metrics_tell_how_full_batches_could_be(open_server):
    with open_server.client() as client:
        assert "objdrive_batch_limit 4.0" in client.get("/metrics").text
