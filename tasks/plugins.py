"""`--plugin FILE.py`: tasks of the user's own, as classes with Reasoning Gym's interface.

The file is the user's Python and runs in this process. So it runs only when it is typed: a checkpoint keeps its path
and its hash, and never runs it by itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.files import reason_of
from tasks.built_in import BUILT_IN

Pair = tuple[type, type]  # a data set class and its config class
PLUGINS: dict[str, Pair] = {}  # tasks of the plugins that were loaded, by name
LOADED: dict[Path, Plugin] = {}
HINT = "expected TASKS = {'name': (DataSetClass, ConfigClass)}, or reasoning_gym.factory.register_dataset"


@dataclass(frozen=True)
class Plugin:
    """A file that was loaded: where it lies, the SHA-256 of its bytes, and the tasks that it adds."""

    path: str
    sha256: str
    tasks: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return dataclasses.asdict(self)


def load_plugin(text: str) -> Plugin:
    """Runs the file, once for the same bytes, and adds its tasks to those that can be named.

    Raises:
        ValueError: one line: no such file, one that raises, or one without a task.
    """
    path = Path(text).expanduser().resolve()
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"--plugin {text} cannot be read: {reason_of(error)}") from error
    before = LOADED.get(path)
    if before and before.sha256 == digest:
        return before

    # What an older text of the file has registered would be refused as known.
    published = published_tasks()
    old = before.tasks if before else ()
    for name in old:
        PLUGINS.pop(name, None)
        published.pop(name, None)
    taken = {*published, *BUILT_IN, *PLUGINS}
    module = _run(path, text)

    # Registered with Reasoning Gym as its own tasks are, or named in a table.
    pairs = {name: pair for name, pair in published.items() if name not in taken}
    given = getattr(module, "TASKS", {})
    if not isinstance(given, Mapping):
        raise ValueError(f"--plugin {text}: TASKS is {type(given).__name__}: {HINT}")
    pairs |= given

    if not pairs:
        raise ValueError(f"--plugin {text} adds no task: {HINT}")
    for name, pair in pairs.items():
        problem = _pair_problem(name, pair, taken)
        if problem:
            raise ValueError(f"--plugin {text}: {problem}")

    PLUGINS.update(pairs)
    LOADED[path] = Plugin(str(path), digest, tuple(pairs))
    return LOADED[path]


def published_tasks() -> dict[str, Any]:
    """Reasoning Gym's own table of tasks; an empty one where it is not installed."""
    try:
        import reasoning_gym  # noqa: F401 - importing fills the table
        from reasoning_gym.factory import DATASETS
    except ImportError:
        return {}
    return DATASETS


def _run(path: Path, text: str) -> ModuleType:
    """The file as a module. Raises ValueError where it raises."""
    name = f"hrm_plugin_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--plugin {text} is no Python file: its name must end in .py")

    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign code raises what it likes
        del sys.modules[name]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"--plugin {text} raises when it is run ({reason}): correct it") from error
    return module


def _pair_problem(name: Any, pair: Any, taken: set[str]) -> str | None:
    """What is wrong with one entry of TASKS, or None."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        return f"{name!r} is no name of a task: choose letters, digits and _"
    if name in taken:
        return f"there is a task {name} already: choose another name"
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(part, type) for part in pair):
        return f"task {name} is no pair of classes: {HINT}"

    data_set, config = pair
    if not dataclasses.is_dataclass(config):
        return f"the config class of task {name} is no dataclass: put @dataclass before it"
    lacking = {"seed", "size"} - {field.name for field in dataclasses.fields(config)}
    if lacking:
        return f"the config class of task {name} has no field {', '.join(sorted(lacking))}: add it"
    for method in ("__getitem__", "score_answer"):
        if not callable(getattr(data_set, method, None)):
            return f"the data set class of task {name} has no {method}: add it"
    return None
