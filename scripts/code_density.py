"""Measures how dense the code is, beside well-read projects, and finds what is too long.

    python scripts/code_density.py                  # the whole repository, tests aside
    python scripts/code_density.py engine grpo      # one line for each folder or file, then their sum
    python scripts/code_density.py --by_file        # one line for each file
    python scripts/code_density.py --check          # exit status 1 where a limit is passed

A code line is a line that is neither blank, nor a comment, nor part of a docstring. Tuple assignments, conditional
expressions, comprehensions (generator expressions included) and lambdas are counted per 1,000 code lines. Blank lines
count inside functions, as a share of all lines there, docstrings left out. Comments count per 100 code lines.

The projects in `ANCHORS` were measured with this script at the commits named there. The limits of rates hold for the
sum of everything measured, those of lengths for each function, class and module.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))

from script_tools import ScriptParser  # noqa: E402

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LEFT_OUT = {"tests", "findings", "examples"}

# Well-read projects as this script measures their whole repositories, in the order of `RATES`.
ANCHORS = {
    "nanochat 92d63d4": (7.0, 14.6, 19.2, 2.8, 6.4, 25.8),
    "litgpt 2685705": (1.7, 8.2, 8.1, 1.1, 8.9, 8.4),
    "trl f2cd577": (2.1, 13.0, 18.8, 1.3, 9.4, 17.2),
    "torchtitan b5bcd76": (0.9, 7.4, 12.0, 1.5, 6.1, 10.5),
    "TRM e7b6871": (1.9, 7.4, 23.8, 1.2, 16.0, 19.0),  # TinyRecursiveModels
}

# Name of a rate -> its head in the table. Four are counted per 1,000 code lines, then per cent, then per 100 lines.
PER_THOUSAND = ("tuple_assignments", "conditional_expressions", "comprehensions", "lambdas")
RATES = {
    "tuple_assignments": "tuple",
    "conditional_expressions": "cond",
    "comprehensions": "compr",
    "lambdas": "lambda",
    "blank_percent": "blank %",
    "comments": "comment",
}

# What is allowed here. The first four may pass the anchors' highest rates, though not their double; the last two must
# come near the anchors' lowest.
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
        sums = Counts()
        for part in fields(Counts):
            setattr(sums, part.name, getattr(self, part.name) + getattr(other, part.name))
        return sums

    def rates(self) -> dict[str, float]:
        """Name in `RATES` -> its rate, in that order."""
        code_lines = max(self.code_lines, 1)
        rates = {}
        for name in PER_THOUSAND:
            rates[name] = 1000 * getattr(self, name) / code_lines
        rates["blank_percent"] = 100 * self.blank_lines / max(self.function_lines, 1)
        rates["comments"] = 100 * self.comments / code_lines
        return rates


def count(path: Path) -> Counts:
    """The counts of one Python file in UTF-8.

    Raises:
        SyntaxError: the file is no Python.
    """
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    tree = ast.parse(source)
    counts = Counts()

    # Lines that hold no code: docstrings, blank lines, lines that are only a comment.
    docstrings = docstring_lines(tree)
    skipped = set(docstrings)
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
    inside -= docstrings
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
    name = path.name
    if path.is_relative_to(ROOT):
        name = path.relative_to(ROOT).as_posix()

    lines = []
    if length > LONGEST_MODULE and name not in WHOLE_MODULES:
        lines.append(f"{name}: {length} lines, a module may have {LONGEST_MODULE}")

    # A definition begins at its `def` or `class`, decorators aside.
    for node in ast.walk(tree):
        if not isinstance(node, (ast.ClassDef, *FUNCTIONS)):
            continue
        limit = LONGEST_FUNCTION
        if isinstance(node, ast.ClassDef):
            limit = LONGEST_CLASS
        own = node.end_lineno - node.lineno + 1
        if own > limit:
            lines.append(f"{name}:{node.lineno}: {node.name} has {own} lines, {limit} are allowed")
    return lines


def python_files(places: list[Path]) -> list[Path]:
    """The Python files in `places`, hidden folders and those of `LEFT_OUT` aside; a file that is named is taken."""
    files = []
    for place in places:
        if place.is_file():
            files.append(place)
            continue

        # Names are looked at below the place alone, so that a hidden or left-out folder can itself be named.
        for path in sorted(place.rglob("*.py")):
            parts = path.relative_to(place).parts
            hidden = any(part.startswith(".") for part in parts)
            if not hidden and not LEFT_OUT & set(parts):
                files.append(path)
    return files


def table(rows: list[tuple[str, Counts]]) -> str:
    """A line for each name, then the anchors and the limits."""
    lines = [_line("", "lines", list(RATES.values()))]
    for name, counts in rows:
        lines.append(_line(name, str(counts.code_lines), _shown(counts.rates().values())))
    for name, rates in ANCHORS.items():
        lines.append(_line(name, "", _shown(rates)))

    # A rate is limited from above or from below, never both ways.
    limits = []
    for name in RATES:
        limits.append(f"<= {MOST[name]:g}" if name in MOST else f">= {LEAST[name]:g}")
    lines.append(_line("allowed", "", limits))

    # The longest name decides where the figures begin.
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}s}{cells}" for name, cells in lines)


def _shown(rates: Iterable[float]) -> list[str]:
    return [f"{rate:.1f}" for rate in rates]


def _line(name: str, code_lines: str, cells: list[str]) -> tuple[str, str]:
    """(name, figures in columns of equal width)."""
    return name, "".join(f"  {cell:>8s}" for cell in [code_lines, *cells])


def beyond_limits(counts: Counts) -> list[str]:
    """One line for each rate beyond its limit, and for everything that is too long."""
    lines = []
    for name, rate in counts.rates().items():
        if name in MOST and rate > MOST[name]:
            lines.append(f"{name} {rate:.1f}: at most {MOST[name]:g}")
        if name in LEAST and rate < LEAST[name]:
            lines.append(f"{name} {rate:.1f}: at least {LEAST[name]:g}")
    return lines + counts.too_long


def counted(places: list[Path], by_file: bool) -> list[tuple[str, Counts]]:
    """(name, counts) of each place, or of each file in it."""
    rows: list[tuple[str, Counts]] = []
    for place in places:
        sums = Counts()
        for path in python_files([place]):
            counts = count(path)
            sums += counts
            if by_file:
                rows.append((str(path.relative_to(place.parent)), counts))
        if not by_file:
            rows.append((place.name, sums))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Prints the table; with --check, returns 1 where a limit is passed."""
    parser = ScriptParser(__doc__)
    parser.add_argument("places", nargs="*", type=Path, help="files or folders (default: the repository)")
    parser.add_argument("--by_file", action="store_true", help="one line for each file")
    parser.add_argument("--check", action="store_true", help="exit status 1 where a limit is passed")
    options = parser.parse_args(argv)

    places = [place.resolve() for place in options.places] or [ROOT]
    missing = [str(place) for place in places if not place.exists()]
    if missing:
        parser.error(f"no such file or folder: {', '.join(missing)}")

    # The sum is what the limits hold for, also where its line would only repeat the one above it.
    rows = counted(places, options.by_file)
    total = Counts()
    for _, counts in rows:
        total += counts
    if len(rows) > 1:
        rows.append(("all", total))
    print(table(rows))

    problems = beyond_limits(total)
    for problem in problems:
        print(problem)
    return int(options.check and bool(problems))


if __name__ == "__main__":
    sys.exit(main())
