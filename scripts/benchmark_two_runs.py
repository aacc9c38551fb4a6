"""Two runs side by side on one machine: the batches of both, over those of one run that has the machine for itself.

    python scripts/benchmark_two_runs.py                                  # about 6 minutes on two cores
    python scripts/benchmark_two_runs.py --flags "--num_threads 2"        # flags of train.py, for all runs

It is `python train.py` with its defaults, each run with the threads that it takes by itself. One run alone and two
runs that start together take turns; after each has done a few batches, batches are counted for --seconds. Nothing else
should run meanwhile. The aim is at least 0.9. The exit status is 1 where the median of the turns is below it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark import ROOT, processor, spread
from script_tools import ScriptParser, run_script
from soak_memory import batches_in

LEAST = 0.9
WARM = 10  # batches of each run that are not counted
PATIENCE_S = 600.0  # for these


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--seconds", type=float, default=30, help="in which batches are counted")
    parser.add_argument("--rounds", type=int, default=3, help="turns of one run and of two")
    parser.add_argument("--flags", default="", help="more flags of train.py, in one word")
    parser.add_argument("--output", type=Path, help="JSON of all figures")
    args = parser.parse_args(argv)
    if args.seconds <= 0 or args.rounds < 1:
        parser.error("--seconds must be above 0, --rounds at least 1")
    return args


def start(folder: Path, flags: str) -> subprocess.Popen:
    """A run that trains until it is ended."""
    words = [sys.executable, "train.py", "--device", "cpu", "--max_steps", "1000000", "--log_steps", "1"]
    words += ["--eval_n", "8", "--save_dir", str(folder), "--run_name", "r", *shlex.split(flags)]
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)


def rates(runs: int, args: argparse.Namespace) -> list[float]:
    """Batches a second of each of `runs` runs at once. Raises ValueError for one that fails, or does not begin."""
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(number) for number in range(runs)]
        for folder in folders:
            folder.mkdir()
        processes = [start(folder, args.flags) for folder in folders]

        def done() -> list[int]:
            for folder, process in zip(folders, processes, strict=True):
                if process.poll() is not None:
                    last = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
                    raise ValueError(f"train.py ended: {last[-1] if last else process.returncode}")
            return [batches_in(folder / "r" / "metrics.jsonl") for folder in folders]

        try:
            began = time.monotonic()
            while min(first := done()) < WARM:
                if time.monotonic() > began + PATIENCE_S:
                    raise ValueError(f"{WARM} batches took more than {PATIENCE_S:.0f} s")
                time.sleep(0.05)
            began = time.monotonic()
            time.sleep(args.seconds)
            last, ended = done(), time.monotonic()
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return [(after - before) / (ended - began) for before, after in zip(first, last, strict=True)]


def figures_of(turns: list[tuple[list[float], list[float]]]) -> dict[str, Any]:
    """What is printed and written, of (rates of one run alone, rates of two) of each turn."""
    ratios = [sum(both) / alone[0] for alone, both in turns]
    shares = [min(both) / sum(both) for _, both in turns]
    return {"machine": processor(), "turns": turns, "alone": statistics.median(alone[0] for alone, _ in turns),
            "together": statistics.median(sum(both) for _, both in turns), "ratio": spread(ratios),
            "share of the slower": spread(shares), "least": LEAST}


def main() -> int:
    """The exit status: 1 where two runs do too little."""
    args = parse()
    figures = figures_of([(rates(1, args), rates(2, args)) for _ in range(args.rounds)])
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    ratio = figures["ratio"]
    print(f"{figures['machine']}: one run alone {figures['alone']:.2f} batches/s, two together "
          f"{figures['together']:.2f}: {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] times as many; "
          f"the aim is at least {LEAST}")
    return 0 if ratio["median"] >= LEAST else 1


if __name__ == "__main__":
    sys.exit(run_script(main))
