"""Pictures of training: grids of samples, and a loss curve."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor


def grid(pixels: Tensor, columns: int, *, zoom: int = 1) -> Image.Image:
    """A sheet of pictures (N, 3, n, n) in [0, 1], row by row."""
    count, _, n, _ = pixels.shape
    rows = -(-count // columns)
    sheet = torch.ones(rows * columns, 3, n, n)
    sheet[:count] = pixels.clamp(0, 1).cpu()
    sheet = sheet.view(rows, columns, 3, n, n).permute(0, 3, 1, 4, 2).reshape(rows * n, columns * n, 3)
    picture = Image.fromarray((sheet * 255).round().byte().numpy())
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def draw_curve(points: Sequence[dict[str, float]], name: str) -> Figure:
    """One figure over the samples seen; save it with ``savefig``."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    values = [point[name] for point in points]
    axes.plot([point["samples"] for point in points], values)
    if values:
        # The first steps would flatten all the rest.
        axes.set_ylim(top=float(np.quantile(values, 0.98)))
    axes.set(xlabel="samples", ylabel=name)
    axes.grid(alpha=0.3)
    return figure
