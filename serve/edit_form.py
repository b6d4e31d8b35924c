"""The multipart form of an edit: OpenAI's fields, a picture and a mask, under the limits of intake."""

import hashlib
import io
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from PIL import Image
from pydantic import ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from objdrive.catalog.decoding import MAX_PIXELS, decode
from objdrive.catalog.sources import MAX_BYTES, Role
from objdrive.errors import ObjdriveError, RowError
from objdrive.sampling.edits import Edit
from serve.errors import ApiError
from serve.schema import DrawingFields
from serve.uploads import Room

MAX_FORM_BYTES = 2 * MAX_BYTES + 2**20
"""An image, a mask, and the fields."""
FORM_SECONDS = 120.0
"""How long a form may take to arrive: clients on the road have a megabit or two."""
_MOST_FILES, _MOST_FIELDS, _LONGEST_FIELD = 3, 40, 64 * 1024
_BYTES_PER_PIXEL = 9
"""Of a picture and its mask, both RGBA, and the place made of them."""
_FILES: dict[str, Role] = {"image": "image", "image[]": "image", "mask": "mask"}


class EditFields(DrawingFields):
    """What to draw into a picture. Numbers and truth values come as text."""

    model_config = ConfigDict(strict=False)

    input_fidelity: str | None = Field(None, description="Not used.")


@dataclass(frozen=True)
class EditForm:
    """A form as it came: its fields, and the files' bytes."""

    asked: EditFields
    image: bytes
    mask: bytes | None

    @property
    def digest(self) -> str:
        """Names the two files by their content."""
        digest = hashlib.sha256(hashlib.sha256(self.image).digest())
        digest.update(b"" if self.mask is None else hashlib.sha256(self.mask).digest())
        return digest.hexdigest()


def form_schema() -> dict[str, Any]:
    """The OpenAPI document's part on the form."""
    schema = EditFields.model_json_schema()
    file = {"type": "string", "format": "binary"}
    schema["properties"] |= {
        "image": file | {"description": "The picture to draw into."},
        "mask": file | {"description": "Of the picture's size, transparent where to draw. Default: its transparency."},
    }
    schema["required"] = ["image", *schema["required"]]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


async def read_form(request: Request, room: Room) -> EditForm:
    """Read a request's form. While it arrives, larger files are on disk; then they take of the memory in `room`.

    Raises:
        ApiError: 400, it is none, or lacks the image; 413, a file is too large; 429, there is no room for its files;
            499, the client went away meanwhile.
        RequestValidationError: a field is not right.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise ApiError("invalid_request", "send the edit as a form (multipart/form-data) with the file `image`")
    fields: dict[str, str] = {}
    files: dict[Role, bytes] = {}
    try:
        async with request.form(max_files=_MOST_FILES, max_fields=_MOST_FIELDS, max_part_size=_LONGEST_FIELD) as form:
            for name, value in form.multi_items():
                if name not in _FILES:
                    if not isinstance(value, str):
                        raise ApiError("invalid_request", f"{name}: is no file", param=name)
                    fields[name] = value
                    continue
                role = _FILES[name]
                if role in files:
                    raise ApiError("invalid_request", f"{role}: there are several, one is edited at a time", param=role)
                files[role] = await _read(value, role, room)
    except ClientDisconnect as error:
        raise ApiError("cancelled", "the client went away before the whole form had arrived") from error
    if "image" not in files:
        raise ApiError("invalid_request", "image: the picture to edit is missing", param="image")
    try:
        asked = EditFields.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    return EditForm(asked, files["image"], files.get("mask"))


def decoded_bytes(form: EditForm) -> int:
    """About what the form's pictures take of memory once they are decoded; 0 for what is no picture."""
    try:
        with Image.open(io.BytesIO(form.image)) as picture:
            pixels = picture.width * picture.height
    # Pillow fails in as many ways as there are formats; what is wrong is said where it is decoded.
    except Exception:
        return 0
    return _BYTES_PER_PIXEL * pixels if pixels <= MAX_PIXELS else 0


def decode_edit(form: EditForm) -> Edit:
    """The edit of a form's files.

    Raises:
        ApiError: 400, a file is no picture within the limits, or no place is transparent.
    """
    try:
        image = decode(form.image, "image", "image").picture
        mask = None if form.mask is None else decode(form.mask, "mask", "mask").picture
        return Edit.of(image, mask)
    except RowError as error:
        role = "mask" if error.code.startswith("mask") else "image"
        raise ApiError("invalid_image", str(error), param=role) from error
    except ObjdriveError as error:
        raise ApiError("invalid_image", str(error), param=str(error).partition(":")[0]) from error


async def _read(value: UploadFile | str, role: Role, room: Room) -> bytes:
    if isinstance(value, str):
        raise ApiError("invalid_request", f"{role}: send it as a file", param=role)
    room.take(min(value.size or 0, MAX_BYTES))
    data = await value.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ApiError("body_too_large", f"{role}: has more than {MAX_BYTES} bytes: scale it down", param=role)
    return data
