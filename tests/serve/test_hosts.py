import pytest

from serve.hosts import asked_host, is_loopback, is_own_page


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.7", False),
        ("localhost.example", False),
        ("", False),
    ],
)
def test_only_this_machine_reaches_a_loopback_address(host, expected):
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("header", "host"),
    [
        (b"127.0.0.1:8000", "127.0.0.1"),
        (b"LocalHost", "localhost"),
        (b"[::1]:8000", "::1"),
        (b"shop.example", "shop.example"),
        (b"", None),
        (b"a{b}.example", None),
        (b"a`b.example", None),
        (b'a"b.example', None),
        (b"127.0.0.1, evil.example", None),
        (b"127.0.0.1:80:80", None),
        (b"127.0.0.1:port", None),
        (b"me@127.0.0.1", None),
        (b"127.0.0.1/x", None),
        (b"127.0.0.1 ", None),
        (b"[::1", None),
        (b"::1", None),
        (b"\xff", None),
    ],
)
def test_a_host_header_is_one_name_or_address(header, host):
    assert asked_host([(b"accept", b"*/*"), (b"host", header)]) == host


def test_there_is_one_host_header():
    assert asked_host([]) is None
    assert asked_host([(b"host", b"127.0.0.1"), (b"host", b"127.0.0.1")]) is None


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (b"http://127.0.0.1:8000", True),
        (b"https://LocalHost", True),
        (b"http://[::1]:8000", True),
        (b"http://shop.example", False),
        (b"http://localhost.shop.example", False),
        (b"http://localhost@shop.example", False),
        (b"http://localhost, http://shop.example", False),
        (b"null", False),
        (b"", False),
        (b"\xff", False),
    ],
)
def test_only_this_machines_pages_are_its_own(origin, expected):
    assert is_own_page(origin) is expected
