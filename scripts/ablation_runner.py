"""The processes of an ablation: several `train.py` at a time, their progress, and an orderly end on Ctrl-C."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ablation_grid import GridError, Job, arguments  # noqa: E402
from engine.progress import clock_text  # noqa: E402

POLL_S = 0.2
LINE_S = 60.0  # between lines of progress where there is no terminal
TAIL = 4096  # bytes in which the last whole line of metrics.jsonl stands
LONGEST_WORDS = 300  # characters of a child's last line that are shown
LEAST_GONE = 0.02  # runs that must be done before the time left is worth telling


# --- processes --------------------------------------------------------------------------------------------------------


@dataclass
class Child:
    """One `train.py` at work."""

    job: Job
    folder: Path
    process: subprocess.Popen
    log: Path
    cpu_s: float = 0.0  # CPU seconds of its process so far

    def note_cpu(self) -> None:
        """Reads `cpu_s`; once the process has been waited for there is nothing to read any more."""
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(self.process.pid).cpu_times()
            self.cpu_s = times.user + times.system

    def share(self) -> float:
        """How much of its batches is done, 0 to 1."""
        path = self.folder / "metrics.jsonl"
        if not self.job.steps or not path.exists():
            return 0.0

        with open(path, "rb") as file:
            file.seek(max(path.stat().st_size - TAIL, 0))
            lines = file.read().split(b"\n")

        # The line before the last newline: what follows it may be half written.
        with contextlib.suppress(ValueError, IndexError, KeyError):
            return min(json.loads(lines[-2])["step"] / self.job.steps, 1.0)
        return 0.0


@dataclass
class Stop:
    """Set by the first signal; the second one ends the children at once."""

    asked: bool = False
    children: list[Child] = field(default_factory=list)

    def __call__(self, number: int, frame: Any) -> None:
        # Children have sessions of their own, so the terminal's signal does not reach them.
        for child in self.children:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGKILL if self.asked else signal.SIGTERM)
        if not self.asked:
            print(
                f"\n{Path(sys.argv[0]).name}: {len(self.children)} runs end after their batch and are saved; once more "
                "to kill them",
                file=sys.stderr,
                flush=True,
            )
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

    Args:
        output: the folder, made where it is missing.
        jobs: children at a time.
        threads: CPU threads of each.
        stop: tells whether the user wants an end, and holds the children at work.

    Raises:
        GridError: another runner, or a run it left behind, is at work in the folder.
    """

    def __init__(self, output: Path, jobs: int, threads: int, stop: Stop):
        self.output = output
        self.jobs = jobs
        self.threads = threads
        self.stop = stop
        output.mkdir(parents=True, exist_ok=True)
        (output / "logs").mkdir(exist_ok=True)

        # Two runners in one folder would start the same runs.
        self._lock = open(output / ".lock", "w", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise GridError(
                f"another ablation, or a run it left, is at work in {output}: wait for it or take another --output"
            ) from error

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    def start(self, job: Job, runs: Path, log: str) -> Child:
        """Starts a run in a folder of `runs`; what it prints goes to `log`. Ctrl-C does not reach it by itself."""
        command = [
            *(sys.executable, str(ROOT / "train.py")),
            *(f"--save_dir={runs}", f"--run_name={job.name}", f"--num_threads={self.threads}"),
            *arguments(job.flags),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        environment.setdefault("PYTHONHASHSEED", "0")  # a few tasks draw their items by it

        # A run that goes on adds to its log.
        path = self.output / "logs" / f"{log}.log"
        with open(path, "a", encoding="utf-8") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(self._lock.fileno(),),
            )
        return Child(job, runs / job.name, process, path)

    def work(self, todo: Sequence[Job], runs: Path, prefix: str, board: Board) -> Iterator[Child]:
        """Runs the jobs and yields each child as it ends; after a stop, only those that were at work."""
        # The list is the stop's: it signals whoever is at work.
        waiting = list(todo)
        at_work = self.stop.children
        while at_work or (waiting and not self.stop.asked):
            while waiting and len(at_work) < self.jobs and not self.stop.asked:
                at_work.append(self.start(waiting[0], runs, f"{prefix}{waiting[0].name}"))
                waiting.pop(0)

            time.sleep(POLL_S)
            for child in list(at_work):
                child.note_cpu()  # before poll, which takes an ended process away
                if child.process.poll() is None:
                    continue
                at_work.remove(child)
                board.ended(child)
                yield child
            board.show(at_work)


def last_words(log: Path) -> str:
    """The last line a child wrote that says something."""
    for line in reversed(log.read_text(encoding="utf-8", errors="replace").splitlines()):
        if line.strip():
            return line.strip()[:LONGEST_WORDS]
    return "it wrote nothing"


# --- progress ---------------------------------------------------------------------------------------------------------


class Board:
    """Live bars on a terminal, a line now and then elsewhere: the runs at work, how many are done, the time left.

    Args:
        jobs: all runs.
        done: how many of them were done before.
        minutes: training time of each; None where nobody fixed it.
        at_once: runs at a time.
    """

    def __init__(self, jobs: Sequence[Job], done: int, minutes: float | None, at_once: int):
        self.total = len(jobs)
        self.done = done
        self.minutes = minutes
        self.at_once = at_once
        self._done_before = done
        self._began = time.monotonic()
        self._shown = self._began
        self._bars: dict[str, Any] = {}
        self._live: Any = None

    def __enter__(self) -> Board:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
            self._live = Progress(*columns, console=Console(stderr=True))
            self._all = self._live.add_task("", total=max(self.total, 1))
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def left(self, shares: Sequence[float]) -> float | None:
        """Seconds left: from the budget where there is one, else from what the work so far took; None: unknown.

        `shares`: how much of each run at work is done, 0 to 1.
        """
        remaining = self.total - self.done - sum(shares)
        if self.minutes:
            return 60 * self.minutes * remaining / self.at_once

        # Runs that were done before say nothing of this call's speed.
        gone = self.done - self._done_before + sum(shares)
        if gone <= LEAST_GONE:
            return None

        return (time.monotonic() - self._began) * remaining / gone

    def line(self, shares: Sequence[float]) -> str:
        """How far all of it is."""
        line = f"{self.done} of {self.total} runs done, {clock_text(time.monotonic() - self._began)} elapsed"
        left = self.left(shares)
        if left is not None:
            line += f", about {clock_text(left)} of training left"
        return line

    def show(self, at_work: Sequence[Child]) -> None:
        """Shows how far the runs are; without a terminal, once in `LINE_S` seconds."""
        if not self._live and time.monotonic() - self._shown < LINE_S:
            return
        shares = [child.share() for child in at_work]
        if self._live:
            self._show_bars(at_work, shares)
            return

        self._shown = time.monotonic()
        running = [f"{child.job.name} {100 * share:.0f} %" for child, share in zip(at_work, shares, strict=True)]
        print(f"{self.line(shares)}; {', '.join(running)}", file=sys.stderr, flush=True)

    def _show_bars(self, at_work: Sequence[Child], shares: Sequence[float]) -> None:
        self._live.update(self._all, completed=self.done + sum(shares), description=self.line(shares))
        for child, share in zip(at_work, shares, strict=True):
            # A bar comes with the first look at its run.
            name = child.job.name
            if name not in self._bars:
                self._bars[name] = self._live.add_task(name, total=1.0)

            description = f"{name}  {share * child.job.steps:.0f}/{child.job.steps} steps"
            self._live.update(self._bars[name], completed=share, description=description)

    def ended(self, child: Child) -> None:
        """Takes away the bar of a run."""
        if self._live and child.job.name in self._bars:
            self._live.remove_task(self._bars.pop(child.job.name))

    def say(self, text: str) -> None:
        """A line above the bars."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)
