"""Turns a generation request into draw requests, one for each picture."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from objdrive.adapters.artifact import ArtifactKey, ArtifactMetadata
from objdrive.base.sizes import Size, parse_size
from objdrive.errors import ObjdriveError
from objdrive.sampling.exact import around
from objdrive.sampling.requests import DrawRequest
from serve.drawing import BASE_MODEL_ID, BaseInfo
from serve.errors import ApiError
from serve.schema import MAX_OBJECTS, DrawingFields

_RANDOM_SEED_BITS = 32


def object_ids(model: str | None, aliases: Mapping[str, str]) -> list[str]:
    """The objects that a request's `model` names: one, several as ``a+b``, or none (None).

    `aliases` are other names for a model; one that stands for `BASE_MODEL_ID` names no object.

    Raises:
        ApiError: 400, there are too many, or one is named twice.
    """
    named = aliases.get(model, model) if model else None
    ids = [] if named is None or (named == BASE_MODEL_ID and model in aliases) else named.split("+")
    if len(ids) > MAX_OBJECTS:
        raise ApiError(
            "invalid_request", f"model: names {len(ids)} objects, at most {MAX_OBJECTS} are allowed", param="model"
        )
    if len(set(ids)) < len(ids):
        raise ApiError("invalid_request", "model: names an object twice", param="model")
    return ids


@dataclass(frozen=True)
class Defaults:
    """Steps and guidance of a request that names neither."""

    steps: int
    guidance_scale: float


def defaults(artifact: ArtifactMetadata, usual: Defaults) -> Defaults:
    """An object's, from its recipe, or the usual ones where it notes none."""
    recipe = artifact.recipe
    return Defaults(
        int(recipe.get("sample_steps", usual.steps)), float(recipe.get("guidance_scale", usual.guidance_scale))
    )


def draw_requests(asked: DrawingFields, artifacts: Sequence[ArtifactMetadata], base: BaseInfo) -> list[DrawRequest]:
    """One request for each picture asked for, with seeds that count up.

    Args:
        asked: what the client asks for.
        artifacts: of the objects that it names, in its order.
        base: what draws.

    Raises:
        ApiError: 400, the fields contradict each other or the base; 409, an artifact belongs to another base.
    """
    _check(asked, base)
    for artifact in artifacts:
        if artifact.base.fingerprint != base.fingerprint:
            raise ApiError(
                "wrong_base",
                f"the object {artifact.object_id!r} was made for the base {artifact.base.id!r} "
                f"({artifact.base.fingerprint}), this server draws with {base.id!r} ({base.fingerprint})",
            )
    own = Defaults(base.steps, base.guidance_scale)
    usual = defaults(artifacts[0], own) if artifacts else own
    steps = usual.steps if asked.steps is None else asked.steps
    seed = secrets.randbits(_RANDOM_SEED_BITS) if asked.seed is None else asked.seed
    draws = [
        DrawRequest(
            prompt=asked.prompt,
            seed=seed + number,
            objects=tuple(ArtifactKey(artifact.object_id, artifact.digest) for artifact in artifacts),
            steps=steps,
            guidance_scale=usual.guidance_scale if asked.guidance_scale is None else asked.guidance_scale,
            adapter_scale=asked.adapter_scale,
            negative_prompt=asked.negative_prompt,
            scheduler=asked.scheduler,
            size=asked_size(asked, base),
            # A picture has no more of them than steps.
            partial_images=min(asked.partial_images or 0, max(0, steps)) if asked.stream else 0,
        )
        for number in range(asked.n or 1)
    ]
    # Own pixels are those of one object: several are refused where their photos would be read.
    return [around(draw, artifacts[0].class_name) for draw in draws] if asked.exact and artifacts else draws


def asked_size(asked: DrawingFields, base: BaseInfo) -> Size:
    """Width and height of the pictures that a request asks for.

    Raises:
        ApiError: 400, the base does not draw that size.
    """
    if asked.size in (None, "auto"):
        return base.sizes.square
    try:
        size = parse_size(asked.size)
        base.sizes.check(size)
    except ObjdriveError as error:
        raise ApiError("invalid_request", str(error), param="size") from error
    return size


def _check(asked: DrawingFields, base: BaseInfo) -> None:
    if asked.stream and (asked.n or 1) > 1:
        raise ApiError("invalid_request", "n: a stream carries one picture only", param="n")
