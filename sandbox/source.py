"""Tests as code objects, with the guard's functions where they have operators, and what they use."""

from __future__ import annotations

import _ast
from types import CodeType

from sandbox import guard

TYPE_CHECKING = False  # typing costs 5 ms a run
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

ONLY_AST = 0x400  # ast.PyCF_ONLY_AST: compile() to a syntax tree, without importing ast
# Stand for the guard's functions until there is a code object, which holds them as constants: nothing can replace them.
COMPARE = "\0compare"
ARITHMETIC = "\0arithmetic"
SOLUTION = "\0solution"
CASES = "\0cases"

# What a test may name without importing it.
MODULES = frozenset(
    {"bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools"}
    | {"json", "math", "operator", "random", "re", "statistics", "string", "sys"}
)
DEFINITIONS = (_ast.FunctionDef, _ast.AsyncFunctionDef, _ast.ClassDef)


def parse(source: str, filename: str) -> Any:
    """The syntax tree. Raises what compiling raises."""
    return compile(source, filename, "exec", ONLY_AST, dont_inherit=True)


def nodes(tree: Any) -> Iterator[Any]:
    """`tree` and every node below it, in the order of the text."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += reversed([child for _, _, child in _children(node)])


def _children(node: Any) -> Iterator[tuple[Any, Any, Any]]:
    """(holder, key, child): where each child of a node stands, as an item of a list or an attribute."""
    for field in node._fields:
        value = getattr(node, field, None)
        if isinstance(value, list):
            for place, child in enumerate(value):
                if isinstance(child, _ast.AST):
                    yield value, place, child
        elif isinstance(value, _ast.AST):
            yield vars(node), field, value


# --- what a text names ------------------------------------------------------------------------------------------------


def loaded_names(tree: Any) -> list[str]:
    """Names that `tree` reads and does not itself assign, in the order of the text, each once."""
    stored = assigned(tree, "id")
    loaded = []
    for node in nodes(tree):
        if isinstance(node, _ast.arg):
            stored.add(node.arg)
        elif isinstance(node, _ast.Name):
            loaded.append(node.id)
    return [name for name in dict.fromkeys(loaded) if name not in stored]


def assigned(tree: Any, kind: str) -> set[str]:
    """What a text assigns: names (`kind` "id", definitions and imports among them) or attributes ("attr")."""
    names = {""}
    for node in nodes(tree):
        if isinstance(node, _ast.Name | _ast.Attribute) and not isinstance(node.ctx, _ast.Load):
            names.add(getattr(node, kind, ""))
        elif kind == "id" and isinstance(node, DEFINITIONS):
            names.add(node.name)
        elif kind == "id" and isinstance(node, _ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
    return names


def used_modules(tree: Any) -> set[str]:
    """Modules that a text imports, and those of `MODULES` whose attributes it uses."""
    names = set()
    for node in nodes(tree):
        if isinstance(node, _ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, _ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, _ast.Attribute) and isinstance(node.value, _ast.Name):
            names |= {node.value.id} & MODULES
    return names


def global_names(source: str) -> set[str]:
    """What functions of the code declare `global`; nothing where it does not parse."""
    if "global" not in source:
        return set()
    try:
        declarations = [node for node in nodes(parse(source, "<code>")) if isinstance(node, _ast.Global)]
    except Exception:  # noqa: BLE001 - told when the code is loaded
        return set()
    return {name for node in declarations for name in node.names}


# --- guarded code -----------------------------------------------------------------------------------------------------


def guarded(tree: Any, filename: str, solution: Any, shared: set[str]) -> CodeType:
    """The code object of a test or setup. Its operators are the guard's; `shared` names are set in `solution`.

    A test that sets a global of the code's means the code's. Functions of the test have names of their own.
    """
    waiting = [(tree, shared)]
    while waiting:
        parent, names = waiting.pop()
        for holder, key, child in list(_children(parent)):
            holder[key] = _guarded(child, names)
            is_function = isinstance(child, (*DEFINITIONS, _ast.Lambda))
            waiting.append((holder[key], set() if is_function else names))

    tools = {COMPARE: guard.compare, ARITHMETIC: guard.arithmetic, SOLUTION: solution, CASES: guard.run_cases}
    return _bound(compile(tree, filename, "exec", dont_inherit=True), tools)


def _guarded(node: Any, shared: set[str]) -> Any:
    """A call of the guard for an operator, an attribute of the code's for a shared name, any other node as it is."""
    if isinstance(node, _ast.Compare):
        names = tuple(type(each).__name__ for each in node.ops)
        return _call(node, COMPARE, names, [node.left, *node.comparators])
    if isinstance(node, _ast.BinOp) and type(node.op).__name__ in guard.ARITHMETIC:
        return _call(node, ARITHMETIC, type(node.op).__name__, [node.left, node.right])
    if isinstance(node, _ast.Call) and _is_unittest_main(node.func):
        scope = _ast.Call(_ast.Name("globals", _ast.Load(), **_location(node)), [], [], **_location(node))
        return _call(node, CASES, "unittest.main", [scope])
    if isinstance(node, _ast.Name) and isinstance(node.ctx, _ast.Store) and node.id in shared:
        return _ast.Attribute(_constant(SOLUTION, node), node.id, node.ctx, **_location(node))
    return node


def _is_unittest_main(node: Any) -> bool:
    if not isinstance(node, _ast.Attribute) or not isinstance(node.value, _ast.Name):
        return False
    return (node.value.id, node.attr) == ("unittest", "main")


def _call(node: Any, tool: str, first: Any, others: list[Any]) -> Any:
    # Through `__call__`: Python warns of a constant that is called.
    function = _ast.Attribute(_constant(tool, node), "__call__", _ast.Load(), **_location(node))
    return _ast.Call(function, [_constant(first, node), *others], [], **_location(node))


def _constant(value: Any, node: Any) -> Any:
    return _ast.Constant(value, **_location(node))


def _location(node: Any) -> dict[str, int]:
    return {name: getattr(node, name) for name in node._attributes}


def _bound(code: CodeType, tools: dict[str, Any]) -> CodeType:
    """The code with `tools` in place of their markers, in inner functions too."""
    constants = []
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            constant = _bound(constant, tools)
        elif isinstance(constant, str):
            constant = tools.get(constant, constant)
        constants.append(constant)
    return code.replace(co_consts=tuple(constants))
