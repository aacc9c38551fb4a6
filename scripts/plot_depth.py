"""Draws solved against the steps that an item needs, from the depth.csv files of several runs: figure, table, CSV.

    python scripts/plot_depth.py HRM=runs/hrm-*/depth/depth.csv "single pass=runs/mlp-*" LoRA=runs/lora-* --chance 0.167
    python scripts/plot_depth.py HRM=runs/hrm-* published=runs/published-* --task toy_chain --output docs/depth

Each argument is an arm, NAME=GLOB, with one file a seed, as `depth_curve.py RUN --steps ...` writes it; the folder of a
run stands for its depth/depth.csv. A name that is given twice takes the files of both. Counted are the steps and
segments that all seeds of an arm have, with halting off.

OUTPUT.png      a line for each number of segments of the first arm; each other arm with its most segments
OUTPUT.md       the table: a row for each arm and number of segments, a column for each number of steps
OUTPUT.csv      the same in rows: mean over seeds with its t interval; of one seed the Wilson interval over its items
OUTPUT_rows.csv the rows of the files that were counted
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from depth_arms import COLUMNS, Row, beyond_from, raw_rows, read_arms, summary, values  # noqa: E402
from engine.figures import DASHES, MARKERS, new_figure  # noqa: E402
from engine.files import staged  # noqa: E402
from plot_tools import Point, curve_of, draw_banded, finish, where, with_interval  # noqa: E402
from script_tools import ScriptParser, csv_text, run_script  # noqa: E402


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, `arms` as {name: files}. Exits with status 2 and one line for a mistake."""
    parser = ScriptParser(__doc__)
    parser.add_argument("arms", nargs="+", metavar="NAME=GLOB", help="an arm and its depth.csv files, one a seed")
    parser.add_argument("--output", type=Path, default=Path("runs") / "depth", help="path without suffix")
    parser.add_argument("--chance", type=float, help="what guessing solves, from 0 to 1: a dotted line")
    parser.add_argument("--task", default="", help="which task, where files hold several")
    parser.add_argument("--title", help="above the figure (default: names the task)")
    args = parser.parse_args(argv)

    if args.chance is not None and not 0 <= args.chance <= 1:
        parser.error(f"--chance {args.chance} is not legal: expected a share from 0 to 1")
    try:
        args.arms = files_of(args.arms)
    except ValueError as error:
        parser.error(str(error))
    return args


def files_of(words: Sequence[str]) -> dict[str, list[Path]]:
    """Arm -> its files, from `NAME=GLOB` words. Raises ValueError for a word without files, and a file given twice."""
    arms: dict[str, list[Path]] = {}
    seen: dict[Path, str] = {}
    for word in words:
        name, _, pattern = word.partition("=")
        name = name.strip()
        if not name or not pattern:
            raise ValueError(f"{word!r} is no arm: expected NAME=GLOB, such as LoRA=runs/lora-*/depth/depth.csv")
        matches = sorted(map(Path, glob.glob(os.path.expanduser(pattern), recursive=True)))
        if not matches:
            raise ValueError(f"{word}: there is no such file; expected the depth.csv of depth_curve.py --steps")

        # One file in two places would be counted as two seeds, or compared with itself.
        for match in matches:
            path = match / "depth" / "depth.csv" if match.is_dir() else match
            if path.resolve() in seen:
                raise ValueError(f"{word}: {path} is given twice (before: {seen[path.resolve()]}); give each file once")
            seen[path.resolve()] = word
            arms.setdefault(name, []).append(path)
    return arms


# --- the table --------------------------------------------------------------------------------------------------------


def inside(point: Point) -> Point:
    """A point whose interval is cut at 0 and 100 %, since no share lies beyond."""
    return replace(point, low=max(point.low, 0.0), high=min(point.high, 100.0))


def markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The table: a row for each arm and its segments, a column for each number of steps, and what its marks mean."""
    steps = values(rows, "steps")
    start = beyond_from(rows)
    marked = [f"{count}+" if start is not None and count > start else str(count) for count in steps]
    lines = ["| arm | segments | seeds | " + " | ".join(marked) + " |", "|---" * (3 + len(steps)) + "|"]

    # One row for each curve; a number of steps that an arm was not asked has an empty cell.
    for name in dict.fromkeys(row["arm"] for row in rows):
        own = where(rows, arm=name)
        for segments in values(own, "segments"):
            found = {row["steps"]: row for row in where(own, segments=segments)}
            seeds = next(iter(found.values()))["seeds"]
            arm = name.replace("|", "\\|")
            head = f"| {arm} | {segments or 'none'} | {seeds}{'*' if seeds == 1 else ''} | "
            lines.append(head + " | ".join(_cell(found.get(count)) for count in steps) + " |")

    lines += ["", "Solved, %, by the steps that an item needs; below it the 95 % interval over seeds."]
    if start is not None:
        lines.append("`+`: more steps than any run was trained on.")
    if any(row["seeds"] == 1 for row in rows):
        lines.append("`*`: one seed, with the Wilson interval over its items.")
    return "\n".join([*lines, *(f"{note}." for note in notes), ""])


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    point = inside(with_interval("", row))
    return f"{point.value:.1f}<br><sub>{point.low:.0f} to {point.high:.0f}</sub>"


# --- the figure -------------------------------------------------------------------------------------------------------

SEGMENTS_MAP = "YlGnBu"  # few segments are light, many are dark
PALEST = 0.42  # of that map, still seen on white
OTHERS = ("#b8402a", "#d98a1f", "#7b4a9e", "0.35", "#a3195b")
GAP = 6.0  # points of percent between two labels
TOP = 112.0  # of the axis: room for the words above 100 %


@dataclass(frozen=True)
class Line:
    """A curve with its name; `points` as `plot_tools.curve_of` gives them."""

    label: str
    look: dict[str, Any]
    points: list[tuple[float, Point]]


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """The first arm at each number of segments, then each other arm at its most segments."""
    from matplotlib import colormaps

    names = list(dict.fromkeys(row["arm"] for row in rows))
    first = values(where(rows, arm=names[0]), "segments")
    lines = []
    for place, segments in enumerate(first):
        tone = 1 - (1 - PALEST) * (len(first) - 1 - place) / max(len(first) - 1, 1)
        look = {"color": colormaps[SEGMENTS_MAP](tone), "linestyle": "-", "marker": "o", "markersize": 4}
        lines.append(_line(rows, names[0], segments, look | {"linewidth": 2}))

    # The solid line and the round marker are the first arm's.
    for place, name in enumerate(names[1:]):
        look = {
            "color": OTHERS[place % len(OTHERS)],
            "linestyle": DASHES[1 + place % (len(DASHES) - 1)],
            "marker": MARKERS[1 + place % (len(MARKERS) - 1)],
            "markersize": 4,
            "linewidth": 1.8,
        }
        lines.append(_line(rows, name, max(values(where(rows, arm=name), "segments")), look))
    return lines


def _line(rows: Sequence[Row], name: str, segments: int, look: dict[str, Any]) -> Line:
    own = where(rows, arm=name, segments=segments)
    label = name
    if segments:
        label += f", {segments} segment{'s' if segments > 1 else ''}"
    if own[0]["seeds"] == 1:
        label += " *"
    return Line(label, look, [(x, inside(point)) for x, point in curve_of(own, "steps")])


def spread(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Places between 0 and `top`, `gap` apart and as near to `heights` as that allows; their order stays."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    gap = min(gap, top / max(len(heights) - 1, 1))

    # Least squares under an order (pool adjacent violators): without the gaps, what overlaps shares its mean.
    pools: list[list[float]] = []
    for rank, place in enumerate(order):
        pools.append([heights[place] - rank * gap])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]

    # The gaps come back, inside the limits.
    places = [0.0] * len(heights)
    means = [fmean(pool) for pool in pools for _ in pool]
    for rank, (place, mean) in enumerate(zip(order, means, strict=True)):
        places[place] = min(max(mean, 0.0), top - (len(heights) - 1) * gap) + rank * gap
    return places


def draw(rows: Sequence[Row], title: str, chance: float | None) -> Any:
    """The figure: solved, %, against steps, with the names at the ends of the lines."""
    figure, (axes,) = new_figure(1, width=8.0, height=4.4)
    steps = values(rows, "steps")
    start = beyond_from(rows)
    if start is not None:
        axes.axvspan(start, steps[-1] + 0.5, color="0.94", linewidth=0, zorder=0)
        axes.text(steps[-1] + 0.4, TOP - 2, "not trained on", color="0.4", fontsize=9, ha="right", va="top")
    if chance is not None:
        axes.axhline(100 * chance, color="0.35", linestyle=":", linewidth=1.2)
        axes.text(steps[0] - 0.4, 100 * chance - 1, f"chance, {100 * chance:.0f} %", color="0.35", fontsize=8, va="top")

    lines = lines_of(rows)
    for line in lines:
        draw_banded(axes, line.look, None, line.points)
    _name_ends(axes, lines)

    # What the bands are stands below, since not every arm has the same number of seeds.
    counts = [str(seeds) for seeds in values(rows, "seeds") if seeds > 1]
    bands = [f"bands: 95 % over {' or '.join(counts)} seeds"] if counts else []
    if any(row["seeds"] == 1 for row in rows):
        bands.append("* one seed, 95 % over its items")
    figure.supxlabel("; ".join(bands), fontsize=8, color="0.4")
    finish(axes, title=title, xlabel="steps needed", ylabel="solved, %", ylim=(-2, TOP))
    axes.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
    axes.set_yticks(range(0, 101, 20))
    if len(steps) <= 24:
        axes.set_xticks(steps)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _name_ends(axes: Any, lines: Sequence[Line]) -> None:
    """The label of each line to the right of the panel, with a stroke to the line's last point."""
    heights = spread([line.points[-1][1].value for line in lines], GAP, 100.0)
    for line, height in zip(lines, heights, strict=True):
        x, point = line.points[-1]
        color = line.look["color"]
        axes.annotate(
            line.label, (x, point.value), xytext=(1.02, height), textcoords=axes.get_yaxis_transform(), color=color,
            fontsize=9, va="center", annotation_clip=False, parse_math=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6, "relpos": (0, 0.5), "shrinkA": 1},
        )


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The exit status. Raises ValueError and OSError for the user's mistakes; nothing is written then."""
    args = parse(argv)
    arms = read_arms(args.arms, args.task)
    rows, notes = summary(arms)
    table = markdown(rows, notes)
    raw = raw_rows(arms)
    figure = draw(rows, args.title or f"{raw[0]['task']}: solved by the steps that an item needs", args.chance)

    # All four or none: a table beside another version's figure would mislead.
    heading = list(dict.fromkeys(name for row in raw for name in row))
    texts = {".md": table, ".csv": csv_text(COLUMNS, rows), "_rows.csv": csv_text(heading, raw)}
    names = [args.output.name + suffix for suffix in (*texts, ".png")]
    with staged(args.output.parent, names) as files:
        for file, text in zip(files[:-1], texts.values(), strict=True):
            file.write(text.encode())
        figure.savefig(files[-1], format="png", dpi=160)

    for note in notes:
        print(f"NOTE: {note}", file=sys.stderr)
    print(table)
    for name in names:
        print(args.output.parent / name)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
