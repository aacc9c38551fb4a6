"""Runs of `train.py` in one or more processes each, and what they leave behind, beside each other."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.files import json_lines
from patience import HANG_S
from tiny_runs import ROOT

# What the clock says; and TRL's entropy, a mean of means over micro-batches that it shuffles.
TIMED = ("elapsed_s", "examples_per_second", "tokens_per_second", "step_time", "entropy")
STEADY = "--lr_scheduler constant --warmup_steps 0 --eval_n 5 --eval_every 0 --batch_size 4 --report 0".split()


def performed(folder: Path, *runs: dict[str, Any]) -> list[list[int]]:
    """Does these runs, which `tests/several.py` describes, one after the other. Returns their exit statuses."""
    plan = folder / "runs.json"
    for number, run in enumerate(runs):
        run.setdefault("log", str(folder / f"log{number}.txt"))
    plan.write_text(json.dumps(runs), encoding="utf-8")
    done = subprocess.run([sys.executable, "tests/several.py", str(plan)], cwd=ROOT, capture_output=True, text=True,
                          timeout=2 * HANG_S)
    assert done.returncode == 0, done.stderr[-3000:]
    return [result["statuses"] for result in json.loads(plan.read_text(encoding="utf-8"))]


def run(processes: int, *argv: str, **more: Any) -> dict[str, Any]:
    return {"processes": processes, "argv": list(argv), **more}


def logs(folder: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("log*.txt")))


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without `TIMED`."""
    lines = [line for _, line in json_lines(folder / "metrics.jsonl")]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def rows(folder: Path) -> dict[tuple[str, ...], float]:
    """(step, task, metric, n) -> value of eval.csv, each of which stands there once."""
    with open(folder / "eval.csv", newline="", encoding="utf-8") as file:
        names = ("step", "task", "metric", "n")
        found = [(tuple(row[name] for name in names), float(row["value"])) for row in csv.DictReader(file)]
    assert len(dict(found)) == len(found) > 0
    return dict(found)


def predictions(folder: Path) -> list[dict]:
    return [line for _, line in json_lines(folder / "predictions.jsonl")]


def assert_alike(ours: Path, theirs: Path, last_step: int | None = None) -> None:
    """Steps up to `last_step`, and all evaluations: none is missing or there twice; figures to 1e-5."""
    two, one = metrics(ours), metrics(theirs)[:last_step]
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for line, other in zip(two, one, strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            expected = value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-5)
            assert line[name] == expected, (other["step"], name)
    if last_step is None:
        assert rows(ours) == pytest.approx(rows(theirs), rel=1e-5, abs=1e-5)
        assert predictions(ours) == predictions(theirs)
