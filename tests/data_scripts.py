"""The data scripts as modules, called with the words of a command line."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare, merge, validate = map(_script, ("prepare_language_dataset", "merge_prepared_batches", "validate_dataset"))


def call(module: ModuleType, *words: object) -> int:
    """Exit status of a script's `main`."""
    return module.main([str(word) for word in words])
