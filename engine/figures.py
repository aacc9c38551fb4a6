"""Figures for people: matplotlib without a display, readable in grey, written whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.files import staged

# Told apart without colour: by dash, marker and tone together.
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
MARKERS = "osD^vPX*<>"


def style(index: int, count: int) -> dict[str, Any]:
    """Line style, marker and grey tone of curve `index` of `count`."""
    return {
        "color": str(round(0.65 * index / max(count - 1, 1), 3)),
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 5,
    }


def new_figure(columns: int, rows: int = 1, width: float = 5.0, height: float = 4.0) -> tuple[Any, list[Any]]:
    """(figure, its axes row by row) of `rows` x `columns` panels, each `width` x `height` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)  # no pyplot, no display
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def save_figure(figure: Any, paths: Sequence[Path]) -> None:
    """Writes the figure to each path, in the format of its suffix (.png, .svg). Raises OSError."""
    for path in map(Path, paths):
        # No date: the same figures give the same file.
        metadata = {"Date": None} if path.suffix == ".svg" else None
        with staged(path.parent, [path.name]) as (file,):
            figure.savefig(file, format=path.suffix.removeprefix("."), metadata=metadata)
