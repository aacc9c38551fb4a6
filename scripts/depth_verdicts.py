"""Whether depth pays: a deep arm against the single pass on each task and difficulty, the verdict, the tables."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import options  # noqa: E402
from ablation_grid import Grid, GridError, jobs_of, plain_flags  # noqa: E402
from ablation_results import ArmResult, title_of  # noqa: E402
from depth_settings import Setting  # noqa: E402
from engine.intervals import Interval, mean_interval, wilson  # noqa: E402

ENOUGH_SEEDS = 3  # with fewer nothing is called a win
SOLVED = 0.98  # from which there is nothing left to gain
# Flags that decide how many examples are seen, and which: alike in every arm.
EXAMPLES = ("batch_size", "max_steps", "epochs", "max_minutes", "train_n", "curriculum", "task_config", "eval_n")

COLUMNS = (
    *("trained", "task", "arm", "segments", "seeds", "n", "chance", "prompt_tokens", "solved", "single_pass"),
    *("one_segment", "gain", "seeds_low", "seeds_high", "items_low", "items_high", "parameters"),
    *("parameters_single_pass", "examples", "cpu_minutes", "cpu_minutes_single_pass", "verdict"),
)
HEADS = (
    *("task", "single pass, %", "1 segment, %", "N segments, %", "gain, points [seeds] [items]", "chance, %", "seeds"),
    *("parameters, single pass / N", "CPU minutes, single pass / N", "verdict"),
)


@dataclass(frozen=True)
class Comparison:
    """A deep arm against the single pass on one evaluated task.

    trained: task, or task@difficulty; task: what was evaluated.
    arm, segments: the deep arm; 0 segments in a refused setting.
    deep, base, one: the arms' results; None where no run is finished, `one` also where the grid has no such arm.
    over_seeds: deep minus base, t interval over the seeds that both have; None without such a seed.
    examples: seen in training by either.
    setting: how the items are.
    refused: why nothing was measured; None where it was.
    """

    trained: str
    task: str
    setting: Setting
    arm: str = ""
    segments: int = 0
    deep: ArmResult | None = None
    base: ArmResult | None = None
    one: ArmResult | None = None
    over_seeds: Interval | None = None
    examples: int = 0
    refused: str | None = None


# --- which arm is which -----------------------------------------------------------------------------------------------


def segments_of(grid: Grid) -> dict[str, int]:
    """Arm -> its segments; 0 for arms without recurrence.

    Raises:
        GridError: no arm has 2 segments or more, or the arms do not see equal examples.
    """
    # Every arm once: its flags are alike on all tasks and seeds but for those two.
    flags = {}
    for job in jobs_of(grid):
        flags.setdefault(job.arm, job.flags)
    segments = {}
    for arm, own in flags.items():
        is_recurrent = own.get("adapter", "hrm") == "hrm"
        segments[arm] = int(_flag(own, "segments")) if is_recurrent else 0

    # What would make the comparison another one.
    problems = []
    if grid.minutes:
        problems.append("minutes: arms are compared at equal examples: leave it out, and give max_steps")
    if segments[grid.baseline] > 1:
        problems.append(f"baseline {grid.baseline} has {segments[grid.baseline]} segments: name the single pass")
    if max(segments.values()) < 2:
        problems.append("no arm has segments: give one of them 2 or more")
    for name in EXAMPLES:
        if len({str(_flag(own, name)) for own in flags.values()}) > 1:
            problems.append(f"{name} differs between the arms, which are compared at equal examples: set it in common")
    if problems:
        raise GridError("\n".join(problems))
    return segments


def _flag(flags: Mapping[str, Any], name: str) -> Any:
    return plain_flags(flags).get(name, options.FIND[name].default)


# --- comparisons ------------------------------------------------------------------------------------------------------


def comparisons(
    results: Sequence[ArmResult], grid: Grid, settings: Mapping[str, Setting], refused: Mapping[str, str]
) -> list[Comparison]:
    """Every deep arm on everything it was evaluated on; refused settings and those without a finished run as well.

    The tasks where depth pays come first.
    """
    segments = segments_of(grid)
    examples = int(_flag(grid.common, "max_steps")) * int(_flag(grid.common, "batch_size"))
    cells = {(result.train_tasks, result.task, result.arm): result for result in results}
    deep_arms = [arm for arm, count in segments.items() if count > 1]
    one = next((arm for arm, count in segments.items() if count == 1 and arm != grid.baseline), "")

    found = []
    for trained, setting in settings.items():
        if trained in refused:
            found.append(Comparison(trained, trained, setting, refused=refused[trained]))
            continue

        tasks = dict.fromkeys(task for where, task, _ in cells if where == trained) or [trained]
        for task in tasks:
            base = cells.get((trained, task, grid.baseline))
            for arm in deep_arms:
                deep = cells.get((trained, task, arm))
                found.append(
                    Comparison(
                        trained=trained,
                        task=task,
                        setting=setting,
                        arm=arm,
                        segments=segments[arm],
                        deep=deep,
                        base=base,
                        one=cells.get((trained, task, one)),
                        over_seeds=_over_seeds(deep, base),
                        examples=examples,
                    )
                )
    return sorted(found, key=_place)


def _over_seeds(deep: ArmResult | None, base: ArmResult | None) -> Interval | None:
    """Mean of the seeds' differences."""
    if deep is None or base is None:
        return None

    shared = sorted(deep.rates.keys() & base.rates.keys())
    return mean_interval([deep.rates[seed] - base.rates[seed] for seed in shared]) if shared else None


# --- verdicts ---------------------------------------------------------------------------------------------------------

# What is at the top of the tables, and what each verdict begins with.
PAYS = "depth pays"
AHEAD = "depth is ahead so far"
OPEN = "no difference shown"
NOTHING_TO_GAIN = "nothing to gain"
BEHIND = "depth is behind so far"
COSTS = "depth costs"
NOTHING_LEARNT = "nothing learnt"
UNFAIR = "no fair comparison"
MISSING = "not finished"
NOT_MEASURED = "not measured"
ORDER = (PAYS, AHEAD, OPEN, NOTHING_TO_GAIN, BEHIND, COSTS, NOTHING_LEARNT, UNFAIR, MISSING, NOT_MEASURED)


def verdict(found: Comparison) -> str:
    """What the comparison shows, in one line that begins with one of `ORDER`."""
    deep, base = found.deep, found.base

    # What cannot be compared.
    if found.refused:
        return f"{NOT_MEASURED}: {found.refused}"
    if deep is None or base is None or found.over_seeds is None:
        return MISSING
    if (deep.trainable or 0) > (base.trainable or 0):
        return f"{UNFAIR}: {found.arm} has {deep.trainable:,} parameters, the single pass {base.trainable:,}"

    # Before any gain: is there something to be seen?
    if not any(_above(result, found.setting.chance) for result in (deep, base)):
        return f"{NOTHING_LEARNT}: neither arm is above chance ({100 * found.setting.chance:.0f} %); train for longer"
    return _of_gain(found, deep, base)


def _of_gain(found: Comparison, deep: ArmResult, base: ArmResult) -> str:
    """The verdict where both arms can be compared."""
    seeds = found.over_seeds
    items = deep.difference
    points = f"{100 * seeds.value:+.1f} points"
    enough = seeds.n >= ENOUGH_SEEDS

    # A win, or a loss: over seeds as well as over items.
    if enough and items and min(seeds.low, items.low) > 0:
        return f"{PAYS}: {points} over {seeds.n} seeds"
    if enough and items and max(seeds.high, items.high) < 0:
        return f"{COSTS}: {points} over {seeds.n} seeds"
    if min(deep.solved.value, base.solved.value) >= SOLVED:
        return f"{NOTHING_TO_GAIN}: both solve at least {100 * SOLVED:.0f} %"

    # Fewer seeds show where to look, no more.
    if not enough and items and items.low > 0:
        return f"{AHEAD}: {points}; {ENOUGH_SEEDS} seeds would tell"
    if not enough and items and items.high < 0:
        return f"{BEHIND}: {points}; {ENOUGH_SEEDS} seeds would tell"
    return f"{OPEN}: {points}"


def _above(result: ArmResult, chance: float) -> bool:
    """Whether the arm solves more than chance does: the mean of its seeds as a share of the items, Wilson's low end."""
    return wilson(round(result.solved.value * result.n), result.n)[0] > chance


def _place(found: Comparison) -> tuple[int, float]:
    """Where it stands in the tables: the best verdict first, then the largest gain."""
    kind = verdict(found).partition(":")[0]
    return ORDER.index(kind), -(found.over_seeds.value if found.over_seeds else 0.0)


# --- tables -----------------------------------------------------------------------------------------------------------


def rows_of(found: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Rows of `COLUMNS`; shares are 0 to 1, gains as well."""
    rows = []
    for one in found:
        row: dict[str, Any] = {
            "trained": one.trained,
            "task": one.task,
            "arm": one.arm,
            "segments": one.segments or None,
            "n": one.setting.n,
            "chance": one.setting.chance,
            "prompt_tokens": one.setting.prompt_tokens,
            "verdict": verdict(one),
        }
        if one.deep:
            row |= {
                "solved": one.deep.solved.value,
                "parameters": one.deep.trainable,
                "cpu_minutes": one.deep.cpu_minutes,
                "n": one.deep.n,
                "examples": one.examples,
            }

        if one.base:
            row |= {
                "single_pass": one.base.solved.value,
                "parameters_single_pass": one.base.trainable,
                "cpu_minutes_single_pass": one.base.cpu_minutes,
            }

        if one.one:
            row["one_segment"] = one.one.solved.value

        if one.over_seeds:
            seeds, items = one.over_seeds, one.deep.difference
            row |= {"gain": seeds.value, "seeds": seeds.n, "seeds_low": seeds.low, "seeds_high": seeds.high}
            row |= {"items_low": items.low, "items_high": items.high} if items else {}

        rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `rows_of` as a table, and a line of verdict for each."""
    if not rows:
        return "Nothing was measured.\n"

    lines = ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
    for row in rows:
        lines.append("| " + " | ".join(_cells(row)) + " |")

    lines.append(
        "\nSolved: of generated answers, mean over seeds. Gain: N segments minus the single pass; first bracket 95 % t "
        "interval over seeds, second 95 % paired bootstrap over items. Chance: the best constant answer. A win needs "
        f"{ENOUGH_SEEDS} seeds and both intervals above 0.\n"
    )
    lines += [f"- {_name(row)}: {row['verdict']}" for row in rows]
    return "\n".join([*lines, ""])


def _name(row: Mapping[str, Any]) -> str:
    """What was trained on, and what was evaluated where that is another task."""
    return title_of(row["trained"], row["task"], "{}, trained on {}")


def _cells(row: Mapping[str, Any]) -> list[str]:
    """A row's cells under `HEADS`."""
    # The gain with both intervals, and how many segments it is of.
    gain = "-"
    if row.get("gain") is not None:
        gain = f"{100 * row['gain']:+.1f}{_ends(row, 'seeds')}{_ends(row, 'items')}"

    solved = _percent(row.get("solved"))
    if row.get("segments"):
        solved += f" (N = {row['segments']})"

    return [
        _name(row),
        _percent(row.get("single_pass")),
        _percent(row.get("one_segment")),
        solved,
        gain,
        _percent(row["chance"]),
        str(row.get("seeds") or "-"),
        _pair(row, "parameters_single_pass", "parameters", ","),
        _pair(row, "cpu_minutes_single_pass", "cpu_minutes", ".1f"),
        row["verdict"].partition(":")[0],
    ]


def _ends(row: Mapping[str, Any], what: str) -> str:
    """An interval in points; a single seed has none."""
    low = row.get(f"{what}_low")
    high = row.get(f"{what}_high")

    return " [-]" if low is None or high is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _pair(row: Mapping[str, Any], first: str, second: str, form: str) -> str:
    """Two figures with a slash."""
    figures = []

    for name in (first, second):
        value = row.get(name)
        figures.append("-" if value is None else f"{value:{form}}")

    return " / ".join(figures)
