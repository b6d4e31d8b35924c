"""What becomes of a drawing before a client gets it: the edited picture, the object's own pixels, the asked format."""

import io
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image

from objdrive.pictures import BEST, DigitalSource, PictureFormat, facts_of, picture_file
from objdrive.sampling.edits import Edit
from objdrive.sampling.exact import CutOut
from objdrive.sampling.requests import DrawRequest
from serve.drawing import FinishedPicture, PartialPicture, PictureEvent, model_id
from serve.errors import ApiError
from serve.schema import DrawingFields

_LONGEST_SIDE = {"webp": 16383, "jpeg": 65500}
"""In pixels, that the format, or its library, can write."""
MEDIA_TYPES: dict[str, str] = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}


@dataclass(frozen=True, eq=False)
class Finish:
    """How a client wants its pictures.

    Attributes:
        format: of the file.
        quality: of a WebP or JPEG; WebP at the best is without loss.
        edit: the picture that is drawn into.
        cut_out: the object's own pixels, which are laid over what is drawn.
        transparent: the cut-out alone, before nothing: no picture is drawn.
        exact: whether the object keeps its own pixels.
        given: names what the picture depends on beside the request's fields.
    """

    format: PictureFormat = "png"
    quality: int = BEST
    edit: Edit | None = None
    cut_out: CutOut | None = None
    transparent: bool = False
    exact: bool = False
    given: str = ""

    @classmethod
    def of(cls, asked: DrawingFields, *, cuts_out: bool, given: str = "") -> "Finish":
        """As a request has it, but for the picture that is drawn into and the object's own pixels.

        Args:
            asked: the request.
            cuts_out: whether it is of a kind that may ask for the object alone.
            given: see there.

        Raises:
            ApiError: 400, its fields contradict each other.
        """
        kind = asked.output_format or "png"
        quality = BEST if asked.output_compression is None else asked.output_compression
        if kind == "png" and quality != BEST:
            raise ApiError(
                "invalid_request",
                f"output_compression: a PNG is compressed without loss, so that {quality} means nothing: "
                "ask for webp or jpeg, or leave it out",
                param="output_compression",
            )
        transparent = asked.background == "transparent"
        if transparent and not (cuts_out and asked.exact):
            raise ApiError(
                "invalid_request",
                "background: what is drawn has a background; transparent is what `exact` gives of a single object in "
                "/v1/images/generations, its own pixels cut out",
                param="background",
            )
        if transparent and kind == "jpeg":
            raise ApiError(
                "invalid_request", "background: a JPEG can't be transparent: ask for png or webp", param="background"
            )
        return cls(kind, quality, transparent=transparent, exact=bool(asked.exact), given=given)

    def into(self, edit: Edit) -> "Finish":
        """The same for an edit.

        Raises:
            ApiError: 400, its picture is too large for the format.
        """
        longest = max(edit.picture.size)
        if longest > _LONGEST_SIDE.get(self.format, longest):
            raise ApiError(
                "invalid_request",
                f"output_format: the image is {longest} pixels long, a {self.format} at most "
                f"{_LONGEST_SIDE[self.format]}: ask for png, or scale the image down",
                param="output_format",
            )
        return replace(self, edit=edit)

    @property
    def lasting(self) -> bool:
        """Whether a drawing gives the same picture again without what came with the request."""
        return self.edit is None and self.cut_out is None

    @property
    def as_drawn(self) -> bool:
        """Whether what is drawn is what the client gets."""
        return self.lasting and self.format == "png"

    @property
    def background(self) -> Literal["opaque", "transparent"]:
        """What is behind the picture."""
        return "transparent" if self.transparent else "opaque"

    def __call__(self, event: PictureEvent) -> PictureEvent:
        """An event as the client gets it."""
        if isinstance(event, PartialPicture | FinishedPicture):
            return replace(event, data=self._finished(event.data))
        return event

    def alone(self, draw: DrawRequest) -> FinishedPicture:
        """The cut-out, for which nothing is drawn."""
        assert self.cut_out is not None
        data = picture_file(
            self.cut_out.alone, self.format, {"model": model_id(draw)}, source=None, quality=self.quality
        )
        return FinishedPicture(data, draw.prompt)

    def _finished(self, png: bytes) -> bytes:
        if self.as_drawn:
            return png
        drawn = Image.open(io.BytesIO(png))
        picture: Image.Image = drawn
        source: DigitalSource = "trainedAlgorithmicMedia"
        if not self.lasting:
            source = "compositeWithTrainedAlgorithmicMedia"
            picture = self.edit.finish(drawn) if self.edit else self._laid_over(drawn)
        return picture_file(picture, self.format, facts_of(drawn), source=source, quality=self.quality)

    def _laid_over(self, drawn: Image.Image) -> Image.Image:
        assert self.cut_out is not None
        return self.cut_out.over(drawn)
