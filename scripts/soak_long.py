"""A long run that is killed and resumed, by one process and then by two: is what it holds flat?

    python scripts/soak_long.py                     # two hours, into runs/soak_long/
    python scripts/soak_long.py --minutes 12 --output /tmp/long

The run is `python train.py` with its default tasks and the embedded LLM, which evaluates, saves and evaluates again.
It is started six times, for a sixth of the minutes each: by one process, ended by SIGKILL, again by SIGKILL, then by
SIGTERM; and by two processes, one of which is killed, then both, then all are sent SIGTERM. Each start goes on from the
newest checkpoint, by the same command. Every few seconds a look is taken at all processes of the run: their resident
memory, open handles, threads, and the bytes of the run's folder and of the folder for temporary files. A stretch is the
time from one start to its end. Memory must end a stretch within 1.15 times what it was after its first quarter, handles
and threads at the same number; checkpoints and temporary files must be as many bytes at the end of the last stretch as
in the first one. Raw looks are in looks.jsonl, figures in figures.json. The exit status is 1 where something has grown.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmark import processor
from script_tools import ScriptParser, run_script
from soak_memory import batches_in

ROOT = Path(__file__).resolve().parent.parent
RUN = "long"
MOST_GROWTH = 1.15
PATIENCE_S = 300.0  # how long a run may take to end after SIGTERM, or after one of its processes was killed
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


@dataclass(frozen=True)
class Stretch:
    """One start of the run: by how many processes, and what ends it."""

    processes: int
    end: str  # kill: all of them at once; kill one: the last rank alone; stop: SIGTERM


STRETCHES = (Stretch(1, "kill"), Stretch(1, "kill"), Stretch(1, "stop"),
             Stretch(2, "kill one"), Stretch(2, "kill"), Stretch(2, "stop"))


@dataclass(frozen=True)
class Look:
    """What a run holds at one moment.

    stretch: number of the start, from 0.
    seconds: since the first start.
    memory: bytes of the resident sets of all its processes, handles and threads likewise.
    records: bytes of the run's folder outside checkpoints/, which grow with every logged step.
    """

    stretch: int
    seconds: float
    batch: int
    processes: int
    memory: int
    handles: int
    threads: int
    checkpoints: int
    records: int
    temporary: int


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--minutes", type=float, default=120, help="of all six starts together")
    parser.add_argument("--every", type=float, default=5, help="seconds between two looks")
    parser.add_argument("--eval_every", type=int, default=200, help="batches between two evaluations, and two saves")
    parser.add_argument("--eval_n", type=int, default=64, help="items of each task in an evaluation")
    parser.add_argument("--batch_size", type=int, default=32, help="of all processes together")
    parser.add_argument("--output", type=Path, default=Path("runs/soak_long"), help="folder of the run and its figures")
    args = parser.parse_args(argv)

    if args.minutes <= 0 or args.every <= 0:
        parser.error("--minutes and --every must be above 0")
    if args.eval_every < 1 or args.eval_n < 1:
        parser.error("--eval_every and --eval_n must be at least 1")
    if args.batch_size < 2 or args.batch_size % 2:
        parser.error(f"--batch_size {args.batch_size} must be even, as two processes share it")
    if (args.output / RUN).exists():
        parser.error(f"--output {args.output} holds a run already: remove it, or name another folder")
    return args


def command(args: argparse.Namespace, processes: int) -> list[str]:
    """The run; its batches have as many items by one process as by two."""
    words = (
        f"train.py --device cpu --num_threads 1 --max_steps 10000000 --batch_size {args.batch_size // processes} "
        f"--eval_n {args.eval_n} --eval_every {args.eval_every} --save_every {args.eval_every} --checkpoint_limit 2 "
        f"--run_name {RUN} --save_dir"
    ).split()
    launch = [*LAUNCH, str(processes)] if processes > 1 else []
    return [sys.executable, *launch, *words, str(args.output.resolve())]


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """A process and all that it has started, those that have ended left out."""
    try:
        parent = psutil.Process(process.pid)
        return [one for one in [parent, *parent.children(recursive=True)] if one.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:
        return []


def ranks(members: list[psutil.Process]) -> list[psutil.Process]:
    """Those of them that train, in the order of their numbers: torchrun's own process is none."""
    return sorted((one for one in members if "torch.distributed.run" not in one.cmdline()
                   and "train.py" in one.cmdline()), key=lambda one: one.pid)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; one that goes away meanwhile counts 0."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue
    return total


def look_at(process: subprocess.Popen, stretch: int, began: float, output: Path) -> Look | None:
    """A look at a run, or None where one of its processes ended meanwhile."""
    sizes = []
    try:
        for one in family(process):
            with one.oneshot():
                sizes.append((one.memory_info().rss, one.num_fds(), one.num_threads()))
    except psutil.NoSuchProcess:
        return None
    if not sizes:
        return None

    folder = output / RUN
    checkpoints = folder_bytes(folder / "checkpoints")
    memory, handles, threads = (sum(column) for column in zip(*sizes, strict=True))
    return Look(stretch, round(time.monotonic() - began, 1), batches_in(folder / "metrics.jsonl"), len(sizes), memory,
                handles, threads, checkpoints, folder_bytes(folder) - checkpoints, folder_bytes(output / "tmp"))


def end(process: subprocess.Popen, how: str) -> None:
    """Ends a run as its stretch says. Raises ValueError where it goes on, or ends otherwise than it should."""
    members = family(process)
    if how == "kill":
        for one in members:
            one.kill()
    elif how == "kill one":
        ranks(members)[-1].kill()
    else:
        for one in ranks(members):
            one.send_signal(signal.SIGTERM)
    try:
        status = process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"the run goes on {PATIENCE_S:.0f} s after it was ended by: {how}") from error
    psutil.wait_procs(members, PATIENCE_S)
    if status == 0:
        raise ValueError(f"the run was ended by: {how}, and has exit status 0")


def watch(args: argparse.Namespace) -> list[Look]:
    """Looks at the whole run, written to looks.jsonl as they are taken. Raises ValueError where it ends by itself."""
    (args.output / "tmp").mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
                   "TMPDIR": str((args.output / "tmp").resolve())}
    looks: list[Look] = []
    began = time.monotonic()
    with open(args.output / "looks.jsonl", "w", encoding="utf-8") as file:
        for number, stretch in enumerate(STRETCHES):
            until = began + 60 * args.minutes * (number + 1) / len(STRETCHES)
            with open(args.output / f"stretch_{number}.log", "wb") as log:
                process = subprocess.Popen(command(args, stretch.processes), cwd=ROOT, env=environment, stdout=log,
                                           stderr=log, start_new_session=True)
            try:
                while time.monotonic() < until and process.poll() is None:
                    time.sleep(args.every)
                    look = look_at(process, number, began, args.output)
                    if look:
                        looks.append(look)
                        print(json.dumps(asdict(look)), file=file, flush=True)
                if process.poll() is not None:
                    raise ValueError(f"the run ended by itself, see {log.name}")
                end(process, stretch.end)
            finally:
                for one in family(process):
                    one.kill()
            last = looks[-1]
            print(f"start {number + 1} of {len(STRETCHES)}, {stretch.processes} process(es), ended by {stretch.end}: "
                  f"{last.batch} batches, {last.memory / 1e6:,.0f} MB", flush=True)
    return looks


def figures_of(looks: list[Look], stretches: tuple[Stretch, ...] = STRETCHES) -> dict[str, Any]:
    """Each stretch's sizes after its first quarter and at its end, and what has grown.

    A size is the median of a tenth of the looks, memory the most of them. Raises ValueError for a stretch of fewer than
    20 looks.
    """
    rows, grown = [], []
    for number, stretch in enumerate(stretches):
        own = [look for look in looks if look.stretch == number]
        if len(own) < 20:
            raise ValueError(f"start {number + 1} has {len(own)} looks: choose more --minutes, or a smaller --every")
        tenth = len(own) // 10
        settled, last = own[len(own) // 4 : len(own) // 4 + tenth], own[-tenth:]
        row: dict[str, Any] = {"processes": stretch.processes, "ended by": stretch.end, "looks": len(own),
                               "batches": last[-1].batch - own[0].batch}
        for name, of in (("memory", max), ("handles", statistics.median), ("threads", statistics.median),
                         ("checkpoints", max), ("temporary", statistics.median)):
            row[name] = [of(getattr(look, name) for look in part) for part in (settled, last)]
        rows.append(row)
        if row["memory"][1] > MOST_GROWTH * row["memory"][0]:
            grown.append(f"memory of start {number + 1}")
        grown += [f"{name} of start {number + 1}" for name in ("handles", "threads") if row[name][1] > row[name][0]]
    for name in ("checkpoints", "temporary"):
        if rows[-1][name][1] > MOST_GROWTH * rows[0][name][1]:
            grown.append(name)
    last = looks[-1]
    return {"machine": processor(), "minutes": round(last.seconds / 60, 1), "batches": last.batch, "grown": grown,
            "records a thousand batches": round(1000 * last.records / last.batch), "stretches": rows}


def evaluations(output: Path) -> int:
    """Evaluations that the run has recorded."""
    with open(output / RUN / "eval.csv", encoding="utf-8") as file:
        return len({line.split(",")[0] for line in file}) - 1


def main() -> int:
    """The exit status: 1 where something has grown."""
    args = parse()
    figures = figures_of(watch(args))
    figures["evaluations"] = evaluations(args.output)
    (args.output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))
    return 1 if figures["grown"] else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
