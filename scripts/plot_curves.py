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

from engine.figures import new_figure, read_losses, read_solved, save_figure, smoothed, style  # noqa: E402
from script_tools import ScriptParser, run_script  # noqa: E402

WINDOWS = 40  # the loss is averaged over 1 / WINDOWS of a run's logged steps


@dataclass
class RunCurves:
    """What a run recorded."""

    label: str
    solved: dict[str, list[dict[str, float]]] = field(default_factory=dict)  # task -> evaluations in order
    loss: list[dict[str, float]] = field(default_factory=list)  # step, elapsed_s, value


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--output", type=Path, default=Path("runs") / "compare", help="path without suffix")
    parser.add_argument("--labels", help="comma list of names, one a run (default: folder names)")
    parser.add_argument("--x", choices=("step", "minutes"), default="step")
    args = parser.parse_args(argv)
    args.labels = args.labels.split(",") if args.labels else [run.resolve().name for run in args.runs]
    if len(args.labels) != len(args.runs):
        parser.error(f"--labels has {len(args.labels)} names for {len(args.runs)} runs: give one each")
    return args


def read_run(folder: Path, label: str) -> RunCurves:
    """The run's curves; lines that a crash cut off and values that are no numbers are left out.

    Raises:
        ValueError: no folder of a run, or nothing recorded yet.
    """
    found = RunCurves(label)
    table, metrics = folder / "eval.csv", folder / "metrics.jsonl"
    if not table.exists() and not metrics.exists():
        raise ValueError(f"{folder} is no run: expected eval.csv or metrics.jsonl in it")
    found.solved = read_solved(table)
    found.loss = read_losses(metrics, "answer_loss")
    if not found.solved and not found.loss:
        raise ValueError(f"{folder} has recorded nothing yet: wait for its first logged step")
    return found


def places(rows: Sequence[dict[str, float]], x: str) -> list[float]:
    return [row["step"] if x == "step" else row["elapsed_s"] / 60 for row in rows]


def draw_solved(axes: Any, runs: Sequence[RunCurves], task: str, x: str) -> None:
    """Solved rate of a task with its band, and the bare LLM as a thin line."""
    for index, run in enumerate(runs):
        rows, looks = run.solved.get(task, []), style(index, len(runs))
        axes.plot(places(rows, x), [100 * row["value"] for row in rows], label=run.label, **looks)
        band = [row for row in rows if {"ci_low", "ci_high"} <= row.keys()]
        axes.fill_between(places(band, x), [100 * row["ci_low"] for row in band],
                          [100 * row["ci_high"] for row in band], color=looks["color"], alpha=0.12, linewidth=0)
    bare = {round(row["bare"], 6) for run in runs for row in run.solved.get(task, []) if "bare" in row}
    for value in bare:
        axes.axhline(100 * value, color="0.5", linestyle=":", linewidth=1)
    axes.set(title=f"{task}, solved" + (" (dotted: bare LLM)" if bare else ""), xlabel=x, ylabel="solved, % (95 %)",
             ylim=(-2, 102))


def draw_loss(axes: Any, runs: Sequence[RunCurves], x: str) -> None:
    for index, run in enumerate(runs):
        values = [row["value"] for row in run.loss]
        looks = style(index, len(runs)) | {"markevery": max(len(values) // 8, 1)}
        axes.plot(places(run.loss, x), smoothed(values, max(len(values) // WINDOWS, 1)), label=run.label, **looks)
    axes.set(title="training loss", xlabel=x, ylabel="loss")


def draw_segments(axes: Any, runs: Sequence[RunCurves], x: str) -> None:
    for index, run in enumerate(runs):
        task = "overall" if "overall" in run.solved else next(iter(run.solved), "")
        rows = [row for row in run.solved.get(task, []) if "segments_used" in row]
        axes.plot(places(rows, x), [row["segments_used"] for row in rows], label=run.label, **style(index, len(runs)))
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
    args = parse(argv)
    runs, wrong = [], []
    for folder, label in zip(args.runs, args.labels, strict=True):
        try:
            runs.append(read_run(folder, label))
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("\n".join(wrong))
    for path in draw(runs, args.x, args.output):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
