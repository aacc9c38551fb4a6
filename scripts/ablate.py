"""Runs a grid of arms x tasks x seeds, each a `train.py` of its own, and compares the arms with error bars.

    python scripts/ablate.py configs/ablation/injector.yaml                    # into runs/ablation/injector/
    python scripts/ablate.py configs/ablation/baselines.yaml --jobs 2 --threads 1 --minutes 3 --seeds 0,1,2
    python scripts/ablate.py configs/ablation/baselines.yaml --eval_n 1000     # finished runs, on more items
    python scripts/ablate.py configs/ablation/segments.yaml --plan             # what would run, and stop
    python scripts/ablate.py my_grid.yaml --plugin my_tasks.py --set lr=1e-3   # tasks of your own; a flag of every arm

What a grid file says stands at the top of ablation_grid.py. Called again, finished runs are skipped and interrupted
ones go on; Ctrl-C lets every running batch end and saves. With `minutes`, each arm's speed on each task is measured
first, under the same number of jobs, and fixes its `max_steps`. `--eval_n N` evaluates finished runs once more where
their last evaluation was of another number of items; nothing is trained twice, and the tables tell the last
evaluation. CPU minutes of a run are those of all its processes, start and evaluation included; minutes are training
alone. The output folder holds results.csv and summary.md, rewritten after every run, results.png, and runs/,
logs/. Exit status: 0 done, 1 a run failed, 2 the user's mistake, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import options  # noqa: E402
from ablation_grid import (  # noqa: E402
    Grid,
    GridError,
    Job,
    arguments,
    jobs_of,
    read_grid,
    typed_alone,
)
from ablation_minutes import calibration_job, with_steps  # noqa: E402
from ablation_results import (  # noqa: E402
    COLUMNS,
    ArmResult,
    as_recorded,
    finished_job,
    markdown,
    read_record,
    run_rows,
    seconds_per_step,
    summarise,
    title_of,
    write_record,
)
from ablation_runner import Board, Child, Runner, last_words, stoppable  # noqa: E402
from engine.figures import new_figure, save_figure  # noqa: E402
from engine.files import read_json, write_text_aside  # noqa: E402
from own_tasks.trusted import functions_of, type_in  # noqa: E402
from script_tools import ScriptParser, csv_text, run_script  # noqa: E402
from tasks.plugins import load_plugin  # noqa: E402


def _names(text: str) -> list[str]:
    return text.split(",")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with status 2 and one line for a mistake."""
    parser = ScriptParser(__doc__)
    parser.add_argument("grid", type=Path, help="YAML file, such as configs/ablation/injector.yaml")
    parser.add_argument("--output", type=Path, help="folder of the results (default: runs/ablation/GRID)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each run (default: cores / jobs)")
    parser.add_argument("--arms", type=_names, help="comma list of the grid's arms; the tables then hold these alone")
    parser.add_argument("--seeds", help="comma list in place of the grid's")
    parser.add_argument("--tasks", help="comma list in place of the grid's; + joins tasks trained together")
    parser.add_argument("--minutes", type=float, help="training minutes of each run in place of the grid's")
    add_typed_flags(parser)
    parser.add_argument("--eval_n", type=int, default=0, help="items of each task on which every finished run is "
                        "evaluated once more; 0 = as trained")
    parser.add_argument("--plan", action="store_true", help="show the runs and stop")
    args = parser.parse_args(argv)

    # Numbers that argparse cannot bound.
    for name, low in (("jobs", 1), ("threads", 0), ("eval_n", 0)):
        if getattr(args, name) < low:
            parser.error(f"--{name} {getattr(args, name)} is not legal: expected at least {low}")
    check_typed_flags(parser, args)
    args.threads = args.threads or max((os.cpu_count() or 1) // args.jobs, 1)
    args.output = args.output or Path("runs") / "ablation" / args.grid.stem
    return args


def add_typed_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what gives flags of train.py to every arm; what runs foreign code, no grid file can."""
    parser.add_argument("--plugin", help="a Python file with tasks of your own; no grid file can name one")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a flag of train.py, for "
                        "every arm; several times for several flags")


def check_typed_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the process with one line where a --set has no value."""
    for text in args.set:
        if "=" not in text:
            parser.error(f"--set {text} is not legal: expected NAME=VALUE, such as batch_size=64")


def typed_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Flags of every arm that the command line gives; the plugin's tasks can be named from now on. Raises ValueError.

    The plugin's path becomes whole: runs start in another folder.
    """
    flags: dict[str, Any] = {}
    for text in args.set:
        name, _, value = text.partition("=")
        flags[name] = value
    type_in(functions_of(flags))

    if args.plugin:
        load_plugin(args.plugin)
        flags["plugin"] = str(Path(args.plugin).resolve())
    return flags


def changes(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the grid that the command line replaces. Raises GridError."""
    fields: dict[str, Any] = {}
    if args.seeds is not None:
        try:
            fields["seeds"] = [int(seed) for seed in args.seeds.split(",")]
        except ValueError:
            raise GridError(f"--seeds {args.seeds!r} is not legal: expected whole numbers with commas") from None

    if args.tasks is not None:
        fields["tasks"] = args.tasks.split(",")
    if args.minutes is not None:
        fields["minutes"] = args.minutes
    return fields


# --- equal minutes ----------------------------------------------------------------------------------------------------


def read_speeds(path: Path) -> dict[str, Any]:
    """Seconds of a batch by arm and task, None where a run gave none. Raises GridError: the file is damaged."""
    try:
        speeds = read_json(path) if path.exists() else {}
    except ValueError as error:
        raise GridError(f"{error}: delete it, and the speeds are measured anew") from error
    if not isinstance(speeds, dict):
        raise GridError(f"{path} holds no speeds: delete it, and they are measured anew")
    return speeds


def calibrated(grid: Grid, jobs: Sequence[Job], runner: Runner) -> list[Job]:
    """The jobs with the `max_steps` that fill the grid's minutes; measured speeds are kept in calibration.json.

    Raises:
        GridError: a calibration failed; its last words.
        KeyboardInterrupt: the user stopped it.
    """
    path = runner.output / "calibration.json"
    speeds = read_speeds(path)

    # One trial for each arm and task; seeds are of one speed.
    trials: dict[tuple[str, str], Job] = {}
    for job in jobs:
        trials.setdefault((job.arm, job.trained), calibration_job(job, grid.calibration_steps))
    todo = [trial for trial in trials.values() if speed_key(trial, runner) not in speeds]
    folder = runner.output / "calibration"
    for trial in todo:
        shutil.rmtree(folder / trial.name, ignore_errors=True)  # an interrupted one is no measurement

    # Every speed is kept as soon as it is known: an interrupted calibration goes on from there.
    with Board(todo, 0, None, runner.jobs) as board:
        for child in runner.work(todo, folder, "calibration-", board):
            board.done += 1
            if runner.stop.asked:
                continue
            if child.process.returncode:
                raise GridError(f"arm {child.job.arm} cannot be calibrated: {last_words(child.log)} (see {child.log})")

            seconds = seconds_per_step(child.folder)
            speeds[speed_key(child.job, runner)] = seconds
            write_text_aside(path, json.dumps(speeds, indent=1), "--output")
            shutil.rmtree(child.folder)
            speed = "nothing to train" if seconds is None else f"{seconds:.3f} s a step"
            board.say(f"{child.job.arm} on {child.job.trained}: {speed}")
    if runner.stop.asked:
        raise KeyboardInterrupt

    sized = []
    for job in jobs:
        seconds = speeds[speed_key(trials[job.arm, job.trained], runner)]
        sized.append(with_steps(job, grid.minutes, seconds))
    return sized


def speed_key(trial: Job, runner: Runner) -> str:
    """What a measured speed depends on; the seed is not among it."""
    flags = {name: value for name, value in sorted(trial.flags.items()) if name != "seed"}
    return json.dumps([trial.arm, trial.task, runner.jobs, runner.threads, flags])


# --- the runs ---------------------------------------------------------------------------------------------------------


def finished(jobs: Sequence[Job], runs: Path) -> set[str]:
    """Names of the runs that are done. Raises GridError, for all at once, where a run has begun with other flags."""
    done = set()
    problems = []
    for job in jobs:
        run = runs / job.name
        record = read_record(run)
        if record is None or not (run / "eval.csv").exists():  # nothing of it is there yet
            continue

        if record["flags"] != as_recorded(job.flags):
            differences = ", ".join(_differences(record["flags"], job.flags))
            problems.append(f"{run} was made with other flags: {differences}; delete it or take another --output")
        elif record["status"] == "finished":
            done.add(job.name)

    if problems:
        raise GridError("\n".join(problems))
    return done


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The flags that differ, with both values."""
    lines = []
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            lines.append(f"{name} {before.get(name)} (now {now.get(name)})")
    return lines


def train_all(grid: Grid, jobs: Sequence[Job], runner: Runner) -> int:
    """Every run that is not finished. Returns how many failed. Raises GridError as `finished`."""
    runs = runner.output / "runs"
    done = finished(jobs, runs)
    todo = [job for job in jobs if job.name not in done]
    failed = 0
    with Board(jobs, len(done), grid.minutes, runner.jobs) as board:
        if done:
            board.say(f"{len(done)} runs are finished already")
        for job in todo:
            write_record(runs / job.name, job.flags, "waiting")

        # The results are written after every run, so that they can be read while the rest is at work.
        for child in runner.work(todo, runs, "", board):
            failed += _note_end(child, runner, board)
            write_results(grid, jobs, runs)
    return failed


def _note_end(child: Child, runner: Runner, board: Board) -> bool:
    """Records how a run ended. Whether it failed."""
    status = child.process.returncode
    failed = status != 0 and not runner.stop.asked
    if status == 0:
        write_record(child.folder, child.job.flags, "finished", cpu_s=child.cpu_s)
        board.done += 1
        board.say(f"{child.job.name} finished")
    elif runner.stop.asked:
        write_record(child.folder, child.job.flags, "interrupted", cpu_s=child.cpu_s)
    else:
        write_record(child.folder, child.job.flags, "failed", cpu_s=child.cpu_s)
        board.say(f"{child.job.name} failed with exit status {status}: {last_words(child.log)} (see {child.log})")
    return failed


def evaluate_again(grid: Grid, jobs: Sequence[Job], runner: Runner, n: int) -> int:
    """Finished runs whose last evaluation was not of `n` items a task. Returns how many failed."""
    runs = runner.output / "runs"
    # A job of its own flags: train.py takes the rest from the run's checkpoint, but for what is typed in each call.
    todo = []
    for job in jobs:
        record = read_record(runs / job.name)
        before = int(_flag(job, "eval_n"))
        if record is None or record["status"] != "finished" or record.get("eval_n", before) == n:
            continue
        # Items beyond those that were kept off training: each run leaves out what it has trained on.
        todo.append(dataclasses.replace(job, flags=typed_alone(job.flags) | {"eval_only": True, "eval_n": n}))

    # The record keeps the flags of training, so that the run still counts as the grid's.
    trained = {job.name: job for job in jobs}
    failed = 0
    with Board(todo, 0, None, runner.jobs) as board:
        for child in runner.work(todo, runs, "", board):
            status = child.process.returncode
            name = child.job.name
            if status == 0:
                write_record(child.folder, trained[name].flags, "finished", eval_n=n)
                board.done += 1
                board.say(f"{name} evaluated on {n} items a task")
            elif not runner.stop.asked:
                failed += 1
                words = last_words(child.log)
                board.say(f"{name} was not evaluated again, exit status {status}: {words} (see {child.log})")
            write_results(grid, jobs, runs)
    return failed


def _flag(job: Job, name: str) -> Any:
    """A flag of the run, or train.py's default."""
    return job.flags.get(name, options.FIND[name].default)


# --- results ----------------------------------------------------------------------------------------------------------


def write_results(grid: Grid, jobs: Sequence[Job], runs: Path) -> list[ArmResult]:
    """results.csv and summary.md of what is there now, beside the folder `runs`."""
    # Runs that are not finished have a row as well, which says so.
    rows = []
    left = 0
    for job in jobs:
        record = read_record(runs / job.name)
        status = record["status"] if record else "waiting"
        if status != "finished":
            left += 1
        rows += run_rows(job, runs / job.name, status)

    results = summarise(rows, runs, grid.baseline)
    write_text_aside(runs.parent / "results.csv", csv_text(COLUMNS, rows), "--output")
    write_text_aside(runs.parent / "summary.md", markdown(results, grid, left), "--output")
    return results


def draw(results: Sequence[ArmResult], path: Path) -> None:
    """A panel per table: each arm's mean with its interval, its seeds as open circles, the bare LLM as a line."""
    tables: dict[tuple[str, str], list[ArmResult]] = {}
    for result in results:
        tables.setdefault((result.train_tasks, result.task), []).append(result)
    if not tables:
        return

    # Arms keep their rows in every panel.
    arms = list(dict.fromkeys(result.arm for result in results))
    figure, panels = new_figure(len(tables), width=4.5, height=1.2 + 0.35 * len(arms))
    for axes, ((trained, task), members) in zip(panels, tables.items(), strict=True):
        for result in members:
            _draw_arm(axes, result, arms.index(result.arm))
        axes.set(
            title=title_of(trained, task, "{} (trained on {})"),
            xlabel="solved, % (95 %)",
            yticks=range(len(arms)),
            yticklabels=arms,
            ylim=(len(arms) - 0.5, -0.5),
            xlim=(-2, 102),
        )
        axes.grid(alpha=0.3)
    save_figure(figure, [path])


def _draw_arm(axes: Any, result: ArmResult, row: int) -> None:
    """An arm in its row: interval, seeds, mean."""
    solved = result.solved
    rates = [100 * rate for rate in result.rates.values()]
    axes.plot([100 * solved.low, 100 * solved.high], [row, row], color="0.3", linewidth=1.5, marker="|")
    axes.plot(rates, [row] * len(rates), "o", color="0.5", markerfacecolor="white", markersize=4)
    axes.plot(100 * solved.value, row, "D", color="0", markersize=5)
    if result.bare is not None:
        axes.axvline(100 * result.bare, color="0.6", linestyle=":", linewidth=1)


# --- the command ------------------------------------------------------------------------------------------------------


def sized_jobs(grid: Grid, jobs: Sequence[Job], runner: Runner, again: bool) -> list[Job]:
    """The jobs with as many batches as fill the grid's minutes.

    A finished run that is only to be evaluated `again` keeps the number it had: a speed of now may be another.
    """
    sized = {}
    if again:
        for job in jobs:
            done = finished_job(job, runner.output / "runs")
            if done:
                sized[job.name] = done

    # The others, in the grid's order again.
    for job in calibrated(grid, [job for job in jobs if job.name not in sized], runner):
        sized[job.name] = job
    return [sized[job.name] for job in jobs]


def print_plan(jobs: Sequence[Job]) -> None:
    """The command of each run, one a line."""
    for job in jobs:
        print(" ".join(["train.py", *arguments(job.flags)]))


def main(argv: list[str] | None = None) -> int:
    """The exit status. Raises ValueError (GridError among it) and OSError for the user's mistakes."""
    args = parse(argv)
    grid = read_grid(args.grid, changes(args), args.arms, typed_flags(args))
    jobs = jobs_of(grid)
    length = f"{grid.minutes:g} minutes each, speeds measured first" if grid.minutes else "steps as their flags say"
    print(
        f"{len(jobs)} runs: {len(grid.arms)} arms x {len(grid.tasks)} tasks x {len(grid.seeds)} seeds, {length}; "
        f"{args.jobs} at a time with {args.threads} threads each; results in {args.output}",
        file=sys.stderr,
    )
    if args.plan:
        print_plan(jobs)
        return 0

    # Children start in another folder, so the path must be whole.
    output = args.output.resolve()
    with stoppable() as stop, Runner(output, args.jobs, args.threads, stop) as runner:
        if grid.minutes:
            jobs = sized_jobs(grid, jobs, runner, again=bool(args.eval_n))
        failed = train_all(grid, jobs, runner)
        if args.eval_n and not stop.asked:
            failed += evaluate_again(grid, jobs, runner, args.eval_n)
        results = write_results(grid, jobs, output / "runs")
        draw(results, output / "results.png")
    print((output / "summary.md").read_text())
    if stop.asked:
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
