"""Runs a grid of arms x tasks x seeds, each a `train.py` of its own, and compares the arms with error bars.

    python scripts/ablate.py configs/ablation/injector.yaml                    # into runs/ablation/injector/
    python scripts/ablate.py configs/ablation/baselines.yaml --jobs 2 --threads 1 --minutes 3 --seeds 0,1,2
    python scripts/ablate.py configs/ablation/baselines.yaml --eval_n 1000     # finished runs, on more items
    python scripts/ablate.py configs/ablation/segments.yaml --plan             # what would run, and stop

What a grid file says stands at the top of ablation.py. Called again, finished runs are skipped and interrupted ones go
on; Ctrl-C lets every running batch end and saves. With `minutes`, each arm's speed on each task is measured first,
under the same number of jobs, and fixes its `max_steps`. `--eval_n N` evaluates finished runs once more where their
last evaluation was of another number of items; nothing is trained twice, and the tables tell the last evaluation. The
output folder holds results.csv and summary.md, rewritten after every run, results.png, and runs/, logs/. Exit status:
0 done, 1 a run failed, 2 the user's mistake, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ablation_grid as ablation  # noqa: E402
import options  # noqa: E402
from ablation_grid import Grid, GridError, Job  # noqa: E402
from engine.figures import new_figure, save_figure  # noqa: E402
from engine.files import write_text_aside  # noqa: E402
from reasoning_gym_wrapper import beyond_reserve  # noqa: E402
from script_tools import ScriptParser, run_script  # noqa: E402

POLL_S = 0.2
LINE_S = 60.0  # between lines of progress where there is no terminal


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("grid", type=Path, help="YAML file, such as configs/ablation/injector.yaml")
    parser.add_argument("--output", type=Path, help="folder of the results (default: runs/ablation/GRID)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each run (default: cores / jobs)")
    parser.add_argument("--arms", type=lambda text: text.split(","), help="comma list of the grid's arms; "
                        "the tables then hold these alone")
    parser.add_argument("--seeds", help="comma list in place of the grid's")
    parser.add_argument("--tasks", help="comma list in place of the grid's; + joins tasks trained together")
    parser.add_argument("--minutes", type=float, help="training minutes of each run in place of the grid's")
    parser.add_argument("--eval_n", type=int, default=0, help="items of each task on which every finished run is "
                        "evaluated once more; 0 = as trained")
    parser.add_argument("--plan", action="store_true", help="show the runs and stop")
    args = parser.parse_args(argv)
    for name, low in (("jobs", 1), ("threads", 0), ("eval_n", 0)):
        if getattr(args, name) < low:
            parser.error(f"--{name} {getattr(args, name)} is not legal: expected at least {low}")
    args.threads = args.threads or max((os.cpu_count() or 1) // args.jobs, 1)
    args.output = args.output or Path("runs") / "ablation" / args.grid.stem
    return args


def changes(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the grid that the command line replaces. Raises GridError."""
    found: dict[str, Any] = {}
    if args.seeds is not None:
        try:
            found["seeds"] = [int(seed) for seed in args.seeds.split(",")]
        except ValueError:
            raise GridError(f"--seeds {args.seeds!r} is not legal: expected whole numbers with commas") from None
    if args.tasks is not None:
        found["tasks"] = args.tasks.split(",")
    return found | ({"minutes": args.minutes} if args.minutes is not None else {})


# --- processes --------------------------------------------------------------------------------------------------------


@dataclass
class Child:
    """One `train.py` at work."""

    job: Job
    folder: Path
    process: subprocess.Popen
    log: Path

    def share(self) -> float:
        """How much of its batches is done, 0 to 1."""
        path = self.folder / "metrics.jsonl"
        if not self.job.steps or not path.exists():
            return 0.0
        with open(path, "rb") as file:
            file.seek(max(path.stat().st_size - 4096, 0))
            lines = file.read().split(b"\n")
        with contextlib.suppress(ValueError, IndexError, KeyError):
            return min(json.loads(lines[-2])["step"] / self.job.steps, 1.0)  # the last line may be half written
        return 0.0


@dataclass
class Stop:
    """Set by the first signal; the second one ends the children at once."""

    asked: bool = False
    children: list[Child] = field(default_factory=list)

    def __call__(self, number: int, frame: Any) -> None:
        for child in self.children:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGKILL if self.asked else signal.SIGTERM)
        if not self.asked:
            print(f"\n{Path(sys.argv[0]).name}: {len(self.children)} runs end after their batch and are saved; once "
                  "more to kill them", file=sys.stderr, flush=True)
        self.asked = True


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Inside, Ctrl-C and SIGTERM ask the children for an orderly end."""
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Runner:
    """Keeps `jobs` children at work in one output folder, which it locks; children hold the lock as well.

    Raises:
        GridError: another runner, or a run it left behind, is at work in the folder.
    """

    def __init__(self, output: Path, jobs: int, threads: int, stop: Stop):
        self.output, self.jobs, self.threads, self.stop = output, jobs, threads, stop
        output.mkdir(parents=True, exist_ok=True)
        (output / "logs").mkdir(exist_ok=True)
        self._lock = open(output / ".lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise GridError(f"another ablation, or a run it left, is at work in {output}: wait for it or take another "
                            "--output") from error

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    def start(self, job: Job, runs: Path, log: str) -> Child:
        command = [sys.executable, str(ROOT / "train.py"), f"--save_dir={runs}", f"--run_name={job.name}",
                   f"--num_threads={self.threads}", *ablation.arguments(job.flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        environment.setdefault("PYTHONHASHSEED", "0")  # a few tasks draw their items by it
        path = self.output / "logs" / f"{log}.log"
        with open(path, "a") as file:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                                       stderr=subprocess.STDOUT, start_new_session=True,
                                       pass_fds=(self._lock.fileno(),))
        return Child(job, runs / job.name, process, path)

    def work(self, todo: Sequence[Job], runs: Path, prefix: str, board: Board) -> Iterator[Child]:
        """Runs the jobs and yields each child as it ends; after a stop, only those that were at work."""
        waiting, at_work = list(todo), self.stop.children
        while at_work or (waiting and not self.stop.asked):
            while waiting and len(at_work) < self.jobs and not self.stop.asked:
                at_work.append(self.start(waiting[0], runs, f"{prefix}{waiting[0].name}"))
                waiting.pop(0)
            time.sleep(POLL_S)
            for child in [child for child in at_work if child.process.poll() is not None]:
                at_work.remove(child)
                board.ended(child)
                yield child
            board.show(at_work)


def last_words(log: Path) -> str:
    """The last line a child wrote that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it wrote nothing"


# --- progress ---------------------------------------------------------------------------------------------------------


class Board:
    """Live bars on a terminal, a line now and then elsewhere: the runs at work, how many are done, the time left."""

    def __init__(self, jobs: Sequence[Job], done: int, minutes: float | None, at_once: int):
        self.total, self.done, self.begun_done = len(jobs), done, done
        self.minutes, self.at_once = minutes, at_once
        self._begun = self._shown = time.monotonic()
        self._bars: dict[str, Any] = {}
        self._live: Any = None

    def __enter__(self) -> Board:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._live = Progress(BarColumn(bar_width=24), TextColumn("{task.description}", markup=False),
                                  console=Console(stderr=True))
            self._all = self._live.add_task("", total=max(self.total, 1))
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def left(self, shares: Sequence[float]) -> float | None:
        """Seconds left: from the budget where there is one, else from what the work so far took; None: unknown."""
        remaining = self.total - self.done - sum(shares)
        if self.minutes:
            return 60 * self.minutes * remaining / self.at_once
        gone = self.done - self.begun_done + sum(shares)
        return (time.monotonic() - self._begun) * remaining / gone if gone > 0.02 else None

    def line(self, shares: Sequence[float]) -> str:
        left = self.left(shares)
        told = "" if left is None else f", about {clock(left)} of training left"
        return f"{self.done} of {self.total} runs done, {clock(time.monotonic() - self._begun)} elapsed{told}"

    def show(self, at_work: Sequence[Child]) -> None:
        if not self._live and time.monotonic() - self._shown < LINE_S:
            return
        shares = [child.share() for child in at_work]
        if self._live:
            self._live.update(self._all, completed=self.done + sum(shares), description=self.line(shares))
            for child, share in zip(at_work, shares, strict=True):
                name = child.job.name
                if name not in self._bars:
                    self._bars[name] = self._live.add_task(name, total=1.0)
                self._live.update(self._bars[name], completed=share,
                                  description=f"{name}  {share * child.job.steps:.0f}/{child.job.steps} steps")
        else:
            self._shown = time.monotonic()
            running = ", ".join(f"{c.job.name} {100 * s:.0f} %" for c, s in zip(at_work, shares, strict=True))
            print(f"{self.line(shares)}; {running}", file=sys.stderr, flush=True)

    def ended(self, child: Child) -> None:
        if self._live and child.job.name in self._bars:
            self._live.remove_task(self._bars.pop(child.job.name))

    def say(self, text: str) -> None:
        if self._live:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


# --- the two passes ---------------------------------------------------------------------------------------------------


def calibrated(grid: Grid, jobs: Sequence[Job], runner: Runner) -> list[Job]:
    """The jobs with the `max_steps` that fill the grid's minutes; measured speeds are kept in calibration.json.

    Raises:
        GridError: a calibration failed; its last words.
    """
    path = runner.output / "calibration.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    short = {}
    for job in jobs:
        trial = ablation.calibration_job(job, grid.calibration_steps)
        short.setdefault((job.arm, job.task), (speed_key(trial, runner), trial))
    todo = [trial for key, trial in short.values() if key not in known]
    folder = runner.output / "calibration"
    for trial in todo:
        shutil.rmtree(folder / trial.name, ignore_errors=True)  # an interrupted one is no measurement
    with Board(todo, 0, None, runner.jobs) as board:
        for child in runner.work(todo, folder, "calibration-", board):
            board.done += 1
            if runner.stop.asked:
                continue
            if child.process.returncode:
                raise GridError(f"arm {child.job.arm} cannot be calibrated: {last_words(child.log)} (see {child.log})")
            seconds = ablation.seconds_per_step(child.folder)
            known[speed_key(child.job, runner)] = seconds
            write_text_aside(path, json.dumps(known, indent=1), "--output")
            shutil.rmtree(child.folder)
            told = "nothing to train" if seconds is None else f"{seconds:.3f} s a step"
            board.say(f"{child.job.arm} on {child.job.task}: {told}")
    if runner.stop.asked:
        raise KeyboardInterrupt
    return [ablation.with_steps(job, grid.minutes, known[short[job.arm, job.task][0]]) for job in jobs]


def speed_key(trial: Job, runner: Runner) -> str:
    """What a measured speed depends on; the seed is not among it."""
    flags = {name: value for name, value in sorted(trial.flags.items()) if name != "seed"}
    return json.dumps([trial.arm, trial.task, runner.jobs, runner.threads, flags])


def finished(jobs: Sequence[Job], runs: Path) -> set[str]:
    """Names of the runs that are done. Raises GridError, for all at once, where a run has begun with other flags."""
    done, other = set(), []
    for job in jobs:
        record = ablation.read_record(runs / job.name)
        if record is None or not (runs / job.name / "eval.csv").exists():  # nothing of it is there yet
            continue
        if record["flags"] != json.loads(json.dumps(job.flags)):
            before = record["flags"]
            named = ", ".join(f"{name} {before.get(name)} (now {job.flags.get(name)})"
                              for name in sorted({*before, *job.flags}) if before.get(name) != job.flags.get(name))
            other.append(f"{runs / job.name} was made with other flags: {named}; delete it or take another --output")
        elif record["status"] == "finished":
            done.add(job.name)
    if other:
        raise GridError("\n".join(other))
    return done


def write_results(grid: Grid, jobs: Sequence[Job], runs: Path) -> list[ablation.ArmResult]:
    """results.csv and summary.md of what is there now."""
    rows, left = [], 0
    for job in jobs:
        record = ablation.read_record(runs / job.name)
        status = record["status"] if record else "waiting"
        left += status != "finished"
        rows += ablation.run_rows(job, runs / job.name, status)
    results = ablation.summarise(rows, runs, grid.baseline)
    for name, text in (("results.csv", ablation.csv_text(rows)),
                       ("summary.md", ablation.markdown(results, grid, left))):
        write_text_aside(runs.parent / name, text, "--output")
    return results


def draw(results: Sequence[ablation.ArmResult], path: Path) -> None:
    """A panel per table: each arm's mean with its interval, its seeds as open circles, the bare LLM as a line."""
    tables = list(dict.fromkeys((result.train_tasks, result.task) for result in results))
    if not tables:
        return
    arms = list(dict.fromkeys(result.arm for result in results))
    figure, panels = new_figure(len(tables), width=4.5, height=1.2 + 0.35 * len(arms))
    for axes, (trained, task) in zip(panels, tables, strict=True):
        for result in results:
            if (result.train_tasks, result.task) != (trained, task):
                continue
            row, solved = arms.index(result.arm), result.solved
            axes.plot([100 * solved.low, 100 * solved.high], [row, row], color="0.3", linewidth=1.5, marker="|")
            axes.plot([100 * rate for rate in result.rates.values()], [row] * len(result.rates), "o", color="0.5",
                      markerfacecolor="white", markersize=4)
            axes.plot(100 * solved.value, row, "D", color="0", markersize=5)
            if result.bare is not None:
                axes.axvline(100 * result.bare, color="0.6", linestyle=":", linewidth=1)
        axes.set(title=task if trained == task else f"{task} (trained on {trained})", xlabel="solved, % (95 %)",
                 yticks=range(len(arms)), yticklabels=arms, ylim=(len(arms) - 0.5, -0.5), xlim=(-2, 102))
        axes.grid(alpha=0.3)
    save_figure(figure, [path])


def train_all(grid: Grid, jobs: Sequence[Job], runner: Runner) -> int:
    """Every run that is not finished. Returns how many failed."""
    runs = runner.output / "runs"
    done, failed = finished(jobs, runs), 0
    todo = [job for job in jobs if job.name not in done]
    with Board(jobs, len(done), grid.minutes, runner.jobs) as board:
        if done:
            board.say(f"{len(done)} runs are finished already")
        for job in todo:
            ablation.write_record(runs / job.name, job.flags, "waiting")
        for child in runner.work(todo, runs, "", board):
            status = child.process.returncode
            if status == 0:
                ablation.write_record(child.folder, child.job.flags, "finished")
                board.done += 1
                board.say(f"{child.job.name} finished")
            elif runner.stop.asked:
                ablation.write_record(child.folder, child.job.flags, "interrupted")
            else:
                failed += 1
                ablation.write_record(child.folder, child.job.flags, "failed")
                board.say(f"{child.job.name} failed with exit status {status}: {last_words(child.log)} (see "
                          f"{child.log})")
            write_results(grid, jobs, runs)
    return failed


def evaluate_again(grid: Grid, jobs: Sequence[Job], runner: Runner, n: int) -> int:
    """Finished runs whose last evaluation was not of `n` items a task. Returns how many failed."""
    runs, failed, todo = runner.output / "runs", 0, []
    made = {job.name: job for job in jobs}
    for job in jobs:
        record = ablation.read_record(runs / job.name)
        before = int(job.flags.get("eval_n", options.FIND["eval_n"].default))
        if record is not None and record["status"] == "finished" and record.get("eval_n", before) != n:
            todo.append(dataclasses.replace(job, flags={"eval_only": True, "eval_n": n}))
            if before < n and job.flags.get("adapter") != "none":
                split = bool(job.flags.get("group_split", options.FIND["group_split"].default))
                for line in beyond_reserve(job.task.split("+"), before, split):
                    print(f"{job.name}: {line}", file=sys.stderr)
    with Board(todo, 0, None, runner.jobs) as board:
        for child in runner.work(todo, runs, "", board):
            status, name = child.process.returncode, child.job.name
            if status == 0:
                ablation.write_record(child.folder, made[name].flags, "finished", eval_n=n)
                board.done += 1
                board.say(f"{name} evaluated on {n} items a task")
            elif not runner.stop.asked:
                failed += 1
                board.say(f"{name} was not evaluated again, exit status {status}: {last_words(child.log)} (see "
                          f"{child.log})")
            write_results(grid, jobs, runs)
    return failed


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    grid = ablation.read_grid(args.grid, changes(args), args.arms)
    jobs = ablation.jobs_of(grid)
    length = f"{grid.minutes:g} minutes each, speeds measured first" if grid.minutes else "steps as their flags say"
    print(f"{len(jobs)} runs: {len(grid.arms)} arms x {len(grid.tasks)} tasks x {len(grid.seeds)} seeds, {length}; "
          f"{args.jobs} at a time with {args.threads} threads each; results in {args.output}", file=sys.stderr)
    if args.plan:
        print("\n".join(" ".join(["train.py", *ablation.arguments(job.flags)]) for job in jobs))
        return 0
    output = args.output.resolve()
    with stoppable() as stop, Runner(output, args.jobs, args.threads, stop) as runner:
        if grid.minutes:
            made = {job.name: done for job in jobs
                    if args.eval_n and (done := ablation.finished_job(job, output / "runs"))}
            sized = calibrated(grid, [job for job in jobs if job.name not in made], runner)
            made |= {job.name: job for job in sized}
            jobs = [made[job.name] for job in jobs]
        failed = train_all(grid, jobs, runner)
        if args.eval_n and not stop.asked:
            failed += evaluate_again(grid, jobs, runner, args.eval_n)
        results = write_results(grid, jobs, output / "runs")
        draw(results, output / "results.png")
    print((output / "summary.md").read_text())
    return 130 if stop.asked else 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
