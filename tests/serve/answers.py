"""What tests of the API read from its answers."""

import base64
import io
import time

from PIL import Image


def png(answer, index=0):
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["data"][index]["b64_json"])


def pixels(data):
    return Image.open(io.BytesIO(data)).convert("RGB")


def error(answer, status):
    assert answer.status_code == status, answer.text
    document = answer.json()
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    return document["error"]["code"]


def until(ask, status):
    """Ask until the answer has this status."""
    deadline = time.monotonic() + 60
    while (answer := ask()).status_code != status:
        assert time.monotonic() < deadline, answer.text
    return answer
