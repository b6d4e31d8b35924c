"""OpenAI's images API: pictures of objects, and links to them."""

import base64
import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse, Response

from objdrive.adapters.artifact import ArtifactKey
from objdrive.sampling.requests import DrawRequest
from serve.auth import ApiKey, Spending
from serve.dependencies import Asking, Serving, described, visible
from serve.draw_requests import asked_size, draw_requests, object_ids
from serve.drawing import BaseInfo, model_id
from serve.errors import ApiError, error_responses
from serve.exactness import placed
from serve.finishing import MEDIA_TYPES, Finish
from serve.kept import Work, name_of
from serve.schema import DrawingFields, GenerationRequest, Image, ImagesResponse
from serve.services import Services
from serve.streaming import streamed
from serve.waiting import draw_all, unless_gone

router = APIRouter(tags=["images"])

STREAMED = {
    "description": "The pictures. With `stream`: server-sent events, partial pictures and the finished one.",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}
_PICTURE = {
    "description": "The picture.",
    "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES.values()},
}


@router.post(
    "/v1/images/generations",
    response_model=ImagesResponse,
    response_model_exclude_none=True,
    responses=error_responses(400, 401, 403, 404, 408, 409, 413, 422, 429, 503) | {200: STREAMED},
)
async def generate(asked: GenerationRequest, key: Asking, services: Serving, request: Request) -> Response:
    """Draw pictures of an object, of several, or of none."""
    artifacts = await visible(services, key, object_ids(asked.model, services.model_aliases))
    base = await described(services.generators, services.draw_seconds)
    finish = Finish.of(asked, cuts_out=True, given=asked.place or "")
    draws = draw_requests(asked, artifacts, base)
    if asked.exact or asked.place:
        ask_rate(services, key, asked, draws, finish)
        cut_out = await placed(services, asked, artifacts, asked_size(asked, base))
        finish = replace(finish, cut_out=cut_out)
        draws = [replace(draw, canvas=cut_out.canvas) for draw in draws]
    return await answer(request, services, key, asked, draws, base, finish)


def ask_rate(
    services: Services, key: ApiKey, asked: DrawingFields, draws: Sequence[DrawRequest], finish: Finish
) -> tuple[Work | None, Spending]:
    """The drawing that is under way or kept for this request, if there is one, and what the request counts for its key.

    To be asked before anything is read or decoded for the request; nothing is counted yet.

    Raises:
        ApiError: 429, the key has used up its rate.
    """
    # A stream has its client wait step by step: no proxy gives it up.
    work = None if asked.stream else services.kept.find(name_of(draws, finish))
    return work, services.gate.spend(key, 0 if work or finish.transparent else len(draws))


async def answer(
    request: Request,
    services: Services,
    key: ApiKey,
    asked: DrawingFields,
    draws: Sequence[DrawRequest],
    base: BaseInfo,
    finish: Finish,
) -> Response:
    """Draw, and answer with the pictures or with a stream of events."""
    headers = _origin(draws, base)
    work, spending = ask_rate(services, key, asked, draws, finish)
    linked = asked.response_format == "url"

    def link(draw: DrawRequest, data: bytes) -> str | None:
        return _link(request, services, key, draw, finish, data) if linked else None

    if asked.stream:
        return await streamed(request, services, draws[0], base, finish, headers, link, spending)
    work = work or services.kept.begin(name_of(draws, finish), draw_all(services, draws, finish, spending))
    pictures = await unless_gone(request, services.kept.wait(work))
    images = [
        Image(
            b64_json=None if linked else base64.b64encode(picture.data).decode(),
            url=link(draw, picture.data),
            revised_prompt=picture.prompt,
            seed=draw.seed,
            model=model_id(draw),
        )
        for draw, picture in zip(draws, pictures, strict=True)
    ]
    document = ImagesResponse(
        created=int(time.time()), data=images, output_format=finish.format, background=finish.background
    )
    return JSONResponse(document.model_dump(exclude_none=True), headers=headers)


@router.get(
    "/v1/images/results/{token}",
    response_class=Response,
    responses=error_responses(403, 404, 408, 409, 429, 503) | {200: _PICTURE},
)
async def result(
    token: Annotated[str, Path(description="The last part of an answer's `url`.", examples=["eNq..."])],
    services: Serving,
    request: Request,
) -> Response:
    """The picture of a signed link. Needs no key."""
    key, draw, finish = _linked(services, token)
    data = services.results.get(token)
    if data is None:
        if draw is None:
            raise ApiError("not_found", "this picture is no longer kept: ask for it again")
        [picture] = await unless_gone(request, draw_all(services, [draw], finish, services.gate.spend(key)))
        data = picture.data
        services.results.keep(token, data)
    headers = {"cache-control": "private, max-age=3600"}
    if draw:
        headers |= _origin([draw], await described(services.generators, services.draw_seconds))
    return Response(data, media_type=MEDIA_TYPES[finish.format], headers=headers)


def _link(request: Request, services: Services, key: ApiKey, draw: DrawRequest, finish: Finish, data: bytes) -> str:
    claims: dict[str, Any] = {"key": key.name, "format": finish.format, "quality": finish.quality}
    if finish.lasting:
        claims["draw"] = asdict(draw)
    else:
        # What came with the request is not in a link, so its picture can't be drawn again.
        claims["kept"] = hashlib.sha256(data).hexdigest()
        claims["objects"] = [one.object_id for one in draw.objects]
    token = services.signer.sign(claims)
    services.results.keep(token, data)
    return f"{services.public_url.rstrip('/') or str(request.base_url).rstrip('/')}/v1/images/results/{token}"


def _linked(services: Services, token: str) -> tuple[ApiKey, DrawRequest | None, Finish]:
    """What `_link` signed: the key that asked, what was drawn if it can be drawn again, and in which format."""
    claims = services.signer.read(token)
    key = services.gate.named(claims["key"])
    fields: dict[str, Any] | None = claims.get("draw")
    draw = None
    if fields is not None:
        objects, size = tuple(ArtifactKey(**one) for one in fields["objects"]), fields["size"] and tuple(fields["size"])
        draw = DrawRequest(**fields | {"objects": objects, "size": size})
    shown = [one.object_id for one in draw.objects] if draw else claims["objects"]
    if key is None or not all(map(key.may_see, shown)):
        raise ApiError("invalid_signature", "the API key that made this link is no longer valid for these objects")
    return key, draw, Finish(claims["format"], claims["quality"])


def _origin(draws: Sequence[DrawRequest], base: BaseInfo) -> dict[str, str]:
    """Headers that name what draws."""
    return {
        "x-objdrive-model": model_id(draws[0]),
        "x-objdrive-digest": ",".join(key.digest for key in draws[0].objects),
        "x-objdrive-seed": ",".join(str(draw.seed) for draw in draws),
        "x-objdrive-base": f"{quote(base.id)}@{base.fingerprint}",
    }
