"""Which part of a picture each object has: from where its class word is attended to once the layout is clear."""

import re
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_FINER = 4
"""Maps are taken this much finer, so that things a cell apart are two."""
_BLUR = 2.0
_LEVELS = (0.5, 0.6, 0.7)
"""Parts of the peak: things that touch at the first level may be apart at the last."""
_LEAST_OF_LARGEST = 0.15
_ALIKE = 0.3
"""How much (Pearson's correlation) a word's attention goes where the objects' does, if it is about things too."""
_SOFTNESS = 1.0
"""Over how many of the latents' cells one region becomes the next."""
_SEVERAL = re.compile(
    r"\b(two|three|four|five|six|seven|eight|nine|ten|several|many|some|few|pair of|group of|row of|pile of|\d+)\s*$",
    re.IGNORECASE,
)

Array = NDArray[np.float64]


def asks_for_several(prompt: str) -> bool:
    """Whether a prompt wants some ``{}`` more than once: it stands twice, or after a number."""
    pieces = prompt.split("{}")
    return any(_SEVERAL.search(before.rstrip()) for before in pieces[:-1])


def find_regions(attention: Tensor, others: Tensor, size: Sequence[int]) -> Tensor:
    """Split a picture between its objects and, last, whatever else stands in it.

    Things are the blobs of the attention to the objects' words and to whatever other words go along with them: those
    of a second thing do ("teapot"), those of a backdrop go where no thing is ("grass"). Each object gets the blob that
    its own words mean most against all of these, and what is nearer to that than to the other blobs. Blobs that are
    left over belong to nobody: the base draws them. Where blobs are fewer than objects, space is divided among the
    objects (k-means, started along the attention's longest axis).

    Args:
        attention: (N, e, f), how much each place attends to the class word of each of N objects.
        others: (W, e, f), how much it attends to each of the prompt's other words; W may be 0.
        size: height and width of the regions.

    Returns:
        (N + 1, height, width) shares, the last of the base; at every place they add up to 1.
    """
    maps = np.stack([_finer(one) for one in attention.double().cpu().numpy()])
    together = maps.sum(axis=0) + _of_things(attention, others)
    centres = _blobs(together)
    if len(centres) < len(maps):
        centres = _divided(together, len(maps))
    if len(centres) == 1:
        return torch.cat([torch.ones(1, *size), torch.zeros(1, *size)])
    cells = _nearest(_places(*maps.shape[1:]), centres).reshape(maps.shape[1:])
    owners = _assign(maps, together, cells, len(centres))
    distances = np.linalg.norm(_places(*size)[:, None] - centres, axis=-1) * max(size)
    shares = torch.softmax(torch.from_numpy(-distances / _SOFTNESS), dim=1).T.reshape(-1, *size).float()
    owned = [shares[owner] for owner in owners]
    return torch.stack([*owned, 1 - torch.stack(owned).sum(dim=0)])


def _of_things(attention: Tensor, others: Tensor) -> Array:
    """The maps of those other words that are about things, added up, as `_finer` has them."""
    objects = attention.double().sum(dim=0).flatten().cpu().numpy()
    alike = [one for one in others.double().cpu().numpy() if np.corrcoef(objects, one.ravel())[0, 1] > _ALIKE]
    found: Array = np.sum([_finer(one) for one in alike], axis=0) if alike else np.zeros(1)
    return found


def _finer(attention: Array) -> Array:
    """What is above the median, smooth, with a peak of 1."""
    above = np.clip(attention - np.median(attention), 0, None)
    finer = cv2.resize(above, None, fx=_FINER, fy=_FINER, interpolation=cv2.INTER_LINEAR)
    smooth = cv2.GaussianBlur(finer, (0, 0), _BLUR)
    return np.asarray(smooth / max(float(smooth.max()), 1e-12))


def _blobs(attention: Array) -> Array:
    """(B, 2) centres (down, across, in parts of the longer edge) of blobs, at the lowest level that tells most."""
    return max((_blobs_above(level, attention) for level in _LEVELS), key=len)


def _blobs_above(level: float, attention: Array) -> Array:
    """(B, 2) centres of what is above a part of the peak."""
    count, labels = cv2.connectedComponents((attention > level * attention.max()).astype(np.uint8))
    weights = [np.where(labels == label, attention, 0) for label in range(1, count)]
    masses = [float(one.sum()) for one in weights]
    kept = [index for index, mass in enumerate(masses) if mass > _LEAST_OF_LARGEST * max(masses)]
    places = _places(*attention.shape)
    return np.array([(places * weights[index].reshape(-1, 1)).sum(axis=0) / masses[index] for index in kept])


def _divided(attention: Array, count: int) -> Array:
    """(count, 2) centres by weighted k-means."""
    places, weights = _places(*attention.shape), (attention * (attention > 0.2 * attention.max())).reshape(-1, 1)
    middle = (places * weights).sum(axis=0) / weights.sum()
    _, axes = np.linalg.eigh(((places - middle) * weights).T @ (places - middle) / weights.sum())
    centres = middle + np.linspace(-0.2, 0.2, count)[:, None] * axes[:, -1]
    for _ in range(20):
        cells = _nearest(places, centres)
        for cell in range(count):
            own = weights * (cells == cell)[:, None]
            if own.sum() > 0:
                centres[cell] = (places * own).sum(axis=0) / own.sum()
    found: Array = centres
    return found


def _assign(maps: Array, together: Array, cells: NDArray[np.intp], count: int) -> list[int]:
    """The cell of each object: where its share of `together` is largest; the best matches first, none twice."""
    inside = [cells == cell for cell in range(count)]
    shares = np.array([[one[cell].sum() / one.sum() / together[cell].sum() for cell in inside] for one in maps])
    owners = [0] * len(maps)
    for _ in maps:
        one, cell = np.unravel_index(int(shares.argmax()), shares.shape)
        owners[int(one)] = int(cell)
        shares[one, :] = shares[:, cell] = -1
    return owners


def _nearest(places: Array, centres: Array) -> NDArray[np.intp]:
    nearest: NDArray[np.intp] = np.linalg.norm(places[:, None] - centres, axis=-1).argmin(axis=1)
    return nearest


def _places(height: int, width: int) -> Array:
    """(height * width, 2): the middles of all cells, in parts of the longer edge."""
    down, across = ((np.arange(count) + 0.5) / max(height, width) for count in (height, width))
    places: Array = np.stack(np.meshgrid(down, across, indexing="ij"), axis=-1).reshape(-1, 2)
    return places
