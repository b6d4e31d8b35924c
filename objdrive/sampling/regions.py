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
_HALF = 0.5
_LEAST_OF_LARGEST = 0.3
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


def find_regions(attention: Tensor, size: Sequence[int]) -> Tensor:
    """Split a picture between its objects and, last, whatever else stands in it.

    Things are the blobs of the objects' attention together. Each object gets the blob that has most of its own
    attention, and what is nearer to that than to the others; blobs that are left over belong to nobody: the base
    draws them. Where blobs are fewer than objects, space is divided among the objects (k-means, started along the
    attention's longest axis).

    Args:
        attention: (N, e, f), how much each place attends to the class word of each of N objects.
        size: height and width of the regions.

    Returns:
        (N + 1, height, width) shares, the last of the base; at every place they add up to 1.
    """
    maps = np.stack([_finer(one) for one in attention.double().cpu().numpy()])
    together = maps.sum(axis=0)
    centres = _blobs(together)
    if len(centres) < len(maps):
        centres = _divided(together, len(maps))
    if len(centres) == 1:
        return torch.cat([torch.ones(1, *size), torch.zeros(1, *size)])
    cells = _nearest(_places(*maps.shape[1:]), centres).reshape(maps.shape[1:])
    owners = _assign(maps, cells, len(centres))
    distances = np.linalg.norm(_places(*size)[:, None] - centres, axis=-1) * max(size)
    shares = torch.softmax(torch.from_numpy(-distances / _SOFTNESS), dim=1).T.reshape(-1, *size).float()
    owned = [shares[owner] for owner in owners]
    return torch.stack([*owned, 1 - torch.stack(owned).sum(dim=0)])


def _finer(attention: Array) -> Array:
    """What is above the median, smooth, with a peak of 1."""
    above = np.clip(attention - np.median(attention), 0, None)
    finer = cv2.resize(above, None, fx=_FINER, fy=_FINER, interpolation=cv2.INTER_LINEAR)
    smooth = cv2.GaussianBlur(finer, (0, 0), _BLUR)
    return np.asarray(smooth / max(float(smooth.max()), 1e-12))


def _blobs(attention: Array) -> Array:
    """(B, 2) centres (down, across, in parts of the longer edge) of what is above half of the peak, heaviest first."""
    count, labels = cv2.connectedComponents((attention > _HALF * attention.max()).astype(np.uint8))
    weights = [np.where(labels == label, attention, 0) for label in range(1, count)]
    masses = [float(one.sum()) for one in weights]
    kept = sorted((-mass, index) for index, mass in enumerate(masses) if mass > _LEAST_OF_LARGEST * max(masses))
    places = _places(*attention.shape)
    return np.array([(places * weights[index].reshape(-1, 1)).sum(axis=0) / -mass for mass, index in kept])


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


def _assign(maps: Array, cells: NDArray[np.intp], count: int) -> list[int]:
    """The cell of each object: the best matches first, none twice."""
    shares = np.array([[one[cells == cell].sum() / one.sum() for cell in range(count)] for one in maps])
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
