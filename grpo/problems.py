"""What GRPO's stages ask: problems with a gold answer, worked examples of them, and questions held out from training.

A source is endless and made from a seed alone. Held-out questions are drawn first, over all stages, and every training
draw rejects them, compared as normalised text.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from enhanced.reasoning_format import END_SOLUTION, END_THINK, SOLUTION, THINK
from grpo.rewards import item_text
from reasoning_gym_wrapper import MAX_REJECTED, Example, Task, for_evaluation, normalise

HELD_OUT_SHARE = 5  # of a finite source, one in so many problems is kept for evaluation at most
_SUM = re.compile(r"-?\d+(?:\s*[-+*]\s*-?\d+)+")


@dataclass(frozen=True)
class Problem:
    """One question. `thought` and `answer` make its worked example; `item`, `tests` and `setup` are for rewards."""

    question: str
    answer: str
    task: str
    thought: str = ""
    item: str = ""
    tests: tuple[str, ...] = ()
    setup: str = ""
    example: Example | None = field(default=None, compare=False, repr=False)

    def row(self) -> dict[str, Any]:
        """The columns that TRL hands to the rewards; the prompt is a conversation of one turn."""
        return {
            "prompt": [{"role": "user", "content": self.question}],
            "answer": self.answer,
            "task": self.task,
            "item": self.item,
            "tests": list(self.tests),
            "setup": self.setup,
        }

    def worked(self, guessed: bool = False) -> str:
        """A well-formed completion that is right; `guessed`: without the steps that lead there."""
        thought = guess(self.answer) if guessed else self.thought or self.answer
        return f"{THINK}{thought}{END_THINK}{SOLUTION}{self.answer}{END_SOLUTION}"


class Source(Protocol):
    """Where problems come from. `size` is None for an endless source."""

    size: int | None

    def problems(self, seed: int) -> Iterator[Problem]:
        """Problems of this seed in a fixed order; another seed gives others, or another order."""


# --- Reasoning Gym ----------------------------------------------------------------------------------------------------


def problem_of(example: Example) -> Problem:
    """A Reasoning Gym item as a problem; sums get their steps as thought."""
    answer = example.target or ""
    return Problem(
        example.question, answer, example.task, thought_of(example.question, answer), item_text(example.entry),
        example=example,
    )


def thought_of(question: str, answer: str) -> str:
    """The steps of a sum or product, left to right, one line each; for anything else the answer in a sentence."""
    found = _SUM.findall(question)
    steps = sum_steps(found[-1]) if found else None
    return "\n".join(steps) if steps and steps[-1].endswith(f"= {answer}") else guess(answer)


def guess(answer: str) -> str:
    """The thought of an answer that is not derived."""
    return f"So it is {answer}"


def sum_steps(expression: str) -> list[str] | None:
    """`3 + 4 - 9` -> [`3 + 4 = 7`, `7 - 9 = -2`]; None where an operator would bind tighter than one before it."""
    parts = re.findall(r"-?\d+|[-+*]", re.sub(r"\s+", " ", expression))
    numbers, operators = [], []
    for part in parts:
        wants_operator = len(numbers) > len(operators)
        if wants_operator and part.startswith("-") and len(part) > 1:  # `3 -4`: a sign that stands for the operator
            operators.append("-")
            numbers.append(int(part[1:]))
        elif wants_operator == (part in "+-*"):
            (operators if wants_operator else numbers).append(part if wants_operator else int(part))
        else:
            return None
    if len(numbers) != len(operators) + 1 or "*" in operators[1:]:
        return None
    total, steps = numbers[0], []
    for operator, number in zip(operators, numbers[1:], strict=True):
        result = {"+": total + number, "-": total - number, "*": total * number}[operator]
        steps.append(f"{total} {operator} {number} = {result}")
        total = result
    return steps


@dataclass(frozen=True)
class TaskSource:
    """Reasoning Gym tasks in equal parts."""

    tasks: tuple[Task, ...]
    size: None = None

    def problems(self, seed: int) -> Iterator[Problem]:
        streams = [task.items(seed) for task in self.tasks]
        while True:
            for stream in streams:
                example = next(stream)[1]
                if example.target is not None:
                    yield problem_of(example)


def task_source(level: Mapping[str, Mapping[str, Any] | None]) -> TaskSource:
    """The source of {task: config}. Raises TaskError."""
    return TaskSource(tuple(Task(name, dict(config or {})) for name, config in level.items()))


# --- small functions --------------------------------------------------------------------------------------------------

NAMES = ("solve", "compute", "run", "apply", "work", "make", "get", "find", "f", "g", "h", "func", "result", "value")
LETTERS = "abcdeklmnpqrstuvwxyz"
_INTS = ((3, 5), (10, -4), (0, 7), (-6, -2), (12, 12))
_LISTS = ([3, 1, 2], [5], [9, -2, 4, 4], [0, 8])
_TEXTS = ("abc", "Hello", "x", "Ab cd")
# (what it returns, expression, kind of the arguments); {a}, {b} are argument names and {k} a constant.
FUNCTIONS: tuple[tuple[str, str, str], ...] = (
    ("the sum of {a} and {b}", "{a} + {b}", "two"),
    ("{a} minus {b}", "{a} - {b}", "two"),
    ("the product of {a} and {b}", "{a} * {b}", "two"),
    ("the larger of {a} and {b}", "max({a}, {b})", "two"),
    ("the smaller of {a} and {b}", "min({a}, {b})", "two"),
    ("{a} plus {k}", "{a} + {k}", "one"),
    ("{a} minus {k}", "{a} - {k}", "one"),
    ("{a} times {k}", "{a} * {k}", "one"),
    ("whether {a} is greater than {k}", "{a} > {k}", "one"),
    ("the square of {a}", "{a} * {a}", "one"),
    ("the largest item of the list {a}", "max({a})", "list"),
    ("the smallest item of the list {a}", "min({a})", "list"),
    ("the sum of the list {a}", "sum({a})", "list"),
    ("the length of the list {a}", "len({a})", "list"),
    ("the list {a} sorted", "sorted({a})", "list"),
    ("the list {a} reversed", "{a}[::-1]", "list"),
    ("the text {a} reversed", "{a}[::-1]", "text"),
    ("the text {a} in upper case", "{a}.upper()", "text"),
    ("the text {a} repeated {k} times", "{a} * {k}", "text"),
    ("the length of the text {a}", "len({a})", "text"),
)


@dataclass(frozen=True)
class CodeSource:
    """Tiny Python functions to write, each with the tests of its reference."""

    size: None = None

    def problems(self, seed: int) -> Iterator[Problem]:
        draw = random.Random(f"code/{seed}")
        while True:
            told, expression, kind = draw.choice(FUNCTIONS)
            name, (a, b), k = draw.choice(NAMES), draw.sample(LETTERS, 2), draw.randint(2, 99 if kind == "one" else 5)
            told, expression = told.format(a=a, b=b, k=k), expression.format(a=a, b=b, k=k)
            heads = f"{a}, {b}" if kind == "two" else a
            code = f"def {name}({heads}): return {expression}"
            question = f"Write a Python function {name}({heads}) that returns {told}."
            yield Problem(question, code, "code", f"return {expression}", tests=_tests(name, code, kind, k))


def _tests(name: str, code: str, kind: str, k: int) -> tuple[str, ...]:
    """Assertions that hold for the reference `code`, which comes from FUNCTIONS alone.

    Numbers on both sides of the constant `k` are asked, too: `return False` must not pass for `x > k`.
    """
    scope: dict[str, Any] = {}
    exec(code, scope)  # noqa: S102 - our own table's text, never a model's
    calls = {"two": _INTS, "one": [(a,) for a in (3, 0, -6, k, k + 1)], "list": [(v,) for v in _LISTS],
             "text": [(v,) for v in _TEXTS]}
    return tuple(f"assert {name}({', '.join(map(repr, call))}) == {scope[name](*call)!r}" for call in calls[kind])


# --- prepared files ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileSource:
    """The problems of a JSON-lines file, in a new order for each seed."""

    path: Path
    rows: tuple[Problem, ...]

    @property
    def size(self) -> int:
        return len(self.rows)

    def problems(self, seed: int) -> Iterator[Problem]:
        order = list(self.rows)
        random.Random(f"{self.path.name}/{seed}").shuffle(order)
        while True:
            yield from order


@functools.lru_cache
def file_source(path: Path) -> FileSource:
    """Reads lines `{"prompt": TEXT, "tests": [TEXT, ..], "setup": TEXT, "answer": TEXT}`; tests or an answer at least.

    Raises:
        ValueError: no such file, or a line that is no such record.
    """
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise ValueError(f"{path} cannot be read: {reason}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            question = str(record.get("prompt") or record.get("question") or "").strip()
            tests = list(map(str, record.get("tests") or ()))
            answer = next((a for a in (record.get("answer"), record.get("code")) if a not in (None, "")), "")
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is no JSON record: correct it or take it out") from error
        if not question or not (tests or answer != ""):  # an answer may be 0
            raise ValueError(f"{path}: line {number} needs a prompt, and tests or an answer")
        setup = str(record.get("setup") or "")
        rows.append(Problem(question, str(answer), "code" if tests else "file", tests=tuple(tests), setup=setup))
    if len(rows) < 2:
        raise ValueError(f"{path} holds {len(rows)} problems: at least 2 are needed, one of them to evaluate on")
    return FileSource(Path(path), tuple(rows))


# --- draws ------------------------------------------------------------------------------------------------------------


def held_out(levels: Sequence[Source], n: int, seed: int) -> list[Problem]:
    """`n` problems with distinct questions, in equal parts from every level.

    Raises:
        ValueError: a level has fewer distinct questions than its part, or would have nothing left to train on.
    """
    drawn: list[Problem] = []
    seen: set[str] = set()
    for index, level in enumerate(levels):
        wanted = n * (index + 1) // len(levels) - n * index // len(levels)
        if level.size is not None:
            wanted = min(wanted, max(level.size // HELD_OUT_SHARE, 1))
        drawn += _fresh(level, wanted, seed, seen)
    return drawn


def training(levels: Sequence[Source], n: int, seed: int, reserved: set[str]) -> list[Problem]:
    """`n` problems in the order of the levels, none of them reserved; questions may come twice where a level is small.

    Raises:
        ValueError: (nearly) every question of a level is reserved.
    """
    drawn: list[Problem] = []
    for index, level in enumerate(levels):
        wanted = n * (index + 1) // len(levels) - n * index // len(levels)
        drawn += list(stream(level, seed, reserved, wanted))
    return drawn


def stream(source: Source, seed: int, reserved: set[str], n: int | None = None) -> Iterator[Problem]:
    """Problems that are not reserved, `n` of them or without end. Raises ValueError as `training`."""
    rejected, given = 0, 0
    for problem in source.problems(seed):
        if n is not None and given >= n:
            return
        if normalise(problem.question) in reserved or _of_evaluated_group(problem):
            rejected += 1
            if rejected >= MAX_REJECTED:
                raise ValueError("nearly all questions are held out, nothing is left to train on: lower eval_n")
            continue
        rejected, given = 0, given + 1
        yield problem


def _fresh(source: Source, n: int, seed: int, seen: set[str]) -> list[Problem]:
    """`n` problems whose questions are not in `seen`, which grows by them."""
    drawn: list[Problem] = []
    rejected = 0
    for problem in source.problems(seed):
        if len(drawn) >= n:
            return drawn
        question = normalise(problem.question)
        if question in seen or _of_evaluated_group(problem) is False:
            rejected += 1
            if rejected >= MAX_REJECTED:
                raise ValueError(f"only {len(drawn)} distinct questions of {problem.task}, {n} were asked for: lower "
                                 "eval_n or raise the difficulty")
            continue
        rejected = 0
        seen.add(question)
        drawn.append(problem)
    return drawn


def _of_evaluated_group(problem: Problem) -> bool | None:
    """Whether the problem's solution is one for evaluation alone, see `GROUPS`; None where solutions are many."""
    group = problem.example.group if problem.example else None
    return None if group is None else for_evaluation(problem.task, group)
