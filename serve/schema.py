"""The API's requests and answers: OpenAI's images API with a few more fields, and the catalog."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue

from objdrive.adapters.artifact import BaseRef
from objdrive.pictures import PictureFormat

MAX_OBJECTS = 4
MAX_PICTURES = 10
MAX_PAGE = 100

_EXAMPLES: list[JsonValue] = [
    {"model": "alarm-clock-01", "prompt": "a photo of {} on grass", "seed": 7},
    {"model": "alarm-clock-01+teapot-02", "prompt": "a photo of {} and {} on a wooden table", "n": 2},
    {"model": "alarm-clock-01", "prompt": "in the snow", "stream": True, "partial_images": 2},
]


class DrawingFields(BaseModel):
    """What to draw. Fields of OpenAI's API that mean nothing here are accepted and ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1)] = Field(
        description="`{}` stands for the object. With several objects, write one `{}` for each; a single object fills "
        "every `{}`. In a prompt without `{}`, a single object takes the place of its class word. Several objects, and "
        "one whose class word is missing, come in front of the prompt."
    )
    model: Annotated[str, Field(min_length=1, max_length=600)] | None = Field(
        None, description="An object's id, or several as `a+b`. Without it, the base alone draws."
    )
    n: Annotated[int, Field(ge=1, le=MAX_PICTURES)] | None = Field(
        None, description="How many pictures (default 1). Their seeds count up."
    )
    size: Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] | None = Field(
        None,
        description="`auto`, the square that the base was trained on, or WIDTHxHEIGHT in steps of 8 (64 for SDXL), of "
        "at most twice its pixels.",
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="`b64_json` (the default), or `url`: a signed link, valid for an hour."
    )
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = Field(
        None, description="With `stream`: how many pictures on the way are sent (default 0)."
    )
    seed: Annotated[int, Field(ge=0, le=2**53 - 1)] | None = Field(
        None, description="The seed of the first picture's noise. By default a random one, which the answer names."
    )
    steps: Annotated[int, Field(ge=1, le=100)] | None = Field(None, description="By default the recipe's.")
    guidance_scale: Annotated[FiniteFloat, Field(ge=1, le=30)] | None = Field(
        None, description="By default the recipe's. 1 draws without guidance."
    )
    adapter_scale: Annotated[FiniteFloat, Field(ge=0, le=2)] = Field(
        1.0, description="How strongly the adapter acts. 0 draws the class word with the base alone."
    )
    negative_prompt: str = Field("", description="What the picture should not show.")
    scheduler: Literal["ddim", "dpmsolver++"] = "ddim"
    exact: bool | None = Field(
        None, description="The object keeps its photo's own pixels, and the base draws around them. For one object."
    )
    output_format: PictureFormat | None = Field(None, description="Of the picture's file (default `png`).")
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of a `webp` or `jpeg` (default 100, at which `webp` is without loss)."
    )
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        None, description="`transparent` wants `exact`: the object's own pixels, cut out; nothing is drawn."
    )
    complexity: str | None = Field(None, description="Not used.")
    quality: str | None = Field(None, description="Not used.")
    style: str | None = Field(None, description="Not used.")
    moderation: str | None = Field(None, description="Not used.")
    user: str | None = Field(None, description="Not used.")
    safety_identifier: str | None = Field(None, description="Not used.")


class GenerationRequest(DrawingFields):
    """A picture on an empty canvas."""

    model_config = ConfigDict(json_schema_extra={"examples": _EXAMPLES})

    place: Annotated[str, Field(max_length=32)] | None = Field(
        None,
        description="With `exact`: where the object stands, as `SIZE` or `SIZE@ACROSS,DOWN` in parts of the picture.",
    )


class Image(BaseModel):
    """One picture: its file in base64, or its address."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str = Field(description="The prompt that was drawn, with `{}` for each object.")
    seed: int
    model: str = Field(description="The artifacts that drew it, as `object_id@digest`, or `base` for the base alone.")


class ImagesResponse(BaseModel):
    """The pictures, in the order of their seeds."""

    created: int
    data: list[Image]
    output_format: PictureFormat = "png"
    background: Literal["opaque", "transparent"] = "opaque"


class TokensDetails(BaseModel):
    """Always zero: pictures are not counted in tokens."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """Always zero. OpenAI's clients expect the field."""

    input_tokens: int = 0
    input_tokens_details: TokensDetails = TokensDetails()
    output_tokens: int = 0
    total_tokens: int = 0


class _ImageEvent(BaseModel):
    b64_json: str
    created_at: int
    size: str
    seed: int
    model: str
    background: Literal["opaque", "transparent"] = "opaque"
    output_format: PictureFormat = "png"
    quality: Literal["auto"] = "auto"


class PartialImageEvent(_ImageEvent):
    """A picture before it is finished."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    partial_image_index: int


class CompletedEvent(_ImageEvent):
    """The finished picture."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    url: str | None = None
    revised_prompt: str
    usage: Usage = Usage()


class ErrorDetails(BaseModel):
    """What went wrong. `code` never changes its meaning; `param` is the request's field that caused it."""

    message: str
    type: str
    param: str | None = None
    code: str

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "message": "there is no object 'teapot-99': GET /v1/models lists them all",
                    "type": "invalid_request_error",
                    "param": "model",
                    "code": "unknown_object",
                }
            ]
        }
    )


class ErrorResponse(BaseModel):
    """The shape of every error."""

    error: ErrorDetails


class Model(BaseModel):
    """An object, as OpenAI's clients list models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "objdrive"


class ModelList(BaseModel):
    """A page of models. Ask for the next one with `after` = `last_id`."""

    object: Literal["list"] = "list"
    data: list[Model]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ObjectInfo(BaseModel):
    """What is known of an object. `row` holds the manifest's free columns."""

    object_id: str
    class_name: str
    digest: str
    scene: str
    base: BaseRef
    created: str
    row: dict[str, Any]
    steps: int = Field(description="Denoising steps of a picture by default.")
    guidance_scale: float
    thumbnail: str | None = Field(description="Path of a small picture of the object in another context.")
    reference: str | None = Field(description="Path of the photo that it was learned from.")


class ObjectPage(BaseModel):
    """A page of objects. Ask for the next one with `after` = `next`. A short page need not be the last."""

    data: list[ObjectInfo]
    next: str | None


class ClassCount(BaseModel):
    """How many objects a class has."""

    class_name: str
    objects: int


class Health(BaseModel):
    """The server is well."""

    status: Literal["ok"] = "ok"
    base: BaseRef | None = None
    resolution: int | None = Field(None, description="Width and height of its pictures in pixels.")
