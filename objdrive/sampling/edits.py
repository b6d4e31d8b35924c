"""Edits of a given picture: the part of it that is drawn anew, and how that comes back into the whole.

A base draws at one size, pictures have any. So a square around the place is drawn, a little larger than that, and what
was drawn goes back at the picture's own scale. Pixels outside of the place are never computed.
"""

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from objdrive.catalog.decoding import MAX_PIXELS
from objdrive.catalog.photos import Photo
from objdrive.errors import ObjdriveError
from objdrive.sampling.exact import REACH, CutOut, paste
from objdrive.sampling.fitting import stand
from objdrive.sampling.inpainting import Canvas

_FILL = 0.9
"""Share of the drawn square that the place takes. A base fills a picture with a thing: at 0.5 the place cut it off."""
_SEAM = 1 / 64
"""Width of the seam in parts of the drawn square, and at most this share of the way into the place:"""
_MOST_OF_PLACE = 0.25
_HALF = 128
_OPAQUE = 255

Box = tuple[int, int, int, int]
"""Left, top, right and bottom (exclusive)."""


@dataclass(frozen=True)
class Edit:
    """A picture, and a place in it that is to be drawn.

    Attributes:
        picture: in mode RGB or RGBA.
        place: in mode L and of the picture's size, 255 where it is drawn, 0 where it stays.
        cut_out: what keeps its own pixels in the place's box; none: all of the place is drawn.
    """

    picture: Image.Image
    place: Image.Image
    cut_out: CutOut | None = None

    @classmethod
    def of(cls, picture: Image.Image, mask: Image.Image | None) -> "Edit":
        """An edit where the mask is transparent; without a mask, where the picture is.

        Args:
            picture: decoded, see `objdrive.catalog.decoding.decode`.
            mask: the same, and of the picture's size.

        Raises:
            ObjdriveError: the sizes differ, nothing or next to nothing is transparent, or the square around what is has
                more pixels than a picture may have.
        """
        if mask is not None and mask.size != picture.size:
            raise ObjdriveError(
                f"mask: is {mask.width} x {mask.height} pixels, the image {picture.width} x {picture.height}: "
                "they must have the same size"
            )
        source, name = (picture, "image") if mask is None else (mask, "mask")
        if source.mode != "RGBA":
            raise ObjdriveError(f"{name}: has no transparency: make transparent what is to be drawn")
        place = source.getchannel("A").point([_OPAQUE - value for value in range(256)])
        if place.point([_OPAQUE * (value >= _HALF) for value in range(256)]).getbbox() is None:
            raise ObjdriveError(f"{name}: nothing in it is transparent: make transparent what is to be drawn")
        if mask is None:
            edit = cls(_opaque(picture), place)
        else:
            edit = cls(picture if picture.mode == "RGBA" else picture.convert("RGB"), place)
        left, top, right, bottom = edit.window
        if (right - left) * (bottom - top) > MAX_PIXELS:
            raise ObjdriveError(
                f"{name}: the square around what is transparent has {right - left} x {bottom - top} pixels, "
                f"more than {MAX_PIXELS}: make less of it transparent, or scale it down"
            )
        return edit

    @property
    def box(self) -> Box:
        """Around all of the place."""
        box = self.place.getbbox()
        assert box is not None
        return box

    @property
    def window(self) -> Box:
        """The square that is drawn: around the place, in the picture as far as that is large enough."""
        left, top, right, bottom = self.box
        longer = max(right - left, bottom - top)
        side = max(min(math.ceil(longer / _FILL), *self.picture.size), longer)
        across = _start((left + right) / 2, side, self.picture.width)
        down = _start((top + bottom) / 2, side, self.picture.height)
        return across, down, across + side, down + side

    def exact(self, photo: Photo) -> "Edit":
        """The same edit, with an object's own pixels as large as the place shows them whole."""
        near, within = self._near(REACH)
        across, down, *size = stand(photo, np.asarray(self.place.crop(self.box)))
        where = across + within[1].start, down + within[0].start, size[0], size[1]
        # With a margin, where there is one: the edge of the picture cuts an object off, the box's is an edge of it.
        cut_out = paste(photo, where, (near[2] - near[0], near[3] - near[1]))
        return Edit(self.picture, self.place, CutOut(cut_out.image[within], cut_out.kept[within]))

    def canvas(self, edge: int) -> Canvas:
        """What is drawn into, at the size that a base draws."""
        shown, place = _crop(self.picture.convert("RGBA"), self.window), _crop(self.place, self.window)
        if self.cut_out:
            at = self.box[0] - self.window[0], self.box[1] - self.window[1]
            shown.alpha_composite(replace(self.cut_out, kept=self._own(self.cut_out)).alone, at)
            free = np.array(place)
            part = free[at[1] : at[1] + self.cut_out.kept.shape[0], at[0] : at[0] + self.cut_out.kept.shape[1]]
            part[:] = np.minimum(part, np.rint(_OPAQUE * (1 - self.cut_out.kept)))
            place = Image.fromarray(free)
        ground = Image.new("RGBA", shown.size, "white")
        image = Image.alpha_composite(ground, shown).convert("RGB").resize((edge, edge), Image.Resampling.LANCZOS)
        draw = place.resize((edge, edge), Image.Resampling.BOX)
        return Canvas(np.asarray(image), np.asarray(draw).astype(np.float32) / np.float32(_OPAQUE))

    def finish(self, drawn: Image.Image) -> Image.Image:
        """The picture with what was drawn in its place; outside of that it is the same to the bit."""
        box, window = self.box, self.window
        side = window[2] - window[0]
        patch = drawn.convert(self.picture.mode).resize((side, side), Image.Resampling.LANCZOS)
        patch = patch.crop((box[0] - window[0], box[1] - window[1], box[2] - window[0], box[3] - window[1]))
        part = np.asarray(self.picture.crop(box), dtype=np.float32)
        part = _mixed(part, np.asarray(patch, dtype=np.float32), self._seam())
        if self.cut_out:
            own = np.full_like(part, _OPAQUE)
            own[..., :3] = self.cut_out.image
            part = _mixed(part, own, self._own(self.cut_out))
        finished = self.picture.copy()
        finished.paste(Image.fromarray(np.rint(part).astype(np.uint8)), box[:2])
        return finished

    def _near(self, margin: int) -> tuple[Box, tuple[slice, slice]]:
        """The box with so many pixels more to each side as far as the picture goes, and where in that the box is."""
        left, top, right, bottom = self.box
        near = max(left - margin, 0), max(top - margin, 0)
        far = min(right + margin, self.place.width), min(bottom + margin, self.place.height)
        return (*near, *far), np.s_[top - near[1] : bottom - near[1], left - near[0] : right - near[0]]

    def _own(self, cut_out: CutOut) -> NDArray[np.float32]:
        """(h, w) in the place's box: how much of each pixel is the object's own."""
        return np.minimum(cut_out.kept, _shares(self.place.crop(self.box)))

    def _seam(self) -> NDArray[np.float32]:
        """(h, w) in the place's box: how much of each pixel is the drawing's, growing from the place's edge inwards."""
        # One more pixel to each side, where there is one: the edge of the picture itself is no seam.
        near, within = self._near(1)
        share = _shares(self.place.crop(near))
        if (share > 0).all():
            return share[within]
        inwards = cv2.distanceTransform((share > 0).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        width = max(1.0, min(_SEAM * (self.window[2] - self.window[0]), _MOST_OF_PLACE * float(inwards.max())))
        weight: NDArray[np.float32] = np.minimum(share, inwards / np.float32(width + 1))
        return weight[within]


def _start(middle: float, side: int, extent: int) -> int:
    """Where a span of `side` starts: around the middle, moved into the extent; a longer one is centred on it."""
    if side > extent:
        return (extent - side) // 2
    return min(max(round(middle - side / 2), 0), extent - side)


def _crop(picture: Image.Image, window: Box) -> Image.Image:
    """A window of a picture RGBA, its edge repeated outside of it; or of a place, all of which is drawn there."""
    inner = max(window[0], 0), max(window[1], 0), min(window[2], picture.width), min(window[3], picture.height)
    sides = (inner[1] - window[1], window[3] - inner[3]), (inner[0] - window[0], window[2] - inner[2])
    part = np.asarray(picture.crop(inner))
    if picture.mode == "L":
        return Image.fromarray(np.pad(part, sides, constant_values=_OPAQUE))
    return Image.fromarray(np.pad(part, (*sides, (0, 0)), mode="edge"))


def _shares(place: Image.Image) -> NDArray[np.float32]:
    return np.asarray(place, dtype=np.float32) / np.float32(_OPAQUE)


def _mixed(under: NDArray[np.float32], over: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of pixels (h, w, C): `over` by its weight (h, w) in [0, 1], the rest `under`."""
    return under + weight[..., None] * (over - under)


def _opaque(picture: Image.Image) -> Image.Image:
    """The picture in RGB; what nothing is known of has the colour of the nearest pixel that is seen."""
    pixels, alpha = np.array(picture.convert("RGB")), np.asarray(picture.getchannel("A"))
    hidden = alpha == 0
    if not hidden.any() or hidden.all():
        return Image.fromarray(pixels)
    _, labels = cv2.distanceTransformWithLabels(
        hidden.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    colours = np.zeros((labels.max() + 1, 3), np.uint8)
    colours[labels[~hidden]] = pixels[~hidden]
    pixels[hidden] = colours[labels[hidden]]
    return Image.fromarray(pixels)
