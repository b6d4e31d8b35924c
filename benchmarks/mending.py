"""What mending makes of masks of photographs: those as they are, and looser, tighter and coarser ones.

Usage: ``python benchmarks/mending.py --photos FOLDER``; each folder in it holds ``img.jpg`` and ``mask0.png``, ...

A usable mask may be refined and must lose nothing: the mended one agrees with it, or with the photo's own mask, by 0.9.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from objdrive.catalog.geometry import bounding_box
from objdrive.catalog.masks import intersection_over_union, mend_mask

Mask = NDArray[np.float32]


def longer_side(mask: Mask) -> int:
    left, top, right, bottom = bounding_box(mask)
    return max(right - left, bottom - top)


def grown(mask: Mask, share: float) -> Mask:
    """The mask, larger on every side by a share of the object's longer side; smaller if it is negative."""
    reach = max(1, round(abs(share) * longer_side(mask)))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    return (cv2.dilate if share > 0 else cv2.erode)(mask, disc)


def coarse(mask: Mask, share: float) -> Mask:
    """Polygons whose corners lie on the mask's edge, off it between them by a share of its longer side at most."""
    outlines, _ = cv2.findContours((mask >= 0.5).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    polygons = [cv2.approxPolyDP(one, share * longer_side(mask), True) for one in outlines]
    return cv2.fillPoly(np.zeros_like(mask), polygons, 1.0)


VARIANTS: dict[str, Callable[[Mask], Mask]] = {
    "as it is": lambda mask: mask,
    "2% too large": lambda mask: grown(mask, 0.02),
    "4% too large": lambda mask: grown(mask, 0.04),
    "2% too small": lambda mask: grown(mask, -0.02),
    "coarse by 2%": lambda mask: coarse(mask, 0.02),
    "coarse by 4%": lambda mask: coarse(mask, 0.04),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--photos", type=Path, required=True, help="folder of folders with img.jpg and mask*.png")
    folders = sorted(path.parent for path in options.parse_args().photos.glob("*/img.jpg"))
    print("| photo | mask | given, with its own | mended, with its own | mended, with the given |\n" + "|---" * 5 + "|")
    for folder in folders:
        image = np.asarray(Image.open(folder / "img.jpg").convert("RGB"))
        for path in sorted(folder.glob("mask*.png")):
            own = np.asarray(Image.open(path).convert("L"), dtype=np.float32) / 255
            for name, spoil in VARIANTS.items():
                given = spoil(own)
                if given.max() < 0.5:
                    continue
                mended = mend_mask(image, given)
                pairs = (given, own), (mended, own), (mended, given)
                scores = (intersection_over_union(one >= 0.5, other >= 0.5) for one, other in pairs)
                print(
                    f"| {folder.name} {path.stem} | {name} | " + " | ".join(f"{score:.2f}" for score in scores) + " |"
                )


if __name__ == "__main__":
    main()
