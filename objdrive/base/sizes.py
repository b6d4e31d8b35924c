"""Which sizes of pictures a base draws."""

import re
from dataclasses import dataclass

from objdrive.errors import ObjdriveError

Size = tuple[int, int]
"""Width and height of a picture in pixels."""

_LARGEST = 2
"""How many times the native square's pixels a picture has at most: more shows a thing twice, and takes memory."""
_SMALLEST = 4
"""Edges are at least this part of the native one: below it, bases draw noise."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a base's pictures.

    Attributes:
        native: edge of the square that the base was trained on, and that is drawn where no size is named.
        step: widths and heights are multiples of it.
    """

    native: int
    step: int

    @property
    def square(self) -> Size:
        """The native size."""
        return self.native, self.native

    @property
    def most_pixels(self) -> int:
        """Width times height of the largest picture."""
        return _LARGEST * self.native**2

    def check(self, size: Size) -> None:
        """Raise ObjdriveError if the base does not draw pictures of this size."""
        width, height = size
        least = max(self.step, self.native // _SMALLEST)
        if size != self.square and (width % self.step or height % self.step):
            raise ObjdriveError(f"size={width}x{height}: width and height must be multiples of {self.step}")
        if min(size) < least:
            raise ObjdriveError(f"size={width}x{height}: width and height must be at least {least}")
        if width * height > self.most_pixels:
            raise ObjdriveError(
                f"size={width}x{height} has {width * height} pixels, at most {self.most_pixels} are drawn: "
                f"choose a smaller size, such as {self.native}x{self.native}"
            )


def parse_size(text: str) -> Size:
    """Read a size such as ``832x1216``, width first.

    Raises:
        ObjdriveError: not of that form.
    """
    found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if found is None:
        raise ObjdriveError(f"the size {text!r} must read WIDTHxHEIGHT, as in 832x1216")
    return int(found[1]), int(found[2])
