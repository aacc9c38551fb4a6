"""What a test compares and computes, so that an object of the code's cannot answer for itself.

`sandbox.source` writes calls of `compare` and `arithmetic` into a test where it has operators. Between plain values
both do what Python does. An operator of the code's own class, or of any other class that is written in Python, is
believed only where it tells values apart: it is asked about made-up values too, in an order nobody can foresee.
"""

from __future__ import annotations

import operator
from math import gcd
from os import urandom

TYPE_CHECKING = False  # typing and collections.abc cost 5 ms a run
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

MADE_UP = 36  # values beside the real one that an operator is asked about: of numbers, 9 steps near and far, both ways
TIMES_ASKED = 3  # times that an operator is asked about the real value
SMALLEST_MODULUS = 7  # of numbers that may be called equal because they leave the same remainder
DEEPEST = 200  # levels of containers that are searched for objects of the code's
IMMUTABLE_TYPE = 1 << 8  # Py_TPFLAGS_IMMUTABLETYPE: a class of C's, which no code can change
REFUSED = "an operator of the code's own class gives the same answer whatever it is asked about"

# What a class says of itself, past its metaclass.
BASES_OF = type.__dict__["__mro__"].__get__
NAMES_OF = type.__dict__["__dict__"].__get__
FLAGS_OF = type.__dict__["__flags__"].__get__

# Whose operators are Python's own: single values, and containers, which ask their parts. Some come with modules that
# are not loaded yet.
SINGLE = frozenset(
    {type(None), bool, int, float, complex, str, bytes, bytearray, memoryview, range, type, object, type(len)}
)
SINGLE_IDS = frozenset(map(id, SINGLE))  # a class of the code's may have a metaclass that says it equals them
SEQUENCES = (list, tuple)
SETS = (set, frozenset, type({}.keys()), type({}.items()))
SINGLE_OF_C = ("datetime", "decimal", "array")  # modules
CONTAINERS_OF_C = ("deque", "OrderedDict")  # of collections

EQUAL = operator.eq
CONTAINS = operator.contains
UNKNOWN = object()
ORDER = {
    "Lt": (operator.lt, "__lt__"),
    "LtE": (operator.le, "__le__"),
    "Gt": (operator.gt, "__gt__"),
    "GtE": (operator.ge, "__ge__"),
}
# Those that bring a wrong number to an expected one.
ARITHMETIC = {"Sub": operator.sub, "Div": operator.truediv, "FloorDiv": operator.floordiv, "Mod": operator.mod}


# --- whose operator ---------------------------------------------------------------------------------------------------


def answering(value: Any, method: str) -> type | None:
    """The class of Python's own that defines `method` for a value; None where it is a class of another kind."""
    for base in BASES_OF(type(value)):
        if method not in NAMES_OF(base):
            continue
        if not FLAGS_OF(base) & IMMUTABLE_TYPE:
            return None
        is_known = base in SINGLE or base is dict or base in SEQUENCES or base in SETS
        return base if is_known or base.__module__ in SINGLE_OF_C or _is_container_of_c(base) else None
    return object


def _is_container_of_c(base: type) -> bool:
    return base.__module__ == "collections" and base.__name__ in CONTAINERS_OF_C


def parts(value: Any, base: type | None) -> list[Any] | None:
    """What a container of the kind `base` holds, a dict its pairs; None where it is none.

    Its subclass has no say in it.
    """
    if base is None or base in SINGLE:
        return None
    if issubclass(base, dict):
        return list(dict.items(value))
    if base in SEQUENCES or base in SETS or _is_container_of_c(base):
        return list(base.__iter__(value))
    return None


def is_plain(*values: Any) -> bool:
    """Whether comparing the values asks nothing of the code's: no part of theirs has operators or a hash of its own."""
    waiting = list(values)
    for _ in range(DEEPEST):
        if SINGLE_IDS.issuperset(map(id, map(type, waiting))):
            return True

        below = []
        for value in waiting:
            base = answering(value, "__eq__")
            if base is None or answering(value, "__hash__") is None:
                return False
            below += parts(value, base) or ()
        waiting = below
    return False


def is_instance(value: Any, kinds: Any) -> bool:
    """`isinstance` for tests: what an object's `__class__` says of it does not count."""
    if not isinstance(value, kinds):
        return False
    return value.__class__ is type(value) or issubclass(type(value), kinds)


# --- comparing --------------------------------------------------------------------------------------------------------


def compare(names: tuple[str, ...], *values: Any) -> Any:
    """What `a < b == c` is worth: `names` are the operators' syntax nodes, `values` stand around them."""
    answer = True
    for place, name in enumerate(names):
        left = values[place]
        right = values[place + 1]
        if name in ORDER:
            answer = ordered(left, right, *ORDER[name])
        else:
            answer = COMPARED[name](left, right)
        if not answer:
            return answer
    return answer


def equal(left: Any, right: Any) -> Any:
    """`left == right`, part by part where the code's own objects are among them."""
    if is_plain(left, right):
        return left == right
    mine = answering(left, "__eq__")
    yours = answering(right, "__eq__")
    if mine is None or yours is None:
        return believed(EQUAL, left, right, mine is None, yours is None, True)

    # Unlike kinds do not look at their parts.
    lefts = parts(left, mine)
    rights = parts(right, yours)
    if lefts is None or rights is None:
        return left == right
    if mine is yours and (mine in SEQUENCES or _is_container_of_c(mine)):
        return len(lefts) == len(rights) and all(map(same, lefts, rights))

    # Each needs one that is like it, in any order.
    if (mine in SETS and yours in SETS) or (issubclass(mine, dict) and issubclass(yours, dict)):
        return _is_part(lefts, rights) and _is_part(rights, lefts)
    return left == right


def same(left: Any, right: Any) -> Any:
    """Whether two parts of containers are alike: the same object is."""
    return left is right or equal(left, right)


def _holds(items: Iterable[Any], item: Any) -> bool:
    return any(same(other, item) for other in items)


def _is_part(lefts: list[Any], rights: list[Any]) -> bool:
    return all(_holds(rights, left) for left in lefts)


def unequal(left: Any, right: Any) -> Any:
    """`left != right`. What says that it is not unlike says that it is equal."""
    mine = answering(left, "__ne__")
    yours = answering(right, "__ne__")
    if mine is None or yours is None:
        return not believed(_not_unlike, left, right, mine is None, yours is None, True)
    return not equal(left, right)


def _not_unlike(left: Any, right: Any) -> bool:
    return not left != right


def ordered(left: Any, right: Any, ask: Callable[[Any, Any], Any], method: str) -> Any:
    """`left < right` and the like. Raises AssertionError where own objects within a container meet plain ones."""
    if is_plain(left, right):
        return ask(left, right)
    mine = answering(left, method)
    yours = answering(right, method)
    if mine is None or yours is None:
        return believed(ask, left, right, mine is None, yours is None, False)
    if is_plain(left) or is_plain(right):
        raise AssertionError(REFUSED)
    return ask(left, right)


def contains(item: Any, container: Any) -> Any:
    """`item in container`."""
    # The code's own method is asked about other items, too; where there is none, the items come one by one.
    base = answering(container, "__contains__")
    if base is None:
        return believed(CONTAINS, container, item, True, not is_plain(item), False)
    if base is object:
        return _holds(container, item)
    if is_plain(container, item):
        return item in container
    return _holds(base.__iter__(container), item)


def _contains_not(item: Any, container: Any) -> bool:
    return not contains(item, container)


COMPARED = {"Eq": equal, "NotEq": unequal, "In": contains, "NotIn": _contains_not}
COMPARED |= {"Is": operator.is_, "IsNot": operator.is_not}


def arithmetic(name: str, left: Any, right: Any) -> Any:
    """`left - right` and the like. A plain result of the code's own operator and a plain value must depend on that."""
    ask = ARITHMETIC[name]
    result = ask(left, right)
    own_left = FLAGS_OF(type(left)) & IMMUTABLE_TYPE == 0
    own_right = FLAGS_OF(type(right)) & IMMUTABLE_TYPE == 0
    if own_left is own_right or not is_plain(result):
        return result

    # Whatever 0 is divided by, it gives 0.
    if own_left and name != "Sub" and result == 0 and equal(left, 0):
        return result
    answers = answers_to(ask, left, right, own_left, made_up(right if own_left else left))
    if all(is_plain(answer) and answer == result for answer in answers):
        raise AssertionError(REFUSED)
    return result


def run_cases(call: str, scope: dict[str, Any]) -> None:
    """Stands for a test's `unittest.main()`: runs the cases of its namespace, raises what the first failure raises."""
    import unittest

    suite = unittest.TestSuite()
    for value in list(scope.values()):
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            suite.addTests(unittest.defaultTestLoader.loadTestsFromTestCase(value))
    if suite.countTestCases() == 0:
        raise AssertionError(f"{call}: no test to run")

    # Collecting the failures instead, unittest forgets some exceptions that the code may raise.
    suite.debug()


# --- is it to be believed ---------------------------------------------------------------------------------------------


def believed(
    ask: Callable[[Any, Any], Any], left: Any, right: Any, own_left: bool, own_right: bool, only_one: bool
) -> Any:
    """What an operator of the code's says of two values, where it speaks otherwise of made-up ones.

    Args:
        ask: the operator.
        left, right: the values, of which `own_left` or `own_right` or both are of the code's own classes.
        only_one: it may say yes to no made-up value, but for whole numbers that leave the same remainder; else to some
            of them.

    Raises:
        AssertionError: it says yes to more.
    """
    # Nothing but None equals None.
    if only_one and (left is None or right is None):
        return left is right

    # The real value stands several times among the made-up ones, never first: what says yes to whatever comes first has
    # no chance, and what says yes once, at a moment of its choice, contradicts itself.
    real = right if own_left else left
    values = [object()] if own_left and own_right else made_up(real)
    if not values and not only_one:
        values = [object()]
    is_real = shuffled([False] * (len(values) - 1) + [True] * TIMES_ASKED)
    if values:
        is_real.insert(0, False)
    others = iter(values)
    asked = [real if mark else next(others) for mark in is_real]
    answers = answers_to(ask, left, right, own_left, asked)

    # It must say the same of the real value each time.
    real_answers = [answer for answer, mark in zip(answers, is_real, strict=True) if mark]
    for answer in real_answers:
        if isinstance(answer, Exception):
            raise answer
    answer = real_answers[0]
    if len({bool(again) for again in real_answers}) > 1:
        raise AssertionError(REFUSED)

    said = [answer for answer, mark in zip(answers, is_real, strict=True) if not mark]
    said_yes = [bool(not isinstance(other, Exception) and other) for other in said]
    if answer and (all(said_yes) or (only_one and any(said_yes) and not _is_remainder(real, values, said_yes))):
        raise AssertionError(REFUSED)
    return answer


def shuffled(items: list[Any]) -> list[Any]:
    """The items in an order that nobody can foresee."""
    places = sorted((draw(), place) for place in range(len(items)))
    return [items[place] for _, place in places]


def _is_remainder(real: Any, values: list[Any], said_yes: list[bool]) -> bool:
    """Whether just those of `values` are said to equal `real` that leave the same remainder by some modulus."""
    if any(type(value) is not int for value in (real, *values)):
        return False
    steps = [value - real for value in values]
    modulus = gcd(*[step for step, yes in zip(steps, said_yes, strict=True) if yes])
    return modulus >= SMALLEST_MODULUS and said_yes == [step % modulus == 0 for step in steps]


def answers_to(ask: Callable, left: Any, right: Any, keep_left: bool, values: list[Any]) -> list[Any]:
    """What an operator says with each of `values` in the place of the other side; the exception where it raises."""
    answers = []
    for value in values:
        try:
            answers.append(ask(left, value) if keep_left else ask(value, right))
        except Exception as error:  # noqa: BLE001 - the code need not take every value
            answers.append(error)
    return answers


def draw() -> int:
    """A number that nobody can foresee."""
    return int.from_bytes(urandom(4), "little")


def made_up(value: Any) -> list[Any]:
    """Values of the same kind that are not `value`; none for kinds whose values are not known."""
    numbers = [(draw(), place) for place in range(MADE_UP)]
    values = [_made_up(value, MADE_UP * number + place) for number, place in sorted(numbers)]
    return [other for other in values if other is not UNKNOWN]


def _made_up(value: Any, number: int) -> Any:
    """A value near a plain one that might well be asked about: UNKNOWN for other kinds than those below."""
    kind = answering(value, "__eq__")
    if type(value) is bool:
        return not value
    if kind in (int, float, complex) or (kind is not None and kind.__name__ == "Decimal"):
        step = 1 + number // 4 % 9
        if number & 1:
            step = step * (abs(value) + 1)
        return value + step if number & 2 else value - step

    # A letter or an item more or less, an item that is another.
    if kind in (str, bytes):
        place = number % (len(value) + 1)
        part = chr(97 + number % 26)
        return value[:place] + (part if kind is str else part.encode("ascii")) + value[place:]
    if kind in (list, tuple):
        place = number % len(value) if value else 0
        items = [_made_up(item, number // 2) for item in value[place : place + 1]] or [number % 9]
        return value[:place] + kind(items if number & 1 or not value else ()) + value[place + 1 :]
    if kind is dict:
        pairs = parts(value, dict)
        key, item = pairs.pop(number // 2 % len(pairs)) if pairs else (number % 9, 0)
        return dict([*pairs, (key, _made_up(item, number // 2))] if number & 1 or not value else pairs)
    if kind in (set, frozenset):
        return value ^ {number % 99}
    return UNKNOWN
