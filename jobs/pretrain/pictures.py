"""Pictures of training: grids of samples, and a loss curve."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

_WIDTH, _HEIGHT, _MARGIN = 720, 360, 40


def grid(pixels: Tensor, columns: int, *, zoom: int = 1) -> Image.Image:
    """A sheet of pictures (N, 3, n, n) in [0, 1], row by row."""
    count, _, n, _ = pixels.shape
    rows = -(-count // columns)
    sheet = torch.ones(rows * columns, 3, n, n)
    sheet[:count] = pixels.clamp(0, 1).cpu()
    sheet = sheet.view(rows, columns, 3, n, n).permute(0, 3, 1, 4, 2).reshape(rows * n, columns * n, 3)
    picture = Image.fromarray((sheet * 255).round().byte().numpy())
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def draw_curve(points: Sequence[dict[str, float]], name: str) -> Image.Image:
    """One figure over the samples seen, scaled to fit."""
    picture = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    pen.rectangle((_MARGIN, _MARGIN, _WIDTH - _MARGIN, _HEIGHT - _MARGIN), outline="gray")
    if len(points) < 2:
        return picture
    xs = [point["samples"] for point in points]
    ys = [point[name] for point in points]
    # The first steps would flatten all the rest.
    top, low = sorted(ys)[int(0.98 * (len(ys) - 1))], min(ys)
    wide, high = max(xs) - min(xs) or 1, top - low or 1
    line = [
        (
            _MARGIN + (x - min(xs)) / wide * (_WIDTH - 2 * _MARGIN),
            _HEIGHT - _MARGIN - min(1.0, (y - low) / high) * (_HEIGHT - 2 * _MARGIN),
        )
        for x, y in zip(xs, ys, strict=True)
    ]
    pen.line(line, fill=(30, 90, 200), width=2)
    pen.text((_MARGIN, _MARGIN - 16), f"{name}: {ys[-1]:.4f} after {xs[-1]:,} samples, least {low:.4f}", fill="black")
    return picture
