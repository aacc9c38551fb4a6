"""Whose records these are: a run's lasting id, and the lock that keeps a second process out of its folder.

The id stands in `run.json` in the run's folder and in each of its checkpoints, so that a folder may be moved. Rows of
a table that several runs share bear it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from engine.checkpoints import CheckpointError, newest_checkpoint, read_checkpoint
from engine.files import parse_json

RECORD = "run.json"
HELD = (errno.EAGAIN, errno.EACCES)  # another process has the lock; other errors: a file system without locks


@dataclass
class Claim:
    """The right to write a run's records.

    run: the run's id.
    before: the id that the folder had until it was copied from another run's; None = the same.
    """

    run: str
    before: str | None = None
    _handle: BinaryIO | None = None

    def document(self) -> str:
        """The text of a checkpoint's `run.json`."""
        return json.dumps({"run": self.run}) + "\n"

    def release(self) -> None:
        """Lets another process have the folder."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def claim(folder: Path, alone: bool = True) -> Claim:
    """The id of the run in `folder`, which exists; a new one for a new run.

    Args:
        folder: the run's folder.
        alone: True keeps other processes out until `release`; False only adds to the records.

    Raises:
        ValueError: another process has the folder.
        OSError: it cannot be written.
    """
    handle = open(folder / RECORD, "a+b")
    try:
        if _locked(handle):
            claimed = _identify(folder, handle)
        elif alone:
            raise ValueError(taken(folder))
        else:
            claimed = Claim(_read(handle).get("run") or _of_checkpoint(folder) or _new_id(folder))
    except BaseException:
        handle.close()
        raise

    if alone:
        claimed._handle = handle
    else:
        handle.close()

    return claimed


def check_free(folder: Path) -> None:
    """Raises ValueError when another process writes the run in `folder`. Leaves nothing behind."""
    try:
        handle = open(folder / RECORD, "r+b")
    except OSError:  # a new run, or a folder that cannot be written, which others tell
        return
    with handle:
        if not _locked(handle):
            raise ValueError(taken(folder))


def known_id(folder: Path) -> str:
    """The id of the run in `folder`; "" where it has none."""
    return _id_in(folder) or ""


def taken(folder: Path) -> str:
    """One line: another process has the folder."""
    return f"{folder} is being written by another process: wait for its end, or choose another --run_name"


def _locked(handle: BinaryIO) -> bool:
    """Takes the lock of an open file, which goes when it is closed. False: another process has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in HELD
    return True


def _identify(folder: Path, handle: BinaryIO) -> Claim:
    """The id in the record, else in the newest checkpoint, else a new one; the record is brought up to date."""
    record = _read(handle)
    run = record.get("run") or _of_checkpoint(folder)
    place = str(folder.resolve())
    before = None

    # A folder that was copied is another run than the one it was copied from, which goes on by itself.
    home = record.get("folder", place)
    if run and home != place and _id_in(Path(home)) == run:
        before = run
        run = None
    run = run or _new_id(folder)

    # In place: another file would have another lock. One torn by a crash counts as missing.
    content = (json.dumps({"run": run, "folder": place}) + "\n").encode()
    if {"run": run, "folder": place} != record:
        handle.truncate(0)
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())

    return Claim(run, before)


def _read(handle: BinaryIO) -> dict[str, str]:
    """The record in an open file; empty where there is none, or a damaged one."""
    handle.seek(0)
    try:
        record = parse_json(handle.read())
    except ValueError:
        return {}
    if not isinstance(record, dict):
        return {}
    return {name: value for name, value in record.items() if isinstance(value, str)}


def _id_in(folder: Path) -> str | None:
    """The id of the run in another folder; None where there is none."""
    try:
        with open(folder / RECORD, "rb") as handle:
            return _read(handle).get("run")
    except OSError:
        return None


def _of_checkpoint(folder: Path) -> str | None:
    """The id that the newest checkpoint in the folder keeps; None for one from before there were ids."""
    try:
        checkpoint = newest_checkpoint(folder)
        if checkpoint is None:
            return None
        text = read_checkpoint(checkpoint, stems=[]).documents.get(RECORD, "{}")
        return parse_json(text).get("run")
    except (CheckpointError, ValueError, AttributeError):
        return None


def _new_id(folder: Path) -> str:
    """A name for people, and what tells it from another run of that name. One line, as a cell of a table is."""
    return " ".join(f"{folder.resolve().name}-{secrets.token_hex(3)}".split())
