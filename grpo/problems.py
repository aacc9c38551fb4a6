"""What GRPO's stages ask: problems with a gold answer, their worked examples, draws for evaluation and training.

A source is endless and made from a seed alone. Questions for evaluation are drawn first, over all stages, and every
training draw rejects them, compared as normalised text.
"""

from __future__ import annotations

import itertools
import operator
import random
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from addon.streams import most_owed
from engine.records import normalise
from enhanced.reasoning_format import END_SOLUTION, END_THINK, SOLUTION, THINK
from grpo.rewards import item_text
from reasoning_gym_wrapper import EVAL_SEED, MAX_REJECTED, Example, Task, TaskError, for_evaluation
from tasks.limits import USUAL, JudgeConfig

HELD_OUT_SHARE = 5  # of a finite source, one in so many problems is kept for evaluation at most
_OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_SUM = re.compile(r"-?\d+(?:\s*[-+*]\s*-?\d+)+")


@dataclass(frozen=True)
class Problem:
    """One question.

    Args:
        question: what the model is asked.
        answer: the gold answer as text; "" where there is none and `tests` judge alone.
        task: name of the Reasoning Gym task; "code" where tests judge, "file" for other rows of a prepared file.
        thought: the steps that lead to the answer, for the worked example; "" = the answer stands for them.
        item: the Reasoning Gym entry as `item_text` packs it, which the task's verifier needs.
        tests: Python assertions that a program must pass.
        setup: Python code that runs before them.
        example: the Reasoning Gym item itself.
    """

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
        if guessed:
            thought = guess(self.answer)
        else:
            thought = self.thought or self.answer
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
    sums = _SUM.findall(question)
    if not sums:
        return guess(answer)

    # The question proper comes last. Steps that miss the gold answer were read wrongly, so they are not shown.
    steps = sum_steps(sums[-1])
    if steps and steps[-1].endswith(f"= {answer}"):
        return "\n".join(steps)
    return guess(answer)


def guess(answer: str) -> str:
    """The thought of an answer that is not derived."""
    return f"So it is {answer}"


def sum_steps(expression: str) -> list[str] | None:
    """`3 + 4 - 9` -> [`3 + 4 = 7`, `7 - 9 = -2`]; None where an operator would bind tighter than one before it."""
    terms = _sum_terms(expression)
    if terms is None:
        return None
    numbers, operators = terms

    # From left to right is right only where no product follows a sum.
    if len(numbers) != len(operators) + 1 or "*" in operators[1:]:
        return None

    steps = []
    total = numbers[0]
    for sign, number in zip(operators, numbers[1:], strict=True):
        result = _OPERATIONS[sign](total, number)
        steps.append(f"{total} {sign} {number} = {result}")
        total = result
    return steps


def _sum_terms(expression: str) -> tuple[list[int], list[str]] | None:
    """(numbers, operators between them) of a text; None where the two do not take turns."""
    numbers: list[int] = []
    operators: list[str] = []
    for part in re.findall(r"-?\d+|[-+*]", re.sub(r"\s+", " ", expression)):
        wants_operator = len(numbers) > len(operators)
        is_operator = part in _OPERATIONS

        # `3 -4`: here the sign of the number stands for the operator.
        if wants_operator and part.startswith("-") and not is_operator:
            operators.append("-")
            numbers.append(int(part[1:]))
        elif wants_operator and is_operator:
            operators.append(part)
        elif not wants_operator and not is_operator:
            numbers.append(int(part))
        else:
            return None
    return numbers, operators


@dataclass(frozen=True)
class TaskSource:
    """Tasks in equal parts; with `weights`, one for each, training draws them in these shares."""

    tasks: tuple[Task, ...]
    size: None = None
    weights: tuple[float, ...] | None = None

    def problems(self, seed: int) -> Iterator[Problem]:
        streams = [task.items(seed) for task in self.tasks]
        weights = self.weights
        if weights is None or seed >= EVAL_SEED:
            weights = (1.0,) * len(streams)

        # Some items have no gold answer: they count for their task's share all the same.
        taken = [0] * len(streams)
        while True:
            turn = most_owed(weights, taken)
            taken[turn] += 1
            example = next(streams[turn])[1]
            if example.target is not None:
                yield problem_of(example)


def task_source(level: Mapping[str, Mapping[str, Any] | None], limits: JudgeConfig = USUAL) -> TaskSource:
    """The source of {task: config}; `limits` hold for making and scoring items. Raises TaskError."""
    for name, config in level.items():
        if not isinstance(config, Mapping | None):
            raise TaskError(f"task {name}: expected settings such as min_terms by name, got {config!r}")
    return TaskSource(tuple(Task(name, dict(config or {}), limits) for name, config in level.items()))


# --- small functions --------------------------------------------------------------------------------------------------

NAMES = ("solve", "compute", "run", "apply", "work", "make", "get", "find", "f", "g", "h", "func", "result", "value")
LETTERS = "abcdeklmnpqrstuvwxyz"
_PAIRS = ((3, 5), (10, -4), (0, 7), (-6, -2), (12, 12))
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
            # The order of these draws fixes the problems of a seed.
            description, expression, kind = draw.choice(FUNCTIONS)
            name = draw.choice(NAMES)
            a, b = draw.sample(LETTERS, 2)
            k = draw.randint(2, 99 if kind == "one" else 5)

            expression = expression.format(a=a, b=b, k=k)
            arguments = f"{a}, {b}" if kind == "two" else a
            code = f"def {name}({arguments}): return {expression}"
            returned = description.format(a=a, b=b, k=k)
            question = f"Write a Python function {name}({arguments}) that returns {returned}."
            yield Problem(question, code, "code", f"return {expression}", tests=_tests(name, code, kind, k))


def _tests(name: str, code: str, kind: str, k: int) -> tuple[str, ...]:
    """Assertions that hold for the reference `code`, which comes from FUNCTIONS alone.

    Numbers on both sides of the constant `k` are tested, too: `return False` must not pass for `x > k`.
    """
    scope: dict[str, Any] = {}
    exec(code, scope)  # noqa: S102 - our own table's text, never a model's
    function = scope[name]

    # Arguments of each call, by what the function takes.
    calls: Sequence[tuple[Any, ...]]
    if kind == "two":
        calls = _PAIRS
    elif kind == "one":
        calls = [(number,) for number in (3, 0, -6, k, k + 1)]
    elif kind == "list":
        calls = [(numbers,) for numbers in _LISTS]
    else:
        calls = [(text,) for text in _TEXTS]

    # What the reference returns is what the test expects.
    lines = []
    for call in calls:
        shown = ", ".join(map(repr, call))
        lines.append(f"assert {name}({shown}) == {function(*call)!r}")
    return tuple(lines)


# --- draws ------------------------------------------------------------------------------------------------------------


def tasks_of(levels: Iterable[Source]) -> list[Task]:
    """The tasks that the questions of these levels come from; a prepared file has none."""
    return [task for level in levels for task in getattr(level, "tasks", ())]


def evaluation_problems(
    levels: Sequence[Source], n: int, seed: int, trained: Container[str] = (), left_out: list[str] | None = None
) -> list[Problem]:
    """`n` problems with distinct questions, in equal parts from every level.

    Questions in `trained` are left out and the next ones take their places; `left_out` takes them down.

    Raises:
        ValueError: a level has fewer distinct questions than its part, or would have nothing left to train on.
    """
    drawn: list[Problem] = []
    seen: set[str] = set()  # over all levels: an easy level's question may come back in a harder one
    for level, part in zip(levels, _equal_parts(n, len(levels)), strict=True):
        if level.size is not None:  # a file must keep questions to train on
            part = min(part, max(level.size // HELD_OUT_SHARE, 1))
        drawn += _distinct(level, part, seed, seen, trained, [] if left_out is None else left_out)
    return drawn


def training_problems(levels: Sequence[Source], n: int, seed: int, reserved: set[str]) -> list[Problem]:
    """`n` problems in the order of the levels, none of them reserved; questions may come twice where a level is small.

    Raises:
        ValueError: (nearly) every question of a level is reserved.
    """
    drawn: list[Problem] = []
    for level, part in zip(levels, _equal_parts(n, len(levels)), strict=True):
        drawn += itertools.islice(stream(level, seed, reserved), part)
    return drawn


def _equal_parts(n: int, count: int) -> list[int]:
    """`n` as `count` numbers that differ by 1 at most."""
    return [n * (index + 1) // count - n * index // count for index in range(count)]


def stream(source: Source, seed: int, reserved: set[str]) -> Iterator[Problem]:
    """Problems without end, none of them reserved. Raises ValueError as `training_problems`."""

    def is_free(problem: Problem) -> bool:
        return normalise(problem.question) not in reserved and not _of_evaluated_group(problem)

    yield from _accepted(source, seed, is_free)
    raise ValueError("nearly all questions are held out, nothing is left to train on: lower eval_n")


def _distinct(
    source: Source, n: int, seed: int, seen: set[str], trained: Container[str], left_out: list[str]
) -> list[Problem]:
    """`n` problems whose questions are not in `seen`, which grows by them, and not in `trained`.

    Raises:
        ValueError: the source does not have so many.
    """

    def is_new(problem: Problem) -> bool:
        question = normalise(problem.question)
        if question in seen or _of_evaluated_group(problem) is False:
            return False
        seen.add(question)
        if question in trained:
            left_out.append(question)
            return False
        return True

    before = len(left_out)
    drawn = list(itertools.islice(_accepted(source, seed, is_new), n))
    if len(drawn) < n:
        task = next(source.problems(seed)).task
        beside = ""
        if len(left_out) > before:
            beside = f" beside {len(left_out) - before} that the checkpoint was trained on"
        raise ValueError(
            f"only {len(drawn)} distinct questions of {task}{beside}, {n} were asked for: lower eval_n or raise the "
            "difficulty"
        )
    return drawn


def _accepted(source: Source, seed: int, accepts: Callable[[Problem], bool]) -> Iterator[Problem]:
    """The problems that `accepts` takes; ends after MAX_REJECTED in a row that it does not."""
    rejected = 0
    for problem in source.problems(seed):
        if accepts(problem):
            rejected = 0
            yield problem
        else:
            rejected += 1
            if rejected >= MAX_REJECTED:  # a source of few questions would be searched for ever
                return


def _of_evaluated_group(problem: Problem) -> bool | None:
    """Whether the problem's solution is one for evaluation alone, see `GROUPS`; None where solutions are many."""
    if problem.example is None or problem.example.group is None:
        return None
    return for_evaluation(problem.task, problem.example.group)
