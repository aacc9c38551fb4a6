"""Functions of the user's own, `PKG.MOD:FUNCTION`: how they are imported, and what a checkpoint keeps of them."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from own_tasks.trusted import folder_before, folder_of, place_of, refusal, remember

_FILES: dict[str, dict[str, Any]] = {}  # of each function that this process has imported, see `function_record`


def imported(text: str, flag: str) -> FunctionType:
    """The function that `PKG.MOD:FUNCTION` names: found as Python does, in the working folder, or where the checkpoint
    says that it lay.

    A checkpoint brings such a name, so it must be trusted, see own_tasks/trusted.py. What Python itself has is refused
    in any case: `os:system` is no verifier.

    Raises:
        ValueError: one line: nobody typed it, no such module or function, or none that was written in Python.
    """
    module_name, _, name = text.partition(":")
    package = module_name.partition(".")[0]
    if package in sys.stdlib_module_names:
        raise ValueError(f"{flag} {text} names a module of Python itself: name a function of your own")

    # Where it lies is found without running it.
    place = place_of(text)
    before = folder_before(text)
    if place is None and before:
        raise ValueError(f"{flag} {text}: there is no {package} in {before}, where it was when the checkpoint was "
                         "written: put it back, run from the folder that holds it now, or put that on PYTHONPATH")

    line = refusal(text, flag)
    if line:
        raise ValueError(line)

    # Of the checkpoint's folder and the working one, that which holds the module comes first.
    folders = [os.getcwd()]
    if place:
        folders.insert(0, folder_of(place))
    sys.path += [folder for folder in folders if folder not in sys.path]

    # Whatever a module does when it is imported may fail.
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign modules raise what they like
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{flag} {text} cannot be imported ({reason}): run from the folder that holds {package}, or put it on "
            "PYTHONPATH"
        ) from error

    function = _function_of(module, name, f"{flag} {text}")
    remember(text)
    _FILES[text] = _record_of(module, function, place or "")
    return function


def _function_of(module: ModuleType, name: str, where: str) -> FunctionType:
    """The function of that name. Raises ValueError, which begins with `where`, for what was not written in Python."""
    function = getattr(module, name, None)
    if isinstance(function, FunctionType):
        return function

    what = "no function"
    if function is not None:
        what = f"{type(function).__name__}, no function,"
    raise ValueError(f"{where}: {module.__name__} has {what} of the name {name}")


# --- what a checkpoint keeps ------------------------------------------------------------------------------------------


def function_record(functions: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Of each of `functions` that was imported: the folder that holds its module, and the SHA-256 of its files by path.
    """
    return {text: _FILES[text] for text in functions if text in _FILES}


def folders_in(record: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Function -> the folder in which its module lay, of a checkpoint's `function_record`."""
    return {text: entry["folder"] for text, entry in record.items()}


def changed_functions(record: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each function of a checkpoint's `function_record` whose files are others now."""
    lines = []
    for text, now in _FILES.items():
        if text not in record:
            continue

        # Files that only lie elsewhere now are still the same.
        before = record[text]["files"]
        old = sorted(set(before.values()) - set(now["files"].values()))
        new = sorted(set(now["files"].values()) - set(before.values()))

        if old or new:
            names = ", ".join(sorted({Path(path).name for path, digest in now["files"].items() if digest in new}))
            shas = [digests[0][:12] if digests else "none" for digests in (old, new)]
            lines.append(f"WARNING: {text} has changed since the checkpoint ({names or 'its files'}: sha256 {shas[0]}, "
                         f"now {shas[1]}): what it calls right now may have been wrong then")
    return lines


def _record_of(module: ModuleType, function: FunctionType, place: str) -> dict[str, Any]:
    """The entry of a function in `function_record`: the module's file, and that of the function where it is another."""
    files = {}
    for owner in (module, inspect.unwrap(function)):
        path = inspect.getsourcefile(owner)
        if path and os.path.isfile(path):
            files[str(Path(path).resolve())] = hashlib.sha256(Path(path).read_bytes()).hexdigest()

    return {"folder": folder_of(place), "files": files}
