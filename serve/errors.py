"""Errors over HTTP: one JSON shape (OpenAI's), and codes that never change their meaning."""

import logging
from collections.abc import MutableMapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from objdrive.errors import ObjdriveError, QueueFull
from serve.request_ids import WithRequestId
from serve.schema import ErrorDetails, ErrorResponse

logger = logging.getLogger("objdrive.serve")
logger.addFilter(WithRequestId())

RETRY_AFTER_SECONDS = 2
OUTCOME = "objdrive.outcome"
"""Where the scope of a request notes the code of its error."""
STATUS = {
    "invalid_request": 400,
    "invalid_image": 400,
    "invalid_api_key": 401,
    "forbidden_object": 403,
    "forbidden_origin": 403,
    "invalid_signature": 403,
    "link_expired": 403,
    "not_found": 404,
    "unknown_object": 404,
    "method_not_allowed": 405,
    "timeout": 408,
    "wrong_base": 409,
    "corrupt_artifact": 409,
    "adapter_too_large": 409,
    "photo_unreadable": 409,
    "body_too_large": 413,
    "invalid_prompt": 422,
    "queue_full": 429,
    "rate_limit_exceeded": 429,
    "headers_too_large": 431,
    "cancelled": 499,
    "drawing_failed": 500,
    "internal_error": 500,
    "draining": 503,
    "store_unreachable": 503,
    "unavailable": 503,
}
"""The HTTP status of each code."""
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_PARAMS = {
    "unknown_object": "model",
    "wrong_base": "model",
    "corrupt_artifact": "model",
    "adapter_too_large": "model",
    "photo_unreadable": "model",
    "invalid_prompt": "prompt",
}
_PUBLIC_MESSAGES = {
    "unknown_object": "the object's artifact is gone",
    "corrupt_artifact": "the object's artifact is damaged: personalize the object again",
    "store_unreachable": "the store can't be reached at the moment",
    "drawing_failed": "the picture could not be drawn",
}
"""For clients, in place of messages that name addresses of the store."""
_HTTP_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "body_too_large",
    503: "draining",
}


class ApiError(ObjdriveError):
    """The error that a request is answered with.

    Attributes:
        code: one of `STATUS`.
        param: the request's field that caused it.
        retry_after: seconds after which asking again may help; None: it does not help.
    """

    def __init__(self, code: str, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param if param is not None else _PARAMS.get(code)
        self.retry_after = RETRY_AFTER_SECONDS if retry_after is None and self.status in (429, 503) else retry_after

    @property
    def status(self) -> int:
        """The HTTP status."""
        return STATUS[self.code]

    @property
    def document(self) -> ErrorResponse:
        """The answer's body."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return ErrorResponse(error=ErrorDetails(message=str(self), type=kind, param=self.param, code=self.code))

    @property
    def headers(self) -> dict[str, str]:
        """The answer's headers. OpenAI's clients try again after a 408 or a 409 unless told not to."""
        headers = {"x-should-retry": "false"} if self.status in (408, 409) else {}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def api_error(error: Exception) -> ApiError:
    """The answer to an exception. One without a code of its own is logged, and answered as an internal error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ObjdriveError) and error.code in STATUS:
        if error.code in _PUBLIC_MESSAGES:
            logger.warning("%s: %s", error.code, error)
        retry_after = round(error.retry_after) if isinstance(error, QueueFull) else None
        return ApiError(error.code, _PUBLIC_MESSAGES.get(error.code, str(error)), retry_after=retry_after)
    logger.error("internal error", exc_info=error)
    return ApiError("internal_error", "something went wrong in the server: its log says what")


def error_response(error: ApiError, scope: MutableMapping[str, Any]) -> Response:
    """The error as an answer; the request's scope notes its code, which `serve.guard.Guard` counts."""
    scope[OUTCOME] = error.code
    return JSONResponse(error.document.model_dump(), status_code=error.status, headers=error.headers)


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI document's part on errors of these statuses."""
    codes = {status: [code for code, its in STATUS.items() if its == status] for status in statuses}
    return {status: {"model": ErrorResponse, "description": " or ".join(names)} for status, names in codes.items()}


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of the app in that shape."""

    async def refuse(request: Request, error: Exception) -> Response:
        return error_response(api_error(error), request.scope)

    async def refuse_input(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(_invalid(error.errors()), request.scope)

    async def refuse_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = _HTTP_CODES.get(error.status_code, "invalid_request")
        response = error_response(ApiError(code, str(error.detail)), request.scope)
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(RequestValidationError, refuse_input)
    app.add_exception_handler(HTTPException, refuse_route)
    app.add_exception_handler(ObjdriveError, refuse)


def _invalid(errors: Sequence[Any]) -> ApiError:
    first = errors[0]
    if first["type"] == "json_invalid":
        at, reason = first["loc"][-1], first["ctx"]["error"]
        return ApiError("invalid_request", f"the body is not JSON: {reason}, at character {at}")
    if tuple(first["loc"]) == ("body",):
        return ApiError("invalid_request", 'send a JSON object, with a header "content-type: application/json"')
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    named = ".".join(where) or None
    message = str(first["msg"])
    return ApiError("invalid_request", f"{named}: {message}" if named else message, param=named)
