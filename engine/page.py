"""A run as one HTML page that needs nothing else: settings, curves, a table of each task, samples, segments.

The page is made from what the run has recorded (`engine.run_records`), so any run has one, also a stopped one. Jinja2
writes it and escapes every text, since questions and answers may hold anything; no script is in it, nothing is loaded.
"""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import options
from engine.figures import DASHES, draw_losses, draw_tasks, new_figure, quiet_matplotlib, read_losses, read_solved
from engine.files import json_lines, write_text_aside
from engine.intervals import wilson
from engine.protocol import measured_by_others, typed
from engine.report import percent
from engine.run_records import Item, RunRecords, read_run, spread

PAGE = "report.html"
TEMPLATE = Path(__file__).resolve().parent.parent / "assets" / "report.html"
SAMPLES = 8  # of each kind
MOST_POINTS = 600  # of a curve
# Title of a panel -> the keys of metrics.jsonl that it shows, where a run has logged any.
SERIES = {
    "segments of a batch": ("segments",),
    "gate": ("gate_mean", "gate_min", "gate_max", "gate"),
    "halting": ("halt_probability", "halt_deviation", "halt_sum_mean"),
    "reward": ("reward",),
}
# Metrics of an evaluation that say what gate and halting do.
GATES = ("gate_mean", "gate_min", "gate_max", "halt_sum_mean", "halt_sum_std", "z_norm")
ADAPTERS = {"hrm": "HRM", "lora": "LoRA", "prompt": "prompt tuning", "mlp": "single pass", "none": "nothing"}


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of the table of tasks: who answers, and what was solved. All cells are text for people."""

    task: str
    n: str
    who: str
    solved: str
    strict: str = ""
    extracted: str = ""
    cut: str = ""
    gain: str = ""
    chance: str = ""


def names_of(flags: Mapping[str, Any]) -> tuple[str, str]:
    """(the model, what it is compared with) in words."""
    compared = "bare LLM"
    if flags.get("objective") == "grpo":
        compared = "start of the stage"
    arch = flags.get("arch", "addon")
    if arch == "hybrid":
        return "hybrid", "gate shut"
    if arch == "enhanced":
        return "planner/worker LM", compared
    return f"LLM + {ADAPTERS.get(flags.get('adapter', 'hrm'), 'add-on')}", compared


def task_lines(records: RunRecords) -> list[Line]:
    """The table of tasks: for each the lines of what the model is compared with, and the model's."""
    model, compared = names_of(records.flags)
    lines = []
    for task, rows in records.newest().items():
        if "solved" not in rows:
            continue
        lines += compared_lines(task, rows, compared, protocol_flags(records, rows).get("few_shot", 0))
        gain = ""
        if "gain" in rows:
            gain = f"{100 * rows['gain']['value']:+.1f} over the best of them"
        chance = rows["solved"].get("chance")
        lines.append(Line(
            "" if rows["solved"]["bare"] is not None else task,
            shown_count(rows["solved"]["n"]),
            model,
            share(rows, "solved"),
            share(rows, "solved_strict"),
            share(rows, "solved_extracted"),
            count(rows, "truncated"),
            gain,
            "" if chance is None else percent(chance),
        ))

    return lines


def protocol_flags(records: RunRecords, rows: Mapping[str, Any]) -> Mapping[str, Any]:
    """The flags of an evaluation with these rows; the run's own where the evaluation's were not recorded."""
    protocol = records.protocol(rows)
    return protocol.flags if protocol else records.flags


def readings(records: RunRecords) -> str:
    """The values of --answer_from in the newest evaluations."""
    tasks = [rows for rows in records.newest().values() if "solved" in rows]
    return ", ".join(dict.fromkeys(protocol_flags(records, rows).get("answer_from", "text") for rows in tasks))


def other_protocols(records: RunRecords) -> list[tuple[str, str]]:
    """(tasks, flags as typed) of newest evaluations that were not made by the run's own protocol."""
    tasks: dict[str, list[str]] = {}
    for task, rows in records.newest().items():
        protocol = records.protocol(rows)
        other = protocol.other_than(records.flags) if protocol else {}
        if other:
            tasks.setdefault(typed(other), []).append(task)
    return [(", ".join(names), text) for text, names in tasks.items()]


def compared_lines(task: str, rows: Mapping[str, Any], compared: str, shots: int) -> list[Line]:
    """The lines of what the model is compared with: none, one, or two with --few_shot."""
    if rows["solved"]["bare"] is None:
        return []
    n = shown_count(rows["solved"]["n"])
    lines = [Line(
        task, n, compared, share(rows, "solved", "bare"), share(rows, "solved_strict", "bare"),
        share(rows, "solved_extracted", "bare"), count(rows, "truncated", "bare"),
    )]
    if "bare_few_shot_strict" in rows:
        lines.append(Line(
            "", n, f"{compared}, {shots}-shot", "", share(rows, "bare_few_shot_strict"),
            share(rows, "bare_few_shot_extracted"), count(rows, "bare_few_shot_truncated"),
        ))

    return lines


def share(rows: Mapping[str, Any], metric: str, column: str = "value") -> str:
    """A share with its Wilson interval; "" where it was not recorded."""
    row = rows.get(metric)
    if row is None or row[column] is None:
        return ""
    value = row[column]
    if column == "value" and row["ci_low"] is not None:
        return percent(value, (row["ci_low"], row["ci_high"]))
    n = int(row["n"] or 0)
    return percent(value, wilson(round(value * n), n) if n else None)


def count(rows: Mapping[str, Any], metric: str, column: str = "value") -> str:
    """How many items a share is of; "" where it was not recorded."""
    row = rows.get(metric)
    if row is None or row[column] is None or row["n"] is None:
        return ""
    return shown_count(row[column] * row["n"])


def shown_count(number: float | None) -> str:
    """A count for people."""
    return "" if number is None else f"{number:.0f}"


def metric_lines(records: RunRecords) -> list[list[str]]:
    """Every metric of the newest evaluation of each task: task, metric, value, interval, n, compared with."""
    lines = []
    for task, rows in records.newest().items():
        for metric, row in rows.items():
            interval = ""
            if row["ci_low"] is not None and row["ci_high"] is not None:
                interval = f"[{row['ci_low']:.4g}, {row['ci_high']:.4g}]"
            bare = "" if row["bare"] is None else f"{row['bare']:.4g}"
            cells = [task, metric, f"{row['value']:.4g}", interval, shown_count(row["n"]), bare]
            lines.append([*cells, f"{row['step']:.0f}"])

    return lines


def paired_lines(items: Sequence[Item]) -> list[tuple[str, int, int, int, int]]:
    """(task, both right, right by the model alone, by the bare LLM alone, neither) of tasks that are compared."""
    tasks: dict[str, Counter] = {}
    for item in items:
        if item.bare_solved is not None:
            tasks.setdefault(item.task, Counter())[item.solved, item.bare_solved] += 1
    lines = []
    for task, counts in tasks.items():
        both = counts[True, True]
        lines.append((task, both, counts[True, False], counts[False, True], counts[False, False]))

    return lines


def segment_lines(items: Sequence[Item]) -> list[tuple[str, int, float]]:
    """(segments, items, share solved) of the answers that used so many; empty where no answer used any."""
    used: dict[float, list[bool]] = {}
    for item in items:
        if item.segments:
            used.setdefault(item.segments, []).append(item.solved)
    return [(f"{segments:g}", len(solved), sum(solved) / len(solved)) for segments, solved in sorted(used.items())]


def gate_lines(records: RunRecords) -> list[tuple[str, str, str]]:
    """(task or split, metric, value) of gate and halting at the newest evaluation."""
    lines = []
    for task, rows in records.newest().items():
        for metric in GATES:
            if metric in rows:
                lines.append((task, metric, f"{rows[metric]['value']:.4g}"))
    return lines


def sample_groups(items: Sequence[Item], most: int) -> list[tuple[str, int, list[Item]]]:
    """(heading, how many there are, a few of them) of the items right, wrong and changed."""
    kinds = {
        "Right, where the bare LLM was wrong": [item for item in items if item.gained],
        "Wrong, where the bare LLM was right": [item for item in items if item.lost],
        "Right": [item for item in items if item.solved and not item.gained],
        "Wrong": [item for item in items if not item.solved and not item.lost],
    }
    return [(heading, len(found), spread(found, most)) for heading, found in kinds.items() if found]


def setting_groups(flags: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, list[tuple[str, str]]]]]:
    """(the flags that are not at their default, all flags by their heading), each flag as (name, value)."""
    arch = flags.get("arch", "addon")
    changed = []
    groups: dict[str, list[tuple[str, str]]] = {}
    for flag in options.FLAGS:
        if flag.name not in flags:
            continue
        value = flags[flag.name]
        shown = "none" if value is None else str(value)
        groups.setdefault(flag.group, []).append((flag.name, shown))
        if value != flag.default_in(arch):
            changed.append((flag.name, shown))

    return changed, list(groups.items())


# --- curves -----------------------------------------------------------------------------------------------------------


def curves(records: RunRecords) -> str:
    """Loss, solved rate and what else was logged, as one <svg>; "" where nothing was."""
    losses = thinned(read_losses(records.folder / "metrics.jsonl"))
    tasks = read_solved(records.csv_path, records.run, measured_by_others(records.folder))
    series = read_series(records.folder / "metrics.jsonl")
    count = bool(losses) + bool(tasks) + len(series)
    if not count:
        return ""

    # Text stays text, and a dollar sign in a task's name is no formula.
    quiet_matplotlib()
    import matplotlib

    columns = min(count, 3)
    with matplotlib.rc_context({"svg.fonttype": "none", "text.parse_math": False, "svg.hashsalt": PAGE}):
        figure, panels = new_figure(columns, -(-count // columns), width=4.6, height=3.4)
        unused = iter(panels)
        if losses:
            draw_losses(next(unused), losses)
        if tasks:
            draw_tasks(next(unused), tasks)
        for title, lines in series.items():
            draw_series(next(unused), title, lines)
        for axes in unused:
            axes.set_visible(False)
        for axes in panels:
            axes.grid(alpha=0.3)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})

    return text.getvalue()[text.getvalue().index("<svg") :]  # without the XML head, which HTML has not


def thinned(points: Sequence[Any]) -> list[Any]:
    """At most about `MOST_POINTS` of the points, evenly taken."""
    return list(points[:: -(-len(points) // MOST_POINTS) or 1])


def read_series(path: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Title of a panel -> key -> (step, value) pairs of a metrics.jsonl; see `SERIES`."""
    found: dict[str, list[tuple[float, float]]] = {}
    wanted = [key for keys in SERIES.values() for key in keys]
    for _, record in json_lines(path, skip_damaged=True):
        if not isinstance(record, dict):
            continue
        for key in wanted:
            if isinstance(record.get(key), int | float) and isinstance(record.get("step"), int):
                found.setdefault(key, []).append((record["step"], float(record[key])))

    panels = {}
    for title, keys in SERIES.items():
        lines = {key: thinned(found[key]) for key in keys if key in found}
        if lines:
            panels[title] = lines

    return panels


def draw_series(axes: Any, title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Each line by its key, told apart by dash and tone."""
    for index, (key, points) in enumerate(lines.items()):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=str(0.25 * index), linestyle=DASHES[index], label=key)
    axes.set(title=title, xlabel="step")
    axes.legend(fontsize=8)


# --- the page ---------------------------------------------------------------------------------------------------------


def page(records: RunRecords, most: int = SAMPLES) -> str:
    """The HTML of a run, with at most `most` samples of each kind."""
    import jinja2
    from markupsafe import Markup

    changed, groups = setting_groups(records.flags)
    seconds = max((row["elapsed_s"] or 0 for row in records.rows), default=0)
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    model, compared = names_of(records.flags)

    return template.render(
        title=records.folder.resolve().name,
        model=model,
        compared=compared,
        host=records.flags.get("model_name"),
        reading=readings(records),
        others=other_protocols(records),
        records=records,
        minutes=seconds / 60,
        changed=changed,
        groups=groups,
        curves=Markup(curves(records)),  # matplotlib has escaped its texts
        tasks=task_lines(records),
        metrics=metric_lines(records),
        paired=paired_lines(records.items),
        segments=segment_lines(records.items),
        gates=gate_lines(records),
        samples=sample_groups(records.items, most),
    ) + "\n"


def write_page(
    folder: Path, csv_path: Path | None = None, to: Path | None = None, most: int = SAMPLES
) -> Path:
    """Writes the page of the run in `folder`; `to` None: `report.html` in it. Returns where it is.

    Raises:
        ValueError: `read_run` refuses the folder, or the page cannot be written.
        OSError: a record cannot be read.
    """
    place = to or Path(folder) / PAGE
    write_text_aside(place, page(read_run(folder, csv_path), most), "--to")
    return place


def page_of_run(folder: Path, csv_path: Path | None = None) -> Path | None:
    """`write_page` at the end of a run, which no page may fail: what goes wrong is a warning, and there is None."""
    try:
        return write_page(folder, csv_path)
    except Exception as error:  # of whatever kind: the run is done, and its records are whole
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        print(f"WARNING: the page of the run could not be written: {reason}", file=sys.stderr)
        return None
