"""The objects as OpenAI's clients list models."""

from collections.abc import AsyncGenerator
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response, StreamingResponse

from objdrive.adapters.artifact import ArtifactMetadata
from serve.auth import ApiKey
from serve.dependencies import After, Asking, ObjectIdPath, Serving, visible, visible_page
from serve.drawing import BASE_MODEL_ID
from serve.errors import error_responses
from serve.schema import MAX_PAGE, Model, ModelList
from serve.services import Services

router = APIRouter(tags=["models"])

MaybeLimit = Annotated[
    int | None, Query(ge=1, le=MAX_PAGE, description="How many to return at most; without it, all of them.")
]


@router.get("/v1/models", response_model=ModelList, responses=error_responses(400, 401, 503))
async def list_models(
    key: Asking, services: Serving, limit: MaybeLimit = None, after: After = ""
) -> ModelList | Response:
    """The objects, as OpenAI's clients list models: a page of them, or all.

    OpenAI's own clients ask for no further page of models, whatever the first one says.
    """
    page, following = await _page(services, key, limit or MAX_PAGE, after)
    if limit is None and following is not None:
        return StreamingResponse(_whole(services, key, page, following), media_type="application/json")
    return ModelList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=following is not None,
    )


@router.get("/v1/models/{model}", responses=error_responses(401, 403, 404, 503))
async def retrieve_model(model: ObjectIdPath, key: Asking, services: Serving) -> Model:
    """One object, or another name for one, as OpenAI's clients see a model."""
    named = services.model_aliases.get(model, model)
    if model in services.model_aliases and named == BASE_MODEL_ID:
        return Model(id=model, created=0)
    artifacts = await visible(services, key, named.split("+"))
    return _model(artifacts[0]).model_copy(update={"id": model})


async def _page(services: Services, key: ApiKey, limit: int, after: str) -> tuple[list[Model], str | None]:
    """A page, and the id behind which there is more; a page is empty only where nothing follows."""
    following: str | None = after
    while following is not None:
        artifacts, following = await visible_page(services, key, limit, following)
        if artifacts:
            return [_model(artifact) for artifact in artifacts], following
    return [], None


async def _whole(
    services: Services, key: ApiKey, first: list[Model], following: str | None
) -> AsyncGenerator[bytes, None]:
    """A `ModelList` of all that the key may see, page by page: no catalog is held in memory."""
    page, last = first, first[-1].id
    yield b'{"object":"list","data":['
    while page:
        last = page[-1].id
        yield ",".join(model.model_dump_json() for model in page).encode()
        if following is None:
            break
        page, following = await _page(services, key, MAX_PAGE, following)
        yield b"," if page else b""
    yield f'],"first_id":"{first[0].id}","last_id":"{last}","has_more":false}}'.encode()


def _model(artifact: ArtifactMetadata) -> Model:
    return Model(id=artifact.object_id, created=int(datetime.fromisoformat(artifact.created).timestamp()))
