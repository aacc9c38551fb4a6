"""Rules of the tasks about statements: who is a knight, and what follows from premises."""

from __future__ import annotations

import itertools
import re
from functools import reduce
from typing import Any

from verify.forms import matched
from verify.table import Entry, strict

# --- knights and knaves -----------------------------------------------------------------------------------------------

CLAUSE = re.compile(r"(\S+) is an? (\w+)")
BETWEEN = re.compile(r",? and |, ")


@strict("knights_knaves", name="one role for each name, nothing else")
def one_role_each(answer: str, entry: Entry) -> bool:
    clauses = [matched(CLAUSE, clause) for clause in BETWEEN.split(" ".join(answer.lower().split()).removesuffix("."))]
    names = [clause[1] for clause in clauses]
    return sorted(names) == sorted(str(name).lower() for name in entry["metadata"]["names"])


# --- propositional logic ----------------------------------------------------------------------------------------------

# A statement: a variable's name, ("¬", statement), ("→", statement, statement), ("↔", frozenset of two statements), or
# ("∧" or "∨", frozenset of statements). Double negations are dropped; joined statements have no order or brackets.
Statement = Any
BY_PRECEDENCE = ("↔", "→", "∨", "∧")  # from loose to tight; the scorer reads equal ones from the left
TOKEN = re.compile(r"\s*([A-Z]|[↔→∨∧¬()])")
LONGEST = 500  # characters
MOST_VARIABLES = 12
TRUE = "⊤"


def has_conclusion(answer: str | None, entry: Entry) -> bool:
    """Whether the item's own example, the one conclusion that is known, is more than premises repeated."""
    premises = {parsed(premise) for premise in entry["metadata"]["premises"]}
    return not _is_repeated(parsed(entry["metadata"]["example_answer"]), premises)


@strict("propositional_logic", name="a conclusion that is no premise and none joined, weakened or wrapped",
        gold_check=has_conclusion)
def real_conclusion(answer: str, entry: Entry) -> bool:
    """A premise, premises joined by any connective, and all else that follows without looking into one are refused.

    The last holds for a premise in a disjunction with something else: only the item's own example may be of this kind.
    Items whose example is a premise, or made of premises, are left out: nothing shows that more follows.
    """
    premises = {parsed(premise) for premise in entry["metadata"]["premises"]}
    given = parsed(answer)
    if not variables_of(given) <= set(entry["metadata"]["variables"]) or _is_repeated(given, premises):
        return False
    return given == parsed(entry["metadata"]["example_answer"]) or not _is_shallow(given, premises)


def _is_repeated(statement: Statement, premises: set[Statement]) -> bool:
    """Whether a statement is a premise, or made of premises alone."""
    pieces = _pieces(statement)
    whole = [_pieces(premise) for premise in premises if _pieces(premise) <= pieces]
    return frozenset().union(*whole) == pieces or not variables_of(_marked(statement, premises))


def _pieces(statement: Statement) -> frozenset:
    """What ∧ joins in a statement; itself where it is no conjunction."""
    return statement[1] if statement[0] == "∧" else frozenset({statement})


def _is_shallow(statement: Statement, premises: set[Statement]) -> bool:
    """Whether a statement is true because premises are, whatever they say and whatever else it names."""
    marked = _marked(statement, premises)
    names = sorted(variables_of(marked))
    if len(names) > MOST_VARIABLES:
        raise ValueError("too many variables")
    for values in itertools.product((False, True), repeat=len(names)):
        if not value_of(marked, dict(zip(names, values, strict=True))):
            return False
    return True


def _marked(statement: Statement, premises: set[Statement]) -> Statement:
    """The statement with `TRUE` in place of each premise that stands in it."""
    if statement in premises:
        return TRUE
    if isinstance(statement, str):
        return statement
    sign, *parts = statement
    if sign == "↔":
        return _joined(sign, *(_marked(part, premises) for part in parts[0]))
    if sign not in ("∧", "∨"):
        return (sign, *(_marked(part, premises) for part in parts))

    # A premise `P ∨ Q` stands in `P ∨ Q ∨ R` as well.
    rest = parts[0]
    marks: frozenset[Statement] = frozenset()
    for premise in premises:
        if premise[0] == sign and premise[1] <= parts[0]:
            rest = rest - premise[1]
            marks = frozenset({TRUE})
    return (sign, marks | {_marked(part, premises) for part in rest})


def value_of(statement: Statement, values: dict[str, bool]) -> bool:
    """Whether a statement is true where its variables have these values."""
    if isinstance(statement, str):
        return statement == TRUE or values[statement]
    sign, *parts = statement
    if sign in ("∧", "∨"):
        truths = [value_of(part, values) for part in parts[0]]
        return all(truths) if sign == "∧" else any(truths)

    if sign == "¬":
        return not value_of(parts[0], values)
    truths = [value_of(part, values) for part in (parts[0] if sign == "↔" else parts)]
    return truths[0] == truths[1] if sign == "↔" else not truths[0] or truths[1]


def variables_of(statement: Statement) -> set[str]:
    """Names of the variables in a statement."""
    if isinstance(statement, str):
        return {statement} - {TRUE}
    sign, *parts = statement
    inner = parts[0] if sign in ("∧", "∨", "↔") else parts
    return set().union(*map(variables_of, inner))


def parsed(text: str) -> Statement:
    """The statement that a whole text is. Raises ValueError."""
    if len(text) > LONGEST:
        raise ValueError("too long")
    tokens = TOKEN.findall(text)
    if len("".join(tokens)) != len("".join(text.split())):
        raise ValueError("no statement")
    statement, rest = _read(tokens, 0)
    if rest:
        raise ValueError("something follows")
    return statement


def _read(tokens: list[str], level: int) -> tuple[Statement, list[str]]:
    """(statement, tokens behind it), of connectives at least as tight as `level` of `BY_PRECEDENCE`."""
    if level == len(BY_PRECEDENCE):
        return _read_tight(tokens)
    operands = []
    while True:
        operand, tokens = _read(tokens, level + 1)
        operands.append(operand)
        if not tokens or tokens[0] != BY_PRECEDENCE[level]:
            break
        tokens = tokens[1:]
    return reduce(lambda one, other: _joined(BY_PRECEDENCE[level], one, other), operands), tokens


def _read_tight(tokens: list[str]) -> tuple[Statement, list[str]]:
    """A variable, a negation or a statement in brackets at the beginning of the tokens. Raises ValueError."""
    if not tokens:
        raise ValueError("it ends too early")
    if tokens[0] == "¬":
        inner, rest = _read_tight(tokens[1:])
        return (inner[1] if inner[0] == "¬" else ("¬", inner)), rest
    if tokens[0] == "(":
        inner, rest = _read(tokens[1:], 0)
        if not rest or rest[0] != ")":
            raise ValueError("a bracket is open")
        return inner, rest[1:]
    if not tokens[0].isalpha():
        raise ValueError("a variable is missing")
    return tokens[0], tokens[1:]


def _joined(sign: str, one: Statement, other: Statement) -> Statement:
    """Two statements with a connective between."""
    if sign == "→":
        return (sign, one, other)
    if sign == "↔":
        return TRUE if one == other else (sign, frozenset({one, other}))

    inside: frozenset = frozenset()
    for part in (one, other):
        inside |= part[1] if part[0] == sign else {part}
    return (sign, inside) if len(inside) > 1 else next(iter(inside))
