"""Draws what halting saves against the steps that an item needs, from the depth.csv files of several seeds.

    python scripts/plot_halting.py runs/chain-seed0 runs/chain-seed1 --output docs/depth_halting
    python scripts/plot_halting.py runs/chain-seed0 --readout on

Each argument is a run's folder, or a depth.csv that `depth_curve.py RUN --steps ...` wrote. The readout `settled` stops
what has settled (--halt_settled X), `on` where the halting head says "right" (a run with --use_act). It is compared
with `last`, where all segments run, at the same most segments. Means over the files.

OUTPUT.png   segments used, and solved with and without halting, against the steps
OUTPUT.md    the same as a table, and below it what is saved and lost, and how far the probabilities that the stopped
             answers were given are from how often they are right
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.figures import new_figure  # noqa: E402
from engine.files import staged  # noqa: E402
from plot_tools import Row, finish, read_rows, where  # noqa: E402
from script_tools import ScriptParser, run_script  # noqa: E402

OVERALL = "overall"  # the rows of all tasks together
# Readout that stops early -> how a run gets rows of it.
HALTING = {
    "settled": "measure with depth_curve.py RUN --steps ... --halt_settled X",
    "on": "train with --use_act 1, and measure with depth_curve.py RUN --steps ...",
}


@dataclass(frozen=True)
class Place:
    """Means over the seeds at one number of steps.

    steps: that an item needs.
    is_beyond: more than any seed was trained on.
    used: segments that halting used.
    halted, whole: solved with halting and with all segments, from 0 to 1.
    """

    steps: int
    is_beyond: bool
    used: float
    halted: float
    whole: float


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, `files` as paths. Exits with status 2 and one line for a mistake."""
    parser = ScriptParser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="RUN", help="a run's folder or a depth.csv, one a seed")
    parser.add_argument("--task", default="", help="which task, where files hold several")
    parser.add_argument("--readout", choices=tuple(HALTING), default="settled", help="the way to stop")
    parser.add_argument("--segments", type=int, default=0, help="most segments (default: the most that all files have)")
    parser.add_argument("--output", type=Path, default=Path("runs") / "halting", help="path without suffix")
    args = parser.parse_args(argv)

    args.files = [_table(path) for path in args.files]
    if len({path.resolve() for path in args.files}) < len(args.files):
        parser.error("a file is given twice; give each seed once")
    return args


def _table(path: Path) -> Path:
    """The depth.csv of a run's folder, or of a folder that `depth_curve.py --output` named; a file is itself."""
    if not path.is_dir():
        return path
    own = path / "depth.csv"
    return own if own.is_file() else path / "depth" / "depth.csv"


def of_task(path: Path, task: str) -> list[Row]:
    """The rows of one task. Raises ValueError: several and no name, or none of that name."""
    rows = read_rows(path)
    names = sorted({row["task"] for row in rows} - {OVERALL})
    if task not in (names if task or len(names) > 1 else [""]):
        raise ValueError(f"{path} has the tasks {', '.join(names)}: choose one by --task")
    return [row for row in rows if row["task"] == (task or names[0])]


def halting_of(path: Path, table: Sequence[Row], readout: str) -> list[Row]:
    """The rows by steps of `readout`, as `halted`, and of `last`. Raises ValueError: the file has none."""
    rows = [row for row in table if row.get("steps") and row.get("readout") in (readout, "last")]
    if not where(rows, readout="last"):
        raise ValueError(f"{path} has no rows by steps of the readout last: measure with depth_curve.py")
    if not where(rows, readout=readout):
        raise ValueError(f"{path} has no rows by steps of the readout {readout}: {HALTING[readout]}")
    return [row if row["readout"] == "last" else row | {"readout": "halted"} for row in rows]


def shared_segments(files: Sequence[list[Row]], wanted: int) -> str:
    """The most segments at which every file was measured with halting, or `wanted`. Raises ValueError."""
    counts = set.intersection(*({int(row["segments"]) for row in where(rows, readout="halted")} for rows in files))

    if not counts or wanted and wanted not in counts:
        raise ValueError(f"not every file was measured with {wanted or 'the same'} segments: measure all with the same "
                         "--segments")
    return str(wanted or max(counts))


def places_of(files: Sequence[list[Row]], segments: str) -> list[Place]:
    """One `Place` for each number of steps that every file has, in ascending order."""
    shared = set.intersection(*({int(row["steps"]) for row in where(rows, readout="halted")} for rows in files))
    places = []

    for steps in sorted(shared):
        found: dict[str, list[Row]] = {"halted": [], "last": []}
        for readout, rows in found.items():
            for file in files:
                rows += where(file, readout=readout, segments=segments, steps=str(steps))

        places.append(
            Place(
                steps,
                all(row["beyond_training"] == "1" for row in found["halted"]),
                fmean(float(row["segments_used"]) for row in found["halted"]),
                fmean(float(row["solved"]) for row in found["halted"]),
                fmean(float(row["solved"]) for row in found["last"]),
            )
        )

    return places


def balance(title: str, places: Sequence[Place], segments: int) -> str:
    """A line: what halting saves of all segments over some steps, and what it costs in solved items."""
    saved = 1 - fmean(place.used for place in places) / segments
    lost = fmean(place.halted - place.whole for place in places)

    return f"{title}: {100 * saved:.0f} % of {segments} segments saved at {100 * lost:+.1f} points."


def markdown(places: Sequence[Place], segments: int, seeds: int) -> str:
    """The table, a column for each number of steps, and the balance over trained steps and over all."""
    names = [f"{place.steps}+" if place.is_beyond else str(place.steps) for place in places]
    lines = ["| steps | " + " | ".join(names) + " |", "|---" * (1 + len(places)) + "|"]
    lines.append("| segments used | " + " | ".join(f"{place.used:.1f}" for place in places) + " |")
    lines.append("| solved with halting, % | " + " | ".join(f"{100 * place.halted:.0f}" for place in places) + " |")
    lines.append(f"| solved with all {segments}, % | " + " | ".join(f"{100 * p.whole:.0f}" for p in places) + " |")

    lines += ["", f"Means over {seeds} seed{'s' if seeds > 1 else ''}. `+`: more steps than trained."]
    trained = [place for place in places if not place.is_beyond]
    if trained:
        lines.append(balance("Over the trained steps", trained, segments))
    if len(trained) < len(places):
        lines.append(balance("Over all of these steps", places, segments))
    return "\n".join([*lines, ""])


def calibration(tables: Sequence[Sequence[Row]], readout: str, segments: str) -> str:
    """A line with the mean calibration error over all steps of the stopped answers; "" where a file has none."""
    errors = []
    for table in tables:
        (row,) = where(table, readout=readout, segments=segments, difficulty="all")
        if not row.get("confidence_error"):
            return ""
        errors.append(float(row["confidence_error"]))
    return f"Calibration error of the answers' own probability: {fmean(errors):.3f}.\n"


def draw(places: Sequence[Place], segments: int) -> Any:
    """Two panels against the steps: segments used, and solved with and without halting."""
    figure, (left, right) = new_figure(2, width=4.6, height=3.4)
    steps = [place.steps for place in places]
    left.axhline(segments, color="0.6", linestyle=":", linewidth=1.2)
    left.plot(steps, [place.used for place in places], "o-", color="#24608a")
    right.plot(steps, [100 * place.halted for place in places], "o-", color="#24608a", label="halting")
    right.plot(steps, [100 * place.whole for place in places], "s--", color="0.4", label=f"all {segments} segments")

    # What lies beyond training is shaded alike in both.
    beyond = [place.steps for place in places if place.is_beyond]
    for axes in (left, right):
        if beyond:
            axes.axvspan(beyond[0] - 0.5, steps[-1] + 0.5, color="0.94", linewidth=0, zorder=0)
        axes.set_xticks(steps)
    finish(left, xlabel="steps needed", ylabel="segments used", ylim=(0, segments + 1))
    finish(right, xlabel="steps needed (grey: not trained on)", ylabel="solved, %", ylim=(-2, 102))
    return figure


def main(argv: list[str] | None = None) -> int:
    """The exit status. Raises ValueError and OSError for the user's mistakes; nothing is written then."""
    args = parse(argv)
    tables = [of_task(path, args.task) for path in args.files]
    files = [halting_of(path, table, args.readout) for path, table in zip(args.files, tables, strict=True)]
    segments = shared_segments(files, args.segments)

    places = places_of(files, segments)
    if not places:
        raise ValueError("the files have no steps in common: measure all with the same --steps")

    # Both or none.
    text = markdown(places, int(segments), len(files)) + calibration(tables, args.readout, segments)
    figure = draw(places, int(segments))
    names = [args.output.name + suffix for suffix in (".md", ".png")]
    with staged(args.output.parent, names) as (table, picture):
        table.write(text.encode())
        figure.savefig(picture, format="png", dpi=160)
    print(text)
    for name in names:
        print(args.output.parent / name)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
