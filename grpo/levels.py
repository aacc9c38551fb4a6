"""The levels of a GRPO stage as the user writes them: where a file of them lies, and which tasks they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.files import parse_json, read_text, reason_of

PROBLEMS = (".jsonl", ".json")  # ends of files that hold problems; all others hold levels


def path_of(given: str) -> Path:
    """The path of one of the user's files, or of this repository's wherever the command was started."""
    path = Path(given)
    if path.exists():
        return path
    return Path(__file__).parent.parent / given


def is_problem_file(path: Path) -> bool:
    """Whether a path is of a file of problems, which names no tasks."""
    return path.suffix in PROBLEMS


def read_levels(path: Path) -> Any:
    """The tree of a YAML file. Raises ValueError where it cannot be read."""
    import yaml

    try:
        return yaml.safe_load(read_text(path))
    except RecursionError as error:
        raise ValueError(f"levels {path} cannot be read: it is nested too deeply") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"levels {path} cannot be read: {reason_of(error)}") from error


def level_tasks(stages: str | None) -> list[str]:
    """The tasks that the levels of `--stages` name, in the order of the text, whether they are there or not.

    What cannot be read names none: `stages_of` says what is wrong with it.
    """
    try:
        given = parse_json(stages or "{}")
    except ValueError:
        return []

    # The levels of published stages name no task of a plugin, so those that are given are all.
    names: list[str] = []
    for settings in given.values() if isinstance(given, dict) else ():
        if isinstance(settings, dict):
            names += _tasks_in(settings.get("levels"))
    return list(dict.fromkeys(names))


def _tasks_in(levels: Any) -> list[str]:
    """The tasks of one stage's levels; none where these are wrong, or no list of tasks."""
    if isinstance(levels, str):
        path = path_of(levels)
        try:
            levels = None if is_problem_file(path) else read_levels(path)
        except (ValueError, OSError):
            return []

    names: list[str] = []
    for level in levels if isinstance(levels, list) else ():
        if isinstance(level, dict):
            names += [name for name in level if isinstance(name, str)]
    return names
