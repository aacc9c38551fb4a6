"""Asks the scorer of every Reasoning Gym task what it accepts: constants, spoilt golds, appended text, the input.

    python scripts/audit_verifiers.py                          # all tasks, about half an hour; writes docs/tasks.md
    python scripts/audit_verifiers.py --tasks chain_sum,maze   # some of them, the other rows stay
    python scripts/audit_verifiers.py --check                  # exits with 1 where the table no longer holds

Each task runs in a process of its own, which is ended when its time is up; the rows so far are kept, and a run that was
interrupted goes on behind them. codeio runs generated programs and is left out unless it is named.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "scripts")) if path not in sys.path]

from audit_report import changes, page  # noqa: E402
from audit_task import FIRST, audit, audit_strictly, version  # noqa: E402
from engine.files import write_text_aside  # noqa: E402
from engine.progress import Progress, clock_text  # noqa: E402
from reasoning_gym_wrapper import registry, unknown_task  # noqa: E402
from script_tools import ScriptParser, run_script  # noqa: E402
from tasks.built_in import BUILT_IN  # noqa: E402

ROWS = ROOT / "docs" / "results" / "tasks" / "tasks.jsonl"
PAGE = ROOT / "docs" / "tasks.md"
FORK = multiprocessing.get_context("fork")  # Reasoning Gym is imported once
RUNS_PROGRAMS = ("codeio",)
GRACE_S = 10.0  # CPU seconds beside its own within which a task's process ends by itself
BUSY = 10  # seconds on the wall for one of CPU: other programs run as well
SOURCES = ("scripts/audit_probes.py", "scripts/audit_task.py")


def parser() -> argparse.ArgumentParser:
    parser = ScriptParser(__doc__)
    parser.add_argument("--tasks", help="tasks with commas between; default: all but codeio")
    parser.add_argument("--items", type=int, default=100, help="items of each task that are scored")
    parser.add_argument("--draws", type=int, default=2000, help="items that are drawn to count distinct questions")
    parser.add_argument("--task_timeout_s", type=float, default=60.0, help="CPU seconds that one task may take")
    parser.add_argument("--rows", type=Path, default=ROWS, help="JSON-lines file of the raw rows")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page that is written from them")
    parser.add_argument("--again", action="store_true", help="measure tasks anew whose rows are up to date")
    parser.add_argument("--check", action="store_true", help=f"compare {FIRST} items of each task with the rows")
    return parser


def chosen_tasks(text: str | None) -> list[str]:
    """The named tasks, or all but the built-in ones and those that run programs. Raises ValueError."""
    existing = registry()
    if text is None:
        return sorted(name for name in existing if name not in RUNS_PROGRAMS and name not in BUILT_IN)
    names = [name.strip() for name in text.split(",")]
    unknown = [unknown_task(name) for name in names if name not in existing]
    if unknown:
        raise ValueError("\n".join(unknown))
    return names


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Task -> its row; empty where there is no file."""
    if not path.exists():
        return {}
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["task"]: row for row in rows}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One line a task, by name, figures with six digits."""
    lines = [json.dumps(_rounded(row), ensure_ascii=False) for row in sorted(rows, key=lambda row: row["task"])]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_aside(path, "".join(line + "\n" for line in lines))


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}


def fingerprint(paths: Iterable[Path], *more: Any) -> str:
    """What a row depends on beside the task."""
    digest = hashlib.sha256(repr(more).encode())
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def measured(
    name: str, items: int, draws: int, seconds: float, before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The row of one task, from a process of its own; where it had to be ended, or died, a row that says so.

    Of a row `before` that holds, only the strict verdict is asked anew.
    """
    began = time.monotonic()
    reason = ""
    late = f"ended after {seconds + GRACE_S:g} s inside one step of its code"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        process = FORK.Process(target=work, args=(path, name, items, draws, seconds, before))
        process.start()
        process.join(BUSY * (seconds + GRACE_S))
        if process.is_alive():
            process.kill()
            process.join()
            reason = late
        elif process.exitcode == -signal.SIGXCPU:
            reason = late

        # What the process left: its row, or why there is none.
        row = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "items" in row:
        return row
    return {
        "task": name, "reasoning_gym": version(), "asked_items": items, "asked_draws": draws, "items": 0,
        "failure": reason or row.get("failure", "its process died"), "out_of_time": True,
        "seconds": round(time.monotonic() - began, 1),
    }


def work(
    path: Path, name: str, items: int, draws: int, seconds: float, before: dict[str, Any] | None
) -> None:
    """Measures a task within its CPU time and leaves the row in `path`; what the process of a task does."""
    most = math.ceil(seconds + GRACE_S)
    resource.setrlimit(resource.RLIMIT_CPU, (most, most + 1))
    try:
        row = audit_strictly(before, seconds) if before else audit(name, items, draws, seconds)
    except Exception as error:  # noqa: BLE001 - foreign code raises what it likes
        row = {"failure": f"{type(error).__name__}: {error}"}
    write_text_aside(path, json.dumps(row, ensure_ascii=False))


def measure_all(options: argparse.Namespace, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The rows of all tasks, those measured now and those that were up to date; each is kept as soon as it is there."""
    rows = read_rows(options.rows)
    loose = {"key": fingerprint(map(ROOT.joinpath, SOURCES), version(), options.items, options.draws)}
    strict = {"strict_key": fingerprint((ROOT / "verify").glob("*.py"))}

    def is_current(name: str, keys: dict[str, str]) -> bool:
        return not options.again and keys.items() <= rows.get(name, {}).items()

    waiting = [name for name in names if not is_current(name, loose | strict)]
    print(
        f"{len(names)} tasks, {len(names) - len(waiting)} of them up to date in {options.rows}; {len(waiting)} to "
        f"measure, at most {clock_text(len(waiting) * (options.task_timeout_s + GRACE_S))} of one core",
        file=sys.stderr,
    )
    with Progress(len(waiting), "task", "task") as progress:
        for done, name in enumerate(waiting, start=1):
            before = rows[name] if is_current(name, loose) else None
            row = measured(name, options.items, options.draws, options.task_timeout_s, before)
            rows[name] = row | loose | strict
            write_rows(options.rows, rows.values())
            progress.update(done, task=name, took=f"{row['seconds']:g} s")
            if row["out_of_time"]:
                progress.say(f"{name}: ran out of time, {row.get('scored', 0)} of {options.items} items were scored"
                             + (f" ({row['failure']})" if row["failure"] else ""))
    return rows


def check(options: argparse.Namespace, names: Sequence[str]) -> int:
    """Compares a few items of each task with the rows; 1 where they differ."""
    rows = read_rows(options.rows)
    if not rows:
        raise ValueError(f"{options.rows} has no rows to compare with: run without --check first")

    lines = changes(rows, {}, names, version())
    with Progress(len(names), "task", "task") as progress:
        for done, name in enumerate(names, start=1):
            if name in rows:
                fresh = measured(name, FIRST, 0, options.task_timeout_s)
                lines += changes({name: rows[name]}, {name: fresh}, [name], rows[name]["reasoning_gym"])
            progress.update(done, task=name)
    for line in lines:
        print(line)
    if not lines:
        print(f"{len(names)} tasks are as {options.rows} says")
    return int(bool(lines))


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if options.items < 1 or options.draws < 0 or options.task_timeout_s <= 0:
        raise ValueError("--items and --task_timeout_s must be above 0, --draws 0 or more")
    names = chosen_tasks(options.tasks)
    if options.check:
        return check(options, names)

    rows = measure_all(options, names)
    existing = [name for name in registry() if name not in BUILT_IN]
    write_text_aside(options.page, page(rows, existing))
    print(f"{options.page}: {len(rows)} tasks, {sum(row['seconds'] for row in rows.values()) / 60:.0f} minutes in all",
          file=sys.stderr)
    return 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # some tasks make other items under another one
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
    sys.exit(run_script(main))
