"""Draws the figures of docs/experiments from the raw rows in docs/results; PNG, readable in grey.

    python scripts/plot_results.py                  # every figure
    python scripts/plot_results.py depth halting    # these alone
    python scripts/plot_results.py --output FOLDER  # elsewhere than in docs/experiments

`@page` names a figure and the files that it reads.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.figures import new_figure, save_figure, style  # noqa: E402
from plot_gains import WHICH, gains_figure  # noqa: E402
from plot_tools import (  # noqa: E402
    Point,
    Row,
    curve_of,
    draw_line,
    draw_marker,
    draw_points,
    finish,
    over_seeds,
    percent,
    read_rows,
    where,
    with_interval,
)
from script_tools import ScriptParser, run_script  # noqa: E402

RESULTS = ROOT / "docs" / "results"
PAGES = ROOT / "docs" / "experiments"
MOST_SEGMENTS = "16"

Tables = dict[str, Any]  # path below docs/results -> its rows, or the tree of a JSON file
Draw = Callable[[Tables], Any]  # makes a figure

# Name of a figure, which is also that of its page and of its PNG -> (what draws it, the files it reads).
FIGURES: dict[str, tuple[Draw, tuple[str, ...]]] = {}


def page(name: str, *files: str) -> Callable[[Draw], Draw]:
    """Enters the function below in `FIGURES`."""

    def enter(function: Draw) -> Draw:
        FIGURES[name] = (function, files)
        return function

    return enter


def read(path: str) -> Any:
    """The rows of a CSV file or the tree of a JSON file below docs/results. Raises ValueError for an empty one."""
    file = RESULTS / path
    if file.suffix == ".json":
        return json.loads(file.read_text(encoding="utf-8"))

    return read_rows(file)


def by_seed(rows: list[Row], arm: str, task: str) -> dict[str, float]:
    """Seed -> solved, in percent, of one arm on one task."""
    return {row["seed"]: percent(row["solved"]) for row in where(rows, arm=arm, task=task)}


# --- does the add-on help, and is it recurrence -----------------------------------------------------------------------

SUMS = "baselines_sums/results.csv"
EQUATIONS = "baselines_equations_1000/results.csv"
PUZZLES = "baselines_sudoku_1000/results.csv"
PROMPTS = "prompt_tuning/results.csv"
FEW = "small_data_sums/results.csv"
FEW_FIRST = "small_data_sums/results_first_arms.csv"

BASELINES = (
    ("chain_sum", "chain_sum, small", SUMS),
    ("simple_equations", "simple_equations, small", EQUATIONS),
    ("mini_sudoku", "mini_sudoku, unseen grids", PUZZLES),
)
ARMS = (
    ("none", "bare LLM"),
    ("prompt20", "prompt tuning"),
    ("lora", "LoRA"),
    ("hrm", "HRM, one segment"),
    ("hrm_published", "HRM, paper's states"),
    ("mlp", "one pass"),
)


@page("add_on", SUMS, EQUATIONS, PUZZLES, PROMPTS)
def draw_add_on(tables: Tables) -> Any:
    """Every arm on the three tasks, mean of three seeds."""
    figure, panels = new_figure(len(BASELINES), width=3.9, height=3.2)

    for column, (task, title, path) in enumerate(BASELINES):
        # Prompt tuning was run later and has a table of its own.
        rows = [*tables[path], *tables[PROMPTS]]
        points = [over_seeds(label, by_seed(rows, arm, task).values()) for arm, label in ARMS]

        draw_points(panels[column], points, labels=column == 0)
        panels[column].set(title=title, xlabel="solved, % (95 % over 3 seeds)", xlim=(-6, 90))

    return figure


@page("recurrence", SUMS, EQUATIONS, PUZZLES, FEW)
def draw_recurrence(tables: Tables) -> Any:
    """What recurrence adds: differences between arms that are alike but for it."""
    pairs = [(f"{title}\nHRM minus one pass", path, task, "hrm", "mlp") for task, title, path in BASELINES]
    pairs.append(("1,000 sums, four steps a batch\nstates kept minus reset", FEW, "chain_sum", "deep4", "four_steps"))

    # Paired by seed: the same seed draws the same training items in both arms.
    points = []
    for label, path, task, arm, control in pairs:
        ours = by_seed(tables[path], arm, task)
        theirs = by_seed(tables[path], control, task)
        differences = [ours[seed] - theirs[seed] for seed in ours]
        points.append(over_seeds(f"{label}, {len(differences)} seeds", differences))

    figure, (axes,) = new_figure(1, width=7.5, height=3.4)
    draw_points(axes, points)
    axes.axvline(0, color="0.3", linestyle="--", linewidth=1)
    axes.set(title="what recurrence adds", xlabel="difference of solved, points (95 % over seeds)", xlim=(-21, 11))
    return figure


FEW_ARMS = (
    ("mlp_300", "one pass, 300 batches", FEW),
    ("mlp_1200", "one pass, 1,200 batches", FEW_FIRST),
    ("hrm_1200", "HRM, one segment, 1,200 batches", FEW_FIRST),
    ("four_steps", "four steps, states reset, 300 batches", FEW),
    ("deep4", "four supervised segments, 300 batches", FEW),
)


@page("few_examples", FEW, FEW_FIRST)
def draw_few_examples(tables: Tables) -> Any:
    """1,000 sums: every arm with its seeds."""
    figure, (axes,) = new_figure(1, width=7.5, height=3.2)

    # A stroke below the mean for each seed: with so few, the reader should see them all.
    points = []
    for place, (arm, label, path) in enumerate(FEW_ARMS):
        values = list(by_seed(tables[path], arm, "chain_sum").values())
        points.append(over_seeds(f"{label}, {len(values)} seeds", values))
        axes.plot(values, [place + 0.28] * len(values), "|", color="0.4")
    draw_points(axes, points)

    bare = percent(tables[FEW][0]["bare"])
    axes.axvline(bare, color="0.3", linestyle=":", linewidth=1, label="bare LLM")
    axes.set(title="1,000 examples of chain_sum", xlabel="solved, % (95 % over seeds; strokes: seeds)", xlim=(0, 50))
    axes.legend(fontsize=8)
    return figure


# --- depth and halting ------------------------------------------------------------------------------------------------

SUMMED = "depth_sum_zero/depth.csv"
GATED = "depth_sum_gated/depth.csv"
HARDER = "depth_sum_default/depth.csv"
GRIDS = "depth_sudoku/depth.csv"
GRIDS_PUBLISHED = "depth_sudoku_published/depth.csv"

DEPTH = (
    ("small sums, summed states", SUMMED),
    ("small sums, gated states", GATED),
    ("harder sums, gated states", HARDER),
    ("mini_sudoku, gated states", GRIDS),
    ("mini_sudoku, paper's states", GRIDS_PUBLISHED),
)


@page("depth", SUMMED, GATED, HARDER, GRIDS, GRIDS_PUBLISHED)
def draw_depth(tables: Tables) -> Any:
    """Solved rate against the number of segments at evaluation, halting off."""
    figure, (axes,) = new_figure(1, width=7.0, height=4.2)

    for index, (label, path) in enumerate(DEPTH):
        rows = where(tables[path], readout="last", difficulty="all")
        draw_line(axes, index, len(DEPTH), label, curve_of(rows, "segments"))

    axes.set_xscale("log", base=2)
    counts = (1, 2, 4, 8, 16)
    axes.set_xticks(counts, map(str, counts))
    finish(axes, title="more segments at test time", xlabel="segments at evaluation", ylabel="solved, % (95 %)",
           ylim=(0, 104))
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 0.36))
    return figure


HALTING = (("small sums", GATED), ("mini_sudoku", GRIDS), ("harder sums", HARDER))
STOPS = (("last", "all 16 segments"), ("on", "halting head"), ("settled", "head and --halt_settled"))


@page("halting", GATED, GRIDS, HARDER)
def draw_halting(tables: Tables) -> Any:
    """Segments that are spent with at most 16, and what the answers are then worth."""
    figure, (spent, solved) = new_figure(2, width=5.2, height=3.6)

    for index, (readout, label) in enumerate(STOPS):
        look = style(index, len(STOPS))
        for place, (_, path) in enumerate(HALTING):
            (row,) = where(tables[path], readout=readout, difficulty="all", segments=MOST_SEGMENTS)
            # The three ways to stop stand side by side; one entry of each in the legend.
            x = place + 0.22 * (index - 1)
            named = label if place == 0 else None
            draw_marker(spent, x, Point("", float(row["segments_used"])), look, named)
            draw_marker(solved, x, with_interval("", row), look, named)

    names = [name for name, _ in HALTING]
    spent.set_xticks(range(len(names)), names)
    solved.set_xticks(range(len(names)), names)
    finish(spent, title="segments used, of at most 16", ylabel="mean segments", ylim=(0, 17))
    finish(solved, title="solved", ylabel="solved, % (95 %)", ylim=(0, 104))
    return figure


# --- curriculum, four tasks, recipe, mini_sudoku ----------------------------------------------------------------------

CLIMB = "curriculum/curriculum.csv"
DIRECT = "curriculum/direct.csv"


@page("curriculum", CLIMB, DIRECT)
def draw_curriculum(tables: Tables) -> Any:
    """Held-out rate at the level of the moment, and both runs at the default difficulty in the end."""
    figure, (axes,) = new_figure(1, width=7.0, height=3.8)

    # On the way 128 questions of the level are asked; the level stands above each point.
    on_the_way = where(tables[CLIMB], metric="solved", n="128")
    draw_line(axes, 0, 3, "curriculum, at the level of the moment (n = 128)", curve_of(on_the_way, "step", "value"))
    levels = where(tables[CLIMB], metric="curriculum_level")
    for row, level in zip(on_the_way, levels, strict=True):
        axes.annotate(f"{float(level['value']):.0f}", (float(row["step"]), percent(row["value"])), fontsize=8,
                      textcoords="offset points", xytext=(0, 7), ha="center")

    # Both runs end on the same 256 questions of the default difficulty.
    (climbed,) = where(tables[CLIMB], metric="solved", n="256")
    (direct,) = where(tables[DIRECT], metric="solved")
    ends = ((592, "curriculum", climbed), (608, "default difficulty from the start", direct))
    for index, (x, label, row) in enumerate(ends, start=1):
        draw_marker(axes, x, with_interval("", row, "value"), style(index, 3), f"{label}: at default (n = 256)")
    finish(axes, title="mini_sudoku (number: level)", xlabel="batches of 32", ylabel="solved, % (95 %)", ylim=(-2, 102))
    return figure


FOUR = "four_tasks/eval.csv"


@page("four_tasks", FOUR)
def draw_four_tasks(tables: Tables) -> Any:
    """Solved rate of each task by batches at default difficulty."""
    figure, (axes,) = new_figure(1, width=7.0, height=3.8)

    names = list(dict.fromkeys(row["task"] for row in tables[FOUR]))
    for index, name in enumerate(names):
        rows = where(tables[FOUR], metric="solved", task=name)
        draw_line(axes, index, len(names), name, curve_of(rows, "step", "value"))

    finish(axes, title="four tasks at default difficulty", xlabel="batches of 64 at default difficulty",
           ylabel="solved, % (95 %)", ylim=(0, 66))
    return figure


RECIPE = "recipe/results.csv"
RECIPE_NAMES = {
    "default": "default",
    "published": "paper's states",
    "sum": "summed states",
    "read_last": "reads last states alone",
    "read_all": "reads every layer",
    "pooled": "reads one pooled position",
    "grb": "gated bias (grb)",
    "cab_mem16": "cab_mem 16",
    "T1": "inner_T 1",
    "T4": "inner_T 4",
    "T4_k2": "inner_T 4, horizon k:2",
    "T4_one_step": "inner_T 4, one_step",
    "shared": "one block for H and L",
    "ema_none": "no EMA",
    "mlp": "one pass, no recurrence",
    "deep4": "4 supervised segments",
    "drawn4": "1 to 4 segments drawn, gated",
    "drawn4_sum": "1 to 4 segments drawn, summed",
}


@page("recipe", RECIPE)
def draw_recipe(tables: Tables) -> Any:
    """Every choice against the default; Wilson intervals over the same 256 items."""
    figure, (axes,) = new_figure(1, width=7.0, height=5.6)

    rows = sorted(tables[RECIPE], key=lambda row: -float(row["solved"]))
    draw_points(axes, [with_interval(RECIPE_NAMES[row["arm"]], row) for row in rows])

    # A line through the default, to read the others against.
    (default,) = where(rows, arm="default")
    axes.axvline(percent(default["solved"]), color="0.3", linestyle="--", linewidth=1, zorder=0)
    axes.set(title="one choice at a time: chain_sum, 600 batches", xlabel="solved, % (95 %, n = 256, one seed)",
             xlim=(0, 68))
    return figure


SUDOKU = "mini_sudoku/solved.csv"


@page("mini_sudoku", SUDOKU)
def draw_mini_sudoku(tables: Tables) -> Any:
    """Solved puzzles on unseen grids by batches."""
    figure, (axes,) = new_figure(1, width=6.0, height=3.4)

    # The last checkpoint was asked 512 questions afterwards; its marker stands a little to the right.
    draw_line(axes, 0, 2, "n = 128", curve_of(where(tables[SUDOKU], n="128"), "batches"))
    (final,) = where(tables[SUDOKU], n="512")
    draw_marker(axes, float(final["batches"]) + 25, with_interval("", final), style(1, 2), "n = 512")

    finish(axes, title="mini_sudoku on unseen grids", xlabel="batches of 32", ylabel="solved, % (95 %)", ylim=(0, 100))
    return figure


# --- the other systems, speed -----------------------------------------------------------------------------------------

ADDITION = "hybrid/addition.csv"
STAGES = "hybrid/stages.csv"
NGRAMS = ("unigram", "bigram")


@page("hybrid", ADDITION, STAGES)
def draw_hybrid(tables: Tables) -> Any:
    """Two-digit addition with and without HRM, and perplexity on the mix after each stage."""
    figure, (addition, mix) = new_figure(2, width=5.6, height=3.4)

    # The rates are so near 100 % that the axis begins at 95.
    points = []
    for row in tables[ADDITION]:
        kind = "no HRM" if row["bridge"] == "none" else f"HRM, {row['bridge']}"
        points.append(with_interval(f"{row['encoder']}, {kind}", row))
    draw_points(addition, points)
    addition.set(title="two-digit addition", xlabel="solved, % (95 %, n = 512)", xlim=(95, 101))

    # Perplexities span two orders of magnitude. The n-grams, which any model must beat, are light.
    for place, row in enumerate(tables[STAGES]):
        value = float(row["mix_c"])
        mix.barh(place, value, color="0.78" if row["after"] in NGRAMS else "0.4")
        mix.annotate(f"{value:.1f}", (value, place), textcoords="offset points", xytext=(4, -3), fontsize=8)
    mix.set_yticks(range(len(tables[STAGES])), [row["after"] for row in tables[STAGES]])
    mix.invert_yaxis()
    mix.set_xscale("log")
    ticks = (20, 50, 100, 200, 500, 1000)
    mix.set_xticks(ticks, map(str, ticks))
    mix.minorticks_off()
    mix.set(title="perplexity on held-out mix C, after stage", xlabel="perplexity (log)", xlim=(20, 1000))
    return figure


GRPO_STAGES = "grpo/stages.csv"
GRPO_ADDON = "grpo/addon.csv"


@page("grpo", GRPO_STAGES, GRPO_ADDON)
def draw_grpo(tables: Tables) -> Any:
    """Solved before and after each stage, of the planner/worker LM and of the add-on."""
    figure, (axes,) = new_figure(1, width=7.0, height=4.2)

    # Two points for each stage, one below the other.
    points = []
    for row in tables[GRPO_STAGES]:
        points.append(with_interval(f"{row['stage']}, before", row, "solved_start", "start_low", "start_high"))
        points.append(with_interval("after", row, "solved_end", "end_low", "end_high"))
    for row in tables[GRPO_ADDON]:
        label = f"add-on at {row['learning_rate']} {row['schedule']}, before"
        points.append(with_interval(label, row, "before", "before_low", "before_high"))
        points.append(with_interval("after", row, "after", "after_low", "after_high"))
    draw_points(axes, points)

    for place in range(2, len(points), 2):
        axes.axhline(place - 0.5, color="0.85", linewidth=0.8)
    axes.set(title="solved on held-out questions", xlabel="solved, % (95 %)", xlim=(-2, 108))
    return figure


BENCHMARK = "benchmark.json"
HOSTS = (("embedded", "embedded LLM, batch 32"), ("qwen2-0.5b", "Qwen2-0.5B's shape, batch 4"))


@page("speed", BENCHMARK)
def draw_speed(tables: Tables) -> Any:
    """Examples per CPU second of training, by adapter."""
    figure, panels = new_figure(len(HOSTS), width=4.8, height=2.9)

    for column, (host, title) in enumerate(HOSTS):
        # The interval is the smallest and the largest of five repeats.
        points = []
        for name, arm in tables[BENCHMARK]["hosts"][host]["arms"].items():
            speed = arm["examples_per_second"]
            points.append(Point(name, speed["median"], speed["low"], speed["high"]))

        draw_points(panels[column], points)
        panels[column].set(title=title, xlabel="examples per CPU second (smallest to largest of 5)")
        panels[column].set_xlim(0, 1.2 * max(point.high for point in points))

    return figure


page("which_tasks", WHICH)(lambda tables: gains_figure(tables[WHICH]))


# --- the command ------------------------------------------------------------------------------------------------------


def draw(name: str, folder: Path) -> Path:
    """Draws one figure of `FIGURES` into `folder` and returns its path. Raises OSError, ValueError."""
    function, files = FIGURES[name]
    path = folder / f"{name}.png"
    save_figure(function({file: read(file) for file in files}), [path])
    return path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line: which figures, and where to."""
    parser = ScriptParser(__doc__)
    parser.add_argument("figures", nargs="*", help=f"some of {', '.join(FIGURES)} (default: all)")
    parser.add_argument("--output", type=Path, default=PAGES, help="folder (default: docs/experiments)")
    args = parser.parse_args(argv)

    unknown = sorted(set(args.figures) - set(FIGURES))
    if unknown:
        parser.error(f"there is no figure {unknown[0]!r}: choose from {', '.join(FIGURES)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Draws the chosen figures and prints their paths."""
    args = parse(argv)
    for name in args.figures or FIGURES:
        print(draw(name, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
