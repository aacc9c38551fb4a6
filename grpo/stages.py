"""The stages of GRPO as YAML gives them: what each is trained on, its rewards, and what is wrong with it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from engine.files import parse_json
from engine.records import is_finite, normalise
from engine.schedule import ScheduleConfig
from flags import FIND
from grpo.levels import is_problem_file, path_of, read_levels
from grpo.own_rewards import is_own, try_reward
from grpo.problem_files import file_source
from grpo.problems import CodeSource, Problem, Source, TaskSource, evaluation_problems, task_source
from grpo.rewards import build_rewards, text_of
from own_tasks.choice import mix_weights
from reasoning_gym_wrapper import EXECUTES_CODE, Task, TaskError
from tasks.limits import USUAL, JudgeConfig
from text_data.roundtrip import ROWS_TRIED, check_round_trip

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
# All that YAML may set for a stage.
KEYS = ("epochs", "size", "levels", "rewards", "eval_n", "warm", "guess", *OVERRIDES)


# --- what a stage needs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GrpoConfig(ScheduleConfig):
    """How one stage of GRPO trains. Every field has the name, the range and the default of a flag.

    Of the schedule the shape over time is kept; its height is `grpo_lr`.

    Args:
        grpo_lr: peak learning rate, above 0.
        grpo_batch_size: completions per micro-batch, 1 or more.
        grpo_accum_steps: micro-batches per optimizer step, 1 or more.
        num_generations: completions of each question, which are compared with each other; 2 or more.
        max_completion_length: longest completion in tokens, 1 or more.
        temperature: sampling temperature of completions, above 0.
        loss_type: how token losses are averaged, one of the flag's choices.
        beta: weight of the KL divergence from the model as the stage began; 0 = none.
        grpo_save_every: optimizer steps between the states that an interrupted stage goes on from, 1 or more.
        log_steps: optimizer steps between logged lines, 1 or more.
        grad_clip: largest gradient norm; 0 = no clipping.
        beta1: first beta of AdamW, in [0, 1).
        beta2: second beta of AdamW, in [0, 1).
        seed: seed of sampling and of the order of questions.
    """

    grpo_lr: float = 5e-5
    grpo_batch_size: int = 4
    grpo_accum_steps: int = 2
    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    loss_type: str = "dapo"
    beta: float = 0.0
    grpo_save_every: int = 50
    log_steps: int = 20
    grad_clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class StagesConfig(GrpoConfig):
    """What the flags say of the stages. The fields of `GrpoConfig` hold for each stage that does not set its own.

    Args:
        arch: the system that is trained: enhanced (the planner/worker LM) or addon.
        stages: JSON object of stage name -> settings; None = all stages as published.
        eval_n: evaluation questions of each stage, 1 or more.
        allow_unconfined_code: whether the code reward may run programs where nothing can confine them.
        allow_code_tasks: whether tasks may be used whose verifier executes code.
        mix: shares of the flags' tasks in training, NAME=WEIGHT,...; None = equal parts.
        draw_timeout_s, score_timeout_s, verifier_strict: as in `tasks.limits.JudgeConfig`.
    """

    arch: str = "enhanced"
    stages: str | None = None
    eval_n: int = 256
    allow_unconfined_code: bool = False
    allow_code_tasks: bool = False
    mix: str | None = None
    draw_timeout_s: float = USUAL.draw_timeout_s
    score_timeout_s: float = USUAL.score_timeout_s
    verifier_strict: bool = USUAL.verifier_strict

    def with_settings(self, settings: Mapping[str, Any]) -> GrpoConfig:
        """The training of a stage that sets `settings`, which are keys of `OVERRIDES`, for itself."""
        values = {each.name: getattr(self, each.name) for each in fields(GrpoConfig)}
        return GrpoConfig(**values | dict(settings))


@dataclass(frozen=True)
class Stage:
    """One stage, with every value resolved.

    Args:
        name: a key of `PUBLISHED` or `ADDON_STAGES`.
        epochs: passes over the questions, above 0.
        size: training questions, 1 or more.
        levels: where the questions come from, from easy to hard.
        rewards: reward name -> weight of 0 or more.
        eval_n: evaluation questions, 1 or more.
        warm: weight of this stage among the warm start's examples; 0 = none of them.
        guess: share, in [0, 1], of these examples that give the answer without its steps. GRPO then has to find out
            that writing steps pays.
        config: how the stage trains.
        allow_unconfined_code: as in `StagesConfig`.
    """

    name: str
    epochs: float
    size: int
    levels: tuple[Source, ...]
    rewards: Mapping[str, float]
    eval_n: int
    warm: float
    guess: float = 0.0
    config: GrpoConfig = field(default_factory=GrpoConfig)
    allow_unconfined_code: bool = False

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Reasoning Gym tasks of the levels, whose scorers the rewards need."""
        return tuple(task for level in self.levels if isinstance(level, TaskSource) for task in level.tasks)


def rewards_of(stage: Stage, tags: bool = True, answer_from: str = "text") -> tuple[list[Any], list[float]]:
    """Reward functions and weights of a stage, in the order the stage gives them.

    `tags` False: a completion without reasoning tags is itself the solution. `answer_from`: how the verifier's reward
    takes the answer out of the solution.
    """
    longest = stage.config.max_completion_length
    return build_rewards(
        stage.rewards,
        tags=tags,
        answer_from=answer_from,
        tasks=stage.tasks,
        free_tokens=max(longest // 4, 1),
        max_tokens=max(longest, 2),
        allow_unconfined_code=stage.allow_unconfined_code,
    )


# --- from YAML --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """The numbers that a setting may be: `low` to `high`, without `low` itself where `above`."""

    low: float
    high: float = math.inf
    above: bool = False
    whole: bool = False

    def allows(self, value: Any) -> bool:
        """Whether `value` is a finite number (a bool is none) within the limit. 8.0 is a whole number."""
        if isinstance(value, bool) or not is_finite(value):
            return False
        if self.whole and value != int(value):
            return False
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        if self.whole:
            return f"a whole number of {self.low} or more"
        if self.high < math.inf:
            return f"in {self.low}..{self.high}"
        return f"above {self.low}" if self.above else f"{self.low} or more"


# Problems are told in this order.
LIMITS = {
    "epochs": Limit(0, above=True),
    "size": Limit(1, whole=True),
    "eval_n": Limit(1, whole=True),
    "warm": Limit(0),
    "guess": Limit(0, high=1),
    "grpo_lr": Limit(0, above=True),
    "grpo_batch_size": Limit(1, whole=True),
    "grpo_accum_steps": Limit(1, whole=True),
    "num_generations": Limit(2, whole=True),
    "max_completion_length": Limit(1, whole=True),
    "temperature": Limit(0, above=True),
    "beta": Limit(0),
}


def stages_of(config: StagesConfig, own: Sequence[Task] = ()) -> tuple[list[Stage], list[str]]:
    """(stages in their published order, everything wrong with them in one line each); loads no model.

    A stage given in YAML takes the published values for what it leaves out; without `stages` all are run as published.
    `own` are the tasks that the flags name, which the level `tasks` stands for.
    """
    published = ADDON_STAGES if config.arch == "addon" else PUBLISHED
    given: dict[str, Any] = {name: {} for name in published}
    if config.stages:
        try:
            given = parse_json(config.stages)
        except ValueError as error:
            return [], [f"--stages is no JSON object: {error}"]
        if not isinstance(given, dict):
            return [], [f"--stages is no JSON object, but {type(given).__name__}: give stages by name"]

    # Names first: a misspelt stage would otherwise be left out in silence.
    choices = ", ".join(published)
    problems = [f"stages: there is no stage {name!r}: choose from {choices}" for name in given if name not in published]
    if not given:
        problems.append(f"stages: none is given: choose from {choices}")

    # The order is the published one, however the user wrote them: later stages build on earlier ones.
    stages = []
    for name, defaults in published.items():
        if name not in given:
            continue
        stage, lines = _stage(name, given[name], defaults, config, own)
        problems += [f"stage {name}: {line}" for line in lines]
        if stage is not None:
            stages.append(stage)

    # The warm start of the planner/worker LM draws its examples from the stages; the add-on has none.
    if not problems and config.arch == "enhanced" and not any(stage.warm for stage in stages):
        problems.append("stages: every warm is 0, so the warm start has no examples: raise one")
    return stages, problems


def _stage(
    name: str, given: Any, published: dict[str, Any], config: StagesConfig, own: Sequence[Task]
) -> tuple[Stage | None, list[str]]:
    """(the stage, no problems), or (None, its problems, one line each)."""
    if given is not None and not isinstance(given, dict):
        return None, [f"expected settings such as epochs and size, got {given!r}"]
    # Later ones win: defaults, the published stage, the user's settings.
    merged = {"eval_n": config.eval_n, "warm": 1.0, "guess": 0.0, **published, **(given or {})}

    # Everything is checked before anything is said, so that one call shows every mistake.
    problems = _setting_problems(merged)
    levels: tuple[Source, ...] = ()
    try:
        levels = _levels(merged["levels"], config, own)
    except (ValueError, OSError) as error:
        problems.append(" ".join(str(error).split()))
    problems += _reward_problems(merged["rewards"], config)
    if not problems:
        problems = _own_reward_problems(merged["rewards"], levels)
    if problems:
        return None, problems

    # YAML may write 8 as 8.0, and libraries take whole numbers as int alone.
    for key, limit in LIMITS.items():
        if key in merged and limit.whole:
            merged[key] = int(merged[key])

    # The batch is checked last: it needs values that are right one by one.
    training = config.with_settings({key: merged[key] for key in OVERRIDES if key in merged})
    problems = _batch_problems(training, merged["size"])
    if problems:
        return None, problems
    values = {key: merged[key] for key in ("epochs", "size", "rewards", "eval_n", "warm", "guess")}
    stage = Stage(
        name, levels=levels, config=training, allow_unconfined_code=config.allow_unconfined_code, **values
    )
    return stage, []


def _setting_problems(settings: Mapping[str, Any]) -> list[str]:
    """Keys that no stage knows and values out of range, one line each."""
    problems = []
    for key in settings:
        if key not in KEYS:
            problems.append(f"unknown setting {key!r}: choose from {', '.join(KEYS)}")
    for key, limit in LIMITS.items():
        if key in settings and not limit.allows(settings[key]):
            problems.append(f"{key} must be {limit}, got {settings[key]!r}")

    # The one setting that is a word; the flag's table holds its choices.
    loss = FIND["loss_type"]
    if "loss_type" in settings and settings["loss_type"] not in loss.choices:
        problems.append(f"loss_type must be {loss.legal}, got {settings['loss_type']!r}")
    return problems


def _reward_problems(weights: Any, config: StagesConfig) -> list[str]:
    """At most one line: what `build_rewards` refuses."""
    if not isinstance(weights, dict):
        return [f"rewards must be a mapping of names to weights, got {weights!r}"]
    try:
        build_rewards(weights, allow_unconfined_code=config.allow_unconfined_code)
    except ValueError as error:
        return [str(error)]
    return []


def _own_reward_problems(weights: Mapping[str, float], levels: Sequence[Source]) -> list[str]:
    """What is wrong with the user's own rewards, one line each: each is called once, on a problem of the stage."""
    problems = []
    for name in filter(is_own, weights):
        problem = try_reward(name, next(levels[0].problems(0)).row(), text_of)
        if problem:
            problems.append(problem)
    return problems


def _batch_problems(config: GrpoConfig, questions: int) -> list[str]:
    """At most one line: a step must hold whole groups of completions, and the stage enough questions for one step."""
    completions = config.grpo_batch_size * config.grpo_accum_steps
    group = config.num_generations
    if completions % group:
        return [
            f"grpo_batch_size {config.grpo_batch_size} x grpo_accum_steps {config.grpo_accum_steps} = {completions} "
            f"completions a step are not divisible by num_generations {group}: change one"
        ]
    needed = completions * int(os.environ.get("WORLD_SIZE", 1)) // group
    return [f"size {questions} is less than the {needed} questions of one step"] if questions < needed else []


def _levels(given: Any, config: StagesConfig, own: Sequence[Task]) -> tuple[Source, ...]:
    """`code`, `tasks` (those of the flags), a YAML file of levels, a JSON-lines file of problems, or levels as a list.

    Raises:
        ValueError: none of these, or unusable tasks.
    """
    if given == "code":
        return (CodeSource(),)
    if given == "tasks" and own:
        weights = mix_weights(config.mix, [task.name for task in own])
        return (TaskSource(tuple(own), weights=tuple(weights) if weights else None),)

    if isinstance(given, str):
        path = path_of(given)
        if is_problem_file(path):
            return (file_source(path),)
        given = read_levels(path)

    if not isinstance(given, list) or not given or not all(isinstance(level, dict) and level for level in given):
        raise ValueError("levels must be a list of {task: settings}, a YAML file of one, a .jsonl file, or `code`")
    # A task of this kind would run a model's text as a program of this process, which nothing confines.
    for level in given:
        for name in level:
            if name in EXECUTES_CODE and not config.allow_code_tasks:
                allow = "type --allow_code_tasks to accept that" if config.arch == "addon" else "choose another task"
                raise TaskError(f"{name} executes code ({EXECUTES_CODE[name]}): {allow}")
    limits = JudgeConfig(config.draw_timeout_s, config.score_timeout_s, config.verifier_strict)
    return tuple(task_source(level, limits) for level in given)


# --- questions for evaluation -----------------------------------------------------------------------------------------


@dataclass
class HeldOut:
    """The questions kept for evaluation.

    Args:
        problems: stage name -> its evaluation problems.
        reserved: all their questions as normalised text, which no training draw may give.
        left_out: questions that would be among them, had the weights not been trained on them.
    """

    problems: dict[str, list[Problem]]
    reserved: set[str]
    left_out: list[str] = field(default_factory=list)

    def note(self) -> str:
        """What to tell of the questions left out; "" where there are none."""
        count = len(self.left_out)
        return f"{count} evaluation questions are left out, since the checkpoint was trained on them" if count else ""


def check_texts(
    held_out: HeldOut, tokenizer: Any, least: float, place: str, say: Callable[[str], None]
) -> None:
    """`check_round_trip` of every stage's held-out questions and answers. Raises ValueError, with the stage's name."""
    for name, problems in held_out.problems.items():
        rows = [[text.strip() for text in (problem.question, problem.answer)] for problem in problems[:ROWS_TRIED]]
        check_round_trip(tokenizer, rows, least, f"stage {name}: {place}", say)


def hold_out(stages: Sequence[Stage], seed: int, trained: Container[str] = ()) -> HeldOut:
    """Draws every stage's evaluation questions before anything is trained on; none of them is in `trained`.

    Raises:
        ValueError: as `evaluation_problems`, with the stage's name.
    """
    problems = {}
    reserved = set()
    left_out: list[str] = []
    for stage in stages:
        try:
            drawn = evaluation_problems(stage.levels, stage.eval_n, seed, trained, left_out)
        except ValueError as error:
            raise ValueError(f"stage {stage.name}: {error}") from error
        problems[stage.name] = drawn
        reserved |= {normalise(problem.question) for problem in drawn}
    return HeldOut(problems, reserved, left_out)
