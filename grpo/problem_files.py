"""Problems from files: what a row may look like, and what is refused, with the line that is wrong.

A row is a JSON object with a prompt (`prompt` or `question`: text, or a chat of one user turn) and an answer or tests.
MBPP, HumanEval and GSM8K are read as published. What has no obvious meaning is refused: training on it in silence costs
hours.
"""

from __future__ import annotations

import difflib
import functools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.files import JsonLineError, reason_of
from engine.records import normalise
from enhanced.reasoning_format import split_completion
from grpo.problems import Problem
from sandbox.references import failing_references
from sandbox.runner import CodeJob
from text_data.answers import MARK, gold_of, without_calculator
from text_data.choice_tasks import has_choices, needs_image, read_choice_task
from text_data.code_tasks import (
    CodeTask,
    is_humaneval,
    is_mbpp,
    read_humaneval,
    read_mbpp,
    setup_field,
    tests_field,
    text_field,
)
from text_data.documents import Splits
from text_data.equality import same_answer
from text_data.row_fields import answer_text, prompt_text
from text_data.rows import json_rows

PROMPTS = ("prompt", "question")
ANSWERS = ("answer", "final_answer", "code")
# Names that others give to what is expected here, which would be passed over in silence.
OTHER_NAMES = {
    **dict.fromkeys(("instruction", "input", "query", "problem", "messages", "prompts", "text"), "prompt"),
    **dict.fromkeys(("output", "response", "completion", "target", "label", "ground_truth", "answers", "gold"),
    "answer"),
    **dict.fromkeys(("test_cases", "unit_tests", "testcases", "asserts", "assertions", "test"), "tests"),
    **dict.fromkeys(("canonical_solution", "solution", "program"), "code"),
}


@dataclass(frozen=True)
class FileSource:
    """The problems of a file, in a new order for each seed."""

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
    """The problems of a file of JSON lines, of one JSON list, or of one JSON object that holds them by id.

    Raises:
        ValueError: one line that names the file and the row: no such file, a row that is no problem, one question
            with two answers, or code whose own tests fail it.
    """
    # A broken line ends the run before it begins: a silent gap would change what is trained on.
    rows = []
    places: dict[str, tuple[str, Problem]] = {}  # of each question
    programs: dict[str, CodeJob] = {}
    splits = Splits(None)
    for place, record in _file_records(path):
        splits.takes(record)
        problem = _file_problem(record, f"{path}: {place}")
        rows.append(problem)
        if problem.tests:
            programs[place] = CodeJob(problem.answer, problem.tests, problem.setup)

        # Of two answers to one question no model can know which is meant; more tests of one program are fine.
        first, same = places.setdefault(normalise(problem.question), (place, problem))
        if problem.answer != same.answer and not (problem.tests and same.tests):
            raise ValueError(
                f"{path}: {place} asks what {first} asks and gives another answer: take one of them out"
            )

    if len(splits.counts) > 1:
        raise ValueError(
            f"{path} mixes rows of the splits {splits.shown()}: take one with scripts/build_reasoning_dataset.py"
        )
    if len(places) < 2:
        raise ValueError(f"{path} holds {len(places)} problems: at least 2 are needed, one of them to evaluate on")

    # What is shown as right must earn its reward.
    wrong = failing_references(programs)
    if wrong is not None:
        raise ValueError(f"{path}: {wrong}")
    return FileSource(Path(path), tuple(rows))


def _file_records(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file of problems with their places. Raises ValueError naming the first that is wrong."""
    try:
        yield from json_rows(Path(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {reason_of(error)}") from error
    except JsonLineError as error:
        hint = "correct it or take it out"
        if error.reason.startswith("Extra data"):
            hint = "write one object a line, without a comma behind it"
        raise ValueError(f"{path}: line {error.number} is no JSON record ({error.reason}): {hint}") from error


# --- one row ----------------------------------------------------------------------------------------------------------


def _file_problem(record: Any, place: str) -> Problem:
    """The problem of one record. Raises ValueError, which names the `place`, where it holds none."""
    if not isinstance(record, dict):
        raise ValueError(
            f"{place} is no JSON record (expected an object, got {type(record).__name__}): correct it or take it out"
        )
    try:
        problem = _problem_of(record)
        _check_example(problem)
    except ValueError as error:
        raise ValueError(f"{place} {error}") from error
    return problem


def _problem_of(record: dict[str, Any]) -> Problem:
    """The problem of a record. Raises ValueError: a clause that goes on from the record's place."""
    # A field that is null is not there.
    record = {name: value for name, value in record.items() if value is not None}
    task = _code_task(record)
    if task is not None:
        code = task.code or answer_text(record.get("answer"), "answer")
        return Problem(task.prompt, code, "code", tests=task.tests, setup=task.setup)

    if has_choices(record):
        if needs_image(record):
            raise ValueError("is about an image, which no model here can read: take it out")
        choice = read_choice_task(record)
        return Problem(choice.prompt, choice.letter, "file", choice.rationale)

    question = _question(record)
    thought, answer = _answer(record)
    if not question or not answer:
        raise ValueError(f"needs a prompt, and tests or an answer{_fields_of(record)}")
    _check_names(record)
    return Problem(question, answer, "file", thought)


def _code_task(record: dict[str, Any]) -> CodeTask | None:
    """The task of a record with tests; None of one without. Raises ValueError."""
    try:
        if is_mbpp(record):
            return read_mbpp(record)
        if is_humaneval(record):
            return read_humaneval(record)
        if record.get("tests") in (None, "", []):
            return None

        question = _question(record)
        if not question:
            raise ValueError(f"needs a prompt, and tests or an answer{_fields_of(record)}")
        _check_names(record)
        code = text_field(record, "code", "")
        return CodeTask(question, tests_field(record, "tests"), setup_field(record, "setup"), code)
    except ValueError as error:
        if str(error).startswith("needs"):
            raise
        raise ValueError(f"is no task to write code: {error}") from error


# --- fields -----------------------------------------------------------------------------------------------------------


def _question(record: dict[str, Any]) -> str:
    """The question of a record, "" where it has none. Raises ValueError."""
    texts = {}
    for name in PROMPTS:
        text = prompt_text(record.get(name), name)
        if text:
            texts[name] = text
    if len({normalise(text) for text in texts.values()}) > 1:
        raise ValueError("holds both a prompt and a question, which differ: take one of them out")
    return next(iter(texts.values()), "")


def _answer(record: dict[str, Any]) -> tuple[str, str]:
    """(the steps that lead to the answer or "", the answer or "") of a record. Raises ValueError.

    Steps stand before `####`, as GSM8K writes them; its marks for a calculator are dropped.
    """
    text = ""
    for name in ANSWERS:
        text = answer_text(record.get(name), name)
        if text:
            break
    final = answer_text(record.get("final_answer"), "final_answer")
    if final and not same_answer(gold_of(text), final):
        raise ValueError("holds both an answer and a final_answer, which differ: take one of them out")
    if MARK not in text:
        return "", without_calculator(final or text)

    steps, _, final = text.rpartition(MARK)
    if not final.strip():
        raise ValueError(f"has an answer that ends with {MARK}: the answer itself belongs behind it")
    return without_calculator(steps).strip(), gold_of(text)


# --- checks -----------------------------------------------------------------------------------------------------------


def _fields_of(record: Mapping[str, Any]) -> str:
    """What fields a record has, and what those are probably meant to be called."""
    hints = [f"rename {name} to {meant}" for name, meant in _misnamed(record)]
    fields = ", ".join(record) or "none"
    return f"; its fields are {fields}" + (f": {', '.join(hints)}" if hints else "")


def _misnamed(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, what it probably means) of the fields that are not read and whose meaning no other field has."""
    has = {
        "prompt": any(name in record for name in PROMPTS),
        "answer": any(name in record for name in ANSWERS),
        "tests": "tests" in record,
        "code": any(name in record for name in ANSWERS),
        "setup": "setup" in record,
    }
    pairs = []
    for name in record:
        meant = OTHER_NAMES.get(name)
        if meant is None and name not in (*PROMPTS, *ANSWERS, *has):
            near = difflib.get_close_matches(name, (*has, "question"), n=1, cutoff=0.8)
            meant = near[0] if near and abs(len(near[0]) - len(name)) <= 1 else None
        if meant == "question":
            meant = "prompt"
        if meant is not None and not has[meant]:
            pairs.append((name, meant))
    return pairs


def _check_names(record: Mapping[str, Any]) -> None:
    """Raises ValueError: a field that is not read looks like one that is."""
    misnamed = _misnamed(record)
    if misnamed:
        name, meant = misnamed[0]
        raise ValueError(f"has the field {name}, which is not read: rename it to {meant} or take it out")


def _check_example(problem: Problem) -> None:
    """Raises ValueError: the worked example of a problem would not earn its own rewards."""
    if not problem.answer:
        return
    parsed = split_completion(problem.worked())
    if not parsed.well_formed or parsed.solution != problem.answer:
        raise ValueError("has a reasoning tag such as <think> in its answer: take the tag out")
    if not problem.tests and not same_answer(problem.answer, problem.answer):
        raise ValueError(f"has an answer that says nothing: {problem.answer[:40]!r}")
