"""Edges: how much a picture changes from pixel to pixel, and along the edge of a mask."""

import cv2
import numpy as np
from numpy.typing import NDArray


def colour_change(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(H, W): how fast the colours of a picture (H, W, 3) uint8 change from pixel to pixel, in CIELAB."""
    lab = cv2.cvtColor(cv2.GaussianBlur(picture, (0, 0), 1), cv2.COLOR_RGB2LAB).astype(np.float32)
    gradients = [cv2.Sobel(lab, cv2.CV_32F, *axis) for axis in ((1, 0), (0, 1))]
    change: NDArray[np.float32] = np.sqrt(sum(np.square(gradient).sum(axis=-1) for gradient in gradients))
    return change


def edge_of(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(H, W) bool: the pixels on the two sides of a mask's edge."""
    edge: NDArray[np.bool_] = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    return edge


def change_along(change: NDArray[np.float32], mask: NDArray[np.float32]) -> float:
    """The mean of `colour_change` along the edge of a mask (H, W) in [0, 1]; 0 if it has none."""
    edge = edge_of(mask >= 0.5)
    return float(change[edge].mean()) if edge.any() else 0.0
