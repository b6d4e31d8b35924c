"""Whose turn it is: requests of different sizes cannot share a forward pass, so sizes take turns at the device."""

from collections.abc import Iterable

from objdrive.base.sizes import Size


class Turns:
    """Shares time fairly among sizes: the one that has had the least work goes next.

    A size that comes anew starts level with the one that is furthest behind, so that it waits for nobody's past and
    nobody waits for its.
    """

    def __init__(self) -> None:
        self._work: dict[Size, int] = {}

    def next(self, sizes: Iterable[Size]) -> Size:
        """Whose turn it is of these sizes, one or more; others are forgotten."""
        there = dict.fromkeys(sizes)
        self._work = {size: work for size, work in self._work.items() if size in there}
        least = min(self._work.values(), default=0)
        for size in there:
            self._work.setdefault(size, least)
        return min(there, key=lambda size: self._work[size])

    def took(self, size: Size, pictures: int) -> None:
        """Note that pictures of a size took a step; its work is measured in pixels."""
        self._work[size] += pictures * size[0] * size[1]
