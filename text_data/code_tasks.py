"""Programming tasks as data sets give them: tests and set-up in their forms, MBPP's two published forms, HumanEval's.

The suite, the builder and GRPO's files read them here, so that one file is the same task to all of them.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SHOWN_TEST = "The code must pass this test:"


@dataclass(frozen=True)
class CodeTask:
    """A task to write code.

    Args:
        prompt: what is asked.
        tests: Python texts that hold assertions about the code, at least one.
        setup: Python that runs before them, or "".
        code: the reference program, or "".
    """

    prompt: str
    tests: tuple[str, ...]
    setup: str = ""
    code: str = ""


# --- fields -----------------------------------------------------------------------------------------------------------


def text_field(row: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """The text of a field, line breaks as `\\n`, no white space around it. Raises ValueError: none and no default."""
    value = row.get(name, default)
    if value is None and default is not None:
        value = default
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {type(value).__name__}")

    value = value.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not value and default is None:
        raise ValueError(f"{name} is empty")
    return value


def tests_field(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The tests of a field: a list of texts, such a list as JSON text, or one text of several statements.

    One text of assertions alone becomes one test for each; any other text stays one test, because its statements build
    on each other. Test functions are called; definitions and imports alone belong to the test below them.

    Raises:
        ValueError: another form, no test, or one that is no Python or asserts nothing.
    """
    value = row.get(name)
    if isinstance(value, str):
        value = _listed(value)
    if isinstance(value, Mapping):
        names = ", ".join(map(str, list(value)[:4]))
        raise ValueError(
            f"{name} is an object of {names}: give a list of Python assertions about the code; inputs with the outputs "
            "that are expected are not read"
        )
    if not isinstance(value, list) or not value or not all(isinstance(test, str) for test in value):
        raise ValueError(f"{name} must be a list of at least 1 text, Python assertions about the code")

    tests = []
    above = ""
    for place, test in enumerate(value, start=1):
        test = text_field({name: test}, name)
        _check_test(test, f"{name} {place}")
        test = above + _called(test)
        above = f"{test}\n" if _only_defines(test) else ""
        if not above:
            tests.append(test)
    if above:
        raise ValueError(f"{name} {len(value)} asserts nothing: it defines, and calls none of it")
    return tuple(tests)


def _called(test: str) -> str:
    """A test with calls of the functions `test..` that it defines, where nothing is called; any other as it is."""
    if not _only_defines(test):
        return test
    functions = [node for node in python_tree(test).body if isinstance(node, ast.FunctionDef)]
    calls = [f"{node.name}()" for node in functions if node.name.startswith("test") and not ast.unparse(node.args)]
    return "\n".join([test, "", *calls]) if calls else test


def _only_defines(test: str) -> bool:
    """Whether nothing of a test can fail: it holds definitions, imports and docstrings alone."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    body = python_tree(test).body
    return all(isinstance(node, kinds) or isinstance(getattr(node, "value", None), ast.Constant) for node in body)


def _listed(text: str) -> list[str]:
    """The tests of one text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
        return value

    tree = python_tree(text.strip())
    if tree is None or not all(isinstance(node, ast.Assert) for node in tree.body):
        return [text]
    return [ast.get_source_segment(text.strip(), node) or "" for node in tree.body]


def _check_test(test: str, name: str) -> None:
    """Raises ValueError: the test is no Python, or comparisons alone, which hold whatever they compare."""
    tree = python_tree(test)
    if tree is None:
        raise ValueError(f"{name} is no Python: {test.splitlines()[0][:60]!r}")
    if all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Compare) for node in tree.body):
        raise ValueError(f"{name} asserts nothing: write `assert` before {test.splitlines()[0][:60]!r}")


def setup_field(row: Mapping[str, Any], *names: str) -> str:
    """The Python statements of the fields that are there, one below the other; each is a text or a list of texts.

    Raises:
        ValueError: another form, or no Python.
    """
    parts = []
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
            raise ValueError(f"{name} must be Python text, or a list of lines of it")
        parts += [text_field({name: line}, name, "") for line in value]

    setup = "\n".join(filter(None, parts))
    if python_tree(setup) is None:
        raise ValueError(f"{' and '.join(names)} is no Python: {setup.splitlines()[0][:60]!r}")
    return setup


def python_tree(text: str) -> ast.Module | None:
    """The syntax tree of a text; None where it is no Python, whatever the parser raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in a model's text
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


# --- published forms --------------------------------------------------------------------------------------------------


def read_mbpp(row: Mapping[str, Any]) -> CodeTask:
    """A task of MBPP as published: the full form has `text` and `test_setup_code`, the sanitized one `prompt` and
    `test_imports`.

    The prompt shows the first test, below its set-up, because the test tells the function's name (Austin et al. 2021).

    Raises:
        ValueError: a field is missing or of another form.
    """
    task = text_field(row, "prompt" if "text" not in row and "prompt" in row else "text")
    tests = tests_field(row, "test_list")
    setup = setup_field(row, "test_imports", "test_setup_code")
    code = text_field(row, "code", "")

    shown = "\n".join(filter(None, (setup, tests[0])))
    return CodeTask(f"{task}\n{SHOWN_TEST}\n{shown}", tests, setup, code)


def read_humaneval(row: Mapping[str, Any]) -> CodeTask:
    """A task of HumanEval: `prompt` begins the program, `test` defines `check`, `entry_point` names what it checks.

    Raises:
        ValueError: a field is missing or of another form.
    """
    beginning = row.get("prompt")
    prompt = text_field(row, "prompt")
    name = text_field(row, "entry_point")
    test = text_field(row, "test")
    if python_tree(test) is None or "def check(" not in test:
        raise ValueError("test must be Python that defines check(candidate)")
    code = row.get("canonical_solution") or ""
    if code:
        code = f"{beginning}{code}".strip()
    return CodeTask(prompt, (f"{test}\n\ncheck({name})",), code=code)


def is_mbpp(row: Mapping[str, Any]) -> bool:
    """Whether a row has one of MBPP's published forms."""
    return "test_list" in row


def is_humaneval(row: Mapping[str, Any]) -> bool:
    """Whether a row has HumanEval's form."""
    return "entry_point" in row and "test" in row
