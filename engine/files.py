"""Files that appear whole or not at all, and the readers of text, JSON and JSON lines. Imports nothing heavy.

Every writer here writes to `.tmp-NAME-PID` beside the file, syncs it to the disk and renames it, so that a crash at
any moment leaves the old content or the new. What a killed process left behind, the next writer removes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

MARK = ".tmp-"
BUFFER = 1 << 20  # bytes; large writes are few
# Escapes of a JSON text that may be halves of a surrogate pair: the first groups are a half that stands alone, the last
# one is NUL, which no text has.
ODD = re.compile(
    r"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})|([\ud800-\udfff])"
    r"|(\\u0000)"
)


class WriteError(ValueError):
    """A file cannot be written; one line for the user."""


class JsonLineError(ValueError):
    """A line of a file is not JSON.

    The cause (`__cause__`) is a JSONDecodeError, a UnicodeDecodeError, or another ValueError of `parse_json`.

    Attributes:
        number: the line's number in the file, from 1.
        reason: what is wrong with it, without the parser's own line number, which is that of a text of one line.
    """

    def __init__(self, path: Path, number: int, cause: Exception):
        self.number = number
        self.reason = json_reason(cause)
        super().__init__(f"{path}, line {number} is not JSON ({self.reason})")


class RepeatedNameError(ValueError):
    """A JSON object gives a name twice."""


class NoTextError(ValueError):
    """A JSON text holds half of a surrogate pair, or a NUL.

    Attributes:
        line: the line of the text in which it stands, from 1.
    """

    def __init__(self, odd: str, line: int):
        what = "half of a character (a lone surrogate)"
        if odd == "\\u0000":
            what = "a NUL character, which no text has: take it out"
        super().__init__(f"it holds {odd}, {what}")
        self.line = line


def process_lives(process: int) -> bool:
    """Whether a process of this machine has the number `process`."""
    import psutil  # here, because a writer rarely meets what another process left

    return psutil.pid_exists(process)


def reason_of(error: Exception) -> str:
    """What went wrong, on one line: the system's words for an OSError, else the error's own."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())


def write_problem(path: Path, error: OSError, needed: int = 0, flag: str = "--save_dir") -> str:
    """One line for the user: why `path` cannot be written, and what to do.

    Args:
        path: the file or folder.
        error: what the system answered.
        needed: bytes that were to be written; told where the disk is full.
        flag: the command's option that chooses where `path` lies.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        # The folder itself may not exist yet.
        existing = next(place for place in path.absolute().parents if place.exists())
        free = shutil.disk_usage(existing).free
        return (f"cannot write {path}: the disk is full: {needed / 1e6:.3f} MB needed, {free / 1e6:.3f} MB free; "
                f"free some space or choose another {flag}")

    return f"cannot write {path}: {reason_of(error)}; choose a {flag} that can be written"


# --- writing ----------------------------------------------------------------------------------------------------------


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def write_synced(path: Path, content: bytes) -> None:
    """Writes `content` to `path` in place and waits until the disk has it. Raises OSError."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _remove_leftovers(folder: Path, names: Sequence[str]) -> None:
    """Removes what killed processes left of `names`; a process that is still alive keeps its files."""
    for leftover in folder.glob(MARK + "*"):
        # `.tmp-NAME-PID`, where the name itself may hold a hyphen.
        name, _, process = leftover.name.removeprefix(MARK).rpartition("-")
        if name in names and process.isdigit() and not process_lives(int(process)):
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def staged(folder: Path, names: Sequence[str]) -> Iterator[list[BinaryIO]]:
    """Files to write for `names` in `folder`, in that order; they get their names together, once all are on disk.

    The last name is the seal: readers ask for it first. Its old version goes before any file is replaced and its new
    one comes last, so a crash in between leaves a folder without a seal, never a mix that looks whole. When the block
    raises, nothing stays.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder, names)
    temporary = [folder / f"{MARK}{name}-{os.getpid()}" for name in names]
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "wb", buffering=BUFFER)) for path in temporary]
            yield files

            # A rename that reaches the disk before the content would leave an empty file under the final name.
            for file in files:
                file.flush()
                os.fsync(file.fileno())

        # Without its seal the folder counts for nothing while its files are replaced one by one.
        if len(names) > 1:
            (folder / names[-1]).unlink(missing_ok=True)
        for path, name in zip(temporary, names, strict=True):
            os.replace(path, folder / name)
        sync_folder(folder)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def write_bytes_aside(path: Path, content: bytes, flag: str = "--save_dir") -> None:
    """Replaces `path` by `content` so that a crash leaves the old content or the new; its folder is made if missing.

    A link stays a link: its target is replaced.

    Args:
        path: the file.
        content: all that it shall hold.
        flag: the command's option that chooses where `path` lies, named in the error.

    Raises:
        WriteError: the disk refuses; nothing has changed.
    """
    target = Path(os.path.realpath(path))
    try:
        with staged(target.parent, [target.name]) as (file,):
            file.write(content)
    except OSError as error:
        raise WriteError(write_problem(target, error, len(content), flag)) from error


def write_text_aside(path: Path, text: str, flag: str = "--save_dir") -> None:
    """As `write_bytes_aside`, of UTF-8 text. Raises WriteError."""
    write_bytes_aside(path, text.encode(), flag)


# --- reading ----------------------------------------------------------------------------------------------------------


def not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> str:
    """One line for the user: a file is no text."""
    return f"{path} is not UTF-8 text (line {line}: {error.reason}): save it as UTF-8"


def holds_nul(path: Path, line: int) -> str:
    """One line for the user: a file holds a NUL, which no text does, but binary files and UTF-16 do."""
    return f"{path} is no plain text (line {line} holds a NUL character): convert it to UTF-8 or take the NUL out"


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; line ends become `\\n`.

    Raises:
        ValueError: one line that names the file: it cannot be read, or the line that is not UTF-8 or holds a NUL.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {reason_of(error)}") from error

    # Lines are counted by their line feeds, as an editor does.
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(path, content.count(b"\n", 0, error.start) + 1, error)) from error
    before_nul, nul, _ = text.partition("\0")
    if nul:
        raise ValueError(holds_nul(path, before_nul.count("\n") + 1))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these names and values. Raises RepeatedNameError: of one name the last value would win unsaid."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise RepeatedNameError(f"it holds {repeated!r} twice")
    return value


def parse_json(content: bytes | str, strict: bool = False) -> Any:
    """The value that JSON text holds; bytes are UTF-8, with or without a byte order mark.

    Args:
        content: the text.
        strict: for data that people wrote: refuse an object that gives a name twice (else its last value counts), and
            a NUL.

    Raises:
        ValueError: the text is not UTF-8, not JSON, nested too deeply, or holds half of a surrogate pair, which no
            UTF-8 file and no tokenizer can hold; what `strict` refuses.
    """
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    try:
        value = json.loads(text, object_pairs_hook=_once if strict else None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (json.JSONDecodeError, RepeatedNameError):
        raise
    except ValueError as error:  # Python refuses to read a whole number of thousands of digits
        raise ValueError(f"it holds a number of more than {sys.get_int_max_str_digits()} digits") from error

    # json takes half of a pair for a character, which then fails wherever it is written or tokenized.
    for match in ODD.finditer(text):
        odd = match[1] or match[2] or (match[3] if strict else None)
        if odd:
            line = text.count("\n", 0, match.start()) + 1
            raise NoTextError(odd.encode("ascii", "backslashreplace").decode(), line)

    return value


def json_reason(error: Exception) -> str:
    """What is wrong with a text of one line that `parse_json` refused."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at character {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8, {error.reason}: save it as UTF-8"
    return reason_of(error)


def read_json(path: Path, strict: bool = False) -> Any:
    """The value of a JSON file; `strict` as in `parse_json`. Raises ValueError: one line that names the file."""
    try:
        return parse_json(Path(path).read_bytes(), strict)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {reason_of(error)}") from error
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(path, error.object.count(b"\n", 0, error.start) + 1, error)) from error
    except NoTextError as error:
        raise ValueError(f"{path} line {error.line} is no text: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({reason_of(error)})") from error


def json_lines(
    path: Path, skip_damaged: bool = False, strict: bool = False,
    on_damage: Callable[[JsonLineError], None] | None = None, on_open: Callable[[BinaryIO], None] | None = None,
) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every line of JSON in a UTF-8 file, read one at a time; blank lines are left out.

    Only a newline ends a line: texts may hold U+2028 and its like.

    Args:
        path: the file.
        skip_damaged: for records of a run that may have crashed: a line that is not JSON is left out, bytes that are
            not UTF-8 are replaced, and a file that is missing has no lines.
        strict: as in `parse_json`.
        on_damage: takes the error of a line that `parse_json` refuses, which is then left out; None: it is raised.
        on_open: takes the open file, to see how far it has been read.

    Raises:
        OSError: the file cannot be read.
        JsonLineError: a line that `parse_json` refuses.
    """
    if skip_damaged and not Path(path).exists():
        return

    # Read as bytes: a text file would end a line at a lone carriage return as well.
    with open(path, "rb") as file:
        if on_open is not None:
            on_open(file)
        for number, line in enumerate(file, start=1):
            if not line.strip(b" \t\r\n\xef\xbb\xbf"):
                continue
            try:
                if skip_damaged:
                    # A model may have said half of a surrogate pair: its record counts as it is.
                    value = json.loads(line.decode("utf-8-sig", "replace"))
                else:
                    value = parse_json(line, strict)
            except (ValueError, RecursionError) as error:
                if skip_damaged:
                    continue
                if on_damage is not None:
                    on_damage(JsonLineError(path, number, error))
                    continue
                raise JsonLineError(path, number, error) from error
            yield number, value


# --- paths on the command line ----------------------------------------------------------------------------------------


def named_paths(text: str) -> list[tuple[str, str]]:
    """(name, path or "") of each entry of a text such as `NAME=PATH,NAME,NAME=PATH`.

    A comma inside a path is written `\\,`. It may also stand as it is where the path with it exists and the path before
    it does not.
    """
    parts = [part.replace("\\,", ",") for part in re.split(r"(?<!\\),", text)]

    entries: list[tuple[str, str]] = []
    while parts:
        name, equals, path = parts.pop(0).partition("=")
        path = path.strip()
        if equals and not os.path.exists(path):
            # As few of the next parts as make a path that exists.
            for count in range(1, len(parts) + 1):
                longer = ",".join([path, *parts[:count]]).rstrip()
                if os.path.exists(longer):
                    path = longer
                    del parts[:count]
                    break
        entries.append((name.strip(), path))

    return entries


def shell_path(path: Path | str) -> str:
    """A path for a command that is printed: quoted where a shell would take it apart."""
    return shlex.quote(str(path))
