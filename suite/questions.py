"""What the evaluation suite asks: its entries, and the files behind them as questions.

Every reader takes the rows of `scripts/build_reasoning_dataset.py` and the published form of its data set.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.files import JsonLineError
from sandbox.references import failing_references
from sandbox.runner import CodeJob
from text_data.choice_tasks import needs_image, read_choice_task
from text_data.code_tasks import CodeTask, is_mbpp, read_mbpp, setup_field, tests_field, text_field
from text_data.documents import Splits
from text_data.numbers import final_number
from text_data.rows import json_rows

SPLIT_FLAG = "--eval_suite_split"


class SuiteError(ValueError):
    """A spec or a file of the suite cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class SuiteItem:
    """One entry of the suite.

    name: of the entry.
    path: its file.
    pairs: for `synthetic` without a file: (prompt, answer) handed in.
    split: which rows of a file that names splits are asked: one split's, "all"; None = those of its only split.
    """

    name: str
    path: Path | None = None
    pairs: tuple[tuple[str, str], ...] = ()
    split: str | None = None


@dataclass(frozen=True)
class Question:
    """One item to answer. `index` is its place in the file; the fields after `answer` belong to single data sets.

    answer: the text (synthetic), or a text whose final number counts (gsm8k).
    tests: `assert` statements about the code that is asked for, with statements to run before them in `setup`, and the
        reference `code` where the row has it (mbpp).
    choices: the options, of which `answer_index` is right; `rationale` says why, empty where nobody wrote it
        (science_qa).
    """

    index: int
    prompt: str
    answer: str = ""
    tests: tuple[str, ...] = ()
    setup: str = ""
    code: str = ""
    choices: tuple[str, ...] = ()
    answer_index: int = -1
    rationale: str = ""

    @property
    def gold(self) -> str | None:
        """The answer that is asked for, for people; None where only tests judge."""
        if self.choices:
            return self.choices[self.answer_index]
        return self.answer or self.code or None


# --- rows -------------------------------------------------------------------------------------------------------------


def _text(row: dict[str, Any], key: str) -> str:
    """The text at `key`, which must say something. Raises SuiteError."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise SuiteError(f"{key} must be non-empty text")
    return value.replace("\r\n", "\n")


def _synthetic(index: int, row: dict[str, Any]) -> Question:
    return Question(index, _text(row, "prompt"), _text(row, "answer"))


def _gsm8k(index: int, row: dict[str, Any]) -> Question:
    # The builder's rows keep the final number apart; the published form ends its worked answer with it.
    if "final_answer" in row:
        prompt = _text(row, "prompt")
        answer = str(row["final_answer"])
    else:
        prompt = _text(row, "question")
        answer = _text(row, "answer")

    if final_number(answer) is None:
        raise SuiteError("the gold answer holds no number")
    return Question(index, prompt, answer)


def _mbpp(index: int, row: dict[str, Any]) -> Question:
    """A row of the builder, or one of MBPP's published forms, full or sanitized."""
    try:
        if is_mbpp(row):
            task = read_mbpp(row)
        else:
            code = text_field(row, "code", "")
            task = CodeTask(_text(row, "prompt"), tests_field(row, "tests"), setup_field(row, "setup"), code)
    except ValueError as error:
        raise SuiteError(str(error)) from error
    return Question(index, task.prompt, tests=task.tests, setup=task.setup, code=task.code)


def _science_qa(index: int, row: dict[str, Any]) -> Question | None:
    """None for a published question about an image: no text answers it."""
    try:
        task = read_choice_task(row)
    except ValueError as error:
        raise SuiteError(str(error)) from error
    if needs_image(row):
        return None
    return Question(
        index, task.prompt, choices=task.choices, answer_index=task.right, rationale=task.rationale
    )


# Name of an entry -> (reader of a row, the keys it expects, for people).
READERS: dict[str, tuple[Callable[[int, dict[str, Any]], Question | None], str]] = {
    "synthetic": (_synthetic, "prompt, answer"),
    "gsm8k": (_gsm8k, "prompt, final_answer (or question, answer)"),
    "mbpp": (_mbpp, "prompt, tests (or text or prompt, test_list)"),
    "science_qa": (_science_qa, "prompt, choices, answer_index (or question, choices, answer)"),
}


# --- files ------------------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a file in any form of `json_rows`. Raises SuiteError."""
    try:
        for place, row in json_rows(path):
            if not isinstance(row, dict):
                raise SuiteError(f"{path}, {place}: expected a JSON object, got {type(row).__name__}")
            yield f"{path}, {place}", row
    except OSError as error:
        raise SuiteError(f"{path} cannot be read: {error.strerror}") from error
    except JsonLineError as error:
        cause = error.__cause__
        if isinstance(cause, UnicodeDecodeError):
            raise SuiteError(f"{path} is no UTF-8 text: line {error.number}, {cause.reason}") from error
        raise SuiteError(
            f"{path}, line {error.number}: no JSON ({error.reason}); expected one object a line"
        ) from error


def keys_of(row: dict[str, Any]) -> str:
    """The keys of a row, for an error's text."""
    return ", ".join(row) or "none"


def read_questions(item: SuiteItem, first_only: bool = False) -> list[Question]:
    """The questions of an entry, in the file's order.

    `first_only` reads the first row alone; of a file whose rows name a split, the splits of all rows.

    Raises:
        SuiteError: names the first line that is wrong; the entry has no question; rows of several splits, of which
            none is chosen; rows whose own code fails their tests.
    """
    if item.path is None:
        if not item.pairs:
            raise SuiteError(f"{item.name} has neither a file nor pairs of prompt and answer")
        return [Question(index, prompt, answer) for index, (prompt, answer) in enumerate(item.pairs)]

    # A row that is left out counts in the index, so an index is the row's place in the file.
    splits = Splits(item.split, SPLIT_FLAG)
    questions = []
    programs = {}
    read = 0
    for index, (where, row) in enumerate(rows_of(item.path)):
        if not splits.takes(row) or (first_only and read):
            continue
        read += 1
        question = _question(item, index, where, row)
        if question is not None:
            questions.append(question)
            programs[where] = CodeJob(question.code, question.tests, question.setup)
        if first_only and not splits.counts:
            return questions

    if splits.problem():
        raise SuiteError(f"{item.name}: {item.path}: {splits.problem()}")
    if not questions and not (first_only and read):
        raise SuiteError(f"{item.name}: {item.path} holds no question that text alone can answer")
    wrong = failing_references(programs)
    if wrong is not None:
        raise SuiteError(f"{item.name}: {wrong}")
    return questions


def _question(item: SuiteItem, index: int, where: str, row: dict[str, Any]) -> Question | None:
    """The question of a row; None where text alone cannot answer it. Raises SuiteError, which names the place."""
    reader, keys = READERS[item.name]
    try:
        return reader(index, row)
    except SuiteError as error:
        raise SuiteError(f"{item.name}: {where}: {error}; expected the keys {keys}, got {keys_of(row)}") from error


def chosen(count: int, n: int, seed: int) -> list[int]:
    """`n` of `count` places (0: all), drawn by `seed`, in order; those of a smaller n are among those of a larger."""
    places = list(range(count))
    if not 0 < n < count:
        return places

    # The beginning of one shuffle: a larger n adds to what a smaller one took.
    random.Random(seed).shuffle(places)
    return sorted(places[:n])
