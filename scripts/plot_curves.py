"""Compares runs: solved rate with its 95 % bands, training loss, segments used; one PNG and one SVG, readable in grey.

    python scripts/plot_curves.py runs/one runs/two
    python scripts/plot_curves.py runs/*/ --x minutes --labels small,large --output docs/compare

A panel per task that the runs evaluated, then the loss (mean over a window of logged steps) and the mean segments used
at evaluation. `--x minutes` is the time of each run itself, resumes included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.figures import Row, new_figure, read_losses, read_solved, save_figure, smoothed, style  # noqa: E402
from engine.files import read_text  # noqa: E402
from engine.ownership import known_id  # noqa: E402
from engine.protocol import measured_by_others  # noqa: E402
from options import read_resolved  # noqa: E402
from script_tools import ScriptParser, run_script  # noqa: E402

WINDOWS = 40  # the loss is averaged over 1 / WINDOWS of a run's logged steps
MARKERS = 8  # marks on a curve of the loss


@dataclass
class RunCurves:
    """What a run recorded.

    solved: task -> its evaluations in order, as `engine.figures.read_solved` reads them.
    loss: `step`, `elapsed_s` and `value` of each logged step.
    """

    label: str
    solved: dict[str, list[Row]] = field(default_factory=dict)
    loss: list[Row] = field(default_factory=list)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with status 2 and one line for a mistake."""
    parser = ScriptParser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--output", type=Path, default=Path("runs") / "compare", help="path without suffix")
    parser.add_argument("--labels", help="comma list of names, one a run (default: folder names)")
    parser.add_argument("--x", choices=("step", "minutes"), default="step")
    args = parser.parse_args(argv)

    if args.labels:
        args.labels = args.labels.split(",")
    else:
        args.labels = [run.resolve().name for run in args.runs]
    if len(args.labels) != len(args.runs):
        parser.error(f"--labels has {len(args.labels)} names for {len(args.runs)} runs: give one each")
    return args


# --- reading ----------------------------------------------------------------------------------------------------------


def table_of(folder: Path) -> Path:
    """The run's evaluation table: `eval.csv` in its folder, else what `--log_csv` named."""
    own = folder / "eval.csv"
    settings = folder / "config.resolved.yaml"
    if own.exists() or not settings.exists():
        return own
    named = read_resolved(read_text(settings)).get("log_csv")
    return Path(named) if named else own


def read_run(folder: Path, label: str) -> RunCurves:
    """The run's curves; lines that a crash cut off and values that are no numbers are left out.

    Raises:
        ValueError: no folder of a run, or nothing recorded yet.
    """
    table = table_of(folder)
    metrics = folder / "metrics.jsonl"
    if not table.exists() and not metrics.exists():
        raise ValueError(f"{folder} is no run: expected eval.csv or metrics.jsonl in it")

    solved = read_solved(table, known_id(folder), measured_by_others(folder))
    curves = RunCurves(label, solved, read_losses(metrics, "answer_loss"))
    if not curves.solved and not curves.loss:
        raise ValueError(f"{folder} has recorded nothing yet: wait for its first logged step")
    return curves


# --- drawing ----------------------------------------------------------------------------------------------------------


def column(rows: Sequence[Row], name: str, factor: float = 1.0) -> list[float]:
    """The values of a column, times `factor`."""
    return [factor * row[name] for row in rows]


def places(rows: Sequence[Row], x: str) -> list[float]:
    """Where the rows stand on the axis `x`: steps, or minutes."""
    if x == "step":
        return column(rows, "step")
    return [row["elapsed_s"] / 60 for row in rows]


def with_column(rows: Sequence[Row], *names: str) -> list[Row]:
    """The rows that have these columns."""
    return [row for row in rows if set(names) <= row.keys()]


def draw_solved(axes: Any, runs: Sequence[RunCurves], task: str, x: str) -> None:
    """Solved rate of a task with its band, and the bare LLM as a thin line."""
    bare: set[float] = set()
    for index, run in enumerate(runs):
        rows = run.solved.get(task, [])
        look = style(index, len(runs))
        axes.plot(places(rows, x), column(rows, "value", 100), label=run.label, **look)
        band = with_column(rows, "ci_low", "ci_high")
        low = column(band, "ci_low", 100)
        high = column(band, "ci_high", 100)
        axes.fill_between(places(band, x), low, high, color=look["color"], alpha=0.12, linewidth=0)
        bare |= {round(value, 6) for value in column(with_column(rows, "bare"), "bare")}

    # Runs on the same items share the bare LLM's rate: one line for each that there is.
    for value in bare:
        axes.axhline(100 * value, color="0.5", linestyle=":", linewidth=1)
    title = f"{task}, solved"
    if bare:
        title += " (dotted: bare LLM)"
    axes.set(title=title, xlabel=x, ylabel="solved, % (95 %)", ylim=(-2, 102))


def draw_loss(axes: Any, runs: Sequence[RunCurves], x: str) -> None:
    """Training loss, smoothed, with a few marks along the curve."""
    for index, run in enumerate(runs):
        values = column(run.loss, "value")
        means = smoothed(values, max(len(values) // WINDOWS, 1))
        look = style(index, len(runs)) | {"markevery": max(len(values) // MARKERS, 1)}
        axes.plot(places(run.loss, x), means, label=run.label, **look)
    axes.set(title="training loss", xlabel=x, ylabel="loss")


def draw_segments(axes: Any, runs: Sequence[RunCurves], x: str) -> None:
    """Mean segments of an answer at evaluation: over all tasks where there is that row, else of the first task."""
    for index, run in enumerate(runs):
        task = "overall" if "overall" in run.solved else next(iter(run.solved), "")
        rows = with_column(run.solved.get(task, []), "segments_used")
        axes.plot(places(rows, x), column(rows, "segments_used"), label=run.label, **style(index, len(runs)))
    axes.set(title="segments used at evaluation", xlabel=x, ylabel="mean segments")
    axes.set_ylim(bottom=0)


def draw(runs: Sequence[RunCurves], x: str, output: Path) -> list[Path]:
    """Writes the figure as PNG and SVG; returns their paths."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.solved))
    figure, panels = new_figure(len(tasks) + 2)
    for axes, task in zip(panels, tasks, strict=False):
        draw_solved(axes, runs, task, x)
    draw_loss(panels[-2], runs, x)
    draw_segments(panels[-1], runs, x)

    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, framealpha=0.6)
    paths = [output.with_name(output.name + suffix) for suffix in (".png", ".svg")]
    save_figure(figure, paths)
    return paths


def main(argv: list[str] | None = None) -> int:
    """The exit status. Raises ValueError with a line for each folder that is no run."""
    args = parse(argv)
    runs = []
    problems = []
    for folder, label in zip(args.runs, args.labels, strict=True):
        try:
            runs.append(read_run(folder, label))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))

    for path in draw(runs, args.x, args.output):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
