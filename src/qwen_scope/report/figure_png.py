"""Figures as PNG, with matplotlib."""

from __future__ import annotations

import os
from typing import Any

from .figures import Curves, Figure, Heatmap, Points


def save_png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Draw a figure into a PNG file."""
    # Not pyplot: it keeps every figure alive, and picks a window system.
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=size_of(figure), dpi=130, layout="constrained")
    axes: Any = canvas.subplots()
    axes.set_title(figure.title, fontsize=11, parse_math=False)
    if isinstance(figure, Heatmap):
        draw_heatmap(canvas, axes, figure)
    else:
        axes.set_xlabel(figure.x_label)
        axes.set_ylabel(figure.y_label)
        axes.grid(alpha=0.25)
        draw_curves(axes, figure) if isinstance(figure, Curves) else draw_points(axes, figure)
    canvas.savefig(os.fspath(path), format="png")


def size_of(figure: Figure) -> tuple[float, float]:
    """Inches: a heat map grows with its table."""
    if isinstance(figure, Heatmap):
        return 3.0 + 0.55 * len(figure.columns), 2.2 + 0.4 * len(figure.rows)
    return 6.4, 4.2


def draw_curves(axes: Any, figure: Curves) -> None:
    """Lines with their bands."""
    for line in figure.lines:
        (drawn,) = axes.plot(line.x, line.y, label=line.name, linewidth=1.6, marker="o" if len(line.x) < 15 else None)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=drawn.get_color(), alpha=0.18, linewidth=0)
    if figure.log_x:
        axes.set_xscale("log")
    axes.legend(fontsize=7, ncols=1 + len(figure.lines) // 8)


def draw_points(axes: Any, figure: Points) -> None:
    """Points with their names beside them."""
    axes.scatter(figure.x, figure.y, s=22)
    for name, x, y in zip(figure.names, figure.x, figure.y, strict=True):
        axes.annotate(name, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7, parse_math=False)
    axes.margins(0.15)


def draw_heatmap(canvas: Any, axes: Any, figure: Heatmap) -> None:
    """Shades with their numbers."""
    low, high = figure.ends
    image = axes.imshow(figure.values, cmap="cividis", aspect="auto", vmin=low, vmax=high)
    axes.set_xticks(range(len(figure.columns)), figure.columns, rotation=45, ha="right", fontsize=8, parse_math=False)
    axes.set_yticks(range(len(figure.rows)), figure.rows, fontsize=8, parse_math=False)
    middle = (image.norm.vmin + image.norm.vmax) / 2
    for i, row in enumerate(figure.values):
        for j, value in enumerate(row):
            if value == value:
                axes.text(
                    j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="k" if value > middle else "w"
                )
    canvas.colorbar(image, ax=axes, shrink=0.8)
