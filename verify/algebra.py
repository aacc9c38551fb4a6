"""Rules of the tasks whose answers are expressions: read by Python's parser, computed as fractions, never evaluated.

Only what passes `readable` reaches sympy, which would run it as Python.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from verify.forms import words
from verify.table import Entry, strict

LONGEST = 1_000  # characters of an expression
MOST_POWER = 1_000  # of a constant exponent
ARITHMETIC = re.compile(r"[\d\s+\-*/().]+", re.A)
EXPONENT = re.compile(r"[0-9.][eE][+-]?[0-9]")
FUNCTIONS = frozenset(
    {"sqrt", "exp", "log", "ln", "Abs", "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot",
     "asec", "acsc", "sinh", "cosh", "tanh", "coth", "sech", "csch", "asinh", "acosh", "atanh", "acoth"}
)
CONSTANTS = frozenset({"E", "pi", "A", "D", "const", "constant"})
OF_INTEGRATION = re.compile(r"[CcKk](?:1|_\d)?", re.A)  # not C7: that may be C with a wrong digit behind
Monomial = tuple[tuple[str, int], ...]


def tree_of(text: str) -> ast.expr:
    """The syntax tree of an expression on one line. Raises ValueError where it is none, or too long."""
    text = text.strip()
    if len(text) > LONGEST or "\n" in text or "#" in text:  # no comment may follow
        raise ValueError("more than an expression")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, MemoryError) as error:
        raise ValueError("no expression") from error


def value_of(node: ast.expr) -> Fraction:
    """The exact value of a sum, product or quotient of integers. Raises ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = value_of(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if not isinstance(node, ast.BinOp):
        raise ValueError("neither a number nor an operation")

    left = value_of(node.left)
    right = value_of(node.right)
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
    raise ValueError("another operation")


def is_arithmetic(answer: str, entry: Entry) -> bool:
    """Whether a text is made of numbers, + - * / and parentheses alone; powers may take for ever."""
    return len(answer) <= LONGEST and ARITHMETIC.fullmatch(answer) is not None and "**" not in answer


@strict("puzzle24", "countdown", name="+ - * / on the given numbers, each used once, exactly the target",
        readable=is_arithmetic, floor=0.01)
def makes_the_target(answer: str, entry: Entry) -> bool:
    tree = tree_of(answer)
    used = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    target = entry["metadata"].get("target", 24)
    return Counter(used) == Counter(entry["metadata"]["numbers"]) and value_of(tree) == target


def is_elementary(answer: str, entry: Entry) -> bool:
    """Whether a text is an expression of elementary functions, of the item's variable and constants of integration.

    So `Integral`, `integrate`, `nan` and attributes are none, nor are towers of powers that take for ever.
    """
    if EXPONENT.search(answer):  # sympy would build the number that 1e999999999 names
        return False
    try:
        tree = tree_of(answer)
        names = CONSTANTS | {entry["metadata"]["variable"]}
        return all(_allowed(node, names) for node in ast.walk(tree))
    except (ValueError, RecursionError):
        return False


def _allowed(node: ast.AST, names: frozenset[str]) -> bool:
    """Whether one node of a syntax tree may stand in an elementary expression."""
    match node:
        case ast.Constant(value=value):
            return type(value) in (int, float)
        case ast.Name(id=name):
            return name in names or name in FUNCTIONS or OF_INTEGRATION.fullmatch(name) is not None
        case ast.Call(func=ast.Name(id=name), args=[_, *_], keywords=[]):
            return name in FUNCTIONS and len(node.args) <= 2
        case ast.BinOp(op=ast.Pow()):
            return _small(node)
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div()):
            return True
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            return True
        case ast.operator() | ast.unaryop() | ast.expr_context():
            return True
    return False


def _small(power: ast.BinOp) -> bool:
    """Whether a power can be computed at once: no tower of powers of numbers, no constant exponent of many digits."""
    symbols = [node.id for node in ast.walk(power.right) if isinstance(node, ast.Name)]
    if any(name not in FUNCTIONS for name in symbols):
        return True
    inside = [*ast.walk(power.right), *_numeric(power.left)]
    if any(isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) for node in inside):
        return False
    numbers: list[Any] = [node.value for node in ast.walk(power.right) if isinstance(node, ast.Constant)]
    return all(abs(number) <= MOST_POWER for number in numbers)


def _numeric(node: ast.expr) -> Iterable[ast.AST]:
    """The nodes of a base without symbols; none of one that has some."""
    nodes = list(ast.walk(node))
    symbols = any(isinstance(each, ast.Name) and each.id not in FUNCTIONS for each in nodes)
    return [] if symbols else nodes


@strict("simple_integration", "intermediate_integration", name="a finite elementary function, no unsolved integral",
        readable=is_elementary, gold_check=is_elementary)
def elementary(answer: str, entry: Entry) -> bool:
    return is_elementary(answer, entry) and is_finite(answer)


def is_finite(answer: str) -> bool:
    """Whether no infinity or NaN stands in an elementary expression: the derivative of `x**2 + 1/0` is 2*x as well."""
    import sympy

    expression = sympy.parse_expr(answer)
    return not expression.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)


@strict("polynomial_multiplication", name="the gold sum, expanded", one_answer=True,
        readable=lambda answer, entry: False)
def expanded(answer: str, entry: Entry) -> bool:
    return monomials(tree_of(" ".join(words(answer)))) == monomials(tree_of(entry["answer"]))


def monomials(node: ast.expr, sign: int = 1) -> dict[Monomial, int]:
    """Monomial -> coefficient of a sum in which each stands once. Raises ValueError for anything else."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return monomials(node.operand, -sign if isinstance(node.op, ast.USub) else sign)
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub)):
        coefficient, monomial = _monomial(node)
        return {monomial: sign * coefficient} if coefficient else {}

    left = monomials(node.left, sign)
    right = monomials(node.right, -sign if isinstance(node.op, ast.Sub) else sign)
    if left.keys() & right.keys():
        raise ValueError("not simplified")
    return left | right


def _monomial(node: ast.expr) -> tuple[int, Monomial]:
    """(coefficient, monomial) of a product such as `3*x**2*y`, multiplied out. Raises ValueError."""
    match node:
        case ast.Constant(value=value) if type(value) is int:
            return value, ()
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            coefficient, monomial = _monomial(operand)
            return -coefficient, monomial
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _monomial(operand)
        case ast.Name(id=name):
            return 1, ((name, 1),)
        case ast.BinOp(left=ast.Name(id=name), op=ast.Pow(), right=ast.Constant(value=int(power))):
            return 1, ((name, power),)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            first, one = _monomial(left)
            second, other = _monomial(right)
            if (second != 1 and first not in (1, -1)) or dict(one).keys() & dict(other).keys():
                raise ValueError("not multiplied out")
            return first * second, tuple(sorted(one + other))
    raise ValueError("no monomial")
