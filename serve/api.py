"""The HTTP API: OpenAI's images API over a store's objects, the catalog, and the page."""

import asyncio
import base64
import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib import resources
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

from fastapi import Depends, FastAPI, Path, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.responses import Response

from objdrive.adapters.artifact import ArtifactKey, ArtifactMetadata, BaseRef
from objdrive.sampling.requests import DrawRequest
from serve.auth import ApiKey, Gate
from serve.catalog import Catalog
from serve.draw_requests import defaults, draw_requests, object_ids
from serve.drawing import (
    Accepted,
    BaseInfo,
    FinishedPicture,
    Generators,
    PartialPicture,
    PictureEvent,
    Refused,
    model_id,
)
from serve.errors import ApiError, add_error_handlers, api_error, error_responses
from serve.guard import Drain, Guard
from serve.hosts import is_loopback
from serve.metrics import Meter, PrometheusMeter
from serve.objects import Objects
from serve.schema import (
    MAX_PAGE,
    ClassCount,
    CompletedEvent,
    GenerationRequest,
    Health,
    Image,
    ImagesResponse,
    Model,
    ModelList,
    ObjectInfo,
    ObjectPage,
    PartialImageEvent,
)
from serve.signing import Signer

_T = TypeVar("_T")
_INPUT_CAPTION = "input"
_NOT_A_SAMPLE = re.compile(r"^(input|mask|prototype only.*)$")
_READY_SECONDS = 5.0
_CLASSES = 1000


@dataclass
class Services:
    """What the API is made over.

    Attributes:
        public_url: the server's address as clients see it; empty: as each request says.
        draw_seconds: how long a picture may take from the request on.
    """

    generators: Generators
    objects: Objects
    catalog: Catalog
    gate: Gate
    signer: Signer
    meter: Meter
    drain: Drain = field(default_factory=Drain)
    public_url: str = ""
    draw_seconds: float = 120.0


def create_app(services: Services) -> FastAPI:
    """The API as an ASGI app."""
    app = FastAPI(
        title="objdrive",
        description="Pictures of any product of a catalog, in any context. Speaks OpenAI's images API.",
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan,
    )
    app.state.services = services
    app.state.results = Results()
    add_error_handlers(app)
    _add_images(app)
    _add_models(app)
    _add_objects(app)
    _add_operations(app)
    app.add_middleware(Guard, meter=services.meter, drain=services.drain)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    services.catalog.start()
    yield
    services.drain.begin()
    await asyncio.to_thread(services.catalog.close)
    services.objects.close()


class Results:
    """Pictures that were drawn for links, the latest 64 MiB of them. A link to another one is drawn again."""

    _MAX_BYTES = 64 * 2**20

    def __init__(self) -> None:
        self._pictures: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0

    def keep(self, token: str, png: bytes) -> None:
        """Remember a picture."""
        self._bytes += len(png) - len(self._pictures.pop(token, b""))
        self._pictures[token] = png
        while self._bytes > self._MAX_BYTES:
            self._bytes -= len(self._pictures.popitem(last=False)[1])

    def get(self, token: str) -> bytes | None:
        """The picture, if it is still there."""
        return self._pictures.get(token)


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


_BEARER = HTTPBearer(auto_error=False, description="An API key. A server without keys asks for none.")


async def _authenticated(
    request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
) -> ApiKey:
    gate = _services(request).gate
    # By its name too: a page of another site may have a name of its own lead to this machine.
    hosts = (request.client.host if request.client else "", request.url.hostname or "")
    if gate.open and not all(map(is_loopback, hosts)):
        raise ApiError("invalid_api_key", "this server has no API keys, and so answers its own machine only")
    return await asyncio.to_thread(gate.key, request.headers.get("authorization"))


Asking = Annotated[ApiKey, Depends(_authenticated)]
ObjectIdPath = Annotated[str, Path(description="The object's id.", examples=["alarm-clock-01"])]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="How many at most.")]
After = Annotated[str, Query(max_length=128, description="The id behind which the page begins.")]


def _add_images(app: FastAPI) -> None:
    streamed = {
        "description": "The pictures; with `stream`, server-sent events of partial pictures and the finished one.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
    errors = error_responses(400, 401, 403, 404, 408, 409, 413, 422, 429, 503)

    @app.post(
        "/v1/images/generations",
        tags=["images"],
        response_model=ImagesResponse,
        response_model_exclude_none=True,
        responses=errors | {200: streamed},
    )
    async def generate(asked: GenerationRequest, key: Asking, request: Request) -> Response:
        """Draw pictures of an object, of several, or of none."""
        services = _services(request)
        artifacts = await _visible(services, key, object_ids(asked.model))
        base = await _described(services.generators, services.draw_seconds)
        requests = draw_requests(asked, artifacts, base)
        services.gate.spend(key, len(requests))
        headers = _origin(requests, base)
        if asked.stream:
            return await _streamed(request, requests[0], base, headers)
        pictures = await _unless_gone(request, _draw_all(services, requests))
        linked = asked.response_format == "url"
        images = [
            Image(
                b64_json=None if linked else _base64(picture.png),
                url=_link(request, key, one, picture.png) if linked else None,
                revised_prompt=picture.prompt,
                seed=one.seed,
                model=model_id(one),
            )
            for one, picture in zip(requests, pictures, strict=True)
        ]
        answer = ImagesResponse(created=int(time.time()), data=images)
        return JSONResponse(answer.model_dump(exclude_none=True), headers=headers)

    @app.get(
        "/v1/images/results/{token}",
        tags=["images"],
        response_class=Response,
        responses=error_responses(403, 404, 408, 409, 429, 503) | {200: _media("image/png")},
    )
    async def result(
        token: Annotated[str, Path(description="From an answer's `url`.", examples=["eNq..."])], request: Request
    ) -> Response:
        """The picture that a signed link stands for. Needs no key."""
        services, results = _services(request), request.app.state.results
        claims = services.signer.read(token)
        key = services.gate.named(claims["key"])
        draw = claims["draw"]
        draw["objects"] = tuple(ArtifactKey(**one) for one in draw["objects"])
        one = DrawRequest(**draw)
        if key is None or not all(key.may_see(its.object_id) for its in one.objects):
            raise ApiError("invalid_signature", "the key that the link was made with is no longer good for it")
        png = results.get(token)
        if png is None:
            services.gate.spend(key)
            [picture] = await _unless_gone(request, _draw_all(services, [one]))
            png = picture.png
            results.keep(token, png)
        base = await _described(services.generators, services.draw_seconds)
        headers = _origin([one], base) | {"cache-control": "private, max-age=3600"}
        return Response(png, media_type="image/png", headers=headers)


def _add_models(app: FastAPI) -> None:
    @app.get("/v1/models", tags=["models"], responses=error_responses(400, 401, 503))
    async def list_models(key: Asking, request: Request, limit: Limit = MAX_PAGE, after: After = "") -> ModelList:
        """A page of the objects, as OpenAI's clients list models."""
        artifacts, following = await _page(_services(request), key, limit, after)
        models = [_model(artifact) for artifact in artifacts]
        return ModelList(
            data=models,
            first_id=models[0].id if models else None,
            last_id=following or (models[-1].id if models else None),
            has_more=following is not None,
        )

    @app.get("/v1/models/{model}", tags=["models"], responses=error_responses(401, 403, 404, 503))
    async def retrieve_model(model: ObjectIdPath, key: Asking, request: Request) -> Model:
        """One object, as OpenAI's clients see a model."""
        [artifact] = await _visible(_services(request), key, [model])
        return _model(artifact)


def _add_objects(app: FastAPI) -> None:
    errors = error_responses(401, 403, 404, 409, 503)

    @app.get("/objects", tags=["catalog"], responses=error_responses(400, 401, 503))
    async def search_objects(
        key: Asking,
        request: Request,
        q: Annotated[str, Query(max_length=100, description="Part of an id, class or free column.")] = "",
        class_name: Annotated[str, Query(max_length=200)] = "",
        limit: Limit = 24,
        after: After = "",
    ) -> ObjectPage:
        """A page of the objects that match."""
        artifacts, following = await _page(_services(request), key, limit, after, q=q, class_name=class_name)
        return ObjectPage(data=[_info(artifact) for artifact in artifacts], next=following)

    @app.get("/classes", tags=["catalog"], responses=error_responses(401))
    async def list_classes(key: Asking, request: Request) -> list[ClassCount]:
        """The classes with the most objects."""
        found = await asyncio.to_thread(_services(request).catalog.classes, _CLASSES, prefix=key.prefix)
        return [ClassCount(class_name=name, objects=count) for name, count in found]

    @app.get("/objects/{object_id}", tags=["catalog"], responses=errors)
    async def retrieve_object(object_id: ObjectIdPath, key: Asking, request: Request) -> ObjectInfo:
        """What is known of an object."""
        [artifact] = await _visible(_services(request), key, [object_id])
        return _info(artifact)

    pictures = errors | {200: _media("image/webp")}

    @app.get("/objects/{object_id}/thumbnail", tags=["catalog"], response_class=Response, responses=pictures)
    async def thumbnail(object_id: ObjectIdPath, key: Asking, request: Request) -> Response:
        """A small picture of the object in a context."""
        [artifact] = await _visible(_services(request), key, [object_id])
        return await _preview(_services(request), artifact, _thumbnail(artifact))

    @app.get("/objects/{object_id}/reference", tags=["catalog"], response_class=Response, responses=pictures)
    async def reference(object_id: ObjectIdPath, key: Asking, request: Request) -> Response:
        """The photo that the object was learned from."""
        [artifact] = await _visible(_services(request), key, [object_id])
        return await _preview(_services(request), artifact, _reference(artifact))


def _add_operations(app: FastAPI) -> None:
    @app.get("/healthz", tags=["operations"])
    async def health() -> Health:
        """Whether the server answers at all."""
        return Health(base=None, resolution=None)

    @app.get("/readyz", tags=["operations"], responses=error_responses(503))
    async def ready(request: Request) -> Health:
        """Whether it can draw, and with what."""
        base = await _described(_services(request).generators, _READY_SECONDS)
        return Health(base=BaseRef(id=base.id, fingerprint=base.fingerprint), resolution=base.resolution)

    meter = app.state.services.meter
    if isinstance(meter, PrometheusMeter):

        @app.get("/metrics", tags=["operations"], response_class=Response, responses={200: _media("text/plain")})
        async def metrics() -> Response:
            """Measurements, for Prometheus."""
            return Response(meter.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    page = resources.files("serve").joinpath("page.html")
    if page.is_file():
        html = page.read_text(encoding="utf-8")
        headers = {"content-security-policy": content_security_policy(html), "cache-control": "no-cache"}

        @app.get("/", include_in_schema=False)
        async def show_page() -> Response:
            return HTMLResponse(html, headers=headers)


def content_security_policy(html: str) -> str:
    """What the page may do: run its own inline scripts, known by their hash, and talk to this server."""
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _visible(services: Services, key: ApiKey, ids: Sequence[str]) -> list[ArtifactMetadata]:
    """The objects' current artifacts, all of them the key's to see. Looks at the key first: 403 tells nothing."""
    for object_id in ids:
        if not key.may_see(object_id):
            raise ApiError(
                "forbidden_object",
                f"the key {key.name!r} sees only objects that begin with {key.prefix!r}",
                param="model",
            )
    return list(await asyncio.gather(*(services.objects.find(object_id) for object_id in ids)))


async def _page(
    services: Services, key: ApiKey, limit: int, after: str, **wanted: str
) -> tuple[list[ArtifactMetadata], str | None]:
    """A page of artifacts, and the id behind which the next one begins."""
    ids = await asyncio.to_thread(services.catalog.page, limit, after=after, prefix=key.prefix, **wanted)
    return await services.objects.find_all(ids), ids[-1] if len(ids) == limit else None


async def _described(generators: Generators, seconds: float) -> BaseInfo:
    try:
        return await asyncio.wait_for(generators.describe(), seconds)
    except TimeoutError:
        raise ApiError("unavailable", "no generator answers") from None


async def _finished(services: Services, one: DrawRequest) -> FinishedPicture:
    async with aclosing(_drawn(services, one)) as events:
        async for event in events:
            if isinstance(event, FinishedPicture):
                return event
    raise ApiError("unavailable", "the drawing ended without a picture")


async def _draw_all(services: Services, requests: Sequence[DrawRequest]) -> list[FinishedPicture]:
    """The pictures. The first drawing that fails ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_finished(services, one)) for one in requests]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _drawn(services: Services, one: DrawRequest) -> AsyncGenerator[PictureEvent, None]:
    """The drawing's events, within the time that it may take. Raises ApiError where it is refused."""
    started = time.monotonic()
    outcome = "cancelled"
    try:
        async with aclosing(services.generators.draw(one)) as events:
            while (event := await _next(events, started + services.draw_seconds)) is not None:
                if isinstance(event, Refused):
                    raise ApiError(event.code, event.message, retry_after=event.retry_after)
                if isinstance(event, FinishedPicture):
                    outcome = "ok"
                    services.meter.observe("picture_seconds", time.monotonic() - started)
                yield event
    except ApiError as error:
        outcome = error.code
        raise
    except Exception:
        outcome = "internal_error"
        raise
    finally:
        services.meter.count("pictures", outcome=outcome)


async def _next(events: AsyncIterator[_T], deadline: float) -> _T | None:
    try:
        return await asyncio.wait_for(anext(events, None), deadline - time.monotonic())
    except TimeoutError:
        raise ApiError("timeout", "the picture took too long", retry_after=5) from None


async def _streamed(request: Request, one: DrawRequest, base: BaseInfo, headers: dict[str, str]) -> Response:
    """Server-sent events. What is refused at once is refused with its own status."""
    events = _drawn(_services(request), one)
    try:
        accepted = await anext(events)
    except BaseException:
        await events.aclose()
        raise
    assert isinstance(accepted, Accepted)
    body = _server_sent(request, events, one, f"{base.resolution}x{base.resolution}")
    return StreamingResponse(body, media_type="text/event-stream", headers=headers | {"cache-control": "no-store"})


async def _server_sent(
    request: Request, events: AsyncGenerator[PictureEvent, None], one: DrawRequest, size: str
) -> AsyncGenerator[bytes, None]:
    common: dict[str, Any] = {"size": size, "seed": one.seed, "model": model_id(one)}
    async with aclosing(events):
        try:
            while (event := await _unless_gone(request, anext(events, None))) is not None:
                if isinstance(event, PartialPicture):
                    fields = common | {"b64_json": _base64(event.png), "created_at": int(time.time())}
                    yield _sse(PartialImageEvent(**fields, partial_image_index=event.index))
                elif isinstance(event, FinishedPicture):
                    fields = common | {"b64_json": _base64(event.png), "created_at": int(time.time())}
                    yield _sse(CompletedEvent(**fields, revised_prompt=event.prompt))
        except Exception as error:
            failed = api_error(error)
            if failed.code != "cancelled":
                yield f"event: error\ndata: {failed.document.model_dump_json()}\n\n".encode()


def _sse(event: PartialImageEvent | CompletedEvent) -> bytes:
    return f"event: {event.type}\ndata: {event.model_dump_json()}\n\n".encode()


async def _unless_gone(request: Request, work: Awaitable[_T]) -> _T:
    """The work's result; when the client goes away, the work is cancelled.

    Raises:
        ApiError: 499, for the log alone: nobody reads the answer.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError("cancelled", "the client went away")
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _origin(requests: Sequence[DrawRequest], base: BaseInfo) -> dict[str, str]:
    """Headers that name what draws."""
    return {
        "x-objdrive-model": model_id(requests[0]),
        "x-objdrive-digest": ",".join(key.digest for key in requests[0].objects),
        "x-objdrive-seed": ",".join(str(one.seed) for one in requests),
        "x-objdrive-base": f"{quote(base.id)}@{base.fingerprint}",
    }


def _link(request: Request, key: ApiKey, one: DrawRequest, png: bytes) -> str:
    services = _services(request)
    token = services.signer.sign({"key": key.name, "draw": asdict(one)})
    request.app.state.results.keep(token, png)
    return f"{services.public_url.rstrip('/') or str(request.base_url).rstrip('/')}/v1/images/results/{token}"


def _model(artifact: ArtifactMetadata) -> Model:
    return Model(id=artifact.object_id, created=int(datetime.fromisoformat(artifact.created).timestamp()))


def _info(artifact: ArtifactMetadata) -> ObjectInfo:
    usual = defaults([artifact])
    path = f"/objects/{artifact.object_id}"
    return ObjectInfo(
        object_id=artifact.object_id,
        class_name=artifact.class_name,
        digest=artifact.digest,
        scene=artifact.scene,
        base=artifact.base,
        created=artifact.created,
        row=artifact.row,
        steps=usual.steps,
        guidance_scale=usual.guidance_scale,
        thumbnail=f"{path}/thumbnail" if _thumbnail(artifact) else None,
        reference=f"{path}/reference" if _reference(artifact) else None,
    )


def _thumbnail(artifact: ArtifactMetadata) -> str | None:
    return next((preview.file for preview in artifact.previews if not _NOT_A_SAMPLE.match(preview.caption)), None)


def _reference(artifact: ArtifactMetadata) -> str | None:
    return next((preview.file for preview in artifact.previews if preview.caption == _INPUT_CAPTION), None)


async def _preview(services: Services, artifact: ArtifactMetadata, name: str | None) -> Response:
    if name is None:
        raise ApiError("not_found", f"no such picture was kept of {artifact.object_id!r}")
    data = await services.objects.picture(artifact, name)
    headers = {"cache-control": "private, max-age=60", "x-objdrive-digest": artifact.digest}
    return Response(data, media_type="image/webp", headers=headers)


def _media(kind: str) -> dict[str, Any]:
    schema = {"type": "string"} if kind.startswith("text") else {"type": "string", "format": "binary"}
    return {"content": {kind: {"schema": schema}}, "description": "As it says."}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
