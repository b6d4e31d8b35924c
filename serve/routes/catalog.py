"""The catalog: pages of objects, what is known of one, and its pictures."""

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response

from objdrive.adapters.artifact import ArtifactMetadata, PreviewKind
from objdrive.base.family import STABLE_DIFFUSION
from serve.dependencies import After, Asking, Limit, ObjectIdPath, Serving, media, visible, visible_page
from serve.draw_requests import Defaults, defaults
from serve.errors import ApiError, error_responses
from serve.schema import ClassCount, ObjectInfo, ObjectPage
from serve.services import Services

router = APIRouter(tags=["catalog"])

_CLASSES = 1000
_OF_AN_OBJECT = error_responses(401, 403, 404, 409, 503)
_OF_A_PICTURE = _OF_AN_OBJECT | {200: media("image/webp", "The picture.")}


@router.get("/objects", responses=error_responses(400, 401, 503))
async def search_objects(
    key: Asking,
    services: Serving,
    q: Annotated[
        str, Query(max_length=100, description="Part of an id, of a class, or of the manifest's free columns.")
    ] = "",
    class_name: Annotated[str, Query(max_length=200)] = "",
    limit: Limit = 24,
    after: After = "",
) -> ObjectPage:
    """A page of the objects that match."""
    artifacts, following = await visible_page(services, key, limit, after, q=q, class_name=class_name)
    return ObjectPage(data=[_info(artifact) for artifact in artifacts], next=following)


@router.get("/classes", responses=error_responses(401))
async def list_classes(key: Asking, services: Serving) -> list[ClassCount]:
    """The classes with the most objects."""
    found = await services.catalog.aside(services.catalog.classes, _CLASSES, prefix=key.prefix)
    return [ClassCount(class_name=name, objects=count) for name, count in found]


@router.get("/objects/{object_id}", responses=_OF_AN_OBJECT)
async def retrieve_object(object_id: ObjectIdPath, key: Asking, services: Serving) -> ObjectInfo:
    """What is known of an object."""
    [artifact] = await visible(services, key, [object_id])
    return _info(artifact)


@router.get("/objects/{object_id}/thumbnail", response_class=Response, responses=_OF_A_PICTURE)
async def thumbnail(object_id: ObjectIdPath, key: Asking, services: Serving) -> Response:
    """A small picture of the object in another context."""
    [artifact] = await visible(services, key, [object_id])
    return await _preview(services, artifact, "picture")


@router.get("/objects/{object_id}/reference", response_class=Response, responses=_OF_A_PICTURE)
async def reference(object_id: ObjectIdPath, key: Asking, services: Serving) -> Response:
    """The photo that the object was learned from."""
    [artifact] = await visible(services, key, [object_id])
    return await _preview(services, artifact, "input")


_USUAL = Defaults(int(STABLE_DIFFUSION.tuning["sample_steps"]), float(STABLE_DIFFUSION.tuning["guidance_scale"]))


def _info(artifact: ArtifactMetadata) -> ObjectInfo:
    usual = defaults(artifact, _USUAL)
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
        thumbnail=f"{path}/thumbnail" if _file(artifact, "picture") else None,
        reference=f"{path}/reference" if _file(artifact, "input") else None,
    )


def _file(artifact: ArtifactMetadata, kind: PreviewKind) -> str | None:
    """The first preview of this kind."""
    return next((preview.file for preview in artifact.previews if preview.kind == kind), None)


async def _preview(services: Services, artifact: ArtifactMetadata, kind: PreviewKind) -> Response:
    name = _file(artifact, kind)
    if name is None:
        raise ApiError("not_found", f"the artifact of {artifact.object_id!r} has no preview of the kind {kind!r}")
    data = await services.objects.picture(artifact, name)
    headers = {"cache-control": "private, max-age=60", "x-objdrive-digest": artifact.digest}
    return Response(data, media_type="image/webp", headers=headers)
