"""GRPO reward functions with TRL's signature: `f(prompts, completions, completion_ids=None, **columns) -> list[float]`.

Pure; each value lies in [0, 1], a right and well-formed answer gets 1.0 of each, and no completion makes one raise.
Prompts and completions are strings or chat message lists. Columns they read: `COLUMNS`. A row without what a reward
needs scores 0 there. `build_rewards` binds settings and checks what would silently score 0 throughout.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.records import is_finite
from enhanced.reasoning_format import (
    REASONING_TOKENS,
    Parsed,
    format_rate,
    format_score,
    split_completion,
    without_tags,
)
from grpo.arithmetic import divisions, sound_share
from grpo.own_rewards import is_own, own_reward
from reasoning_gym_wrapper import EXECUTES_CODE, Example, Task, TaskError
from sandbox.runner import CodeJob, confinement, run_many
from text_data.equality import same_answer
from text_data.programs import program_of
from text_data.taken import TEXT
from verify.reading import verdict_by

__all__ = ["COLUMNS", "REWARDS", "RewardSettings", "build_rewards", "item_text", "repetition", "same_answer"]
__all__ += ["Parsed", "format_rate", "split_completion"]  # the parser's, for those who score

PARSES = 0.2  # what code that parses is worth without passing a test
NGRAM = 4
FREE_REPETITION = 0.1  # share of repeated n-grams that plain prose and arithmetic have
CHARACTERS_PER_TOKEN = 4  # where completion ids are not handed in
LONGEST_ITEM_ANSWER = 20_000  # characters shown to a task's scorer; some take time quadratic in them
LONGEST_CODE = 50_000  # characters
LONGEST_COUNTED = 100_000  # characters in which repetition is counted

# Columns a reward reads beside prompts and completions; (needed, optional).
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "format": ((), ()),
    "math": (("answer",), ()),
    "brevity": ((), ()),
    "code": (("tests",), ("setup",)),
    "chain_of_thought": ((), ()),
    "verifier": (("task", "item"), ()),
}


@dataclass(frozen=True)
class RewardSettings:
    """What the rewards may be told.

    Args:
        tags: False: a completion that holds no reasoning tag is itself thought and solution.
        answer_from: how the verifier's reward takes the answer out of the solution, see `text_data.taken`.
        free_tokens: a completion of this many tokens or fewer loses nothing for brevity; above 0.
        max_tokens: one of this many tokens or more gets 0 for it; more than free_tokens.
        code_timeout: seconds that one code run may take, above 0.
        code_memory_mb: memory of one code run in MiB, 64 or more.
        code_workers: code runs at a time; 0 = one per core.
        allow_unconfined_code: whether code may run where nothing confines it.
        allow_code_tasks: whether tasks may score whose scorer executes the completion.
        tasks: the tasks that items were drawn from, where their configs differ from the default.
    """

    tags: bool = True
    answer_from: str = TEXT
    free_tokens: int = 256
    max_tokens: int = 1024
    code_timeout: float = 5.0
    code_memory_mb: int = 512
    code_workers: int = 0
    allow_unconfined_code: bool = False
    allow_code_tasks: bool = False
    tasks: tuple[Task, ...] = ()

    def problems(self) -> list[str]:
        """What is wrong with the values, one clause each."""
        clauses = []
        if not 0 < self.free_tokens < self.max_tokens:
            clauses.append(f"need 0 < free_tokens < max_tokens, got {self.free_tokens} and {self.max_tokens}")
        if not self.code_timeout > 0:
            clauses.append(f"code_timeout must be above 0, got {self.code_timeout}")
        if self.code_memory_mb < 64:
            clauses.append(f"code_memory_mb must be at least 64, got {self.code_memory_mb}")
        if self.code_workers < 0:
            clauses.append(f"code_workers must be 0 or more, got {self.code_workers}")
        return clauses


DEFAULTS = RewardSettings()


# --- what TRL hands in ------------------------------------------------------------------------------------------------


def text_of(value: Any, roles: Sequence[str] = ()) -> str:
    """A string as it is; of a message list the contents, of `roles` alone where given; "" for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        return ""

    texts = []
    for message in value:
        if isinstance(message, Mapping) and (not roles or message.get("role") in roles):
            texts.append(_content(message.get("content")))
    return "\n".join(filter(None, texts))


def _content(content: Any) -> str:
    """A message's content: text, or a list of parts of which the textual ones count."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        return ""

    texts = []
    for part in content:
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            texts.append(part["text"])
    return "\n".join(texts)


def parse(completion: Any, settings: RewardSettings) -> Parsed:
    """A completion's thought and solution; a text without a tag is both of them where `settings.tags` is False."""
    text = text_of(completion)
    if settings.tags or any(tag in text for tag in REASONING_TOKENS):
        return split_completion(text)

    # Not well-formed, so that such a text never earns the format reward.
    bare = without_tags(text).strip()
    return Parsed(bare, bare, False)


def _column(columns: Mapping[str, Any], name: str, rows: int) -> list[Any]:
    """`rows` values of the column, None where there are none."""
    values = columns.get(name)
    if not isinstance(values, list | tuple):
        return [None] * rows

    # A data set's column may be shorter than the completions that TRL hands in.
    return [*values, *[None] * rows][:rows]


# --- rewards ----------------------------------------------------------------------------------------------------------


def format_reward(prompts, completions, completion_ids=None, *, settings=DEFAULTS, **columns) -> list[float]:
    """1.0 for `<think>..</think><SOLUTION>..</SOLUTION>` and nothing more, up to 0.6 for parts of it."""
    return [format_score(text_of(completion)) for completion in completions]


def math_reward(prompts, completions, completion_ids=None, *, settings=DEFAULTS, **columns) -> list[float]:
    """1.0 where the solution's one number equals the column `answer`, else 0.0. See `same_answer`.

    A division that the prompt asks for is no answer to it, though it is worth as much: `24 / 2` for 12.
    """
    answers = _column(columns, "answer", len(completions))
    questions = _column({"prompts": prompts}, "prompts", len(completions))

    scores = []
    for completion, answer, prompt in zip(completions, answers, questions, strict=True):
        solution = parse(completion, settings).solution
        is_right = same_answer(solution, answer) and not _copied(solution, answer, text_of(prompt, ("user",)))
        scores.append(float(is_right))
    return scores


def _copied(solution: str, answer: Any, prompt: str) -> bool:
    """Whether the solution is a division of the prompt's that the answer is not written as."""
    return bool(divisions(solution) & divisions(prompt) - divisions(str(answer)))


def brevity_reward(prompts, completions, completion_ids=None, *, settings=DEFAULTS, **columns) -> list[float]:
    """1.0 for a short completion that does not repeat itself; 0.0 for one without a word in it."""
    ids = _column({"ids": completion_ids}, "ids", len(completions))
    return [_brevity(text_of(completion), row, settings) for completion, row in zip(completions, ids, strict=True)]


def _brevity(text: str, ids: Any, settings: RewardSettings) -> float:
    """Brevity of one completion in [0, 1]; `ids` are its tokens, where known."""
    content = without_tags(text)
    if re.search(r"\w", content) is None:
        return 0.0

    # Falls linearly from free_tokens to max_tokens.
    if isinstance(ids, list | tuple) and ids:
        length = len(ids)
    else:
        length = len(text) / CHARACTERS_PER_TOKEN
    room = (settings.max_tokens - length) / (settings.max_tokens - settings.free_tokens)
    if room <= 0:
        return 0.0

    # Filling the room with the same words must not pay.
    excess = max(repetition(content) - FREE_REPETITION, 0.0) / (1.0 - FREE_REPETITION)
    return min(room, 1.0) * (1.0 - excess)


def repetition(text: str) -> float:
    """Share of the text's word 4-grams that occurred before in it, in [0, 1); long words count as pieces of them."""
    words = re.findall(r"\w{1,8}|[^\w\s]", text[:LONGEST_COUNTED].lower())
    grams = [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
    if not grams:
        return 0.0

    return 1.0 - len(set(grams)) / len(grams)


def code_reward(prompts, completions, completion_ids=None, *, settings=DEFAULTS, **columns) -> list[float]:
    """0.2 where the solution parses, and the rest by the share of column `tests` it passes (after column `setup`).

    Runs confined; a machine that cannot confine scores 0.0, of which `build_rewards` warns by raising.
    """
    rows = len(completions)
    tests = _column(columns, "tests", rows)
    setups = _column(columns, "setup", rows)
    jobs = [_code_job(*row, settings) for row in zip(completions, tests, setups, strict=True)]

    # Completions of a group are often equal: each distinct program runs once.
    distinct = list(dict.fromkeys(job for job in jobs if job is not None))
    limits = (settings.code_workers, settings.code_timeout, settings.code_memory_mb, settings.allow_unconfined_code)

    scores: dict[CodeJob | None, float] = {None: 0.0}
    for job, result in zip(distinct, run_many(distinct, *limits), strict=True):
        parses = result.status not in ("syntax", "refused")
        scores[job] = parses * (PARSES + (1.0 - PARSES) * result.passed_tests / result.total_tests)

    return [scores[job] for job in jobs]


def _code_job(completion: Any, tests: Any, setup: Any, settings: RewardSettings) -> CodeJob | None:
    """The program of a completion with its tests; None where there are no tests, or nothing to run."""
    if not isinstance(tests, list | tuple) or not tests or not all(isinstance(test, str) for test in tests):
        return None

    solution = parse(completion, settings).solution
    if len(solution) > LONGEST_CODE:
        return None

    # A comment alone parses, but is no program.
    code = program_of(solution, tests)
    has_code = any(line.strip() and not line.lstrip().startswith("#") for line in code.splitlines())
    if not has_code:
        return None

    if not isinstance(setup, str):
        setup = ""
    return CodeJob(code, tuple(tests), setup)


def chain_of_thought_reward(prompts, completions, completion_ids=None, *, settings=DEFAULTS, **columns) -> list[float]:
    """Share of the thought's equations that are right and follow from the prompt: `arithmetic.sound_share`."""
    questions = _column({"prompts": prompts}, "prompts", len(completions))

    scores = []
    for completion, prompt in zip(completions, questions, strict=True):
        thought = parse(completion, settings).thought
        scores.append(sound_share(thought, text_of(prompt, ("user",))))
    return scores


def verifier_reward(prompts, completions, completion_ids=None, *, settings=DEFAULTS, **columns) -> list[float]:
    """What the verifiers say of the solution (`Verdict.reward`): columns `task`, a name, and `item` (`item_text`)."""
    tasks = _column(columns, "task", len(completions))
    items = _column(columns, "item", len(completions))

    scores = []
    for completion, task, item in zip(completions, tasks, items, strict=True):
        solution = parse(completion, settings).solution
        scores.append(_verified(solution, task, item, settings))
    return scores


def _verified(solution: str, name: Any, text: Any, settings: RewardSettings) -> float:
    """The score of one solution by the task `name` on the item `text`; 0.0 where either is missing or not allowed."""
    if not isinstance(name, str) or not isinstance(text, str):
        return 0.0
    if name in EXECUTES_CODE and not settings.allow_code_tasks:
        return 0.0
    if not solution or len(solution) > LONGEST_ITEM_ANSWER:
        return 0.0

    # The item's own task where it is at hand: some scorers read the config.
    task = next((task for task in settings.tasks if task.name == name), None) or _default_task(name)
    entry = read_item(text)
    if task is None or entry is None:
        return 0.0

    example = Example(entry["question"], entry.get("answer"), name, entry, task)
    return verdict_by(example.verify, solution, example.target, settings.answer_from).reward


@functools.cache
def _default_task(name: str) -> Task | None:
    """The task at its default config; None where there is none of that name."""
    try:
        return Task(name)
    except TaskError:
        return None


# --- items as text ----------------------------------------------------------------------------------------------------


def item_text(entry: Mapping[str, Any]) -> str:
    """The JSON text of a data set entry (`Example.entry`), for the column `item`.

    Tuples, sets and keys that are no strings come back from `read_item` as they were; plain JSON would turn them into
    what some scorers do not accept.
    """
    return json.dumps(_packed(entry), ensure_ascii=False)


def _packed(value: Any) -> Any:
    """The value in JSON's types; a mapping of one tag stands for a type that JSON does not have."""
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _packed(part) for key, part in value.items()}
        return {"__dict__": [[_packed(key), _packed(part)] for key, part in value.items()]}
    if isinstance(value, list):
        return [_packed(part) for part in value]

    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {f"__{kind.__name__}__": [_packed(part) for part in value]}

    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)


def _unpacked(value: dict[str, Any]) -> Any:
    """`json.loads`' object hook: inner values are unpacked already."""
    builders: dict[str, Callable] = {"__tuple__": tuple, "__set__": set, "__frozenset__": frozenset, "__dict__": dict}
    if len(value) != 1:
        return value

    tag = next(iter(value))
    return builders[tag](value[tag]) if tag in builders else value


@functools.lru_cache(maxsize=4096)
def read_item(text: str) -> dict[str, Any] | None:
    """The entry of an `item_text`, or of plain JSON; None if it is none. Shared: scorers only read it."""
    try:
        entry = json.loads(text, object_hook=_unpacked)
    except (ValueError, TypeError, RecursionError):
        return None

    # Scorers ask for the question at least.
    if not isinstance(entry, dict) or not isinstance(entry.get("question"), str):
        return None
    return entry


# --- the registry -----------------------------------------------------------------------------------------------------

Reward = Callable[..., list[float]]
REWARDS: dict[str, Reward] = {
    "format": format_reward,
    "math": math_reward,
    "brevity": brevity_reward,
    "code": code_reward,
    "chain_of_thought": chain_of_thought_reward,
    "verifier": verifier_reward,
}


def build_rewards(weights: Mapping[str, float], **settings: Any) -> tuple[list[Reward], list[float]]:
    """Reward functions, each named as its reward (TRL logs it so), and their weights, in the order given.

    Raises:
        ValueError: one line with every problem: unknown rewards or settings, weights that are negative, not finite or
            all 0, values out of range, the code reward where code cannot be confined.
    """
    problems = _weight_problems(weights)

    # Settings come from callers in Python; a misspelt one would otherwise have no effect.
    names = {field.name for field in dataclasses.fields(RewardSettings)}
    for name in settings:
        if name not in names:
            problems.append(f"unknown setting {name!r}: choose from {', '.join(sorted(names))}")
    bound = RewardSettings(**{name: value for name, value in settings.items() if name in names})
    problems += bound.problems()

    # Without confinement every program would score 0, which looks like a model that cannot write code.
    if "code" in weights and not bound.allow_unconfined_code:
        reason = confinement()
        if reason is not None:
            problems.append(f"the code reward cannot run: {reason}; type --allow_unconfined_code to accept that")
    if problems:
        raise ValueError("; ".join(problems))
    return [_bind(name, bound) for name in weights], [float(weight) for weight in weights.values()]


def _weight_problems(weights: Mapping[str, float]) -> list[str]:
    """Unknown rewards and weights out of range, one clause each."""
    problems = []
    for name in weights:
        if name not in REWARDS and not is_own(name):
            choices = ", ".join(REWARDS)
            problems.append(f"unknown reward {name!r}: choose from {choices}, or name a function as PKG.MOD:FUNCTION")

    for name, weight in weights.items():
        if not is_finite(weight) or weight < 0:
            problems.append(f"the weight of {name} must be a finite number of 0 or more, got {weight!r}")

    if not any(weights.values()):
        problems.append("no reward has a weight above 0")
    return problems


def _bind(name: str, settings: RewardSettings) -> Reward:
    """The reward with these settings, under its own name. Raises ValueError for a user's that cannot be imported."""
    if is_own(name):
        return own_reward(name, text_of)
    reward = REWARDS[name]

    def function(prompts, completions, completion_ids=None, **columns) -> list[float]:
        columns.pop("settings", None)  # a data set's column of that name is none of ours
        return reward(prompts, completions, completion_ids, settings=settings, **columns)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = reward.__doc__
    return function
