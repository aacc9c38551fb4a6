"""Ablations: a grid of arms x tasks x seeds, each a run of `train.py`.

A grid is YAML:

    arms: {default: {}, grb: {injector: grb}}   flags of train.py that each arm adds
    tasks: [chain_sum, gcd+lcm]                 each trained by itself; + joins tasks that are trained together, and
                                                `data` stands for the own data that `common` names (data: rows.jsonl)
    seeds: [0, 1, 2]
    common: {task_config: small, eval_n: 512}   flags of every run
    baseline: default                           the arm that others are compared with (the first where none is named)
    difficulties:                               settings of a task, each trained and compared by itself; without any,
      toy_chain: {short: {max_steps: 4}}        a task is trained as `task_config` says
    steps: {chain_sum: {default: 900}}          batches of an arm on a task, in place of its flags' max_steps
    minutes: 5                                  equal training time: each arm's max_steps comes from its own speed
    calibration_steps: 40                       batches of the short run that measures it
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import options
from own_tasks.trusted import functions_of, refusal
from reasoning_gym_wrapper import task_problems

# What the runner sets itself, or what would make runs of one grid incomparable.
OWN = {"run_name", "resume", "eval_only", "dry_run", "reset_progress", "config", "task", "tasks", "seed", "save_dir",
       "log_csv", "num_threads"}
LENGTH = {"max_steps", "epochs", "max_minutes"}  # with `minutes` the runner sets the length, too
NAME = re.compile(r"[A-Za-z0-9][\w.=+-]*")
DATA = "data"  # the task that stands for own data
WARM = 4  # the first 1 / WARM of a calibration's batches is not timed


class GridError(ValueError):
    """A grid that cannot be run; one problem a line."""


@dataclass(frozen=True)
class Grid:
    """What a grid file says.

    name: the file's, without its suffix.
    arms: name -> flags that the arm adds to `common`.
    tasks: names, or several joined by + that are trained together.
    baseline: the arm that others are compared with.
    difficulties: task -> name -> the task's config there; each is trained and compared by itself.
    steps: task -> arm -> `max_steps` of its runs there; others have what their flags say.
    minutes: training time of each run; None: its length is what its flags or `steps` say.
    calibration_steps: batches of the run that measures an arm's speed.
    """

    name: str
    arms: dict[str, dict[str, Any]]
    tasks: list[str]
    seeds: list[int]
    common: dict[str, Any] = field(default_factory=dict)
    baseline: str = ""
    difficulties: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    steps: dict[str, dict[str, int]] = field(default_factory=dict)
    minutes: float | None = None
    calibration_steps: int = 40


@dataclass(frozen=True)
class Job:
    """One run: an arm on one task (or several joined by +), at a difficulty where the grid names any, with one seed."""

    arm: str
    task: str
    seed: int
    flags: dict[str, Any]
    difficulty: str = ""

    @property
    def name(self) -> str:
        """The run's folder."""
        return f"{self.arm}--{self.trained}--seed{self.seed}"

    @property
    def trained(self) -> str:
        """What it is trained on: `task`, or `task@difficulty`."""
        return f"{self.task}@{self.difficulty}" if self.difficulty else self.task

    @property
    def steps(self) -> int:
        """Batches of the run; 0 where its flags do not fix them."""
        return int(self.flags.get("max_steps", 0))


# --- what a value may be ----------------------------------------------------------------------------------------------


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_flags(value: Any) -> bool:
    return isinstance(value, dict)


def _are_arms(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(flags, dict | None) for flags in value.values())


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _are_seeds(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_whole, value))


def _are_difficulties(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return all(isinstance(settings, dict) and all(map(_is_flags, settings.values())) for settings in value.values())


def _are_steps(value: Any) -> bool:
    if not isinstance(value, dict) or not all(map(_is_flags, value.values())):
        return False
    return all(_is_whole(number) and number > 0 for arms in value.values() for number in arms.values())


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_length(value: Any) -> bool:
    return _is_whole(value) and value >= 2 * WARM


# Key of a grid file -> (what it holds, for people; whether a value is that).
KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "arms": ("a mapping of arm names to flags", _are_arms),
    "tasks": ("a list of task names", _are_names),
    "seeds": ("a list of whole numbers", _are_seeds),
    "common": ("a mapping of flags", _is_flags),
    "baseline": ("the name of an arm", _is_name),
    "difficulties": ("task names, each with a mapping of difficulty names to the task's config", _are_difficulties),
    "steps": ("task names, each with a mapping of arm names to whole numbers of at least 1", _are_steps),
    "minutes": ("a number above 0", _is_amount),
    "calibration_steps": (f"a whole number of at least {2 * WARM}", _is_length),
}
NEEDED = ("arms", "tasks", "seeds")


# --- the grid ---------------------------------------------------------------------------------------------------------


def read_grid(
    path: Path,
    changes: Mapping[str, Any] | None = None,
    only: Sequence[str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Grid:
    """The grid of a YAML file, `changes` (fields of `Grid`) in place of what it says, and `only` these of its arms.

    Where the grid's baseline is not among them, the first one is. `flags` of every run stand in place of what `common`
    says.

    Raises:
        GridError: every problem found, one a line.
    """
    try:
        tree, problems = options.load_yaml(str(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise GridError(f"{path} cannot be read: {reason}") from error
    if not isinstance(tree, dict):
        raise GridError(f"{path} must hold a mapping with {', '.join(KEYS)}")

    # An empty key of the file is as good as none.
    given = {}
    for key, value in tree.items():
        if key not in KEYS:
            problems.append(f"{path}: unknown key {key}: expected {', '.join(KEYS)}")
        elif value is not None:
            given[key] = value

    # What runs foreign code is typed, and a grid may be a stranger's.
    problems += [line for where, own in _places(given) for line in _from_a_file(f"{path}: {where}", own)]

    given |= changes or {}
    if flags and _is_flags(given.get("common", {})):
        given["common"] = plain_flags(given.get("common", {})) | plain_flags(flags)
    _raise(problems + _shape_problems(given))

    # Shapes are right from here on; now what they say.
    arms = {str(name): flags or {} for name, flags in given["arms"].items()}
    baseline = given.get("baseline") or next(iter(arms))
    grid = Grid(path.stem, **given | {"arms": arms, "baseline": baseline})
    problems = _grid_problems(grid)
    for name in only or ():
        if name not in arms:
            problems.append(f"{name!r} is no arm of {path}: choose from {', '.join(arms)}")
    _raise(problems)
    return grid if only is None else _with_arms(grid, only)


def _raise(problems: Sequence[str]) -> None:
    """Raises GridError where there are problems."""
    if problems:
        raise GridError("\n".join(problems))


def _with_arms(grid: Grid, names: Sequence[str]) -> Grid:
    """The grid with these of its arms, in its order."""
    kept = {name: flags for name, flags in grid.arms.items() if name in names}
    baseline = grid.baseline
    if baseline not in kept:
        baseline = next(iter(kept))
    return dataclasses.replace(grid, arms=kept, baseline=baseline)


def _shape_problems(given: Mapping[str, Any]) -> list[str]:
    """What is missing or of the wrong type."""
    # Missing keys first, then those that are there.
    problems = []
    for key in NEEDED:
        if key not in given:
            problems.append(f"{key} is missing: give {KEYS[key][0]}")

    for key, value in given.items():
        expected, is_legal = KEYS[key]
        if not is_legal(value):
            problems.append(f"{key} {value!r} is not legal: expected {expected}")
    return problems


def _twice(values: Iterable[Any]) -> list[Any]:
    """The values that occur more than once, each once, in order."""
    values = list(values)
    return [value for value in dict.fromkeys(values) if values.count(value) > 1]


def _grid_problems(grid: Grid) -> list[str]:
    """Names that cannot be used, tasks that do not exist, flags that train.py refuses."""
    # Names: of arms, tasks, seeds and the baseline.
    problems = []
    for name in grid.arms:
        if not NAME.fullmatch(name) or "--" in name:  # -- parts the names in a run's folder
            problems.append(f"arm {name!r} is no plain name: use letters, digits, . = + _ and -")
    for what, values in (("task", grid.tasks), ("seed", grid.seeds)):
        problems += [f"{what} {value} is given twice" for value in _twice(values)]
    for task, settings in grid.difficulties.items():
        for name in settings:
            if not NAME.fullmatch(str(name)) or "--" in str(name):
                problems.append(f"difficulty {name!r} of {task} is no plain name: use letters, digits, . = + _ and -")
    problems += _task_problems(grid)
    problems += _steps_problems(grid)
    if grid.baseline not in grid.arms:
        problems.append(f"baseline {grid.baseline} is not an arm: choose from {', '.join(grid.arms)}")

    # Flags: those that are the runner's to set, then what train.py itself says of a whole command line.
    problems += _flag_problems("common", grid.common, grid.minutes)
    for name, flags in grid.arms.items():
        problems += _flag_problems(f"arm {name}", flags, grid.minutes)
    if problems:
        return problems

    # A complaint that several runs share is told once, of the first arm that has it.
    arm_of: dict[str, str] = {}
    for job in reversed(jobs_of(grid)):
        for line in options.collect(arguments(job.flags))[1]:
            arm_of[line] = job.arm
    return [f"arm {arm}: {line}" for line, arm in reversed(arm_of.items())]


def _task_problems(grid: Grid) -> list[str]:
    """What is wrong with the grid's tasks, each line once."""
    config = grid.common.get("task_config")
    if isinstance(config, dict):
        config = json.dumps(config)
    text = str(config or "default")
    allow_code = options.BOOLS.get(str(grid.common.get("allow_code_tasks", 0)).lower(), False)

    lines = []
    for task in grid.tasks:
        if task == DATA:
            if not grid.common.get("data"):
                lines.append("task data stands for own data: set data in common to the file")
        elif task not in grid.difficulties:
            lines += task_problems(task.split("+"), text, allow_code, supervised=True)

    # Those of tasks that are not asked for today as well: a wrong name would be passed over in silence.
    for task, settings in grid.difficulties.items():
        for own in settings.values():
            lines += task_problems([task], json.dumps({task: own}), allow_code, supervised=True)
    return list(dict.fromkeys(lines))


def _steps_problems(grid: Grid) -> list[str]:
    """What is wrong with `steps`. A task that is not trained today is no mistake: `--tasks` may have left it out."""
    problems = []
    if grid.steps and grid.minutes:
        problems.append("steps and minutes both fix the length of a run: give one of them")
    for task, numbers in grid.steps.items():
        for name in numbers:
            if name not in grid.arms:
                problems.append(f"steps of {task}: {name} is not an arm: choose from {', '.join(grid.arms)}")
    return problems


def _places(given: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each place of a grid file that sets flags, and what it sets there; shapes are not checked yet."""
    arms = given.get("arms")
    named = {f"arm {name}": flags for name, flags in arms.items()} if isinstance(arms, dict) else {}
    for where, flags in ({"common": given.get("common")} | named).items():
        if isinstance(flags, dict):
            yield where, flags


def typed_alone(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Of the flags those that no file sets and no run records: a plugin, and switches that run foreign code."""
    kept = {}
    for name, value in plain_flags(flags).items():
        flag = options.FIND.get(name)
        # What the grid's own keys set is another matter.
        if flag and name not in OWN and (not flag.in_file or (value and not flag.file_turns_on)):
            kept[name] = value
    return kept


def _from_a_file(where: str, flags: Mapping[str, Any]) -> list[str]:
    """One line for each flag that no file sets, and for each function that a file names and nobody typed."""
    lines = [f"{where}: {name} runs foreign code and belongs on the command line only: leave it out and type "
             f"--set {name}=..." for name in typed_alone(flags)]
    for function in functions_of(flags):
        line = refusal(function, where, typed="--set trust_functions=")
        if line:
            lines.append(line)
    return lines


def _flag_problems(where: str, flags: Mapping[str, Any], minutes: float | None) -> list[str]:
    """Flags at one place of the grid that are not its to set, or that are set under two names."""
    kept = OWN | LENGTH if minutes else OWN
    # Names that train.py does not know are told with its own words later.
    names = [options.FIND[name].name for name in flags if name in options.FIND]
    problems = []
    for name in names:
        if name in kept:
            problems.append(f"{where}: {name} is set by the grid's own keys: leave it out")
    for name in _twice(names):
        problems.append(f"{where}: {name} is given twice, under different names")

    return problems


# --- runs -------------------------------------------------------------------------------------------------------------


def plain_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags under their first names (`steps` and `max_steps` are one), choices by theirs (off, not False)."""
    plain = {}
    for name, value in flags.items():
        flag = options.FIND.get(name)
        if flag is None:
            plain[name] = value
        else:
            plain[flag.name] = flag.spelled(value)
    return plain


def jobs_of(grid: Grid) -> list[Job]:
    """Every run, all arms of a seed before the next seed, so that a grid cut short can still be compared."""
    # A grid has many runs: each evaluates at its end and keeps one checkpoint, unless it says otherwise.
    shared = {"eval_every": 0, "checkpoint_limit": 1} | plain_flags(grid.common)
    jobs = []
    for seed in grid.seeds:
        for task, difficulty, config in _settings(grid):
            for arm, flags in grid.arms.items():
                own = {"seed": seed} | config
                if arm in grid.steps.get(task, {}):
                    own["max_steps"] = grid.steps[task][arm]
                if task != DATA:
                    own = {"tasks": task.replace("+", ",")} | own
                jobs.append(Job(arm, task, seed, shared | plain_flags(flags) | own, difficulty))
    return jobs


def _settings(grid: Grid) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What runs are trained on: task, difficulty ("" without one), and the flags that set it."""
    for task in grid.tasks:
        if task not in grid.difficulties:
            yield task, "", {}
        for name, config in grid.difficulties.get(task, {}).items():
            yield task, str(name), {"task_config": {task: config}}


def arguments(flags: Mapping[str, Any]) -> list[str]:
    """The flags as a command line of train.py."""
    return [f"--{name}={_text(value)}" for name, value in flags.items()]


def _text(value: Any) -> str:
    """A flag's value as it is typed."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value)
