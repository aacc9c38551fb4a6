"""The stages of GRPO as YAML gives them: what each is trained on, its rewards, and what is wrong with it."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flags import FIND
from grpo.problems import CodeSource, Problem, Source, TaskSource, file_source, held_out, task_source
from grpo.rewards import build_rewards
from reasoning_gym_wrapper import EXECUTES_CODE, Task, TaskError, normalise

ADDON_STAGE = "task"  # the add-on's one stage, on the tasks of its checkpoint
SUMS = {"chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}}
# Epochs and sizes are the published ones. `levels` go from easy to hard; the tasks of a level are mixed.
PUBLISHED: dict[str, dict[str, Any]] = {
    "format": {"epochs": 2, "size": 200, "levels": [SUMS], "rewards": {"format": 1.0, "brevity": 0.2}},
    "math": {
        "epochs": 5, "size": 500, "levels": "configs/curricula/arithmetic.yaml",
        "rewards": {"math": 1.0, "format": 0.3, "brevity": 0.1},
    },
    "reasoning": {
        "epochs": 4, "size": 500,
        "levels": [{name: {} for name in ("syllogism", "knights_knaves", "aiw", "mini_sudoku", "maze")}],
        "rewards": {"verifier": 1.0, "format": 0.3},
    },
    "code": {"epochs": 3, "size": 300, "levels": "code", "rewards": {"code": 1.0, "format": 0.3}},
    "chain_of_thought": {
        "epochs": 3, "size": 400,
        "levels": [{"chain_sum": {"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 2}}],
        "rewards": {"chain_of_thought": 0.5, "math": 1.0, "format": 0.3},
    },
}
ADDON_STAGES: dict[str, dict[str, Any]] = {
    ADDON_STAGE: {"epochs": 1, "size": 2000, "levels": "tasks", "rewards": {"verifier": 1.0}}
}
# Settings of a stage that replace a flag's, by the flag's name.
OVERRIDES = (
    *("grpo_lr", "grpo_batch_size", "grpo_accum_steps", "num_generations", "max_completion_length"),
    *("temperature", "loss_type", "beta"),
)


@dataclass(frozen=True)
class Stage:
    """One stage. `levels` are sources from easy to hard; `warm` its share of the warm start's examples.

    `guess` is the share of these examples that give the answer without its steps: GRPO then has to find out that
    writing steps pays.
    """

    name: str
    epochs: float
    size: int  # questions
    levels: tuple[Source, ...]
    rewards: Mapping[str, float]
    eval_n: int
    warm: float
    guess: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def value(self, opts: argparse.Namespace, name: str) -> Any:
        """The stage's own setting, else the flag's."""
        return self.settings.get(name, getattr(opts, name))

    @property
    def tasks(self) -> tuple[Any, ...]:
        """Reasoning Gym tasks of the levels, whose scorers the rewards need."""
        return tuple(task for level in self.levels if isinstance(level, TaskSource) for task in level.tasks)


KEYS = ("epochs", "size", "levels", "rewards", "eval_n", "warm", "guess", *OVERRIDES)


def stages_of(opts: argparse.Namespace, own: Sequence[Task] = ()) -> tuple[list[Stage], list[str]]:
    """(stages in their published order, everything wrong with them in one line each); loads no model.

    A stage given in YAML takes the published values for what it leaves out; without `stages` all are run as published.
    `own` are the tasks that the flags name, which the level `tasks` stands for.
    """
    known = ADDON_STAGES if opts.arch == "addon" else PUBLISHED
    try:
        given = json.loads(opts.stages) if opts.stages else {name: {} for name in known}
    except ValueError as error:
        return [], [f"--stages is no JSON object: {error}"]
    found = [
        f"stages: there is no stage {name!r}: choose from {', '.join(known)}" for name in given if name not in known
    ]
    if not given:
        found.append(f"stages: none is given: choose from {', '.join(known)}")
    stages = []
    for name in (name for name in known if name in given):
        stage, wrong = _stage(name, given[name], known[name], opts, own)
        found += [f"stage {name}: {line}" for line in wrong]
        stages += [stage] if stage else []
    if not found and opts.arch == "enhanced" and not any(stage.warm for stage in stages):
        found.append("stages: every warm is 0, so the warm start has no examples: raise one")
    return stages, found


def _stage(
    name: str, given: Any, published: dict[str, Any], opts: argparse.Namespace, own: Sequence[Task]
) -> tuple[Stage | None, list[str]]:
    if given is not None and not isinstance(given, dict):
        return None, [f"expected settings such as epochs and size, got {given!r}"]
    merged = {"eval_n": opts.eval_n, "warm": 1.0, "guess": 0.0, **published, **(given or {})}
    found = [f"unknown setting {key!r}: choose from {', '.join(KEYS)}" for key in merged if key not in KEYS]
    found += [
        f"{key} must be {told}, got {merged[key]!r}"
        for key, (legal, told) in _LIMITS.items()
        if key in merged and not (_is_number(merged[key]) and legal(merged[key]))
    ]
    if "loss_type" in merged and merged["loss_type"] not in FIND["loss_type"].choices:
        found.append(f"loss_type must be {FIND['loss_type'].legal}, got {merged['loss_type']!r}")
    levels: tuple[Source, ...] = ()
    try:
        levels = _levels(merged["levels"], opts, own)
    except (ValueError, OSError) as error:
        found.append(" ".join(str(error).split()))
    found += _reward_problems(merged["rewards"], opts)
    if not found:  # 8.0 is 8: libraries take whole numbers as int alone
        merged |= {key: int(merged[key]) for key in WHOLE if key in merged}
    settings = {key: merged[key] for key in OVERRIDES if key in merged}
    if not found:
        found = _batch_problems(settings, opts, merged["size"])
    if found:
        return None, found
    parts = {key: merged[key] for key in ("epochs", "size", "rewards", "eval_n", "warm", "guess")}
    return Stage(name, levels=levels, settings=settings, **parts), []


WHOLE = ("size", "eval_n", "grpo_batch_size", "grpo_accum_steps", "num_generations", "max_completion_length")
_LIMITS = {
    "epochs": (lambda v: v > 0, "above 0"),
    "size": (lambda v: v >= 1 and v == int(v), "a whole number of 1 or more"),
    "eval_n": (lambda v: v >= 1 and v == int(v), "a whole number of 1 or more"),
    "warm": (lambda v: v >= 0, "0 or more"),
    "guess": (lambda v: 0 <= v <= 1, "in 0..1"),
    "grpo_lr": (lambda v: v > 0, "above 0"),
    "grpo_batch_size": (lambda v: v >= 1 and v == int(v), "a whole number of 1 or more"),
    "grpo_accum_steps": (lambda v: v >= 1 and v == int(v), "a whole number of 1 or more"),
    "num_generations": (lambda v: v >= 2 and v == int(v), "a whole number of 2 or more"),
    "max_completion_length": (lambda v: v >= 1 and v == int(v), "a whole number of 1 or more"),
    "temperature": (lambda v: v > 0, "above 0"),
    "beta": (lambda v: v >= 0, "0 or more"),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _reward_problems(weights: Any, opts: argparse.Namespace) -> list[str]:
    if not isinstance(weights, dict):
        return [f"rewards must be a mapping of names to weights, got {weights!r}"]
    try:
        build_rewards(weights, allow_unconfined_code=opts.allow_unconfined_code)
    except ValueError as error:
        return [str(error)]
    return []


def _batch_problems(settings: Mapping[str, Any], opts: argparse.Namespace, questions: int) -> list[str]:
    size, accum, group = (
        settings.get(name, getattr(opts, name)) for name in ("grpo_batch_size", "grpo_accum_steps", "num_generations")
    )
    if size * accum % group == 0:
        needed = size * accum // group
        return [f"size {questions} is less than the {needed} questions of one step"] if questions < needed else []
    return [f"grpo_batch_size {size} x grpo_accum_steps {accum} = {size * accum} completions a step are not divisible "
            f"by num_generations {group}: change one"]


def _levels(given: Any, opts: argparse.Namespace, own: Sequence[Task]) -> tuple[Source, ...]:
    """`code`, `tasks` (those of the flags), a YAML file of levels, a JSON-lines file of problems, or levels as a list.

    Raises:
        ValueError: none of these, or unusable tasks.
    """
    if given == "code":
        return (CodeSource(),)
    if given == "tasks" and own:
        return (TaskSource(tuple(own)),)
    if isinstance(given, str):
        path = Path(given) if Path(given).exists() else Path(__file__).parent.parent / given
        if path.suffix in (".jsonl", ".json"):
            return (file_source(path),)
        given = _read_levels(path)
    if not isinstance(given, list) or not given or not all(isinstance(level, dict) and level for level in given):
        raise ValueError("levels must be a list of {task: settings}, a YAML file of one, a .jsonl file, or `code`")
    barred = [name for level in given for name in level if name in EXECUTES_CODE and not opts.allow_code_tasks]
    if barred:
        raise TaskError(f"{barred[0]} executes code ({EXECUTES_CODE[barred[0]]}): choose another task")
    return tuple(task_source(level) for level in given)


def _read_levels(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"levels {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


@dataclass
class Held:
    """The questions kept for evaluation: of each stage, and all of them as normalised text."""

    problems: dict[str, list[Problem]]
    reserved: set[str]


def hold_out(stages: Sequence[Stage], seed: int) -> Held:
    """Draws every stage's evaluation questions before anything is trained on. Raises ValueError as `held_out`."""
    problems = {}
    for stage in stages:
        try:
            problems[stage.name] = held_out(stage.levels, stage.eval_n, seed)
        except ValueError as error:
            raise ValueError(f"stage {stage.name}: {error}") from error
    return Held(problems, {normalise(p.question) for drawn in problems.values() for p in drawn})


def rewards_of(stage: Stage, opts: argparse.Namespace, tags: bool = True) -> tuple[list[Any], list[float]]:
    """Reward functions and weights of a stage; `tags` False: a completion without tags is itself the solution."""
    longest = stage.value(opts, "max_completion_length")
    return build_rewards(
        stage.rewards, tags=tags, tasks=stage.tasks, free_tokens=max(longest // 4, 1), max_tokens=max(longest, 2),
        allow_unconfined_code=opts.allow_unconfined_code,
    )
