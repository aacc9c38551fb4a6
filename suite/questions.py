"""What the evaluation suite asks: the `--eval_suite` spec, and the files behind it as questions and documents.

Every reader takes the rows of `scripts/build_reasoning_dataset.py` and the published form of its data set.
"""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.files import JsonLineError, json_lines
from text_data.numbers import final_number

WINDOW = 512  # characters that are predicted at a time
CONTEXT_WINDOWS = 2  # windows before them that are read
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TITLE = re.compile(r"^ = [^=\n]+ = *$", re.MULTILINE)  # WikiText's mark of a new article


class SuiteError(ValueError):
    """A spec or a file of the suite cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class SuiteItem:
    """One entry of the suite: its name, its file, or for `synthetic` (prompt, answer) pairs handed in."""

    name: str
    path: Path | None = None
    pairs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Question:
    """One item to answer. `index` is its place in the file; the fields after `answer` belong to single data sets."""

    index: int
    prompt: str
    answer: str = ""  # synthetic: the text; gsm8k: the final number
    tests: tuple[str, ...] = ()
    setup: str = ""
    choices: tuple[str, ...] = ()
    answer_index: int = -1
    rationale: str = ""


# --- rows -------------------------------------------------------------------------------------------------------------


def _text(row: dict[str, Any], key: str, empty: bool = False) -> str:
    value = row.get(key, "" if empty else None)
    if isinstance(value, str):
        value = value.replace("\r\n", "\n")
    if not isinstance(value, str) or not (value.strip() or empty):
        raise SuiteError(f"{key} must be {'' if empty else 'non-empty '}text")
    return value


def _texts(row: dict[str, Any], key: str, least: int) -> tuple[str, ...]:
    value = row.get(key)
    if not isinstance(value, list) or len(value) < least or not all(isinstance(entry, str) for entry in value):
        raise SuiteError(f"{key} must be a list of at least {least} texts")
    return tuple(entry.replace("\r\n", "\n") for entry in value)


def _synthetic(index: int, row: dict[str, Any]) -> Question:
    return Question(index, _text(row, "prompt"), _text(row, "answer"))


def _gsm8k(index: int, row: dict[str, Any]) -> Question:
    if "final_answer" in row:
        prompt, answer = _text(row, "prompt"), str(row["final_answer"])
    else:
        prompt, answer = _text(row, "question"), _text(row, "answer")
    if final_number(answer) is None:
        raise SuiteError("the gold answer holds no number")
    return Question(index, prompt, answer)


def _mbpp(index: int, row: dict[str, Any]) -> Question:
    """The prompt of the published form shows the first test, which tells the function's name (Austin et al. 2021)."""
    if "test_list" not in row:
        return Question(index, _text(row, "prompt"), tests=_texts(row, "tests", 1), setup=_text(row, "setup", True))
    tests, setup = _texts(row, "test_list", 1), _text(row, "test_setup_code", True)
    parts = [_text(row, "text").strip(), "The code must pass this test:", setup.strip(), tests[0].strip()]
    return Question(index, "\n".join(filter(None, parts)), tests=tests, setup=setup)


def _science_qa(index: int, row: dict[str, Any]) -> Question | None:
    """None for a published question about an image: no text answers it."""
    choices = _texts(row, "choices", 2)
    right = row.get("answer_index", row.get("answer"))
    if type(right) is not int or not 0 <= right < len(choices) <= len(LETTERS):
        raise SuiteError(f"answer_index must be a choice's place, 0 to {len(choices) - 1}")
    if "prompt" in row:
        return Question(index, _text(row, "prompt"), choices=choices, answer_index=right,
                        rationale=_text(row, "rationale", True))
    if row.get("image"):
        return None
    options = [f"({letter}) {choice.strip()}" for letter, choice in zip(LETTERS, choices, strict=False)]
    parts = [_text(row, "hint", True).strip(), _text(row, "question").strip(), *options]
    told = [_text(row, key, True).strip() for key in ("lecture", "solution")]
    return Question(index, "\n".join(filter(None, parts)), choices=choices, answer_index=right,
                    rationale="\n".join(filter(None, told)))


READERS: dict[str, tuple[Callable[[int, dict[str, Any]], Question | None], str]] = {
    "synthetic": (_synthetic, "prompt, answer"),
    "gsm8k": (_gsm8k, "prompt, final_answer (or question, answer)"),
    "mbpp": (_mbpp, "prompt, tests (or text, test_list)"),
    "science_qa": (_science_qa, "prompt, choices, answer_index (or question, choices, answer)"),
}
NAMES = ("perplexity", *READERS)
NO_FILE_NEEDED = ("synthetic",)


# --- files ------------------------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a JSONL file, or of one JSON object that holds the rows by id. Raises SuiteError."""
    try:
        for number, row in json_lines(path):
            if not isinstance(row, dict):
                raise SuiteError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
            if number == 1 and len(row) and all(isinstance(value, dict) for value in row.values()):
                yield from ((f"{path}, entry {key}", value) for key, value in row.items())
            else:
                yield f"{path}, line {number}", row
    except OSError as error:
        raise SuiteError(f"{path} cannot be read: {error.strerror}") from error
    except JsonLineError as error:
        cause = error.__cause__
        if isinstance(cause, UnicodeDecodeError):
            raise SuiteError(f"{path} is no UTF-8 text: {cause.reason}") from error
        reason = getattr(cause, "msg", None) or str(cause)
        raise SuiteError(f"{path}, line {error.number}: no JSON ({reason}); expected one object a line") from error


def read_questions(item: SuiteItem, first_only: bool = False) -> list[Question]:
    """The questions of an entry, in the file's order. Raises SuiteError naming the first line that is wrong."""
    if item.path is None:
        return [Question(index, prompt, answer) for index, (prompt, answer) in enumerate(item.pairs)]
    reader, keys = READERS[item.name]
    questions = []
    for index, (where, row) in enumerate(_rows(item.path)):
        try:
            question = reader(index, row)
        except SuiteError as error:
            raise SuiteError(f"{item.name}: {where}: {error}; expected the keys {keys}, "
                             f"got {', '.join(row) or 'none'}") from error
        if question is not None:
            questions.append(question)
        if first_only:
            return questions
    if not questions:
        raise SuiteError(f"{item.name}: {item.path} holds no question that text alone can answer")
    return questions


def read_documents(path: Path, first_only: bool = False) -> list[str]:
    """Documents of the key `text` of a .jsonl file; of any other file, its WikiText articles, or else the whole text.

    Raises SuiteError.
    """
    if path.suffix == ".jsonl":
        documents = []
        for where, row in _rows(path):
            if not isinstance(row.get("text"), str):
                raise SuiteError(f"perplexity: {where}: expected the key text, got {', '.join(row) or 'none'}")
            documents.append(row["text"])
            if first_only:
                break
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SuiteError(f"perplexity: {path} cannot be read: {error}") from error
        starts = [match.start() for match in TITLE.finditer(text)]
        documents = [text[a:b] for a, b in zip([0, *starts], [*starts, len(text)], strict=True)]
    documents = [document.strip() for document in documents if document.strip()]
    if not documents:
        raise SuiteError(f"perplexity: {path} holds no text")
    return documents


def cut_windows(text: str, size: int = WINDOW) -> list[str]:
    """`text` in pieces of at most `size` characters that join to it, cut before white space where there is any."""
    pieces, start = [], 0
    while len(text) - start > size:
        end = start + size
        cut = next((place for place in range(end, start, -1) if text[place].isspace()), end)
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def window_pairs(document: str, size: int = WINDOW) -> list[tuple[str, str]]:
    """(context, continuation) of each window but the first, so that all text after it is predicted once."""
    pieces = cut_windows(document, size)
    return [("".join(pieces[max(place - CONTEXT_WINDOWS, 0) : place]), pieces[place])
            for place in range(1, len(pieces))]


def chosen(count: int, n: int, seed: int) -> list[int]:
    """`n` of `count` places (0: all), drawn by `seed`, in order; those of a smaller n are among those of a larger."""
    if not 0 < n < count:
        return list(range(count))
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return sorted(order[:n])


# --- the spec ---------------------------------------------------------------------------------------------------------


def _split(text: str) -> list[tuple[str, str]]:
    """(name, path or "") of each entry of a spec."""
    parts = (entry.strip().partition("=") for entry in text.split(","))
    return [(name.strip(), path.strip()) for name, _, path in parts]


def _entry_problem(name: str, path: str) -> str | None:
    if not name:
        return f"entry {'=' + path if path else 'without text'!r} has no name: write NAME=FILE"
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
        return f"unknown entry {name!r}, the nearest is {near}: choose from {', '.join(NAMES)}"
    if not path:
        return None if name in NO_FILE_NEEDED else f"{name} needs a file: write {name}=FILE"
    if not Path(path).is_file():
        return f"{name}: {path} is {'a folder' if Path(path).is_dir() else 'no file'}: give a file"
    try:
        if name == "perplexity":
            read_documents(Path(path), first_only=True)
        else:
            read_questions(SuiteItem(name, Path(path)), first_only=True)
    except SuiteError as error:
        return str(error)
    return None


def suite_problems(text: str) -> list[str]:
    """Everything wrong with an `--eval_suite` spec, one line each; looks at the first line of each file."""
    entries = _split(text)
    names: Sequence[str] = [name for name, _ in entries]
    found = [f"{name} is named twice" for name in dict.fromkeys(names) if name and names.count(name) > 1]
    return found + [problem for problem in (_entry_problem(*entry) for entry in entries) if problem]


def parse_suite(text: str) -> list[SuiteItem]:
    """The entries of a spec such as `perplexity=FILE,gsm8k=FILE,synthetic`. Raises SuiteError naming all problems."""
    problems = suite_problems(text)
    if problems:
        raise SuiteError(f"--eval_suite: {'; '.join(problems)}")
    return [SuiteItem(name, Path(path) if path else None) for name, path in _split(text)]
