"""Which tasks need depth: trains a single pass and a recurrence on each, at equal examples, and tells where depth pays.

    python scripts/which_tasks_need_depth.py --seeds 0       # configs/depth/real_tasks.yaml, to screen
    python scripts/which_tasks_need_depth.py --tasks color_cube_rotation --seeds 0,1,2 --steps 2000
    python scripts/which_tasks_need_depth.py --tasks countdown --task_config easy.yaml --task_config hard.yaml
    python scripts/which_tasks_need_depth.py --data rows.jsonl --set verifier=number     # own data
    python scripts/which_tasks_need_depth.py my_grid.yaml --plan                # what would run, and stop

The grid is one of scripts/ablate.py. Its baseline is the single pass, an arm with 1 segment shows what the same block
does once, and every arm with more segments is compared with the baseline. Batches, batch size and items must be alike
in all arms, so that examples are equal; parameters and CPU minutes are told beside the gain. `difficulties` of the grid
gives a task several settings; `--task_config`, as often as wanted, does so for `--tasks`. `--plugin` brings tasks and
`--data` rows of your own, and `--set` changes any flag of train.py in all arms.

Before training, each task is looked at: where the longest prompt has more than --longest tokens, answers more than 100,
or one constant answer solves half of the items, it is left out, and the table says why. Solved counts generated answers
that the task's verifier scores 1.0. Called again, finished runs are skipped and interrupted ones go on.

The output folder holds which.csv and which.md (the table, tasks where depth pays at the top, a verdict for each) beside
results.csv, summary.md, runs/ and logs/ as scripts/ablate.py writes them. Exit status: 0 done, 1 a run failed, 2 the
user's mistake, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import options  # noqa: E402
from ablate import (  # noqa: E402
    add_typed_flags,
    changes,
    check_typed_flags,
    print_plan,
    train_all,
    typed_flags,
    write_results,
)
from ablation_grid import DATA, Grid, GridError, Job, arguments, jobs_of, read_grid  # noqa: E402
from ablation_runner import Runner, stoppable  # noqa: E402
from depth_settings import LONGEST, Setting, settings_of  # noqa: E402
from depth_verdicts import COLUMNS, comparisons, markdown, rows_of, segments_of  # noqa: E402
from engine.files import write_text_aside  # noqa: E402
from reasoning_gym_wrapper import read_task_config  # noqa: E402
from script_tools import ScriptParser, csv_text, run_script  # noqa: E402

GRID = ROOT / "configs" / "depth" / "real_tasks.yaml"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with status 2 and one line for a mistake."""
    parser = ScriptParser(__doc__)
    parser.add_argument("grid", type=Path, nargs="?", default=GRID, help="YAML file (default: the real tasks')")
    parser.add_argument("--output", type=Path, help="folder of the results (default: runs/which_tasks/GRID)")
    parser.add_argument("--tasks", help="comma list in place of the grid's")
    parser.add_argument("--task_config", action="append", default=[], help="settings of --tasks, as train.py takes "
                        "them, in place of the grid's difficulties; several times for several difficulties")
    parser.add_argument("--data", help="own data in place of the grid's tasks, as train.py takes them")
    add_typed_flags(parser)
    parser.add_argument("--arms", type=lambda text: text.split(","), help="comma list of the grid's arms")
    parser.add_argument("--seeds", help="comma list in place of the grid's")
    parser.add_argument("--steps", type=int, help="batches of each run in place of the grid's max_steps")
    parser.add_argument("--segments", type=int, help="segments of the arms that have more than one")
    parser.add_argument("--longest", type=int, default=LONGEST, help="most tokens of a prompt; else a task is left out")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each run (default: cores / jobs)")
    parser.add_argument("--plan", action="store_true", help="show the tasks and the runs and stop")
    args = parser.parse_args(argv)

    # Numbers that argparse cannot bound.
    for name, low in (("jobs", 1), ("threads", 0), ("steps", 1), ("segments", 2), ("longest", 1)):
        value = getattr(args, name)
        if value is not None and value < low:
            parser.error(f"--{name} {value} is not legal: expected at least {low}")
    if args.task_config and not args.tasks:
        parser.error("--task_config needs --tasks: name the tasks whose settings these are")
    if args.data and args.tasks:
        parser.error("--data and --tasks: one of them says what is trained on, leave the other out")
    check_typed_flags(parser, args)
    args.threads = args.threads or max((os.cpu_count() or 1) // args.jobs, 1)
    args.output = args.output or Path("runs") / "which_tasks" / args.grid.stem
    args.minutes = None  # of ablate's command line: examples are equal here, not minutes
    return args


# --- the grid ---------------------------------------------------------------------------------------------------------


def grid_of(args: argparse.Namespace) -> Grid:
    """The grid that the command line asks for. Raises GridError, TaskError (a ValueError as well)."""
    # A plugin's tasks may be named from here on.
    flags = _flags(args)

    # What stands in place of the grid's own tasks.
    fields = changes(args)
    if args.data:
        fields["tasks"] = [DATA]
    if args.task_config:
        fields["difficulties"] = _difficulties(args.tasks.split(","), args.task_config)

    grid = read_grid(args.grid, fields, args.arms, flags)

    if args.steps:
        grid = dataclasses.replace(grid, common=grid.common | _steps(args.steps, grid.common))

    if args.segments:
        arms = {arm: flags | _deeper(flags, args.segments) for arm, flags in grid.arms.items()}
        grid = dataclasses.replace(grid, arms=arms)

    # What only the whole of it can tell.
    segments_of(grid)
    _check_flags(grid)
    return grid


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    """Flags of every arm that the command line gives. Files become whole paths: runs start in another folder."""
    flags = typed_flags(args)
    if args.data:
        path, colon, split = args.data.partition(":")
        flags["data"] = str(Path(path).resolve()) + colon + split if Path(path).exists() else args.data
    return flags


def _difficulties(tasks: Sequence[str], texts: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Each task's settings, named after the files they stand in; those typed are numbered."""
    found: dict[str, dict[str, dict[str, Any]]] = {task: {} for task in tasks}
    for place, text in enumerate(texts, 1):
        name = str(place)
        if text in ("small", "default") or Path(text).is_file():
            name = Path(text).stem

        for task, config in read_task_config(text, list(tasks)).items():
            if name in found[task]:
                raise GridError(f"--task_config {text}: two settings are named {name}: give the file another name")
            found[task][name] = config
    return found


def _steps(steps: int, common: Mapping[str, Any]) -> dict[str, Any]:
    """So many batches; the warm-up must not be all there is."""
    warmup = int(common.get("warmup_steps", options.FIND["warmup_steps"].default))
    return {"max_steps": steps, "warmup_steps": min(warmup, max(steps // 2, 1))}


def _deeper(flags: Mapping[str, Any], segments: int) -> dict[str, Any]:
    """The flags of an arm with several segments that become so many; a gradient through all of them stays one."""
    before = int(flags.get("segments", 1))
    if before < 2:
        return {}

    changed: dict[str, Any] = {"segments": segments}
    if flags.get("grad_horizon") == f"segments:{before}":
        changed["grad_horizon"] = f"segments:{segments}"
    return changed


def _check_flags(grid: Grid) -> None:
    """Raises GridError for what train.py would refuse of the flags that the command line changed."""
    problems = {line: None for job in jobs_of(grid) for line in options.collect(arguments(job.flags))[1]}
    if problems:
        raise GridError("\n".join(problems))


# --- the command ------------------------------------------------------------------------------------------------------


def look(jobs: Sequence[Job], longest: int) -> tuple[dict[str, Setting], dict[str, str]]:
    """What is trained on -> how it is, and why depth is not measured there; tells both."""
    print("looking at the tasks", file=sys.stderr)
    settings = settings_of(jobs)
    refused = {}
    for trained, setting in settings.items():
        reason = setting.refusal(longest)
        if reason:
            refused[trained] = reason

        steps = ""
        if setting.steps:
            steps = f", {setting.steps[0]} to {setting.steps[1]} steps"

        print(
            f"{trained}: prompts of at most {setting.prompt_tokens} tokens, answers of {setting.answer_tokens}, chance "
            f"{100 * setting.chance:.0f} %{steps}{f'; left out: {reason}' if reason else ''}",
            file=sys.stderr,
        )
    return settings, refused


def main(argv: list[str] | None = None) -> int:
    """The exit status. Raises ValueError (GridError among it) and OSError for the user's mistakes."""
    args = parse(argv)
    grid = grid_of(args)
    settings, refused = look(jobs_of(grid), args.longest)
    jobs = [job for job in jobs_of(grid) if job.trained not in refused]
    print(
        f"{len(jobs)} runs: {len(grid.arms)} arms, {len(settings) - len(refused)} tasks and difficulties, "
        f"{len(grid.seeds)} seeds; {args.jobs} at a time with {args.threads} threads each; results in {args.output}",
        file=sys.stderr,
    )
    if args.plan:
        print_plan(jobs)
        return 0

    # Children start in another folder, so the path must be whole.
    output = args.output.resolve()
    with stoppable() as stop, Runner(output, args.jobs, args.threads, stop) as runner:
        failed = train_all(grid, jobs, runner)
        results = write_results(grid, jobs, output / "runs")

    # Tables of what there is now, after an interruption as well.
    rows = rows_of(comparisons(results, grid, settings, refused))
    write_text_aside(output / "which.csv", csv_text(COLUMNS, rows), "--output")
    table = markdown(rows)
    write_text_aside(output / "which.md", table, "--output")
    print(table)
    if stop.asked:
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
