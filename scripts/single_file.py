"""One Python file made of what some classes of this project need: definitions from its modules, in an order that runs.

`single_file` starts at the definitions that it is given, reads the names that each of them uses, and follows those that
this project defines. What other packages define is imported. Methods may be left out; then what they alone need is left
out with them.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_COLUMNS = 120
Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


@dataclass
class Module:
    """A module of this project as text: what it defines and what it imports, at the top level.

    name: dotted, as it is imported.
    lines: of its file.
    defined: name -> the statement that defines it.
    imported: name -> (module, the name there); the name there is "" where the module itself is imported.
    """

    name: str
    lines: list[str]
    defined: dict[str, Definition] = field(default_factory=dict)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)


def read_module(name: str) -> Module:
    """The module `name` of this project. Raises ValueError for a star import."""
    text = (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
    module = Module(name, text.splitlines())
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            module.defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            module.defined.update({target.id: node for target in targets if isinstance(target, ast.Name)})
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module.imported.update(_imports(node, name))
    return module


def _imports(node: ast.Import | ast.ImportFrom, place: str) -> dict[str, tuple[str, str]]:
    """What an import statement binds, see `Module.imported`."""
    found = {}
    for alias in node.names:
        if isinstance(node, ast.Import):
            found[alias.asname or alias.name.partition(".")[0]] = (alias.name, "")
        elif alias.name == "*":
            raise ValueError(f"{place} imports * from {node.module}: nothing tells which names these are")
        else:
            found[alias.asname or alias.name] = (node.module, alias.name)
    return found


def is_own(module: str) -> bool:
    """Whether a dotted name is a module of this project."""
    return (ROOT / f"{module.replace('.', '/')}.py").is_file()


class Collector:
    """Follows names from definition to definition.

    `left_out` holds methods as "Class.method". `modules` are the modules read, `taken` what is taken of each, and
    `foreign` the imports of other packages, by the name they bind.
    """

    def __init__(self, left_out: Collection[str]):
        self.left_out = left_out
        self.modules: dict[str, Module] = {}
        self.taken: dict[str, set[str]] = {}
        self.foreign: dict[str, tuple[str, str]] = {}
        self.needs: dict[str, set[str]] = {}  # module -> the modules that it takes from
        self._owner: dict[str, str] = {}  # name -> the module that defines it

    def module(self, name: str) -> Module:
        """A module, read once."""
        if name not in self.modules:
            self.modules[name] = read_module(name)
        return self.modules[name]

    def take(self, place: str, name: str) -> None:
        """Takes a definition and all that it needs.

        Raises:
            ValueError: a name that two modules define, or one that is imported under another name.
        """
        if name in self.taken.get(place, ()):
            return
        if self._owner.setdefault(name, place) != place:
            raise ValueError(f"{name} is defined in {self._owner[name]} and in {place}: one file can hold one of them")
        self.taken.setdefault(place, set()).add(name)

        self.needs.setdefault(place, set())
        module = self.module(place)
        for used in sorted(names_of(module.defined[name], self.left_out)):
            self._follow(module, used)

    def _follow(self, module: Module, used: str) -> None:
        """Takes what `used` means in `module`; nothing where it is a builtin or a local name."""
        if used in module.defined:
            self.take(module.name, used)
            return
        if used not in module.imported:
            return

        source, original = module.imported[used]
        if is_own(source):
            if original != used:
                raise ValueError(f"{module.name} imports {source}.{original} as {used}: give it its own name")
            source = self._home(source, used)
            self.needs[module.name].add(source)
            self.take(source, original)
        elif self.foreign.setdefault(used, (source, original)) != (source, original):
            raise ValueError(f"{used} is imported from {source} and from {self.foreign[used][0]}")

    def _home(self, place: str, name: str) -> str:
        """The module that defines a name, where `place` defines it or only hands it on."""
        module = self.module(place)
        source, original = module.imported.get(name, ("", name))

        if name in module.defined or original != name or not is_own(source):
            return place
        return self._home(source, name)


def names_of(node: ast.AST, left_out: Collection[str] = ()) -> set[str]:
    """The names that a definition reads, those of its annotations among them; not those of methods left out."""
    names = set()
    for part in kept_parts(node, left_out):
        for inner in ast.walk(part):
            if isinstance(inner, ast.Name):
                names.add(inner.id)
            elif isinstance(inner, ast.ImportFrom) and inner.module and is_own(inner.module):
                raise ValueError(f"line {inner.lineno} imports {inner.module} inside a function: import it at the top")
    return names - set(dir(builtins))


def kept_parts(node: ast.AST, left_out: Collection[str]) -> list[ast.AST]:
    """The node itself, or of a class its bases, decorators and the statements that stay."""
    if not isinstance(node, ast.ClassDef):
        return [node]
    stays = [part for part in node.body if f"{node.name}.{getattr(part, 'name', '')}" not in left_out]
    return [*node.bases, *node.keywords, *node.decorator_list, *stays]


# --- text -------------------------------------------------------------------------------------------------------------


def first_line(node: ast.AST) -> int:
    """Index of a statement's first line, decorators included."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1


def text_of(module: Module, node: Definition, left_out: Collection[str]) -> str:
    """The statement as it stands in its file, comments inside it included, without the methods left out."""
    dropped: set[int] = set()
    if isinstance(node, ast.ClassDef):
        for part in node.body:
            if f"{node.name}.{getattr(part, 'name', '')}" in left_out:
                dropped |= set(range(first_line(part), part.end_lineno))

    kept = []
    for index in range(first_line(node), node.end_lineno):
        # The blank lines behind a method left out go with it.
        is_second_blank = not module.lines[index].strip() and kept and not kept[-1].strip()
        if index not in dropped and not is_second_blank:
            kept.append(module.lines[index])
    return "\n".join(kept).rstrip()


def import_lines(foreign: dict[str, tuple[str, str]]) -> list[str]:
    """The import statements: modules first, then names by the module that they come from, in alphabetical order."""
    lines = []
    members: dict[str, list[str]] = {}
    for name, (source, original) in sorted(foreign.items()):
        if original:
            members.setdefault(source, []).append(original if original == name else f"{original} as {name}")
        else:
            is_plain = name == source.partition(".")[0]
            lines.append(f"import {source}" if is_plain else f"import {source} as {name}")

    lines.sort()
    for source, names in sorted(members.items()):
        line = f"from {source} import {', '.join(names)}"
        if len(line) > MOST_COLUMNS:
            line = "\n".join([f"from {source} import (", *(f"    {name}," for name in names), ")"])
        lines.append(line)
    return lines


def single_file(roots: Sequence[tuple[str, str]], title: str, left_out: Collection[str] = ()) -> str:
    """The text of one Python module that defines what `roots` name, and all that these need.

    Args:
        roots: (module of this project, name in it) of each definition to start from.
        title: text of the module's docstring.
        left_out: methods as "Class.method" that the file does without.

    Raises:
        ValueError: names that cannot stand in one file; a method left out that is not there, or that something taken
            still calls.
    """
    collector = Collector(left_out)
    for place, name in roots:
        collector.take(place, name)
    _check_left_out(collector)

    parts = [f'"""{title}"""', "from __future__ import annotations", "\n".join(import_lines(collector.foreign))]
    for place in TopologicalSorter(collector.needs).static_order():
        module = collector.module(place)
        parts.append(f"# --- from {place.replace('.', '/')}.py ---")
        nodes = {id(module.defined[name]): module.defined[name] for name in collector.taken[place]}
        for node in sorted(nodes.values(), key=first_line):
            parts.append(text_of(module, node, left_out))
    return "\n\n\n".join(parts) + "\n"


def _check_left_out(collector: Collector) -> None:
    """Raises ValueError where a method left out is unknown, or called by what was taken."""
    known = set()
    called = set()
    for place, names in collector.taken.items():
        for name in names:
            node = collector.module(place).defined[name]
            known |= {f"{name}.{part.name}" for part in getattr(node, "body", []) if isinstance(part, ast.FunctionDef)}
            for part in kept_parts(node, collector.left_out):
                called |= {inner.attr for inner in ast.walk(part) if isinstance(inner, ast.Attribute)}

    unknown = sorted(set(collector.left_out) - known)
    if unknown:
        raise ValueError(f"{unknown[0]} is to be left out, and nothing taken defines it")
    still = sorted(method for method in collector.left_out if method.rpartition(".")[2] in called - {"__init__"})
    if still:
        raise ValueError(f"{still[0]} is to be left out, and something taken still calls it")
