"""CPU seconds of a default training step, and of the start of a run, here and at an earlier commit, in one run.

    python scripts/benchmark.py                          # against the commit before
    python scripts/benchmark.py --against v1.0 --repeats 5 --steps 8

The earlier commit is unpacked beside this one, and both are run in turn, in another order in each repeat, each time in
a process of its own with one thread. Ratios are taken within a repeat. Shown are medians with the smallest and largest
value. Seconds are CPU seconds of the process, so that other programs on the machine matter little. Measured are

    start    from the start of the process to the end of the first training step of `python train.py`
    step     a step of the default run (64 examples): forward, backward, optimizer, average; without drawing items
    cached   the same with `--cache_hidden ram`, once the cache is filled
    disk     the same with `--cache_hidden disk`, where the commit knows it
    fill     filling the cache in RAM with 256 items, and drawing the first batch
    muon     what of a step is spent in the optimizer Muon
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from script_tools import ScriptParser, run_script

ROOT = Path(__file__).resolve().parent.parent
MEASURES = ("start", "step", "cached", "disk", "fill", "muon")
WARM = 2  # steps before the clock starts
CACHED_ITEMS = 256
PATIENCE_S = 1800.0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--against", default="HEAD~1", help="the commit to compare with")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="training steps that are timed in each repeat")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmark.json", help="JSON of all figures")
    parser.add_argument("--measure_here", action="store_true", help=argparse.SUPPRESS)  # the process of one tree
    args = parser.parse_args(argv)
    for name in ("repeats", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1")
    return args


# --- in the tree that is measured -------------------------------------------------------------------------------------


def measure_here(steps: int) -> dict[str, float]:
    """The measures of the code in the working directory, in CPU seconds."""
    sys.path.insert(0, os.getcwd())
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(folder)
        run.trainer.step(run.data.next_batches(), 0, 1e-4)
        seconds["start"] = time.process_time()

        seconds["step"], seconds["muon"] = seconds_of_steps(run, steps)
        fixed = ("--train_n", str(CACHED_ITEMS), "--cache_hidden")
        cached = run_of(folder, *fixed, "ram")
        seconds["fill"] = seconds_of_fill(cached)
        seconds["cached"], _ = seconds_of_steps(cached, steps)

        if knows_disk():
            on_disk = run_of(folder, *fixed, "disk", "--cache_dir", folder)
            seconds["disk"], _ = seconds_of_steps(on_disk, steps)
    return seconds


def knows_disk() -> bool:
    """Whether this tree can keep its cache on disk."""
    from flags import FIND

    return "disk" in FIND["cache_hidden"].choices


def seconds_of_fill(run: Any) -> float:
    """CPU seconds until the cache of a run is filled, before its first step or in it, as the tree does it."""
    started = time.process_time()
    for batch in run.data.next_batches():
        run.trainer.encode(batch)
    return time.process_time() - started


def run_of(folder: str, *flags: str) -> Any:
    """A run of the add-on as `train.py` builds it from the default flags and `flags`."""
    import torch

    import options
    from addon_run import AddonRun

    torch.set_num_threads(1)
    fixed = ["--device", "cpu", "--num_threads", "1", "--eval_n", "8", "--save_dir", folder]
    return AddonRun(options.resolve(options.parse([*fixed, *flags])), None)


def seconds_of_steps(run: Any, steps: int) -> tuple[float, float]:
    """CPU seconds of a step, and of Muon in it, over `steps` batches that are drawn before."""
    in_muon = 0.0
    batches = [run.data.next_batches() for _ in range(WARM + steps)]
    for optimizer, _ in run.trainer.optimizers:
        if type(optimizer).__name__ == "Muon":
            plain = optimizer.step

    def timed(*arguments: Any, **keywords: Any) -> Any:
        nonlocal in_muon
        began = time.process_time()
        result = plain(*arguments, **keywords)
        in_muon += time.process_time() - began
        return result

    for optimizer, _ in run.trainer.optimizers:
        if type(optimizer).__name__ == "Muon":
            optimizer.step = timed

    # The first steps fill the cache, and pay for what libraries set up.
    for number, batch in enumerate(batches):
        if number == WARM:
            in_muon = 0.0
            started = time.process_time()
        run.trainer.step(batch, number, 1e-4)
    return (time.process_time() - started) / steps, in_muon / steps


# --- the comparison ---------------------------------------------------------------------------------------------------


def unpacked(commit: str, folder: Path) -> str:
    """Unpacks `commit` into `folder` and returns its short name. Raises ValueError where git does not know it."""
    command = ["git", "rev-parse", "--short", f"{commit}^{{commit}}"]
    name = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if name.returncode:
        raise ValueError(f"--against {commit} is no commit of this repository")

    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return name.stdout.strip()


def measured(tree: Path, steps: int) -> dict[str, float]:
    """The measures of the code in `tree`, by a process of its own. Raises ValueError where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--measure_here", "--steps", str(steps)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    if done.returncode:
        raise ValueError(f"the measurement in {tree} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def processor() -> str:
    """The name of the processor, its cores, and whether it multiplies bf16."""
    name = platform.processor() or platform.machine()
    flags = Path("/proc/cpuinfo")
    text = flags.read_text(encoding="utf-8") if flags.exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    native = "with" if re.search("avx512_bf16|amx_bf16", text) else "without"
    return f"{model[1] if model else name}, {os.cpu_count()} cores, {native} bf16 instructions"


def table(before: str, rows: dict[str, Any]) -> str:
    """The figures, one measure a line."""
    lines = [f"{'CPU s':<8}{before:>24}{'now':>24}{'times as fast':>24}"]
    for name, row in rows.items():
        lines.append(f"{name:<8}" + "".join(f"{words(cell):>24}" for cell in row.values()))
    return "\n".join(lines)


def words(cell: dict[str, float] | None) -> str:
    """A spread as text; - for none."""
    if cell is None:
        return "-"
    return f"{cell['median']:.3g} [{cell['low']:.3g}, {cell['high']:.3g}]"


def row_of(name: str, repeats: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """The spreads of one measure: before, now, and how many times as fast; None where the commit lacks it."""
    row: dict[str, Any] = {"before": None, "now": spread([each["now"][name] for each in repeats]), "times": None}

    if name in repeats[0]["before"]:
        row["before"] = spread([each["before"][name] for each in repeats])
        row["times"] = spread([each["before"][name] / each["now"][name] for each in repeats])
    return row


def main() -> int:
    """Measures both trees in turn, prints the table and writes the JSON."""
    args = parse()
    if args.measure_here:
        print(json.dumps(measure_here(args.steps)))
        return 0

    repeats: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        before = unpacked(args.against, Path(folder))
        trees = {"before": Path(folder), "now": ROOT}
        for repeat in range(args.repeats):
            order = list(trees) if repeat % 2 == 0 else list(trees)[::-1]
            repeats.append({name: measured(trees[name], args.steps) for name in order})
            print(f"repeat {repeat + 1} of {args.repeats}: {repeats[-1]}", file=sys.stderr, flush=True)

    rows = {name: row_of(name, repeats) for name in MEASURES}
    disk_of_ram = spread([each["now"]["cached"] / each["now"]["disk"] for each in repeats])
    machine = {"processor": processor(), "load": os.getloadavg()[0], "python": platform.python_version()}
    figures = {"against": before, "repeats": args.repeats, "steps": args.steps, "machine": machine, "measures": rows}
    figures["disk_of_ram"] = disk_of_ram
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"{machine['processor']}; one thread; medians [smallest, largest] of {args.repeats}")
    print(table(before, rows))
    print(f"from disk a step has {words(disk_of_ram)} of its speed from RAM")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
