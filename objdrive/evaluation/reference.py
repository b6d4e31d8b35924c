"""What drawn pictures are compared with: objects as their photos show them, and galleries of designs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from objdrive.catalog.geometry import cut, object_alone, object_window, whole_window
from objdrive.catalog.photos import Photo
from objdrive.errors import ObjdriveError
from objdrive.evaluation.scores import Array, centres

MEASURED = 2
"""A gallery's pictures of each drawing and prompt that stand for a method, the first ones: two, to have variety."""

_CROP_FILL = 0.8
_GROUNDS = (255, 140, 25)


@dataclass(frozen=True)
class Reference:
    """An object as its photo shows it.

    Attributes:
        whole: (R, R, 3) uint8, the picture.
        crop: (R, R, 3) uint8, the object in its surroundings, nearly filling the frame.
        alone: (V, R, R, 3) uint8, the object on plain grounds.
    """

    object_id: str
    class_name: str
    whole: NDArray[np.uint8]
    crop: NDArray[np.uint8]
    alone: NDArray[np.uint8]

    @classmethod
    def of(cls, object_id: str, class_name: str, photo: Photo, size: int) -> "Reference":
        """The views of a photo at a base's resolution."""
        image, mask = photo.image, photo.mask
        return cls(
            object_id,
            class_name,
            cut(image, mask, whole_window(mask), size)[0],
            cut(image, mask, object_window(mask, _CROP_FILL), size)[0],
            np.stack([object_alone(image, mask, size, ground) for ground in _GROUNDS]),
        )


@dataclass(frozen=True)
class Design:
    """One drawing or photographed thing that a picture may show; `object_id` is empty for what is no object."""

    name: str
    class_name: str
    object_id: str


@dataclass(frozen=True)
class Gallery:
    """What each design looks like where each prompt puts it, to one encoder.

    Attributes:
        designs: in the order of the first axis.
        prompts: ids, in the order of the second.
        objects: (designs, prompts, W), features that tell objects; unit length.
        backdrops: (designs, prompts, V), features that tell backdrops and styles; unit length.
    """

    designs: tuple[Design, ...]
    prompts: tuple[str, ...]
    objects: Array
    backdrops: Array

    @classmethod
    def of(cls, shown: Sequence[tuple[Design, str]], objects: Array, backdrops: Array) -> "Gallery":
        """Average the features (N, W) and (N, V) of N pictures, each of a design as a prompt asks for it.

        Raises:
            ObjdriveError: there is no picture of some design for some prompt.
        """
        designs = tuple(dict.fromkeys(design for design, _ in shown))
        prompts = tuple(dict.fromkeys(prompt for _, prompt in shown))
        rows, columns = ({one: index for index, one in enumerate(axis)} for axis in (designs, prompts))
        cells = np.array([(rows[design], columns[prompt]) for design, prompt in shown])
        counts = np.zeros((len(designs), len(prompts)), int)
        np.add.at(counts, tuple(cells.T), 1)
        if not counts.all():
            row, column = np.argwhere(counts == 0)[0]
            raise ObjdriveError(
                f"the gallery has no picture of {designs[row].name!r} for the prompt {prompts[column]!r}: "
                "compose it again with these prompts"
            )
        return cls(designs, prompts, *(centres(part, cells, counts.shape) for part in (objects, backdrops)))

    def row(self, object_id: str) -> int:
        """Where an object's design stands."""
        return next(row for row, design in enumerate(self.designs) if design.object_id == object_id)

    def check(self, object_ids: Iterable[str], prompt_ids: Iterable[str]) -> None:
        """Make sure that these are there.

        Raises:
            ObjdriveError: one is not.
        """
        shown = [design.object_id for design in self.designs]
        check_shown("the gallery", (object_ids, prompt_ids), (shown, self.prompts))


def check_shown(gallery: str, asked: Sequence[Iterable[str]], shown: Sequence[Iterable[str]]) -> None:
    """Make sure that a gallery shows what is asked for, kind by kind: objects and prompts, by id.

    Raises:
        ObjdriveError: it lacks some.
    """
    lacking = [one for ids, there in zip(asked, shown, strict=True) for one in sorted(set(ids).difference(there))]
    if lacking:
        raise ObjdriveError(f"{gallery} lacks {', '.join(lacking)}: compose it for these objects and prompts")
