"""The rows of a JSON file, in every form in which data sets are published: one reader for suite, builder and GRPO."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.files import JsonLineError, NoTextError, json_lines, parse_json

Row = tuple[str, Any]  # where it stands, as `line 3` or `item 17`; the value, which may be no object


def json_rows(path: Path, on_damage: Callable[[JsonLineError], None] | None = None) -> Iterator[Row]:
    """Every row of a file of JSON lines, of one list of objects, or of one object that holds objects by id.

    The latter two may stand on one line or be indented. A byte order mark and blank lines do not matter.
    `on_damage` takes the error of a broken line of several, see `json_lines`.

    Raises:
        OSError: the file cannot be read.
        JsonLineError: names the line that is not JSON, or that gives a name twice.
    """
    if _spans_lines(path):
        yield from _members(_whole(path), 1)
        return
    for number, value in json_lines(path, strict=True, on_damage=on_damage):
        yield from _members(value, number)


def _members(value: Any, line: int) -> Iterator[Row]:
    """The rows that a JSON value of the given line holds: its entries where it is a table, else itself."""
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        for place, entry in enumerate(value, start=1):
            yield f"item {place}", entry
    elif isinstance(value, dict) and value and all(isinstance(entry, dict) for entry in value.values()):
        for key, entry in value.items():
            yield f"item {key}", entry
    else:
        yield f"line {line}", value


def _spans_lines(path: Path) -> bool:
    """Whether the file is one JSON value over several lines: its first line begins one and does not end it."""
    with open(path, "rb") as file:
        for line in file:
            if not line.strip(b" \t\r\n\xef\xbb\xbf"):
                continue
            try:
                text = line.decode("utf-8-sig").strip()
                json.loads(text)
            except json.JSONDecodeError as error:
                return text[:1] in ("{", "[") and error.pos >= len(text)
            except (ValueError, RecursionError):
                return False  # `json_lines` says what is wrong with it
            return False
    return False


def _whole(path: Path) -> Any:
    """The one value of a file. Raises OSError, JsonLineError."""
    content = path.read_bytes()
    try:
        return parse_json(content, strict=True)
    except json.JSONDecodeError as error:
        raise JsonLineError(path, error.lineno, error) from error
    except UnicodeDecodeError as error:
        raise JsonLineError(path, content.count(b"\n", 0, error.start) + 1, error) from error
    except NoTextError as error:
        raise JsonLineError(path, error.line, error) from error
    except ValueError as error:
        raise JsonLineError(path, 1, error) from error
