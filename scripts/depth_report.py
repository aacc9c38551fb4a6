"""The CSV, the figures and the lines for the terminal of depth_curve.py, from its rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from calibration import calibration_error, reliability  # noqa: E402
from depth_measures import ALL, Trajectory  # noqa: E402
from depth_steps import LAST, by_task, draw_steps, draw_used  # noqa: E402
from engine.figures import new_figure, save_figure, style  # noqa: E402
from engine.files import write_text_aside  # noqa: E402
from engine.intervals import wilson  # noqa: E402
from plot_tools import curve_of, draw_line, where  # noqa: E402
from script_tools import csv_text  # noqa: E402

Row = dict[str, Any]
COLUMNS = (
    *("task", "difficulty", "readout", "segments", "n", "solved", "ci_low", "ci_high", "segments_used"),
    *("z_high_change", "z_low_change", "answer_change", "halt_probability", "ece", "confidence", "confidence_error"),
    *("seconds", "steps", "beyond_training"),
)
# Readouts that may stop early, and what the terminal calls them.
STOPPING = {"on": "halting", "settled": "stopping what has settled"}


def write(rows: Sequence[Row], path: Path) -> None:
    """The CSV of `COLUMNS`; missing values are empty. Raises WriteError."""
    write_text_aside(path, csv_text(COLUMNS, rows), "--output")


# --- the terminal -----------------------------------------------------------------------------------------------------


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """The tasks in the order of the rows."""
    return list(dict.fromkeys(map(itemgetter("task"), rows)))


def table(rows: Sequence[Row]) -> str:
    """What the terminal shows: one line per task, readout and number of segments."""
    lines = [f"{'task':18s} {'readout':10s} {'segments':>8s}  {'solved':22s} {'used':>6s}  change of z_H, z_L"]
    for row in where(rows, difficulty=ALL):
        share = f"{100 * row['solved']:.1f} % [{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"
        change = ""
        if "z_high_change" in row:
            change = f"{row['z_high_change']:.4f}  {row['z_low_change']:.4f}"
        line = (
            f"{row['task']:18s} {row['readout']:10s} {row['segments']:8d}  {share:22s} {row['segments_used']:6.2f}  "
            f"{change}"
        )
        lines.append(line.rstrip())
    return "\n".join(lines)


def calibrations(rows: Sequence[Row]) -> list[str]:
    """Per task: how far the probability that answers are given is from how often they are right, with most segments."""
    lines = []
    for task in tasks_of(rows):
        sure = [row for row in where(rows, task=task, difficulty=ALL) if "confidence" in row]
        most = max((row["segments"] for row in sure), default=0)
        for row in where(sure, segments=most):
            lines.append(
                f"{task}: {row['readout']} gives its answers a probability of {row['confidence']:.3f}, "
                f"{row['solved']:.3f} are right; calibration error {row['confidence_error']:.3f}"
            )
    return lines


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Per task: what most segments lose against the best number, and what halting saves and costs at the most."""
    lines = []
    for task in tasks_of(rows):
        own = where(rows, task=task, difficulty=ALL)
        off = where(own, readout="last")
        most = max(off, key=itemgetter("segments"))
        best = max(off, key=itemgetter("solved"))
        lines.append(
            f"{task}: best with {best['segments']} segments, {100 * best['solved']:.1f} %; with {most['segments']} "
            f"{100 * (most['solved'] - best['solved']):+.1f} points"
        )

        # Halting against no halting, both with the most segments.
        for row in own:
            if row["readout"] in STOPPING and row["segments"] == most["segments"]:
                saved = 1 - row["segments_used"] / most["segments"]
                lines.append(
                    f"{task}: {STOPPING[row['readout']]} of at most {most['segments']} segments saves "
                    f"{100 * saved:.0f} % of them at {100 * (row['solved'] - most['solved']):+.1f} points"
                )
    return lines


# --- figures ----------------------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row], walk: Trajectory | None, trained: int, most_steps: Mapping[str, int], path: Path) -> None:
    """Per task: solved over the steps needed, readouts, difficulties with halting off; then the change of z by segment.

    `trained` is the number of segments in training, where each panel has a dotted line; `most_steps` the most steps of
    each task there. Without a recurrence (`walk` None) there are the panels over steps alone.
    """
    panels: list[Callable[[Any], None]] = []
    steps = by_task(rows)
    for task, members in steps.items():
        panels.append(partial(draw_steps, task=task, rows=members, trained=most_steps.get(task)))
    for task, members in by_task(rows, "settled").items():
        panels.append(partial(draw_used, task=task, rows=members))

    # One panel for each task, one more for a task whose items differ in another difficulty, one for the states.
    if walk is not None:
        for task in tasks_of(rows):
            own = where(rows, task=task)
            whole = where(own, difficulty=ALL)
            panels.append(partial(_curves, rows=whole, by="readout", title=f"{task}: readouts", trained=trained))
            parts = [row for row in where(own, readout=LAST) if row["difficulty"] != ALL]
            if parts and task not in steps:
                title = f"{task}: by difficulty"
                panels.append(partial(_curves, rows=parts, by="difficulty", title=title, trained=trained))
        panels.append(partial(_draw_change, walk=walk))

    figure, places = new_figure(len(panels))
    for axes, panel in zip(places, panels, strict=True):
        panel(axes)
    save_figure(figure, [path])


def _draw_change(axes: Any, walk: Trajectory) -> None:
    """How much a segment still changes z, mean over items."""
    changes = {"z_high": walk.z_high_change, "z_low": walk.z_low_change}
    for index, (name, change) in enumerate(changes.items()):
        values = change.mean(dim=1).tolist()
        axes.plot(range(1, len(values) + 1), values, label=name, **style(index, len(changes)))
    axes.set(
        title="relative change of z by segment",
        xlabel="segment",
        ylabel="||z_k - z_(k-1)|| / ||z_k||",
        yscale="log",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _curves(axes: Any, rows: Sequence[Row], by: str, title: str, trained: int) -> None:
    """Solved rate over segments, one curve with its band for each value of the column `by`."""
    names = list(dict.fromkeys(map(itemgetter(by), rows)))
    for index, name in enumerate(names):
        draw_line(axes, index, len(names), name, curve_of(where(rows, **{by: name}), "segments"))

    # The axis is logarithmic, its ticks are the numbers measured.
    ticks = sorted(set(map(itemgetter("segments"), rows)))
    axes.axvline(trained, color="0.6", linestyle=":", linewidth=1)
    axes.set(title=title, xlabel="segments at evaluation (dotted: trained)", ylabel="solved, % (95 %)", ylim=(-2, 102))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def draw_reliability(chances: Sequence[float], right: Sequence[bool], path: Path) -> None:
    """Share of right answers against the halting probability, with Wilson bars, and how many answers each bin has."""
    figure, (axes, counts) = new_figure(2)
    bins = reliability(chances, right)

    # matplotlib takes the lengths of an error bar, below and above the value.
    places = []
    shares = []
    below = []
    above = []
    for b in bins:
        share = b.right / b.n
        low, high = wilson(b.right, b.n)
        places.append(b.probability)
        shares.append(share)
        below.append(share - low)
        above.append(high - share)

    axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="perfect")
    axes.errorbar(
        places,
        shares,
        [below, above],
        color="0.1",
        marker="o",
        capsize=3,
        label=f"halting head, ECE {calibration_error(chances, right):.3f}",
    )
    axes.set(
        title="reliability",
        xlabel="halting probability",
        ylabel="share of right answers (95 %)",
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
    )
    axes.legend(fontsize=8)

    for b in bins:
        counts.bar(b.low, b.n, width=b.high - b.low, align="edge", color="0.7", edgecolor="0.2")
    counts.set(xlabel="halting probability", ylabel="answers", xlim=(0, 1), title="how often")
    save_figure(figure, [path])
