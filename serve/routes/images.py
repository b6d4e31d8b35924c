"""OpenAI's images API: pictures of objects, and links to them."""

import base64
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse, Response

from objdrive.adapters.artifact import ArtifactKey
from objdrive.sampling.requests import DrawRequest
from serve.auth import ApiKey
from serve.dependencies import Asking, Serving, described, media, visible
from serve.draw_requests import draw_requests, object_ids
from serve.drawing import BaseInfo, model_id
from serve.errors import ApiError, error_responses
from serve.schema import GenerationRequest, Image, ImagesResponse
from serve.services import Services
from serve.streaming import streamed
from serve.waiting import draw_all, unless_gone

router = APIRouter(tags=["images"])

_STREAMED = {
    "description": "The pictures. With `stream`: server-sent events, partial pictures and the finished one.",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


@router.post(
    "/v1/images/generations",
    response_model=ImagesResponse,
    response_model_exclude_none=True,
    responses=error_responses(400, 401, 403, 404, 408, 409, 413, 422, 429, 503) | {200: _STREAMED},
)
async def generate(asked: GenerationRequest, key: Asking, services: Serving, request: Request) -> Response:
    """Draw pictures of an object, of several, or of none."""
    artifacts = await visible(services, key, object_ids(asked.model))
    base = await described(services.generators, services.draw_seconds)
    draws = draw_requests(asked, artifacts, base)
    spending = services.gate.spend(key, len(draws))
    headers = _origin(draws, base)
    if asked.stream:
        return await streamed(request, services, draws[0], base, headers, spending)
    pictures = await unless_gone(request, draw_all(services, draws, spending))
    linked = asked.response_format == "url"
    images = [
        Image(
            b64_json=None if linked else base64.b64encode(picture.png).decode(),
            url=_link(request, services, key, draw, picture.png) if linked else None,
            revised_prompt=picture.prompt,
            seed=draw.seed,
            model=model_id(draw),
        )
        for draw, picture in zip(draws, pictures, strict=True)
    ]
    answer = ImagesResponse(created=int(time.time()), data=images)
    return JSONResponse(answer.model_dump(exclude_none=True), headers=headers)


@router.get(
    "/v1/images/results/{token}",
    response_class=Response,
    responses=error_responses(403, 404, 408, 409, 429, 503) | {200: media("image/png", "The picture.")},
)
async def result(
    token: Annotated[str, Path(description="The last part of an answer's `url`.", examples=["eNq..."])],
    services: Serving,
    request: Request,
) -> Response:
    """The picture of a signed link. Needs no key."""
    key, draw = _linked(services, token)
    png = services.results.get(token)
    if png is None:
        [picture] = await unless_gone(request, draw_all(services, [draw], services.gate.spend(key)))
        png = picture.png
        services.results.keep(token, png)
    base = await described(services.generators, services.draw_seconds)
    headers = _origin([draw], base) | {"cache-control": "private, max-age=3600"}
    return Response(png, media_type="image/png", headers=headers)


def _link(request: Request, services: Services, key: ApiKey, draw: DrawRequest, png: bytes) -> str:
    token = services.signer.sign({"key": key.name, "draw": asdict(draw)})
    services.results.keep(token, png)
    return f"{services.public_url.rstrip('/') or str(request.base_url).rstrip('/')}/v1/images/results/{token}"


def _linked(services: Services, token: str) -> tuple[ApiKey, DrawRequest]:
    """What `_link` signed: the key that asked, and what was drawn."""
    claims = services.signer.read(token)
    key = services.gate.named(claims["key"])
    fields: dict[str, Any] = claims["draw"]
    draw = DrawRequest(**fields | {"objects": tuple(ArtifactKey(**one) for one in fields["objects"])})
    if key is None or not all(key.may_see(one.object_id) for one in draw.objects):
        raise ApiError("invalid_signature", "the API key that made this link is no longer valid for these objects")
    return key, draw


def _origin(draws: Sequence[DrawRequest], base: BaseInfo) -> dict[str, str]:
    """Headers that name what draws."""
    return {
        "x-objdrive-model": model_id(draws[0]),
        "x-objdrive-digest": ",".join(key.digest for key in draws[0].objects),
        "x-objdrive-seed": ",".join(str(draw.seed) for draw in draws),
        "x-objdrive-base": f"{quote(base.id)}@{base.fingerprint}",
    }
