"""Points with their intervals, drawn as rows or as curves: what the figures of the experiments share."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.figures import style  # noqa: E402
from engine.files import read_text  # noqa: E402
from engine.intervals import mean_interval  # noqa: E402

Row = dict[str, str]


@dataclass(frozen=True)
class Point:
    """A labelled value with its 95 % interval; `low` and `high` are None where there is none."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file with a heading. Raises ValueError: it cannot be read, has no rows, or a torn one."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path))))
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV table: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no rows")

    # The reader marks a row with too few or too many cells by None.
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise ValueError(f"{path}: row {number} has other cells than the heading has columns; write the table anew")
    return rows


def percent(text: str | float) -> float:
    """A share as a table holds it, in percent."""
    return 100 * float(text)


def with_interval(label: str, row: Row, name: str = "solved", low: str = "ci_low", high: str = "ci_high") -> Point:
    """The share in column `name` of a row, with its interval, in percent."""
    return Point(label, percent(row[name]), percent(row[low]), percent(row[high]))


def over_seeds(label: str, values: Iterable[float]) -> Point:
    """Mean of independent runs with its t interval."""
    interval = mean_interval(list(values))
    return Point(label, interval.value, interval.low, interval.high)


def where(rows: Iterable[Row], **wanted: str) -> list[Row]:
    """The rows whose columns hold what is wanted; `where(rows, arm="mlp", n="256")`."""
    return [row for row in rows if wanted.items() <= row.items()]


def curve_of(rows: Iterable[Row], place: str, name: str = "solved") -> list[tuple[float, Point]]:
    """(number in column `place`, share in column `name` with its interval) of each row."""
    return [(float(row[place]), with_interval("", row, name)) for row in rows]


def draw_points(axes: Any, points: Sequence[Point], *, labels: bool = True) -> None:
    """One line per point from top to bottom: its interval, a dot, and the value in figures."""
    for place, point in enumerate(points):
        # The figures stand to the right of the interval, where nothing hides them.
        end = point.value
        if point.low is not None:
            axes.plot([point.low, point.high], [place, place], color="0.55", linewidth=2.5, solid_capstyle="butt")
            end = point.high
        axes.plot([point.value], [place], "o", color="0.1", markersize=6)
        axes.annotate(f"{point.value:.1f}", (end, place), textcoords="offset points", xytext=(7, -3), fontsize=8)

    # Points run downwards as a table's rows do.
    names = [point.label for point in points] if labels else []
    axes.set_yticks(range(len(points)), names)
    axes.set_ylim(len(points) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)


def draw_line(axes: Any, index: int, count: int, label: str, points: Sequence[tuple[float, Point]]) -> None:
    """Curve `index` of `count` through (x, point), with the band of the intervals."""
    draw_banded(axes, style(index, count), label, points)


def draw_banded(axes: Any, look: dict[str, Any], label: str | None, points: Sequence[tuple[float, Point]]) -> None:
    """A curve of any `look` (matplotlib's names) through (x, point), with the band of the intervals."""
    # matplotlib takes columns, not rows.
    columns = zip(*((x, point.value, point.low, point.high) for x, point in points), strict=True)
    places, values, lows, highs = map(list, columns)

    axes.plot(places, values, label=label, **look)
    if None not in lows:
        axes.fill_between(places, lows, highs, color=look["color"], alpha=0.12, linewidth=0)


def draw_marker(axes: Any, x: float, point: Point, look: dict[str, Any], label: str | None = None) -> None:
    """A single point at `x` with its interval as an upright stroke."""
    axes.plot([x], [point.value], label=label, **look | {"linestyle": "none", "markersize": 8})
    if point.low is not None:
        axes.plot([x, x], [point.low, point.high], color=look["color"], linewidth=1.5)


def finish(axes: Any, **labels: Any) -> None:
    """Grid, labels, and a legend where there is something to tell apart."""
    axes.set(**labels)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, framealpha=0.7)
