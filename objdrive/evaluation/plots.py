"""Plots: the paper's Figure 5 (fidelity against generalization, a point for each method), and sheets of pictures."""

import io
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

import numpy as np
from PIL import Image

from objdrive.errors import ObjdriveError
from objdrive.evaluation.scores import pareto_front
from objdrive.evaluation.summary import Figure

_SIZE = (8.0, 4.8)
_CELL = 1.0
_MARKERS = "osD^vP*X<>"


def plot_trade(
    points: Mapping[str, tuple[Figure, Figure]],
    labels: tuple[str, str],
    *,
    title: str,
    controls: Sequence[str] = (),
) -> dict[str, bytes]:
    """Draw methods by two figures, the larger the better, with their intervals and the Pareto front.

    Args:
        points: method -> (generalization, fidelity), right and up.
        labels: of the axes, in this order.
        title: above it.
        controls: methods that calibrate the ruler; drawn in grey and left out of the front.

    Returns:
        The plot as ``"svg"`` and as ``"png"``.

    Raises:
        ObjdriveError: matplotlib is not installed.
    """
    plt = _pyplot()
    # Without these an SVG differs in every run.
    with plt.rc_context({"svg.hashsalt": "objdrive", "svg.fonttype": "path"}):
        picture, axes = plt.subplots(figsize=_SIZE, layout="constrained")
        try:
            contenders = [name for name in points if name not in controls]
            _front(axes, [points[name] for name in contenders])
            for number, name in enumerate(contenders):
                # Beyond ten, colours come again with other markers.
                _point(axes, name, points[name], f"C{number % 10}", _MARKERS[(number + number // 10) % len(_MARKERS)])
            for name in controls:
                _point(axes, name, points[name], "0.6", _MARKERS[list(controls).index(name)])
            # Labels beside the points would lie over each other: good methods lie close together.
            picture.legend(loc="outside right upper", fontsize=9)
            axes.set_xlabel(labels[0])
            axes.set_ylabel(labels[1])
            axes.set_title(title)
            axes.grid(alpha=0.3)
            return {kind: _save(picture, kind) for kind in ("svg", "png")}
        finally:
            plt.close(picture)


def plot_sheet(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[bytes]]]) -> bytes:
    """Draw pictures side by side.

    Args:
        columns: what each shows.
        rows: a title, and an encoded picture for each column; empty for none.

    Returns:
        The sheet as WebP.

    Raises:
        ObjdriveError: matplotlib is not installed.
    """
    plt = _pyplot()
    size = (_CELL * (len(columns) + 1), _CELL * 1.05 * len(rows) + 0.4)
    picture, axes = plt.subplots(len(rows), len(columns), figsize=size, layout="constrained", squeeze=False)
    try:
        for (title, pictures), line in zip(rows, axes, strict=True):
            for data, cell in zip(pictures, line, strict=True):
                cell.set(xticks=[], yticks=[])
                cell.set_frame_on(False)
                if data:
                    cell.imshow(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
            line[0].set_ylabel("\n".join(wrap(title, 18)), rotation=0, ha="right", va="center", fontsize=7)
        for name, cell in zip(columns, axes[0], strict=True):
            cell.set_title("\n".join(wrap(name, 14)), fontsize=7)
        return _save(picture, "webp")
    finally:
        plt.close(picture)


def _front(axes: Any, points: Sequence[tuple[Figure, Figure]]) -> None:
    if not points:
        return
    places = np.array([(x.value, y.value) for x, y in points])
    best = places[pareto_front(places)]
    best = best[np.argsort(best[:, 0])]
    axes.plot(best[:, 0], best[:, 1], linestyle="--", linewidth=1, color="0.4", zorder=1, label="Pareto front")


def _point(axes: Any, name: str, point: tuple[Figure, Figure], colour: str, marker: str) -> None:
    x, y = point
    axes.errorbar(
        x.value,
        y.value,
        # A percentile interval may leave a skewed figure outside.
        xerr=[[max(0.0, x.value - x.low)], [max(0.0, x.high - x.value)]],
        yerr=[[max(0.0, y.value - y.low)], [max(0.0, y.high - y.value)]],
        fmt=marker,
        label=name,
        color=colour,
        elinewidth=0.8,
        capsize=2,
    )


def _save(picture: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ObjdriveError(f"plots need the extra `evaluate` ({error}): pip install 'objdrive[evaluate]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
