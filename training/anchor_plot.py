"""A drawing of how anchors fit the boxes of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training.anchor_shapes import Anchors, shape_iou
from yolov4_fast.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOTS = 20_000  # boxes drawn at most


def plot_anchors(path: Path, shapes: np.ndarray, anchors: Anchors, title: str) -> None:
    """Writes a PNG: shapes [N, 2] as dots in the colour of the anchor that fits them best, anchors
    as crosses; and the anchors as rectangles about one centre.

    Raises ValueError where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            f"{path}: drawing needs matplotlib: pip install 'yolov4_fast[train]'"
        ) from None
    if len(shapes) > DOTS:
        shapes = np.random.default_rng(0).choice(shapes, DOTS, replace=False)
    figure = Figure(figsize=(12, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    _draw_fit(left, shapes, anchors)
    _draw_rectangles(right, anchors)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_fit(axes: Axes, shapes: np.ndarray, anchors: Anchors) -> None:
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import LogLocator, NullLocator

    nearest = shape_iou(shapes, np.array(anchors)).argmax(axis=1)
    for number, (width, height) in enumerate(anchors):
        own = shapes[nearest == number]
        axes.scatter(own[:, 0], own[:, 1], s=5, alpha=0.4, linewidths=0, color=_colour(number))
        axes.plot(width, height, "x", color="black", markersize=8, markeredgewidth=2)
        axes.annotate(
            f"{number + 1}", (width, height), (5, 4), textcoords="offset points", weight="bold",
            path_effects=[withStroke(linewidth=2.5, foreground="white")], zorder=3,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="width, px", ylabel="height, px")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.2)


def _draw_rectangles(axes: Axes, anchors: Anchors) -> None:
    from matplotlib.patches import Rectangle

    for number, (width, height) in enumerate(anchors):
        axes.add_patch(
            Rectangle(
                (-width / 2, -height / 2), width, height,
                fill=False, linewidth=1.8, edgecolor=_colour(number),
                label=f"{number + 1}: {width:g} x {height:g}",
            )
        )  # fmt: skip
    limit = 0.55 * max(max(anchor) for anchor in anchors)
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xlabel="px", ylabel="px")
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    axes.grid(alpha=0.2)


def _colour(number: int) -> str:
    return f"C{number % 10}"
