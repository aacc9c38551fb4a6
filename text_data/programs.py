"""The program that a completion gives: the one place that takes Python out of prose, fences and consoles.

The suite and the code reward read it here, so that both judge the same program.
"""

from __future__ import annotations

import ast
import builtins
import re
import symtable
import sys
import textwrap
import warnings
from collections.abc import Iterable, Sequence

from text_data.answers import before_turn_end
from text_data.code_tasks import python_tree
from text_data.fences import Block, fenced_blocks, without_lone_fence

STARTS = 12  # lines from which a program is looked for
CUTS = 16  # statements that are cut off an end that does not parse
LONGEST = 100_000  # characters that are searched for a program

# A line that begins Python where prose may stand around it.
_START = re.compile(r"(?:def|class|async def|import|from|@\w|if __name__)\b|[A-Za-z_]\w*\s*(?::[^=\n]{1,40})?=[^=]|@")
_PROMPT = re.compile(r"^(?:>>>|\.\.\.)(?: |$)", re.M)
# A label or a tag on the line where the code begins, quotation marks of Markdown, and commands of a notebook.
_LABEL = re.compile(
    r"^(?:[A-Za-z][A-Za-z ]{0,20}:[ \t]+|(?:<\w[^<>\n]{0,80}>){1,4})(?=(?:async def|def|class|import|from)\b)", re.M
)
_QUOTED = re.compile(r"^> ?", re.M)
_NOTEBOOK = re.compile(r"^[ \t]*[%!]\w.*$", re.M)
# Spaces that are none to Python.
_SPACES = {0xA0: " ", 0x200B: None, 0xFEFF: None, 0x2060: None}
_LEAVES = frozenset(("input", "exit", "quit", "stdin", "_exit", "breakpoint"))
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)


def program_of(text: str, tests: Sequence[str] = ()) -> str:
    """The program of a completion, for tests that call it.

    Of fenced blocks, those in another language (bash, text) do not count; of several, the last that defines what the
    tests call wins, with the imports and definitions of the blocks before it. A text without a fence gives its longest
    run of Python statements. Statements after the definitions that only use them, such as demonstrations and reads of
    standard input, are dropped. A text in which nothing of this is found comes back as it is, for the judge to refuse.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if len(text) > LONGEST:
        return text
    needed = called_names(tests)

    # The mark that ends a turn may stand at the code; what a chat or a web page leaves in a text is taken off last.
    code = _program_of(text, needed)
    for variant in (before_turn_end(text), text, _plain(text)):
        program = code if variant == text else _program_of(variant, needed)
        if _defined(program) & needed or (not needed and _is_python(program)):
            return program
    return code


def _plain(text: str) -> str:
    """The text without odd spaces, labels and tags before code, and quotation marks of Markdown."""
    plain = _LABEL.sub("", before_turn_end(text).translate(_SPACES))
    if plain.lstrip().startswith("> "):
        plain = _QUOTED.sub("", plain)
    if re.fullmatch(r"\s*`[^`]+`\s*", plain):
        plain = plain.strip().strip("`")
    return plain


def _program_of(text: str, needed: set[str]) -> str:
    """The program of a text with line ends `\\n`, for tests that need the names `needed`."""
    if _defined(text) & needed:
        return _without_use(text, needed)

    # A fence that nothing opened ends the code before it.
    before = without_lone_fence(text)
    if before != text:
        code = _from_prose(_without_prompts(before), needed)
        if _defined(code) & needed:
            return _without_use(code, needed)

    blocks = [block for block in fenced_blocks(text, _is_python) if block.is_python]
    if blocks:
        code = _chosen(blocks, needed)
    else:
        code = _from_prose(_without_prompts(before), needed)
    return _without_use(code, needed)


def called_names(tests: Iterable[str]) -> set[str]:
    """Names that tests read and do not define, builtins only where there is nothing else: what the program defines."""
    read: set[str] = set()
    own: set[str] = set()
    for test in tests:
        tree = python_tree(test)
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, ast.Name):
                (read if isinstance(node.ctx, ast.Load) else own).add(node.id)
            elif isinstance(node, ast.arg):
                own.add(node.arg)
            elif isinstance(node, _DEFINITIONS):
                own |= _bound(node)
    names = read - own
    return names - set(dir(builtins)) or names


def _is_python(code: str) -> bool:
    return python_tree(code) is not None


# --- fenced blocks ----------------------------------------------------------------------------------------------------


def _chosen(blocks: Sequence[Block], needed: set[str]) -> str:
    """The code of the last block that defines what is needed, below the definitions of those before it."""
    codes = [_statements(_without_prompts(textwrap.dedent(block.code)), needed) for block in blocks]
    defining = [place for place, code in enumerate(codes) if _defined(code) & needed]
    defining = [place for place in defining if not _is_sketch(codes[place])] or defining
    parsing = [place for place, code in enumerate(codes) if code.strip() and _is_python(code)]
    place = (defining or parsing or [0])[-1]

    # Earlier blocks may hold imports and helpers; what they demonstrate is not run.
    parts = []
    for code in codes[:place]:
        tree = python_tree(code)
        for node in tree.body if tree else ():
            if isinstance(node, (*_DEFINITIONS, ast.Assign, ast.AnnAssign)) and not _leaves(node):
                parts.append(_source(code, node))

    # Helpers may be shown behind what calls them.
    chosen = codes[place]
    for code in codes[place + 1 :]:
        tree = python_tree(code)
        lacking = _lacking("\n".join([*parts, chosen]))
        for node in tree.body if tree else ():
            if isinstance(node, _DEFINITIONS) and _bound(node) & lacking:
                chosen = f"{chosen.rstrip()}\n\n{_source(code, node)}\n"
    return "\n".join([*parts, chosen])


def _is_sketch(code: str) -> bool:
    """Whether the code leaves the bodies of all its functions out, as in `def f(x): ...`."""
    tree = python_tree(code)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)] if tree else []
    bodies = [statement for node in functions for statement in node.body]
    return bool(functions) and all(
        isinstance(statement, ast.Pass)
        or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        for statement in bodies
    )


def _lacking(code: str) -> set[str]:
    """Names that the code reads and neither it nor Python defines."""
    tree = python_tree(code)
    read = set().union(*map(_needs, tree.body)) if tree else set()
    return read - _defined(code) - set(dir(builtins))


def _source(code: str, node: ast.stmt) -> str:
    """The lines of a statement, decorators included."""
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
    return "\n".join(code.split("\n")[first - 1 : node.end_lineno])


# --- prose ------------------------------------------------------------------------------------------------------------


def _without_prompts(text: str) -> str:
    """The input lines of a Python console; the code before one, where that is Python; any other text as it is."""
    console = re.search(r"^>>> ", text, re.M)
    if console is None:
        return text
    before = text[: console.start()]
    if _defined(before):
        return before
    return "\n".join(line[4:] for line in text.split("\n") if _PROMPT.match(line))


def _from_prose(text: str, needed: set[str]) -> str:
    """The Python of a text without a fence: from a line that begins a statement, as far as it parses."""
    for whole in (text, text.lstrip(), textwrap.dedent(text)):
        if _is_python(whole):
            return whole

    # From each line that may begin a program, the longest run of statements; one that defines what is needed wins. It
    # may be indented as a block below prose.
    lines = textwrap.dedent(text).split("\n")
    if lines[0].startswith(" "):
        lines[0] = lines[0].lstrip()
    longest = ""
    starts = [place for place, line in enumerate(lines) if _START.match(line)][:STARTS]
    starts += [place for place, line in enumerate(lines) if line[:2].isspace() and _START.match(line.lstrip())][:STARTS]
    for start in starts:
        code = _prefix(_as_block(lines[start:]))
        if code and _defined(code) & needed:
            return code
        longest = max(longest, code, key=len)
    return longest or text


def _as_block(lines: list[str]) -> list[str]:
    """The lines as far as they are indented like the first one or more, without that indentation."""
    margin = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    block = []
    for line in lines:
        if line.strip() and not line.startswith(margin):
            break
        block.append(line[len(margin) :])
    return block


def _statements(code: str, needed: set[str]) -> str:
    """The code, without the end that does not parse where what is needed stands before it."""
    if _is_python(code):
        return code
    code = _NOTEBOOK.sub("", code)
    part = _prefix(code.split("\n"))
    return part if _defined(part) & needed else code


def _prefix(lines: list[str]) -> str:
    """The longest run of whole statements that the lines begin with, "" where there is none."""
    for _ in range(CUTS):
        code = "\n".join(lines)
        if not code.strip():
            return ""
        error_line = _error_line(code)
        if error_line == 0:
            return code

        # Up to the statement in which the error stands.
        end = min(error_line or len(lines), len(lines)) - 1
        while end > 0 and (not lines[end].strip() or lines[end][0] in " \t)]}"):
            end -= 1
        lines = lines[:end]
    return ""


def _error_line(code: str) -> int | None:
    """The line of the first syntax error, 0 where there is none; None where the parser names no line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except SyntaxError as error:
        return error.lineno
    except (ValueError, RecursionError, MemoryError):
        return None
    return 0


# --- definitions and their use ----------------------------------------------------------------------------------------


def _bound(node: ast.stmt) -> set[str]:
    """Names that a top-level statement binds."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    names = {node.name} if isinstance(node, _DEFINITIONS) else set()
    if not names:
        names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
        names |= {each.name for each in ast.walk(node) if isinstance(each, ast.FunctionDef | ast.ClassDef)}
    return names


def _defined(code: str) -> set[str]:
    """Names that the code binds at its top level."""
    tree = python_tree(code)
    return set().union(*(_bound(node) for node in tree.body)) if tree else set()


def _read(node: ast.AST) -> set[str]:
    """Names that a statement reads."""
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load)}


def _needs(node: ast.stmt) -> set[str]:
    """Names that a top-level statement reads of the others: arguments and variables of its functions are its own."""
    try:
        tables = [symtable.symtable(ast.unparse(node), "", "exec")]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return _read(node)
    names = set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        is_top = table.get_type() == "module"
        for each in table.get_symbols():
            if each.is_referenced() if is_top else each.is_global():
                names.add(each.get_name())
    return names


def _leaves(node: ast.AST) -> bool:
    """Whether a statement reads standard input, or ends the program."""
    names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    names |= {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
    return bool(names & _LEAVES) or {"unittest", "main"} <= names


def _without_use(code: str, needed: set[str]) -> str:
    """The code without top-level statements that only use its definitions, where it defines what is needed.

    Dropped are: lone names, which are words of prose; what reads standard input or ends the program; imports of
    packages that nothing needs; behind the last needed definition, whatever changes nothing that the needed definitions
    read.
    """
    tree = python_tree(code)
    if tree is None or not _defined(code) & needed:
        return code
    relevant = _relevant(tree, needed)
    last = max(place for place, node in enumerate(tree.body) if _bound(node) & needed)
    variables: set[str] = set()
    for node in tree.body:
        if not isinstance(node, _DEFINITIONS):
            variables |= _bound(node) & relevant

    # What may change them when it is called: modules, and functions that use the variables.
    callers: set[str] = set()
    for node in tree.body:
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        if is_import or (isinstance(node, _DEFINITIONS) and _needs(node) & variables and not _leaves(node)):
            callers |= _bound(node) - needed

    # A line that a kept statement shares stays.
    dropped: set[int] = set()
    kept: set[int] = set()
    for place, node in enumerate(tree.body):
        lines = range(node.lineno, node.end_lineno + 1)
        is_used = place > last or _leaves(node) or (isinstance(node, ast.Assert) and _read(node) & needed)
        is_prose = isinstance(node, ast.Expr) and isinstance(node.value, ast.Name | ast.List)
        if is_prose or _is_idle_import(node, relevant) or (is_used and not _feeds(node, relevant, variables, callers)):
            dropped.update(lines)
        else:
            kept.update(lines)

    numbered = enumerate(code.split("\n"), start=1)
    return "\n".join(line for number, line in numbered if number in kept or number not in dropped)


def _relevant(tree: ast.Module, needed: set[str]) -> set[str]:
    """The needed names and what their definitions read, directly or through others."""
    readers = [(_bound(node), _needs(node)) for node in tree.body]
    relevant = set(needed)
    size = 0
    while len(relevant) != size:
        size = len(relevant)
        for bound, read in readers:
            if bound & relevant:
                relevant |= read
    return relevant


def _is_idle_import(node: ast.stmt, relevant: set[str]) -> bool:
    """Whether a statement imports what nothing needs and Python does not come with, as plots do."""
    if not isinstance(node, ast.Import | ast.ImportFrom) or _bound(node) & (relevant | {"*"}):
        return False
    modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return not any(module.partition(".")[0] in sys.stdlib_module_names for module in modules)


def _feeds(node: ast.stmt, relevant: set[str], variables: set[str], callers: set[str]) -> bool:
    """Whether a top-level statement defines or changes what the relevant definitions read.

    Args:
        node: the statement.
        relevant: names that matter.
        variables: those of them that statements bind.
        callers: names whose call may change them.
    """
    if isinstance(node, _DEFINITIONS) or _bound(node) & relevant:
        return True

    # Their variables may be changed in place, and their functions and classes given attributes.
    if _read(node) & variables:
        return True
    for each in ast.walk(node):
        stored = isinstance(each, ast.Attribute | ast.Subscript) and isinstance(each.ctx, ast.Store)
        if stored and _read(each) & relevant:
            return True

    # A call that builds them or sets up a module, such as build() or sys.setrecursionlimit(9999).
    call = node.value if isinstance(node, ast.Expr) else None
    if not isinstance(call, ast.Call) or _leaves(node):
        return False
    called = _read(call.func)
    return bool(called & callers) or (called == {"setattr"} and bool(_read(call) & relevant))
