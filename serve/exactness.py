"""Exact drawing over HTTP: the one object that keeps its own pixels, and where it stands."""

import asyncio
from collections.abc import Sequence

from objdrive.adapters.artifact import ArtifactMetadata
from objdrive.catalog.photos import Photo
from objdrive.errors import ObjdriveError, RowError
from objdrive.sampling.exact import CutOut, Place, compose, read_photo
from serve.errors import ApiError, logger
from serve.schema import GenerationRequest
from serve.services import Services

PHOTO_SECONDS = 20.0
"""How long an object's photo may take to come from its storage."""


async def placed(
    services: Services, asked: GenerationRequest, artifacts: Sequence[ArtifactMetadata], size: tuple[int, int]
) -> CutOut:
    """The object's own pixels on an empty canvas of `size`.

    Raises:
        ApiError: 400, the request is not of one object, or its place is none; 409, the photo can't be read.
    """
    if not asked.exact:
        raise ApiError("invalid_request", "place: only an `exact` object is placed: set exact", param="place")
    _check_one(artifacts)
    try:
        place = Place.parse(asked.place) if asked.place else Place()
    except ObjdriveError as error:
        raise ApiError("invalid_request", f"place: {error}", param="place") from error
    photo = await own_photo(services, artifacts)
    try:
        return await services.decoding.run(compose, photo, place, size)
    except ObjdriveError as error:
        raise ApiError("invalid_request", f"place: {error}", param="place") from error


async def own_photo(services: Services, artifacts: Sequence[ArtifactMetadata]) -> Photo:
    """The photo and mask of a request's one object.

    Raises:
        ApiError: 400, there is none, or there are several; 409, they can't be read any more; 503, their storage hangs.
    """
    _check_one(artifacts)
    try:
        return await asyncio.wait_for(services.photos.run(read_photo, artifacts[0]), PHOTO_SECONDS)
    except TimeoutError as error:
        logger.warning("the photo of %s can't be read: no answer in time", artifacts[0].object_id)
        raise ApiError(
            "unavailable", f"the photo of {artifacts[0].object_id!r} can't be reached at the moment"
        ) from error
    except RowError as error:
        # It names an address that is for the operator's eyes.
        logger.warning("%s: %s", error.code, error)
        raise ApiError(
            "photo_unreadable",
            f"the photo of {artifacts[0].object_id!r} can't be read any more ({error.code}): exact drawing needs it",
        ) from error


def _check_one(artifacts: Sequence[ArtifactMetadata]) -> None:
    if len(artifacts) != 1:
        raise ApiError(
            "invalid_request", f"exact: draws one object, model names {len(artifacts)}: name one", param="exact"
        )
