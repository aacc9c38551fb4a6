"""Memory of a long run over batches of all lengths: what it holds after 300 batches and at the end, and the ratio.

    python scripts/soak_memory.py                                     # 3,000 batches, about 10 CPU minutes
    LRU_CACHE_CAPACITY=1024 ONEDNN_PRIMITIVE_CACHE_CAPACITY=1024 python scripts/soak_memory.py     # as it was before

It is `python train.py` on four tasks whose prompts differ in length, grouped by length, in a process of its own with
one thread and a narrow HRM. It evaluates and saves on its way. Shown is the most memory that the process held (resident
set) over the 50 batches before. The exit status is 1 where the end is above 1.15 times the beginning.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmark import processor
from script_tools import ScriptParser, run_script

ROOT = Path(__file__).resolve().parent.parent
MOST_GROWTH = 1.15
WINDOW = 50  # batches that a figure is the largest of
EVERY_S = 0.2  # seconds between two looks
TASKS = "chain_sum,basic_arithmetic,simple_equations,mini_sudoku"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--steps", type=int, default=3000, help="batches")
    parser.add_argument("--settled", type=int, default=300, help="batches after which the memory should be settled")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--d_h", type=int, default=16, help="width of the HRM")
    parser.add_argument("--output", type=Path, help="JSON of all figures")
    args = parser.parse_args(argv)

    if args.settled < 1 or args.batch_size < 1:
        parser.error("--settled and --batch_size must be at least 1")
    if args.steps < args.settled + WINDOW:
        parser.error(f"--steps {args.steps} must be at least --settled and {WINDOW} more, {args.settled + WINDOW}")
    return args


def command(args: argparse.Namespace, folder: str) -> list[str]:
    """The run that is watched; its last evaluation comes behind the last figure."""
    words = f"--tasks {TASKS} --bucket_batches 8 --num_threads 1 --device cpu --eval_n 32 --eval_every 250 --n_heads 2"
    words += f" --save_every 500 --checkpoint_limit 1 --batch_size {args.batch_size} --d_h {args.d_h}"
    words += f" --max_steps {args.steps} --save_dir {folder} --run_name soak"
    return [sys.executable, "train.py", *words.split()]


def watched(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(batches done, bytes held) at each look at a run. Raises ValueError with its last words where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    looks = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as words:
        metrics = Path(folder) / "soak" / "metrics.jsonl"
        process = subprocess.Popen(command(args, folder), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
                                   stderr=words)
        seen = psutil.Process(process.pid)
        try:
            while process.poll() is None:
                looks.append((batches_in(metrics), held(seen)))
                time.sleep(EVERY_S)
        finally:
            process.kill()
            process.wait()
        words.seek(0)
        if process.returncode:
            raise ValueError(f"train.py failed: {words.read().decode(errors='replace')[-600:]}")
    return looks


def batches_in(metrics: Path) -> int:
    """Batches that a run has recorded so far."""
    if not metrics.exists():
        return 0
    with open(metrics, "rb") as file:
        file.seek(max(metrics.stat().st_size - 4096, 0))
        lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines[-3:] if line.startswith(b"{") and line.endswith(b"\n")]
    return max((json.loads(line)["step"] for line in whole), default=0)


def held(process: psutil.Process) -> int:
    """Bytes of a process's resident set; 0 where it has ended."""
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def most_until(looks: list[tuple[int, int]], step: int) -> int:
    """Most bytes over the `WINDOW` batches up to `step`. Raises ValueError where none of them was seen."""
    seen = [size for done, size in looks if step - WINDOW <= done < step]
    if not seen:
        raise ValueError(f"the batches before {step} were over between two looks: choose a larger --batch_size")
    return max(seen)


def figures_of(looks: list[tuple[int, int]], args: argparse.Namespace) -> dict[str, Any]:
    """What is printed and written."""
    marks = sorted({args.settled, *range(500, args.steps, 500), args.steps})
    sizes = {str(mark): most_until(looks, mark) for mark in marks}
    ratio = sizes[str(args.steps)] / sizes[str(args.settled)]
    kept = {name: os.environ.get(name) for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")}
    return {"machine": processor(), "steps": args.steps, "settled": args.settled, "batch_size": args.batch_size,
            "d_h": args.d_h, "environment": kept, "bytes": sizes, "ratio": ratio, "most": MOST_GROWTH}


def main() -> int:
    """The exit status: 1 where memory has grown too much."""
    args = parse()
    figures = figures_of(watched(args), args)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    for mark, size in figures["bytes"].items():
        print(f"batch {mark:>6}: {size / 1e6:8,.0f} MB")
    ratio = figures["ratio"]
    print(f"{ratio:.3f} times as much at the end as at batch {args.settled}; the limit is {MOST_GROWTH}")
    return 1 if ratio > MOST_GROWTH else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
