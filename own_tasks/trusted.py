"""Which functions `PKG.MOD:FUNCTION` of the user's own may be imported: importing runs a module's Python.

A verifier or a reward may be named by a checkpoint or a YAML file, which may be a stranger's. So a function is imported
only where it is typed in this call, or was once typed on this machine by this user and lies where it lay then. A list
in the user's folder of states keeps these; a run of one's own thus goes on without a word. A checkpoint says in which
folder a module lay: it is looked for there too, and trusted by the same rule.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from engine.files import json_lines
from flag_table.flag import names

FUNCTION = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
_typed: set[str] = set()  # the functions that this call names on its command line
_folders: dict[str, str] = {}  # function -> the folder in which its module lay, by the checkpoint


def type_in(functions: Iterable[str], folders: Mapping[str, str] | None = None) -> None:
    """These functions, and no others, are typed in this call; `folders` says where a checkpoint's modules lay."""
    _typed.clear()
    _typed.update(functions)
    _folders.clear()
    _folders.update(folders or {})


def folder_before(text: str) -> str | None:
    """The folder in which the function's module lay when the checkpoint was written; None where nothing says it."""
    return _folders.get(text)


def further_folders(text: str) -> list[str]:
    """Where the function's module is looked for behind Python's own places: the working folder and the checkpoint's.

    What is typed is meant as it is found here; what a checkpoint names, as it was there.
    """
    before = folder_before(text)

    folders = [os.getcwd()]
    if before and text in _typed:
        folders.append(before)
    elif before:
        folders.insert(0, before)

    return folders


def functions_of(flags: Mapping[str, Any]) -> list[str]:
    """The functions that the values of --verifier, --stages and --trust_functions name; other flags name none."""
    found = names(flags.get("trust_functions"))
    verifier = flags.get("verifier")
    if isinstance(verifier, str) and FUNCTION.fullmatch(verifier) and not verifier.startswith("regex:"):
        found.append(verifier)

    # Of a mapping that is none, the reader of the stages tells.
    stages = flags.get("stages")
    if isinstance(stages, str):
        with contextlib.suppress(ValueError, RecursionError):
            stages = json.loads(stages)
    for settings in stages.values() if isinstance(stages, dict) else ():
        rewards = settings.get("rewards") if isinstance(settings, dict) else None
        if isinstance(rewards, dict):
            found += [name for name in rewards if isinstance(name, str) and FUNCTION.fullmatch(name)]
    return found


def refusal(text: str, flag: str, typed: str = "--trust_functions ") -> str | None:
    """One line where a function must be typed before it is imported, else None.

    Args:
        text: the function.
        flag: what names it.
        typed: what the command's user types before the function.
    """
    place = place_of(text)
    if text in _typed or (text, place) in _remembered():
        return None

    module = text.partition(":")[0]
    beside = f" ({place})" if place else ""
    return (f"{flag} {text} is named by a file or a checkpoint, and importing {module}{beside} runs its Python: read "
            f"it, then type {typed}{text}")


def remember(text: str) -> None:
    """Keeps a typed function that was imported, so that it need not be typed again. A folder not to be written is no
    mistake: the function is typed again then."""
    place = place_of(text)
    if text not in _typed or place is None or (text, place) in _remembered():
        return

    path = _list()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"function": text, "place": place}) + "\n")


def place_of(text: str) -> str | None:
    """Where the function's outermost package or module lies, found without running it; None where it is not found."""
    spec = _spec(text.partition(":")[0].partition(".")[0], further_folders(text))
    if spec is None:
        return None

    if spec.origin:
        return str(Path(spec.origin).resolve())
    # A package without __init__.py may lie in several folders.
    folders = {str(Path(folder).resolve()) for folder in spec.submodule_search_locations or ()}
    return os.pathsep.join(sorted(folders)) or None


def folder_of(place: str) -> str:
    """The folder on Python's path that holds the package or module of this place."""
    path = Path(place.partition(os.pathsep)[0])
    if path.name == "__init__.py":
        return str(path.parent.parent)

    return str(path.parent)


def _spec(package: str, folders: Iterable[str]) -> ModuleSpec | None:
    """How Python finds the package or module, on its path and behind that in `folders`."""
    with contextlib.suppress(ImportError, ValueError, AttributeError):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin:
            return spec

    # A module in any of the folders goes before a mere folder of its name.
    return PathFinder.find_spec(package, [*sys.path, *folders])


def _list() -> Path:
    """The list of what was typed. XDG_STATE_HOME says where states of programs lie."""
    return Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")) / "hrm" / "trusted_functions"


def _remembered() -> set[tuple[str, str]]:
    """(function, place) of all that was typed; empty where the list cannot be read."""
    try:
        rows = [row for _, row in json_lines(_list(), skip_damaged=True)]
        return {(row["function"], row["place"]) for row in rows}
    except (OSError, ValueError, TypeError, KeyError):
        return set()
