import asyncio

from serve.proxy import middlewares


def through(headers, answered):
    """What the app sees of a request's headers, and the client of the answer's."""
    seen, sent = [], []

    async def app(scope, receive, send):
        seen.extend(scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": answered})

    async def send(message):
        sent.extend(message["headers"])

    [middleware] = middlewares()
    wrapped = middleware.cls(app, **middleware.kwargs)
    asyncio.run(wrapped({"type": "http", "headers": headers}, None, send))
    return seen, sent


def test_clients_do_not_set_what_is_serve_s():
    kept = [(b"accept", b"*/*"), (b"x-request-id", b"a")]
    asked = [(b"X_Request_Timeout_Seconds", b"1"), *kept, (b"serve-multiplexed-model-id", b"b")]
    assert through(asked, [])[0] == kept


def test_an_answer_has_one_id():
    answered = [(b"x-request-id", b"a"), (b"etag", b"e"), (b"X-Request-ID", b"a")]
    assert through([], answered)[1] == [(b"etag", b"e"), (b"x-request-id", b"a")]
