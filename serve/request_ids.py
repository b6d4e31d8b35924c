"""The id of each request: the client's, or a new one. Answers and lines of the log bear it."""

import logging
import re
import uuid
from collections.abc import Iterable
from contextvars import ContextVar

HEADER = b"x-request-id"
_PATTERN = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_current: ContextVar[str] = ContextVar("request_id", default="")


def enter_request(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Take the id that a request came with, or give it one if that is no id; the context's lines bear it from here."""
    told = [value for name, value in headers if name == HEADER]
    request_id = told[0] if len(told) == 1 and _PATTERN.fullmatch(told[0]) else uuid.uuid4().hex.encode()
    _current.set(request_id.decode())
    return request_id


class WithRequestId(logging.Filter):
    """Puts the request's id in front of what is logged while it is answered."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record through."""
        request_id = _current.get()
        if request_id:
            record.msg = f"[{request_id}] {record.msg}"
        return True
