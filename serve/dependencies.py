"""What the routes have in common: their parameters, who asks, and the objects that they may see."""

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Depends, Path, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from objdrive.adapters.artifact import ArtifactMetadata
from serve.auth import ApiKey
from serve.drawing import BaseInfo, Generators
from serve.errors import ApiError
from serve.schema import MAX_PAGE
from serve.services import Services

_BEARER = HTTPBearer(auto_error=False, description="An API key. A server without keys asks for none.")


def services_of(request: Request) -> Services:
    """The services of the app that a request reached."""
    services: Services = request.app.state.services
    return services


Serving = Annotated[Services, Depends(services_of)]


async def authenticated(
    request: Request, services: Serving, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
) -> ApiKey:
    """The key that a request was sent with.

    Raises:
        ApiError: 401.
    """
    return services.gate.key(request.headers.get("authorization"))


Asking = Annotated[ApiKey, Depends(authenticated)]
ObjectIdPath = Annotated[str, Path(description="The object's id.", examples=["alarm-clock-01"])]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="How many to return at most.")]
After = Annotated[str, Query(max_length=128, description="The page begins after this id.")]


async def visible(services: Services, key: ApiKey, ids: Sequence[str]) -> list[ArtifactMetadata]:
    """The objects' current artifacts, in the order of `ids`.

    Raises:
        ApiError: 403, the key may not see one of them, whether it is there or not; 404, there is none such; 503, the
            store can't be asked.
    """
    for object_id in ids:
        if not key.may_see(object_id):
            raise ApiError(
                "forbidden_object",
                f"the key {key.name!r} sees only objects that begin with {key.prefix!r}",
                param="model",
            )
    return list(await asyncio.gather(*(services.objects.find(object_id) for object_id in ids)))


async def visible_page(
    services: Services, key: ApiKey, limit: int, after: str, **wanted: str
) -> tuple[list[ArtifactMetadata], str | None]:
    """A page of artifacts that the key may see, and the id behind which the next page begins (None: it is the last).

    `wanted` is as for `serve.catalog.Catalog.page`.
    """
    # One more than asked for tells whether there is a next page.
    found = await services.catalog.aside(services.catalog.page, limit + 1, after=after, prefix=key.prefix, **wanted)
    ids = found[:limit]
    return await services.objects.find_all(ids), ids[-1] if len(found) > limit else None


async def described(generators: Generators, seconds: float) -> BaseInfo:
    """The base that draws.

    Raises:
        ApiError: 503, no generator has told it within `seconds`.
    """
    try:
        return await asyncio.wait_for(generators.describe(), seconds)
    except TimeoutError:
        raise ApiError("unavailable", "no generator answers") from None


def media(kind: str, description: str) -> dict[str, Any]:
    """The OpenAPI document's part on an answer of a media type that is not JSON."""
    schema = {"type": "string"} if kind.startswith("text") else {"type": "string", "format": "binary"}
    return {"content": {kind: {"schema": schema}}, "description": description}
