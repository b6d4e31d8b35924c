"""OpenAI's edits: an object is drawn into a place of a picture."""

from dataclasses import replace

from fastapi import APIRouter, Request
from fastapi.responses import Response

from objdrive.sampling.edits import Edit
from serve.dependencies import Asking, Serving, described, visible
from serve.draw_requests import draw_requests, object_ids
from serve.edit_form import EditFields, decode_edit, decoded_bytes, form_schema, read_form
from serve.errors import ApiError, error_responses
from serve.exactness import own_photo
from serve.finishing import Finish
from serve.routes.images import STREAMED, answer, ask_rate
from serve.schema import ImagesResponse

router = APIRouter(tags=["images"])


@router.post(
    "/v1/images/edits",
    response_model=ImagesResponse,
    response_model_exclude_none=True,
    responses=error_responses(400, 401, 403, 404, 408, 409, 413, 422, 429, 503) | {200: STREAMED},
    openapi_extra=form_schema(),
)
async def edit(key: Asking, services: Serving, request: Request) -> Response:
    """Draw an object into a picture, where a mask is transparent. The rest of the picture stays as it is."""
    # Not a parameter: FastAPI would take the whole form before it looks at the key.
    with services.uploads.room() as room:
        form = await read_form(request, room)
        asked = form.asked
        artifacts = await visible(services, key, object_ids(asked.model, services.model_aliases))
        base = await described(services.generators, services.draw_seconds)
        finish = Finish.of(asked, cuts_out=False, given=form.digest)
        draws = draw_requests(asked.model_copy(update={"size": None}), artifacts, base)
        ask_rate(services, key, asked, draws, finish)
        room.take(decoded_bytes(form))
        edited = await services.decoding.run(decode_edit, form)
        room.until_gone(edited.picture)
    _check_size(asked, edited)
    if asked.exact:
        edited = await services.decoding.run(edited.exact, await own_photo(services, artifacts))
    canvas = await services.decoding.run(edited.canvas, base.resolution)
    draws = [replace(draw, canvas=canvas) for draw in draws]
    return await answer(request, services, key, asked, draws, base, finish.into(edited))


def _check_size(asked: EditFields, edited: Edit) -> None:
    size = f"{edited.picture.width}x{edited.picture.height}"
    if asked.size not in (None, "auto", size):
        raise ApiError("invalid_request", f"size: an edit keeps the image's size, {size}", param="size")
