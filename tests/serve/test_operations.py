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
        'objdrive_http_requests_total{route="/v1/images/generations",status="200"}',
        "objdrive_step_seconds_bucket",
        "objdrive_batch_size_sum",
        "objdrive_queue_seconds_count",
        "objdrive_swap_seconds_count",
        'objdrive_adapter_hits_total{tier="store"}',
        "objdrive_adapters_resident",
    ):
        assert name in text
