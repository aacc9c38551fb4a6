"""The process that runs generated code and then its tests, in one interpreter: a test sees the code's own objects.

What the code may not do to a test:

- end it early: a test has passed when its last statement is done and its token, which the runner drew, is sent;
- replace what it uses: builtins and the setup's functions are the tests' own, and a test that finds one of its modules
  changed has not passed;
- answer for itself: see `sandbox.guard`;
- look for the tests, what they expect, or the tokens: frames, the garbage collector and tracing are refused.

All here is functions and data, as a class could be found among the subclasses of `object`, and its methods replaced.
"""

from __future__ import annotations

import builtins
import marshal
import os
import sys
from types import ModuleType, SimpleNamespace

from sandbox import frames, guard, jail, pool, source

TYPE_CHECKING = False  # typing costs 5 ms a run
if TYPE_CHECKING:
    from typing import Any

HIGHEST_FD = 4096  # no descriptor lies beyond
LONGEST_NOTE = 300  # characters of an error's text

# What leads to frames, and so to the tests, or past the guard. Libraries that ask for the caller's frame go on without
# it after a ValueError, those that look into tracebacks after a RuntimeError.
REFUSED_EVENTS = {
    "sys._getframe": ValueError,
    **dict.fromkeys(("sys.settrace", "sys.setprofile", "sys.monitoring.register_callback"), RuntimeError),
    **dict.fromkeys(("sys._current_frames", "sys._current_exceptions", "sys.addaudithook"), RuntimeError),
    **dict.fromkeys(("gc.get_objects", "gc.get_referrers", "gc.get_referents"), RuntimeError),
    "cpython.PyInterpreterState_New": RuntimeError,
}
FRAME_ATTRIBUTES = {"tb_frame", "gi_frame", "cr_frame", "ag_frame", "f_code", "gi_code", "cr_code", "ag_code"}
# With these the code could read and write the interpreter's own memory, so it passes no test.
UNSAFE_MODULES = {"ctypes", "_ctypes", "_testcapi", "_testinternalcapi", "_xxsubinterpreters"}

# Modules that are changed when they are imported, and what changes them.
CHANGED = {"traceback": frames.hide, "threading": pool.run_threads_inline, "asyncio": pool.leave_out_debugging}

ALL_BUILTINS = dict(vars(builtins))
BY_PYTHON = {name: ALL_BUILTINS[name] for name in ("__build_class__", "__import__")}  # called by `class` and `import`


def describe(error: BaseException) -> str:
    """`Type: text` of any exception, also of one whose text raises; one line of at most `LONGEST_NOTE` characters."""
    try:
        note = f"{type(error).__name__}: {error}"
    except BaseException:  # noqa: B036 - the code's own exception classes do what they like
        note = type(error).__name__
    return " ".join(note[:LONGEST_NOTE].split())


def write_record(fd: int, kind: str, note: str = "") -> None:
    """One line of the verdict: `kind note`; the note holds no line break."""
    line = f"{kind} {note[:LONGEST_NOTE]}\n".encode("utf-8", "backslashreplace")
    while line:
        line = line[os.write(fd, line) :]


# --- tests ------------------------------------------------------------------------------------------------------------


def prepare(setup: str, code: str, tests: list[str]) -> SimpleNamespace:
    """Setup and tests, compiled before the code runs, and the namespace they share.

    Returns:
        solution: the module that the code will run in.
        scope: the tests' namespace. Where it lacks a name, the code's holds, as it is at that moment.
        texts: of the setup and each test a code object with the names it reads, or what compiling it raised.
        remembered: (namespace, values in it, names that may change) of what the tests use.
    """
    solution = ModuleType("solution")  # not __main__: a script's main block is no part of the tests
    shared = source.global_names(code)
    names = {"__name__", "__annotations__"}
    attributes: set[str] = set()
    modules: set[str] = set()
    texts: list[Any] = []
    for text in (setup, *tests):
        try:
            tree = source.parse(text, "<test>")
            names |= source.assigned(tree, "id")
            attributes |= source.assigned(tree, "attr")
            modules |= source.used_modules(tree)
            loaded_names = source.loaded_names(tree)
            texts.append((source.guarded(tree, "<test>", solution, shared), loaded_names))
        except Exception as error:  # noqa: BLE001 - a test that is no Python fails
            texts.append(error)

    # Names of the tests' own, whatever the code defines.
    loaded = load_modules(modules - {"builtins"})  # the code has its own
    scope = {**ALL_BUILTINS, "isinstance": guard.is_instance, "__name__": "__main__", "__builtins__": vars(solution)}
    scope.update({name: loaded[name] for name in source.MODULES & set(loaded)})
    if "*" in names:
        names.update(*map(vars, loaded.values()))

    # What must be as it is now after each test.
    remembered = [(vars(builtins), ALL_BUILTINS, ()), (scope, dict(scope), names)]
    remembered += [(sys.modules, loaded, ()), (vars(solution), BY_PYTHON, ())]
    for holder in (vars(guard), guard.COMPARED, guard.ORDER, guard.ARITHMETIC):
        remembered.append((holder, dict(holder), ()))
    for module in loaded.values():
        if module is not sys:
            remembered += [(holder, callables(holder), attributes) for holder in namespaces(module)]
    return SimpleNamespace(solution=solution, scope=scope, texts=texts, remembered=remembered)


def load_modules(names: set[str]) -> dict[str, Any]:
    """{name: module} of those that are there."""
    modules = {}
    for name in sorted(names):
        try:
            __import__(name)
            modules[name] = sys.modules[name]
        except Exception:  # noqa: BLE001 - the test's own import tells
            continue

    for name in CHANGED.keys() & sys.modules.keys():
        CHANGED[name]()
    return modules


def namespaces(module: ModuleType) -> list[Any]:
    """The names of a module, and those of its classes that can be changed."""
    holders = [vars(module)]
    for value in vars(module).values():
        if isinstance(value, type) and not value.__flags__ & guard.IMMUTABLE_TYPE:
            holders.append(vars(value))
    return holders


def callables(holder: Any) -> dict[str, Any]:
    """The functions and classes among its values: others change by themselves."""
    return {name: value for name, value in holder.items() if callable(value)}


def run_setup(tests: SimpleNamespace, ran_before: bool) -> None:
    """Runs the setup for the tests. Its classes and values are the code's where it `ran_before`, for the code."""
    before = set(tests.scope)
    run_text(tests, 0)

    # The code may have changed a value since, and made objects of a class; a function is the setup's own.
    kept = {}
    for name in set(tests.scope) - before:
        value = tests.scope[name]
        is_tool = callable(value) and not isinstance(value, type)
        if ran_before and not is_tool and not isinstance(value, ModuleType):
            del tests.scope[name]
        elif is_tool:
            kept[name] = value
    tests.remembered.append((tests.scope, kept, ()))


def run_text(tests: SimpleNamespace, place: int) -> None:
    """Runs the setup (0) or a test. Raises whatever it raises, AssertionError where the code changed what it uses."""
    if isinstance(tests.texts[place], Exception):
        raise tests.texts[place]
    code, names = tests.texts[place]
    defined = vars(tests.solution)
    defined.update(BY_PYTHON)

    # A test that names nothing but builtins tests one that the code defines itself: the first such name.
    replaced = {}
    if place > 0 and all(name in ALL_BUILTINS for name in names):
        for name in names:
            if name in defined:
                replaced[name] = tests.scope.pop(name)
                break
    try:
        exec(code, tests.scope)
    finally:
        tests.scope.update(replaced)

    for holder, saved, free in tests.remembered:
        for name, value in saved.items():
            if holder.get(name) is not value and name not in free:
                raise AssertionError(f"the code replaced {name}, which the test uses")


def outcome(tests: SimpleNamespace, place: int, unsafe: list[str]) -> tuple[str, str]:
    """(passed | failed | memory, why) of one test."""
    try:
        run_text(tests, place)
    except MemoryError:
        return "memory", "MemoryError"
    except BaseException as error:  # noqa: B036 - a test may raise anything, SystemExit too
        return "failed", describe(error)

    # Against these no test can be guarded.
    return "failed" if unsafe else "passed", ""


# --- the code ---------------------------------------------------------------------------------------------------------


def watch(tests: SimpleNamespace) -> list[str]:
    """Refuses from now on what leads to the tests. Returns the list that uses of unsafe modules are entered in."""
    unsafe: list[str] = []
    inside: list[str] = []  # the event that is looked at
    unchanged = dict(CHANGED)
    walk = frames.walk.__code__
    caller = sys._getframe
    functions = set()
    for _, saved, _ in tests.remembered:
        functions |= set(map(id, saved.values()))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if inside:
            return
        if event == "import" and arguments[0] in unchanged:
            unchanged.pop(arguments[0])()

        inside.append(event)
        try:
            if event in REFUSED_EVENTS:
                raise REFUSED_EVENTS[event](f"{event} is not available to code under test")
            if event == "object.__getattr__" and arguments[1] in FRAME_ATTRIBUTES and caller(1).f_code is not walk:
                raise RuntimeError(f"{arguments[1]} is not available to code under test")
            if event == "object.__setattr__" and arguments[1] == "__code__" and id(arguments[0]) in functions:
                raise RuntimeError("__code__ of a function that a test uses cannot be set")
            if (event == "import" and arguments[0] in UNSAFE_MODULES) or event.startswith("ctypes."):
                unsafe.append(event)
        finally:
            inside.clear()

    sys.addaudithook(hook)
    return unsafe


def separate(solution: ModuleType) -> None:
    """Gives the code builtins of its own, and takes away what is ours."""
    own_builtins = ModuleType("builtins")
    vars(own_builtins).update(ALL_BUILTINS)
    vars(solution)["__builtins__"] = vars(own_builtins)
    for name in list(sys.modules):
        if name.partition(".")[0] in ("sandbox", "ctypes", "_ctypes"):
            del sys.modules[name]
    sys.modules.update(builtins=own_builtins, solution=solution, __main__=ModuleType("__main__"))
    sys.modules.update(dict.fromkeys(pool.MODULES, pool))
    sys.argv[:] = [""]


def load(tests: SimpleNamespace, setup: str, code: str) -> tuple[str, str]:
    """Runs setup, code and the tests' setup: (loaded | syntax | memory | error, why)."""
    try:
        compiled = compile(code, "<code>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        return "syntax", describe(error)

    namespace = vars(tests.solution)
    where = ""
    try:
        ran_before = True
        try:
            exec(compile(setup, "<setup>", "exec", dont_inherit=True), namespace)
        except Exception:  # noqa: BLE001 - it needs the code, or is broken: it runs again below, and tells
            ran_before = False
        exec(compiled, namespace)
        where = "setup: "
        run_setup(tests, ran_before)
    except MemoryError as error:
        return "memory", where + describe(error)
    except BaseException as error:  # noqa: B036 - SystemExit too
        return "error", where + describe(error)
    return "loaded", ""


# --- the process ------------------------------------------------------------------------------------------------------


def serve(verdict: int, confined: bool, memory_mb: int, cpu_seconds: int) -> None:
    """The worker's whole life: the job from standard input, the code, one record per test.

    Args:
        verdict: descriptor that the records are written to; the runner reads the other end.
        confined: namespaces hold this process, so whatever else cannot be confined is an error.
        memory_mb: address space in MiB.
        cpu_seconds: processor time.

    Raises:
        CannotConfine: this process cannot be confined.
    """
    with open(0, "rb", closefd=False) as job:
        setup, code, texts, tokens = marshal.load(job)
    _close_all_but(verdict)
    jail.protect(confined, memory_mb, cpu_seconds)

    tests = prepare(setup, code, texts)
    output = sys.stdout
    separate(tests.solution)
    write_record(verdict, "ready")
    unsafe = watch(tests)
    kind, note = load(tests, setup, code)
    write_record(verdict, kind, note)

    if kind == "loaded":
        for place, token in enumerate(tokens, start=1):
            kind, note = outcome(tests, place, unsafe)
            _flush(output)
            write_record(verdict, kind, token if kind == "passed" else note and f"test {place}: {note}")
    _flush(output)
    write_record(verdict, "end")


def _flush(output: Any) -> None:
    """Hands on what the code printed; it may have closed its stream."""
    try:
        output.flush()
    except BaseException:  # noqa: B036
        pass


def _close_all_but(kept: int) -> None:
    """Closes every descriptor above 2 but this; standard input becomes /dev/null."""
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.closerange(3, kept)
    os.closerange(kept + 1, HIGHEST_FD)
