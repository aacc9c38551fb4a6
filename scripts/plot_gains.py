"""The figure of which.csv: what a loop gains over one pass on each task, with its interval."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.figures import new_figure  # noqa: E402
from plot_tools import Point, Row, draw_points, percent  # noqa: E402

WHICH = "which_tasks/which.csv"  # below docs/results


def gain_of(row: Row) -> Point:
    """The gain of one row in points: its interval is over seeds, or over items where there is one seed alone."""
    over = "seeds" if row["seeds_low"] else "items"
    seeds = "1 seed" if row["seeds"] == "1" else f"{row['seeds']} seeds"
    label = f"{row['trained'].replace('@', ', ')} ({seeds})"
    return Point(label, percent(row["gain"]), percent(row[f"{over}_low"]), percent(row[f"{over}_high"]))


def gains_figure(rows: Sequence[Row]) -> Any:
    """One line for each task and difficulty that both arms have finished, the largest gain on top."""
    points = sorted((gain_of(row) for row in rows if row["gain"]), key=lambda point: -point.value)
    figure, (axes,) = new_figure(1, width=6.4, height=1.2 + 0.28 * len(points))
    axes.axvline(0, color="0.6", linewidth=1)
    draw_points(axes, points)
    axes.margins(x=0.2)
    axes.set_xlabel("gain over one pass, points")
    return figure
