"""Ablations: a grid of arms x tasks x seeds, each a run of `train.py`, and the table of what they came to.

A grid is YAML:

    arms: {default: {}, grb: {injector: grb}}   flags of train.py that each arm adds
    tasks: [chain_sum, gcd+lcm]                 each trained by itself; + joins tasks that are trained together
    seeds: [0, 1, 2]
    common: {task_config: small, eval_n: 512}   flags of every run
    baseline: default                           the arm that others are compared with (the first where none is named)
    minutes: 5                                  equal training time: each arm's max_steps comes from its own speed
    calibration_steps: 40                       batches of the short run that measures it
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import options
from engine.files import json_lines, write_text_aside
from engine.intervals import Interval, mean_interval, paired_seeds
from reasoning_gym_wrapper import task_problems

KEYS = ("arms", "tasks", "seeds", "common", "baseline", "minutes", "calibration_steps")
# What the runner sets itself, or what would make runs of one grid incomparable.
OWN = {"run_name", "resume", "eval_only", "dry_run", "reset_progress", "config", "task", "tasks", "seed", "save_dir",
       "log_csv", "num_threads"}
LENGTH = {"max_steps", "epochs", "max_minutes"}  # with `minutes` the runner sets the length, too
NAME = re.compile(r"[A-Za-z0-9][\w.=+-]*")
COLUMNS = (
    *("arm", "train_tasks", "seed", "task", "status", "solved", "n", "ci_low", "ci_high", "bare", "mean_score"),
    *("truncated", "segments_used", "steps", "train_minutes", "examples_per_second", "trainable", "run"),
)
RECORD = "ablation.json"  # in each run's folder: its flags, and whether it is finished
WARM = 4  # the first 1 / WARM of a calibration's batches is not timed


class GridError(ValueError):
    """A grid that cannot be run; one problem a line."""


@dataclass(frozen=True)
class Grid:
    """What a grid file says."""

    name: str
    arms: dict[str, dict[str, Any]]
    tasks: list[str]
    seeds: list[int]
    common: dict[str, Any] = field(default_factory=dict)
    baseline: str = ""
    minutes: float | None = None
    calibration_steps: int = 40


@dataclass(frozen=True)
class Job:
    """One run: an arm on one task (or several joined by +) with one seed."""

    arm: str
    task: str
    seed: int
    flags: dict[str, Any]

    @property
    def name(self) -> str:
        """The run's folder."""
        return f"{self.arm}--{self.task}--seed{self.seed}"

    @property
    def steps(self) -> int:
        """Batches of the run; 0 where its flags do not fix them."""
        return int(self.flags.get("max_steps", 0))


# --- the grid ---------------------------------------------------------------------------------------------------------


def read_grid(path: Path, changes: Mapping[str, Any] | None = None, only: Sequence[str] | None = None) -> Grid:
    """The grid of a YAML file, `changes` (fields of `Grid`) in place of what it says, and `only` these of its arms.

    Where the grid's baseline is not among them, the first one is.

    Raises:
        GridError: every problem found, one a line.
    """
    try:
        tree, found = options.load_yaml(str(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise GridError(f"{path} cannot be read: {reason}") from error
    if not isinstance(tree, dict):
        raise GridError(f"{path} must hold a mapping with {', '.join(KEYS)}")
    found += [f"{path}: unknown key {key}: expected {', '.join(KEYS)}" for key in tree if key not in KEYS]
    given = {key: value for key, value in tree.items() if key in KEYS and value is not None} | dict(changes or {})
    found += _shape_problems(given)
    if found:
        raise GridError("\n".join(found))
    arms = {str(name): flags or {} for name, flags in given["arms"].items()}
    grid = Grid(path.stem, **given | {"arms": arms, "baseline": given.get("baseline") or next(iter(arms))})
    found = _grid_problems(grid)
    found += [f"{name!r} is no arm of {path}: choose from {', '.join(arms)}" for name in only or () if name not in arms]
    if found:
        raise GridError("\n".join(found))
    if only is None:
        return grid
    kept = {name: flags for name, flags in arms.items() if name in only}
    return dataclasses.replace(grid, arms=kept, baseline=grid.baseline if grid.baseline in kept else next(iter(kept)))


def _shape_problems(given: Mapping[str, Any]) -> list[str]:
    """What is missing or of the wrong type."""
    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    def amount(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf

    expected = {
        "arms": ("a mapping of arm names to flags", lambda v: isinstance(v, dict) and bool(v) and all(
            isinstance(flags, dict | None) for flags in v.values())),
        "tasks": ("a list of task names", lambda v: isinstance(v, list) and bool(v) and all(
            isinstance(task, str) for task in v)),
        "seeds": ("a list of whole numbers", lambda v: isinstance(v, list) and bool(v) and all(map(whole, v))),
        "common": ("a mapping of flags", lambda v: isinstance(v, dict)),
        "baseline": ("the name of an arm", lambda v: isinstance(v, str)),
        "minutes": ("a number above 0", amount),
        "calibration_steps": (f"a whole number of at least {2 * WARM}", lambda v: whole(v) and v >= 2 * WARM),
    }
    found = [f"{key} is missing: give {expected[key][0]}" for key in ("arms", "tasks", "seeds") if key not in given]
    return found + [f"{key} {value!r} is not legal: expected {expected[key][0]}"
                    for key, value in given.items() if not expected[key][1](value)]


def _grid_problems(grid: Grid) -> list[str]:
    """Names that cannot be used, tasks that do not exist, flags that train.py refuses."""
    found = [f"arm {name!r} is no plain name: use letters, digits, . = + _ and -" for name in grid.arms
             if not NAME.fullmatch(name) or "--" in name]
    for what, values in (("task", grid.tasks), ("seed", grid.seeds)):
        found += [f"{what} {value} is given twice" for value in dict.fromkeys(values) if values.count(value) > 1]
    config, allowed = str(grid.common.get("task_config") or "default"), bool(grid.common.get("allow_code_tasks"))
    if isinstance(grid.common.get("task_config"), dict):
        config = json.dumps(grid.common["task_config"])
    found += dict.fromkeys(line for task in grid.tasks
                           for line in task_problems(task.split("+"), config, allowed, supervised=True))
    if grid.baseline not in grid.arms:
        found.append(f"baseline {grid.baseline} is not an arm: choose from {', '.join(grid.arms)}")
    kept = OWN | (LENGTH if grid.minutes else set())
    for where, flags in (("common", grid.common), *((f"arm {name}", flags) for name, flags in grid.arms.items())):
        named = [options.FIND[name].name for name in flags if name in options.FIND]
        found += [f"{where}: {name} is set by the grid's own keys: leave it out" for name in named if name in kept]
        found += [f"{where}: {name} is given twice, under different names"
                  for name in dict.fromkeys(named) if named.count(name) > 1]
    if found:
        return found
    told = {line: job.arm for job in reversed(jobs_of(grid)) for line in options.collect(arguments(job.flags))[1]}
    return [f"arm {arm}: {line}" for line, arm in reversed(told.items())]


def plain_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags under their first names: `steps` and `max_steps` are one."""
    return {options.FIND[name].name if name in options.FIND else name: value for name, value in flags.items()}


def jobs_of(grid: Grid) -> list[Job]:
    """Every run, all arms of a seed before the next seed, so that a grid cut short can still be compared."""
    shared = {"eval_every": 0, "checkpoint_limit": 1} | plain_flags(grid.common)
    return [Job(arm, task, seed, {**shared, **plain_flags(flags), "tasks": task.replace("+", ","), "seed": seed})
            for seed in grid.seeds for task in grid.tasks for arm, flags in grid.arms.items()]


def arguments(flags: Mapping[str, Any]) -> list[str]:
    """The flags as a command line of train.py."""
    return [f"--{name}={_text(value)}" for name, value in flags.items()]


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


# --- equal minutes ----------------------------------------------------------------------------------------------------


def calibration_job(job: Job, steps: int) -> Job:
    """The short run that measures an arm's speed on a task: every batch timed, one item evaluated."""
    short = {"max_steps": steps, "warmup_steps": min(int(job.flags.get("warmup_steps", 50)), steps), "log_steps": 1,
             "eval_n": 1, "eval_every": 0, "save_every": 0, "log_samples_every": 0, "eval_suite": None}
    return dataclasses.replace(job, flags={**job.flags, **short})


def seconds_per_step(folder: Path) -> float | None:
    """Mean seconds of a batch in a finished calibration, its first ones left out; None where nothing was trained."""
    times = [record["elapsed_s"] for record in _records(folder / "metrics.jsonl")]
    first = len(times) // WARM
    return (times[-1] - times[first]) / (len(times) - 1 - first) if len(times) >= 2 * WARM else None


def with_steps(job: Job, minutes: float, seconds: float | None) -> Job:
    """The run with as many batches as fit into `minutes`, so that its schedule ends where its time ends."""
    if seconds is None:  # nothing trains in this arm
        return job
    steps = max(round(60 * minutes / seconds), 1)
    warmup = {"warmup_steps": steps // 2} if int(job.flags.get("warmup_steps", 0)) > steps else {}
    return dataclasses.replace(job, flags={**job.flags, "max_steps": steps, **warmup})


# --- what runs came to ------------------------------------------------------------------------------------------------


def _records(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a line that a crash cut off is left out."""
    return [record for _, record in json_lines(path, skip_damaged=True)]


def read_record(run: Path) -> dict[str, Any] | None:
    """What `write_record` left in a run's folder. Raises GridError when it cannot be read."""
    path = run / RECORD
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise GridError(f"{path} cannot be read: delete the folder {run}, and that run begins anew") from error


def write_record(run: Path, flags: Mapping[str, Any], status: str, eval_n: int | None = None) -> None:
    """Notes a run's flags, whether it is `waiting`, `interrupted`, `failed` or `finished`, and n of a later evaluation.
    """
    again = {} if eval_n is None else {"eval_n": eval_n}
    write_text_aside(run / RECORD, json.dumps({"flags": flags, "status": status, **again}, indent=1), "--output")


def finished_job(job: Job, runs: Path) -> Job | None:
    """The job of a timed grid with the number of batches that its finished run had; None without such a run."""
    record = read_record(runs / job.name)
    if record is None or record["status"] != "finished":
        return None
    ours, made = ({name: value for name, value in flags.items() if name not in ("max_steps", "warmup_steps")}
                  for flags in (json.loads(json.dumps(job.flags)), record["flags"]))
    return dataclasses.replace(job, flags=record["flags"]) if ours == made else None


def run_rows(job: Job, run: Path, status: str) -> list[dict[str, Any]]:
    """One row of `COLUMNS` per evaluated task of a run; one without figures where nothing was evaluated."""
    shared: dict[str, Any] = {"arm": job.arm, "train_tasks": job.task, "seed": job.seed, "status": status,
                              "run": job.name}
    metrics = _records(run / "metrics.jsonl")
    if metrics:
        last = metrics[-1]
        shared |= {"train_minutes": last["elapsed_s"] / 60,
                   "examples_per_second": last["step"] * last.get("examples", 0) / last["elapsed_s"]}
    shared["trainable"] = trainable(run)
    path = run / "eval.csv"
    found: dict[str, dict[str, Any]] = {}
    if status == "finished" and path.exists():
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["step"].isdigit()]
        last_step = max((int(row["step"]) for row in rows), default=0)
        for row in rows:
            if int(row["step"]) != last_step or row["metric"] not in ("solved", "mean_score", "truncated"):
                continue
            entry = found.setdefault(row["task"], {**shared, "task": row["task"], "steps": last_step})
            entry[row["metric"]] = row["value"]  # of several evaluations of one checkpoint, the last
            if row["metric"] == "solved":
                entry |= {key: row[key] for key in ("n", "segments_used", "ci_low", "ci_high", "bare")}
    return list(found.values()) or [shared | {"steps": metrics[-1]["step"] if metrics else 0}]


def trainable(run: Path) -> int | None:
    """Trainable parameters of the run's newest checkpoint, from the file's header; None without one."""
    folders = sorted((run / "checkpoints").glob("step-*/training_state.safetensors"))
    if not folders:
        return None
    with open(folders[-1], "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name.startswith("raw/"))


def csv_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """The table as CSV; missing values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else "" if value is None else value
                         for key, value in row.items()})
    return text.getvalue()


def item_scores(run: Path, task: str) -> dict[str, float]:
    """Item -> 1.0 if solved, at the run's last evaluation; `overall` is all tasks."""
    lines = _records(run / "predictions.jsonl")
    last = max((line["step"] for line in lines), default=0)
    lines = [line for line in lines if line["step"] == last]
    begins = max((i for i, line in enumerate(lines) if line["id"] == lines[0]["id"]), default=0)  # of the last one
    return {f"{line['id']} {line['prompt_hash']}": float(line["score"] == 1.0) for line in lines[begins:]
            if task in ("overall", line["task"])}


@dataclass(frozen=True)
class ArmResult:
    """An arm on one evaluated task: its seeds, and how it differs from the baseline on the same items."""

    arm: str
    train_tasks: str
    task: str
    rates: dict[int, float]  # seed -> solved
    solved: Interval
    difference: Interval | None  # None for the baseline itself, or where no item was answered by both
    minutes: float | None
    steps: float | None
    trainable: int | None
    segments_used: float | None
    bare: float | None
    n: int


def summarise(rows: Sequence[Mapping[str, Any]], runs: Path, baseline: str) -> list[ArmResult]:
    """One result per training task, evaluated task and arm of finished runs, in the order of `rows`."""
    cells: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("solved") not in (None, ""):
            cells.setdefault((row["train_tasks"], row["task"], row["arm"]), []).append(row)
    scores: dict[tuple[str, str, str], dict[int, dict[str, float]]] = {
        cell: {int(row["seed"]): item_scores(runs / row["run"], cell[1]) for row in members}
        for cell, members in cells.items()
    }
    results = []
    for (trained, task, arm), members in cells.items():
        rates = {int(row["seed"]): float(row["solved"]) for row in members}
        solved = mean_interval(list(rates.values()))
        if solved.low is None:  # one seed: the interval over its items
            solved = dataclasses.replace(solved, low=float(members[0]["ci_low"]), high=float(members[0]["ci_high"]))
        else:  # t knows nothing of the ends of a rate
            solved = dataclasses.replace(solved, low=max(solved.low, 0.0), high=min(solved.high, 1.0))
        base = scores.get((trained, task, baseline))
        difference = paired_seeds(scores[trained, task, arm], base) if base and arm != baseline else None
        counts = [int(row["trainable"]) for row in members if row.get("trainable")]
        averages = [_average(members, key) for key in ("train_minutes", "steps")]
        results.append(ArmResult(arm, trained, task, rates, solved, difference, *averages,
                                 max(counts, default=None), _average(members, "segments_used"),
                                 _average(members, "bare"), min(int(row["n"]) for row in members)))
    return results


def _average(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [float(row[key]) for row in rows if row.get(key) not in (None, "")]
    return sum(values) / len(values) if values else None


def markdown(results: Sequence[ArmResult], grid: Grid, left: int) -> str:
    """The tables, one per training task and evaluated task. `left` runs are not finished yet."""
    lines = [f"# Ablation {grid.name}\n"]
    if left:
        lines.append(f"**{left} runs are not finished yet.**\n")
    tables = dict.fromkeys((result.train_tasks, result.task) for result in results)
    for trained, task in tables:
        members = [result for result in results if (result.train_tasks, result.task) == (trained, task)]
        lines.append(f"## {task}" + (f", trained on {trained.replace('+', ', ')}" if trained != task else "") + "\n")
        lines.append(f"| arm | seeds | solved, % | minus {grid.baseline}, points | minutes | steps | trainable | "
                     "segments used | n |\n|---|---|---|---|---|---|---|---|---|")
        bare = next((result.bare for result in members if result.bare is not None), None)
        if bare is not None:
            lines.append(f"| bare LLM | | {100 * bare:.1f} | | | | | | |")
        lines += [_line(result, grid.baseline) for result in members]
        lines.append("")
    lines.append("solved: mean over seeds with its 95 % t interval (one seed: Wilson interval over items). Difference: "
                 "mean over seeds, 95 % paired bootstrap over the same items and seeds of both arms; it says nothing "
                 "of other seeds.")
    budget = f"{grid.minutes:g} minutes of training per run, steps from each arm's own speed" if grid.minutes else \
        "equal steps unless an arm's flags say otherwise"
    return "\n".join([*lines, f"Budget: {budget}. Minutes are those of training alone.", ""])


def _line(result: ArmResult, baseline: str) -> str:
    difference = "reference" if result.arm == baseline else "-"
    if result.difference:
        d = result.difference
        difference = f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
    solved = f"{100 * result.solved.value:.1f} [{100 * result.solved.low:.1f}, {100 * result.solved.high:.1f}]"
    cells = [result.arm, str(len(result.rates)), solved, difference,
             *("-" if value is None else f"{value:{form}}" for value, form in (
                 (result.minutes, ".1f"), (result.steps, ",.0f"), (result.trainable, ","),
                 (result.segments_used, ".2f"), (result.n, "d")))]
    return "| " + " | ".join(cells) + " |"

