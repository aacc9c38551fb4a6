"""The spec of the evaluation suite (`--eval_suite`): its entries, and everything that may be wrong with them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.files import named_paths
from sandbox import runner
from suite.language import read_documents
from suite.questions import READERS, SuiteError, SuiteItem, read_questions

LANGUAGE = "perplexity"
SUMS = "synthetic"
CODE = "mbpp"
NAMES = (LANGUAGE, *READERS)


def _entry_problem(name: str, path: str, split: str | None) -> str | None:
    """What is wrong with one entry, or None; looks at the first line of its file, and at the splits of all."""
    # What the spec itself tells.
    if not name:
        entry = repr("=" + path) if path else "'without text'"
        return f"entry {entry} has no name: write NAME=FILE"
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
        return f"unknown entry {name!r}, the nearest is {near}: choose from {', '.join(NAMES)}"

    # What lies there.
    if not path:
        return None if name == SUMS else f"{name} needs a file: write {name}=FILE"
    if not Path(path).is_file():
        what = "a folder" if Path(path).is_dir() else "no file"
        return f"{name}: {path} is {what}: give a file"

    # What stands in it: one line is enough to see a file of another entry. Reference code is run now, not after hours.
    try:
        if name == LANGUAGE:
            read_documents(Path(path), first_only=True, split=split)
        else:
            read_questions(SuiteItem(name, Path(path), split=split), first_only=name != CODE)
    except SuiteError as error:
        return str(error)
    return None


def suite_problems(text: str, split: str | None = None) -> list[str]:
    """Everything wrong with an `--eval_suite` spec, one line each; looks at the first line of each file, at all code.

    `split` chooses rows of files whose rows name one, see `SuiteItem`.
    """
    entries = named_paths(text)
    names = [name for name, _ in entries]
    # Rows of the records are told apart by the entry's name.
    lines = []
    for name in dict.fromkeys(names):
        if name and names.count(name) > 1:
            lines.append(f"{name} is named twice")

    for name, path in entries:
        problem = _entry_problem(name, path, split)
        if problem and problem not in lines:
            lines.append(problem)

    return lines


def parse_suite(text: str, split: str | None = None) -> list[SuiteItem]:
    """The entries of a spec such as `perplexity=FILE,gsm8k=FILE,synthetic`; `split` as in `suite_problems`.

    Raises:
        SuiteError: names all problems.
    """
    problems = suite_problems(text, split)
    if problems:
        raise SuiteError(f"--eval_suite: {'; '.join(problems)}")

    items = []
    for name, path in named_paths(text):
        items.append(SuiteItem(name, Path(path) if path else None, split=split))
    return items


def with_sums(
    items: Sequence[SuiteItem], sums: Callable[[int], Sequence[tuple[str, str]]], n: int
) -> list[SuiteItem]:
    """The entries, `synthetic` without a file asking what `sums` gives for `n`: pairs of prompt and answer.

    `n` 0 leaves the number to `sums`, which is not called where nothing needs it.
    """
    filled = []
    for item in items:
        if item.name == SUMS and item.path is None:
            item = SuiteItem(SUMS, pairs=tuple(sums(n)))
        filled.append(item)
    return filled


def check_code_runner(items: Sequence[SuiteItem], allow_unconfined: bool) -> None:
    """Raises SuiteError where the suite would run generated code that nothing confines and nobody allowed."""
    if allow_unconfined or all(item.name != CODE for item in items):
        return

    # Asked last: it runs a program to see.
    reason = runner.confinement()
    if reason is not None:
        raise SuiteError(
            f"mbpp runs generated code, which cannot be confined here ({reason}): leave mbpp out of --eval_suite, or "
            "accept the risk with --allow_unconfined_code"
        )


def spec_problems(text: str | None, allow_unconfined: bool, split: str | None = None) -> list[str]:
    """Everything wrong with an `--eval_suite` spec here, one line each; None is no suite; `split` as above.

    A suite that would run generated code which nothing confines is told when all else is right.
    """
    if not text:
        return []
    lines = suite_problems(text, split)
    if lines:
        return lines

    try:
        check_code_runner(parse_suite(text, split), allow_unconfined)
    except SuiteError as error:
        return [str(error)]
    return []
