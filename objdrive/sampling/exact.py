"""Exact drawing: a product keeps its own pixels, and what stands around it is drawn.

A drawn product is a likeness: letters and logos may change. Here its photo is cut out by its mask and placed on a
canvas; the base draws everything else, the contact shadow too, and the cut-out is laid over what was drawn.
"""

import re
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from objdrive.adapters.artifact import ArtifactMetadata
from objdrive.base.prompts import place_objects
from objdrive.catalog.geometry import bounding_box
from objdrive.catalog.photos import Photo, decode_photo
from objdrive.catalog.rows import AUTO_MASK
from objdrive.catalog.sources import SourceMark, read_source
from objdrive.errors import ObjdriveError
from objdrive.sampling.inpainting import Canvas
from objdrive.sampling.requests import DrawRequest

_GREY = 128
"""Of the canvas around the cut-out, where nothing is kept."""
_SOFTNESS = 0.7
"""Deviation in pixels of the blur that softens the cut-out's edge."""
REACH = 4
"""Pixels from which on it does not reach."""
AROUND_VERSION = 1
"""Of how a picture around own pixels is made, by `around`, `compose` and `CutOut.over`.

Raise it when one of them makes another picture of the same request: jobs take pictures of one version for the same.
"""
_PLACE = re.compile(r"(?P<size>[0-9.]+)(@(?P<across>[0-9.]+),(?P<down>[0-9.]+))?")


@dataclass(frozen=True)
class Place:
    """Where an object stands in a picture.

    Attributes:
        size: of the longer side of its box, in parts of the picture's shorter side.
        across: the middle of its box, in parts of the picture's width.
        down: likewise, of its height.
    """

    size: float = 0.6
    across: float = 0.5
    down: float = 0.6

    @classmethod
    def parse(cls, text: str) -> "Place":
        """Read ``SIZE`` or ``SIZE@ACROSS,DOWN``, such as ``0.5@0.3,0.7``.

        Raises:
            ObjdriveError: it is not of that form, or a number is not between 0 and 1.
        """
        found = _PLACE.fullmatch(text)
        try:
            values = {name: float(value) for name, value in (found.groupdict() if found else {}).items() if value}
        except ValueError:
            values = {}
        if not values or not all(0 < value <= 1 for value in values.values()):
            raise ObjdriveError(
                f"place {text!r} must be SIZE or SIZE@ACROSS,DOWN in parts of the picture, such as 0.6 or 0.5@0.3,0.7"
            )
        return cls(**values)


@dataclass(frozen=True)
class CutOut:
    """An object on an empty canvas.

    Attributes:
        image: (H, W, 3) uint8, its own pixels; around them grey.
        kept: (H, W) float32 in [0, 1], how much of each pixel is the object's.
    """

    image: NDArray[np.uint8]
    kept: NDArray[np.float32]

    @property
    def canvas(self) -> Canvas:
        """What to draw around it in: see `SampleSpec.canvas`."""
        return Canvas(self.image, 1 - self.kept)

    @property
    def alone(self) -> Image.Image:
        """The object before nothing, in mode RGBA."""
        alpha = np.rint(255 * self.kept).astype(np.uint8)
        return Image.fromarray(np.dstack([self.image, alpha]))

    def over(self, drawn: Image.Image) -> Image.Image:
        """The picture that was drawn around it, with the object's own pixels laid over."""
        kept = self.kept[..., None]
        blended = kept * self.image + (1 - kept) * np.asarray(drawn.convert("RGB"), dtype=np.float32)
        return Image.fromarray(np.rint(blended).astype(np.uint8))


def around(request: DrawRequest, class_name: str) -> DrawRequest:
    """The request that draws what stands around the own pixels of an object of this class, which a canvas keeps.

    The base alone draws it, by the class word and as a small one: an adapter, and a base that is not told so, draw the
    object again, larger, behind its own pixels. Without the class word a base puts something else there.
    """
    prompt = place_objects(request.prompt, [class_name]).replace("{}", "small {}")
    return replace(request, prompt=prompt, adapter_scale=0.0)


def compose(photo: Photo, place: Place, size: tuple[int, int]) -> CutOut:
    """Place an object on an empty canvas.

    Its colours are resampled by their share of the object, so that none of the photo's background comes along. At the
    photo's own scale they stay as they are. The edge is soft on the inner side.

    Args:
        photo: the object and its mask.
        place: where it stands, and how large.
        size: of the canvas, width and height in pixels.

    Raises:
        ObjdriveError: the object would reach out of the canvas.
    """
    box = bounding_box(photo.mask)
    width, height = box[2] - box[0], box[3] - box[1]
    scale = place.size * min(size) / max(width, height)
    target = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = round(place.across * size[0] - target[0] / 2), round(place.down * size[1] - target[1] / 2)
    if left < 0 or top < 0 or left + target[0] > size[0] or top + target[1] > size[1]:
        raise ObjdriveError(
            f"an object of the size {place.size:g} at {place.across:g},{place.down:g} reaches out of a picture of "
            f"{size[0]} x {size[1]} pixels: make it smaller, or move it to the middle"
        )
    return paste(photo, (left, top, *target), size)


def paste(photo: Photo, where: tuple[int, int, int, int], size: tuple[int, int]) -> CutOut:
    """An object's box at left, top, width and height of an empty canvas of `size` (width, height).

    Its edge is soft on the inner side, but not where it meets the canvas's: there it is cut off.
    """
    left, top, width, height = where
    alpha = np.rint(255 * photo.mask).astype(np.uint8)
    layers = Image.fromarray(np.dstack([photo.image, alpha]))
    cut = layers.crop(bounding_box(photo.mask))
    # Pillow resamples colours weighted by their alpha.
    cut = cut if cut.size == (width, height) else cut.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(cut)
    image = np.full((size[1], size[0], 3), _GREY, np.uint8)
    kept = np.zeros((size[1], size[0]), np.float32)
    kept[top : top + height, left : left + width] = pixels[..., 3].astype(np.float32) / 255
    image[top : top + height, left : left + width] = np.where(pixels[..., 3:] > 0, pixels[..., :3], _GREY)
    return CutOut(image, _softened(kept))


def read_photo(artifact: ArtifactMetadata) -> Photo:
    """The photo and mask of an object, from where they were when it was personalized.

    Raises:
        RowError: one of them is gone, or can't be read.
    """
    image, mask = artifact.sources.image, artifact.sources.mask
    data = read_source(SourceMark(**image.model_dump()), role="image")
    if mask and mask.uri == AUTO_MASK:
        return decode_photo(data, AUTO_MASK, name=artifact.object_id)
    mask_data = read_source(SourceMark(**mask.model_dump()), role="mask") if mask else None
    return decode_photo(data, mask_data, name=artifact.object_id)


def _softened(kept: NDArray[np.float32]) -> NDArray[np.float32]:
    blurred = cv2.GaussianBlur(kept, (0, 0), _SOFTNESS, borderType=cv2.BORDER_REPLICATE)
    # In whole steps of a byte: inside, it is 1 and nothing less.
    softened: NDArray[np.float32] = np.minimum(kept, np.rint(255 * blurred).astype(np.float32) / np.float32(255))
    return softened
