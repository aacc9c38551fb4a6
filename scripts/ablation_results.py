"""What the runs of an ablation came to: their records, one row for each run and task, and the table of the arms."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablation_grid import WARM, Grid, GridError, Job
from engine.files import json_lines, read_json, write_text_aside
from engine.intervals import Interval, mean_interval, paired_seeds

RECORD = "ablation.json"  # in each run's folder: its flags, and whether it is finished
COLUMNS = (
    *("arm", "train_tasks", "seed", "task", "status", "solved", "n", "ci_low", "ci_high", "bare", "mean_score"),
    *("truncated", "segments_used", "steps", "train_minutes", "examples_per_second", "trainable", "cpu_minutes", "run"),
)
METRICS = ("solved", "mean_score", "truncated")  # of eval.csv, each a column of its own
BESIDE_SOLVED = ("n", "segments_used", "ci_low", "ci_high", "bare")  # columns of eval.csv that go with `solved`
MEASURED = ("max_steps", "warmup_steps")  # flags that come from an arm's speed
HEADS = ("arm", "seeds", "solved, %", "minus {}, points", "minutes", "steps", "trainable", "segments used", "n")

Row = Mapping[str, Any]


# --- records ----------------------------------------------------------------------------------------------------------


def _records(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a line that a crash cut off is left out."""
    return [record for _, record in json_lines(path, skip_damaged=True)]


def read_record(run: Path) -> dict[str, Any] | None:
    """What `write_record` left in a run's folder; None where nothing is. Raises GridError when it cannot be read."""
    path = run / RECORD
    if not path.exists():
        return None
    try:
        record = read_json(path)
        if not isinstance(record, dict) or not {"flags", "status"} <= record.keys():
            raise ValueError("it is no record of a run")
    except ValueError as error:
        raise GridError(f"{path} cannot be read: delete the folder {run}, and that run begins anew") from error
    return record


def write_record(
    run: Path, flags: Mapping[str, Any], status: str, eval_n: int | None = None, cpu_s: float = 0.0
) -> None:
    """Notes how a run stands.

    Args:
        run: its folder.
        flags: those it was made with.
        status: `waiting`, `interrupted`, `failed` or `finished`.
        eval_n: items of a later evaluation; None without one.
        cpu_s: CPU seconds of the call that ended; those of earlier calls are added.
    """
    # Rewritten whole, so an earlier evaluation's n goes when the run is trained again.
    earlier = read_record(run) or {}
    record = {"flags": flags, "status": status, "cpu_s": round(earlier.get("cpu_s", 0.0) + cpu_s, 1)}
    if eval_n is not None:
        record["eval_n"] = eval_n
    write_text_aside(run / RECORD, json.dumps(record, indent=1), "--output")


def as_recorded(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags as they come back from a record: JSON has no tuples."""
    return json.loads(json.dumps(flags))


def finished_job(job: Job, runs: Path) -> Job | None:
    """The job of a timed grid with the number of batches that its finished run had; None without such a run."""
    record = read_record(runs / job.name)
    if record is None or record["status"] != "finished":
        return None

    # Apart from what the speed decides, its flags must be those of now.
    ours = as_recorded(job.flags)
    made = dict(record["flags"])
    for name in MEASURED:
        ours.pop(name, None)
        made.pop(name, None)
    if ours != made:
        return None
    return dataclasses.replace(job, flags=record["flags"])


def seconds_per_step(folder: Path) -> float | None:
    """Mean seconds of a batch in a finished calibration, its first ones left out; None where nothing was trained."""
    # A calibration logs every batch.
    times = [record["elapsed_s"] for record in _records(folder / "metrics.jsonl")]
    if len(times) < 2 * WARM:
        return None

    first = len(times) // WARM
    return (times[-1] - times[first]) / (len(times) - 1 - first)


# --- rows -------------------------------------------------------------------------------------------------------------


def run_rows(job: Job, run: Path, status: str) -> list[dict[str, Any]]:
    """One row of `COLUMNS` per evaluated task of a run; one without figures where nothing was evaluated."""
    shared: dict[str, Any] = {
        "arm": job.arm,
        "train_tasks": job.trained,
        "seed": job.seed,
        "status": status,
        "run": job.name,
        "trainable": trainable(run),
    }

    # Of every process that worked at it; a record of an older version has none.
    cpu_s = (read_record(run) or {}).get("cpu_s")
    if cpu_s:
        shared["cpu_minutes"] = cpu_s / 60

    # What training itself logged last; an arm without training has logged nothing.
    steps = 0
    metrics = _records(run / "metrics.jsonl")
    if metrics:
        last = metrics[-1]
        steps = last["step"]
        shared["train_minutes"] = last["elapsed_s"] / 60
        shared["examples_per_second"] = steps * last.get("examples", 0) / last["elapsed_s"]

    rows = []
    if status == "finished" and (run / "eval.csv").exists():
        rows = _evaluated(run / "eval.csv", shared)
    return rows or [shared | {"steps": steps}]


def _evaluated(path: Path, shared: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each task of the last evaluation in eval.csv, on top of what all of them share."""
    with open(path, encoding="utf-8", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["step"].isdigit()]  # a crash may cut a line off
    last_step = max((int(line["step"]) for line in lines), default=0)

    # Of several evaluations of one checkpoint the last one counts, so later lines replace earlier ones.
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        if int(line["step"]) != last_step or line["metric"] not in METRICS:
            continue
        row = rows.setdefault(line["task"], shared | {"task": line["task"], "steps": last_step})
        row[line["metric"]] = line["value"]
        if line["metric"] == "solved":
            for name in BESIDE_SOLVED:
                row[name] = line[name]
    return list(rows.values())


def trainable(run: Path) -> int | None:
    """Trainable parameters of the run's newest checkpoint, from the file's header; None without one."""
    files = sorted((run / "checkpoints").glob("step-*/training_state.safetensors"))
    if not files:
        return None

    # A safetensors file begins with the length of its header in eight bytes, then JSON.
    with open(files[-1], "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name.startswith("raw/"))


def item_scores(run: Path, task: str) -> dict[str, float]:
    """Item -> 1.0 if solved, else 0.0, at the run's last evaluation; `overall` is all tasks."""
    lines = _records(run / "predictions.jsonl")
    last_step = max((line["step"] for line in lines), default=0)
    lines = [line for line in lines if line["step"] == last_step]

    # One checkpoint may be evaluated several times; the last time begins where the first item stands last.
    begin = 0
    for place, line in enumerate(lines):
        if line["id"] == lines[0]["id"]:
            begin = place

    scores = {}
    for line in lines[begin:]:
        if task in ("overall", line["task"]):
            solved = line["score"] == 1.0 and not line.get("refused", False)
            # Not by the number: runs that leave out questions they trained on count the others differently.
            scores[f"{line['task']} {line['prompt_hash']}"] = float(solved)
    return scores


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArmResult:
    """An arm on one evaluated task: its seeds, and how it differs from the baseline on the same items.

    rates: seed -> solved, 0 to 1.
    solved: mean over seeds with its t interval; of one seed, the Wilson interval over its items.
    difference: from the baseline, paired over items and seeds; None for the baseline itself, or where no item was
        answered by both.
    minutes, steps, segments_used, bare: means over seeds; None where nothing is known.
    trainable: parameters; None where nothing is known.
    n: items, of the seed with the fewest.
    cpu_minutes: mean over seeds of a run's CPU time, start and evaluation included; None where nothing is known.
    """

    arm: str
    train_tasks: str
    task: str
    rates: dict[int, float]
    solved: Interval
    difference: Interval | None
    minutes: float | None
    steps: float | None
    trainable: int | None
    segments_used: float | None
    bare: float | None
    n: int
    cpu_minutes: float | None = None


def summarise(rows: Sequence[Row], runs: Path, baseline: str) -> list[ArmResult]:
    """One result per training task, evaluated task and arm of finished runs, in the order of `rows`."""
    # A cell of the tables is an arm on one task; its members are its seeds.
    cells: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.get("solved") not in (None, ""):
            cells.setdefault((row["train_tasks"], row["task"], row["arm"]), []).append(row)

    # Seed -> scores of the items, which differences are paired over.
    scores: dict[tuple[str, str, str], dict[int, dict[str, float]]] = {}
    for cell, members in cells.items():
        scores[cell] = {int(row["seed"]): item_scores(runs / row["run"], cell[1]) for row in members}

    results = []
    for (trained, task, arm), members in cells.items():
        difference = None
        base = scores.get((trained, task, baseline))
        if base and arm != baseline:
            difference = paired_seeds(scores[trained, task, arm], base)
        results.append(_result(arm, trained, task, members, difference))

    return results


def _result(arm: str, trained: str, task: str, members: Sequence[Row], difference: Interval | None) -> ArmResult:
    """The result of an arm from the rows of its seeds."""
    # Rows come from CSV, so figures are text.
    rates = {int(row["seed"]): float(row["solved"]) for row in members}
    counts = [int(row["trainable"]) for row in members if row.get("trainable")]
    return ArmResult(
        arm=arm,
        train_tasks=trained,
        task=task,
        rates=rates,
        solved=_over_seeds(list(rates.values()), members[0]),
        difference=difference,
        minutes=_average(members, "train_minutes"),
        steps=_average(members, "steps"),
        trainable=max(counts, default=None),
        segments_used=_average(members, "segments_used"),
        bare=_average(members, "bare"),
        n=min(int(row["n"]) for row in members),
        cpu_minutes=_average(members, "cpu_minutes"),
    )


def _over_seeds(rates: list[float], row: Row) -> Interval:
    """Mean of the seeds' rates with its interval; a single seed has that of its row, over its items."""
    solved = mean_interval(rates)
    if solved.low is None:
        return dataclasses.replace(solved, low=float(row["ci_low"]), high=float(row["ci_high"]))
    return dataclasses.replace(solved, low=max(solved.low, 0.0), high=min(solved.high, 1.0))  # t knows no ends


def _average(rows: Sequence[Row], key: str) -> float | None:
    values = [float(row[key]) for row in rows if row.get(key) not in (None, "")]
    return sum(values) / len(values) if values else None


def markdown(results: Sequence[ArmResult], grid: Grid, left: int) -> str:
    """The tables, one per training task and evaluated task. `left` runs are not finished yet."""
    lines = [f"# Ablation {grid.name}\n"]
    if left:
        lines.append(f"**{left} runs are not finished yet.**\n")

    tables: dict[tuple[str, str], list[ArmResult]] = {}
    for result in results:
        tables.setdefault((result.train_tasks, result.task), []).append(result)
    for (trained, task), members in tables.items():
        title = title_of(trained, task, "{}, trained on {}")
        lines += [f"## {title}\n", *_table(members, grid.baseline), ""]

    lines.append(
        "solved: mean over seeds with its 95 % t interval (one seed: Wilson interval over items). Difference: mean "
        "over seeds, 95 % paired bootstrap over the same items and seeds of both arms; it says nothing of other seeds."
    )
    budget = "equal steps unless an arm's flags say otherwise"
    if grid.minutes:
        budget = f"{grid.minutes:g} minutes of training per run, steps from each arm's own speed"
    return "\n".join([*lines, f"Budget: {budget}. Minutes are those of training alone.", ""])


def title_of(trained: str, task: str, form: str) -> str:
    """What a table is of: the task, with its difficulty; what was `trained` as well, where it was something else."""
    if trained.partition("@")[0] == task:
        return trained
    return form.format(task, trained.replace("+", ", "))


def _table(members: Sequence[ArmResult], baseline: str) -> list[str]:
    """A Markdown table of the arms on one task, the bare LLM first."""
    lines = [_line([head.format(baseline) for head in HEADS]), "|" + "---|" * len(HEADS)]

    # The bare LLM answered the same items beside every arm; the first that has it will do.
    for result in members:
        if result.bare is not None:
            lines.append(f"| bare LLM | | {100 * result.bare:.1f} | | | | | | |")
            break

    for result in members:
        lines.append(_line(_cells(result, baseline)))
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(result: ArmResult, baseline: str) -> list[str]:
    """An arm's line of the table."""
    solved = result.solved
    return [
        result.arm,
        str(len(result.rates)),
        f"{100 * solved.value:.1f} [{100 * solved.low:.1f}, {100 * solved.high:.1f}]",
        _difference(result, baseline),
        _number(result.minutes, ".1f"),
        _number(result.steps, ",.0f"),
        _number(result.trainable, ","),
        _number(result.segments_used, ".2f"),
        _number(result.n, "d"),
    ]


def _difference(result: ArmResult, baseline: str) -> str:
    """What the arm has above the baseline, in points."""
    if result.difference:
        value = result.difference
        return f"{100 * value.value:+.1f} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"
    return "reference" if result.arm == baseline else "-"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
