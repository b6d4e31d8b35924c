"""The objects as OpenAI's clients list models."""

from datetime import datetime

from fastapi import APIRouter

from objdrive.adapters.artifact import ArtifactMetadata
from serve.dependencies import After, Asking, Limit, ObjectIdPath, Serving, visible, visible_page
from serve.errors import error_responses
from serve.schema import MAX_PAGE, Model, ModelList

router = APIRouter(tags=["models"])


@router.get("/v1/models", responses=error_responses(400, 401, 503))
async def list_models(key: Asking, services: Serving, limit: Limit = MAX_PAGE, after: After = "") -> ModelList:
    """A page of the objects, as OpenAI's clients list models."""
    artifacts, following = await visible_page(services, key, limit, after)
    models = [_model(artifact) for artifact in artifacts]
    return ModelList(
        data=models,
        first_id=models[0].id if models else None,
        last_id=following or (models[-1].id if models else None),
        has_more=following is not None,
    )


@router.get("/v1/models/{model}", responses=error_responses(401, 403, 404, 503))
async def retrieve_model(model: ObjectIdPath, key: Asking, services: Serving) -> Model:
    """One object, as OpenAI's clients see a model."""
    [artifact] = await visible(services, key, [model])
    return _model(artifact)


def _model(artifact: ArtifactMetadata) -> Model:
    return Model(id=artifact.object_id, created=int(datetime.fromisoformat(artifact.created).timestamp()))
