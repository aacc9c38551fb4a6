"""Measures how dense the code is, beside well-read projects, and finds what is too long.

    python scripts/code_density.py                  # the whole repository, tests aside
    python scripts/code_density.py engine grpo      # one line for each folder or file, then their sum
    python scripts/code_density.py --by_file        # one line for each file
    python scripts/code_density.py --check          # exit status 1 where a limit is passed

A code line is a line that is neither blank, nor a comment, nor part of a docstring. Tuple assignments, conditional
expressions, comprehensions (generator expressions included) and lambdas are counted per 1,000 code lines. Blank lines
count inside functions, as a share of all lines there. Comments count per 100 code lines.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from dataclasses import dataclass, field, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LEFT_OUT = {"tests", "findings", "examples"}

# The range over nanochat, litgpt, trl, torchtitan and TRM, and what is allowed here: at most twice their highest rate.
ANCHORS = {
    "tuple_assignments": "1-5",
    "conditional_expressions": "6-11",
    "comprehensions": "7-21",
    "lambdas": "1-2",
    "blank_percent": "6-16",
    "comments": "7-19",
}
MOST = {"tuple_assignments": 10.0, "conditional_expressions": 22.0, "comprehensions": 42.0, "lambdas": 4.0}
LEAST = {"blank_percent": 6.0, "comments": 7.0}

LONGEST_CLASS = 250
LONGEST_FUNCTION = 50
LONGEST_MODULE = 450
WHOLE_MODULES = {"model.py"}  # reads better whole


@dataclass
class Counts:
    """What is counted in one file; files add up."""

    code_lines: int = 0
    tuple_assignments: int = 0
    conditional_expressions: int = 0
    comprehensions: int = 0
    lambdas: int = 0
    comments: int = 0
    function_lines: int = 0
    blank_lines: int = 0  # inside functions
    too_long: list[str] = field(default_factory=list)

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(Counts)))

    def rates(self) -> dict[str, float]:
        """Name in `ANCHORS` -> its rate."""
        thousands = max(self.code_lines, 1) / 1000
        names = ("tuple_assignments", "conditional_expressions", "comprehensions", "lambdas")
        rates = {name: getattr(self, name) / thousands for name in names}
        rates["blank_percent"] = 100 * self.blank_lines / max(self.function_lines, 1)
        rates["comments"] = 100 * self.comments / max(self.code_lines, 1)
        return rates


def count(path: Path) -> Counts:
    """The counts of one Python file."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    tree = ast.parse(source)
    counts = Counts()

    # Lines that hold no code: docstrings, blank lines, lines that are only a comment.
    skipped = docstring_lines(tree)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            counts.comments += 1
            if lines[token.start[0] - 1].lstrip().startswith("#"):
                skipped.add(token.start[0])
    blank = {number for number, line in enumerate(lines, start=1) if not line.strip()}
    counts.code_lines = len(lines) - len(skipped | blank)

    for node in ast.walk(tree):
        count_node(node, counts)

    # Blank lines inside functions; an inner function's lines count once, with the outer one.
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            inside |= set(range(node.lineno, node.end_lineno + 1))
    inside -= docstring_lines(tree)
    counts.function_lines = len(inside)
    counts.blank_lines = len(inside & blank)

    counts.too_long = too_long(path, tree, len(lines))
    return counts


def count_node(node: ast.AST, counts: Counts) -> None:
    """Adds one syntax node to `counts`."""
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
        # `a, b = b, a` and `low, high = 0, 1`: two statements in one. Unpacking a call's result is not.
        if any(isinstance(target, ast.Tuple) for target in node.targets):
            counts.tuple_assignments += 1
    elif isinstance(node, ast.IfExp):
        counts.conditional_expressions += 1
    elif isinstance(node, COMPREHENSIONS):
        counts.comprehensions += 1
    elif isinstance(node, ast.Lambda):
        counts.lambdas += 1


def docstring_lines(tree: ast.Module) -> set[int]:
    """Numbers of the lines that docstrings take."""
    numbers: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) or not node.body:
            continue
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            numbers |= set(range(first.lineno, first.end_lineno + 1))
    return numbers


def too_long(path: Path, tree: ast.Module, length: int) -> list[str]:
    """One line for each class, function and module that passes its limit. Docstrings count as part of them."""
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    lines = []
    if length > LONGEST_MODULE and name not in WHOLE_MODULES:
        lines.append(f"{name}: {length} lines, a module may have {LONGEST_MODULE}")
    for node in ast.walk(tree):
        if not isinstance(node, (ast.ClassDef, *FUNCTIONS)):
            continue
        limit = LONGEST_CLASS if isinstance(node, ast.ClassDef) else LONGEST_FUNCTION
        own = node.end_lineno - node.lineno + 1
        if own > limit:
            lines.append(f"{name}:{node.lineno}: {node.name} has {own} lines, {limit} are allowed")
    return lines


def python_files(places: list[Path]) -> list[Path]:
    """The Python files in `places`, tests and findings left out."""
    files = []
    for place in places:
        if place.is_file():
            files.append(place)
            continue
        for path in sorted(place.rglob("*.py")):
            parts = path.relative_to(place).parts
            hidden = any(part.startswith(".") for part in parts)
            if not hidden and not LEFT_OUT & set(parts):
                files.append(path)
    return files


def table(rows: list[tuple[str, Counts]]) -> str:
    """A line for each name, then the anchors' range and the limits."""
    heads = ["lines", "tuple", "cond", "compr", "lambda", "blank %", "comment"]
    width = max(8, *(len(name) for name, _ in rows))
    lines = [f"{'':{width}s}  " + "  ".join(f"{head:>8s}" for head in heads)]
    for name, counts in rows:
        values = [f"{counts.code_lines:8d}", *(f"{rate:8.1f}" for rate in counts.rates().values())]
        lines.append(f"{name:{width}s}  " + "  ".join(values))
    limits = [f"<= {MOST[name]:g}" if name in MOST else f">= {LEAST[name]:g}" for name in ANCHORS]
    for name, cells in (("anchors", list(ANCHORS.values())), ("allowed", limits)):
        lines.append(f"{name:{width}s}  " + "  ".join(f"{cell:>8s}" for cell in ["", *cells]))
    return "\n".join(lines)


def beyond_limits(counts: Counts) -> list[str]:
    """One line for each rate beyond its limit, and for everything that is too long."""
    rates = counts.rates()
    lines = [f"{name} {rates[name]:.1f}: at most {most:g}" for name, most in MOST.items() if rates[name] > most]
    lines += [f"{name} {rates[name]:.1f}: at least {least:g}" for name, least in LEAST.items() if rates[name] < least]
    return lines + counts.too_long


def main(argv: list[str] | None = None) -> int:
    """Prints the table; with --check, returns 1 where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="*", type=Path, help="files or folders (default: the repository)")
    parser.add_argument("--by_file", action="store_true", help="one line for each file")
    parser.add_argument("--check", action="store_true", help="exit status 1 where a limit is passed")
    options = parser.parse_args(argv)

    places = [place.resolve() for place in options.places] or [ROOT]
    missing = [str(place) for place in places if not place.exists()]
    if missing:
        parser.error(f"no such file or folder: {', '.join(missing)}")

    # One row for each place, or for each file in it, and their sum.
    rows: list[tuple[str, Counts]] = []
    for place in places:
        counted = [(path, count(path)) for path in python_files([place])]
        if options.by_file:
            rows += [(str(path.relative_to(place.parent)), counts) for path, counts in counted]
        else:
            rows.append((place.name, sum((counts for _, counts in counted), Counts())))
    total = sum((counts for _, counts in rows), Counts())
    print(table(rows if len(rows) == 1 else [*rows, ("all", total)]))

    problems = beyond_limits(total)
    print("\n".join(problems))
    return int(options.check and bool(problems))


if __name__ == "__main__":
    sys.exit(main())
