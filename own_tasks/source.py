"""Where own data lies, and its rows one at a time: JSON lines, CSV, parquet, a folder, a data set of the hub.

JSON is read by the project's own strict reader, which knows the line of every row. All else is read by the library
`datasets`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from engine.files import JsonLineError, reason_of
from text_data.documents import Splits
from text_data.rows import json_rows

KINDS = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".parquet": "parquet",
}
LARGE = 2 * 10**8  # bytes from which data are read as a stream, those of the hub without a copy on this machine
FORMS = "a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, or a data set of the hub (OWNER/NAME)"
_HUB = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:/([\w.-]+))?")
_SPLIT = re.compile(r"[\w.-]+")
_SHIFTED = "__index_level_0__"  # where pandas puts a first cell for which the header has no name


class Row(NamedTuple):
    """A row of a source.

    place: as people find it: `line 3`, `row 3`, `item 17`.
    value: its fields by name; whatever else a line of JSON holds.
    problem: why it cannot be read; "" where it can.
    """

    place: str
    value: Any
    problem: str = ""


@dataclass(frozen=True)
class Source:
    """Own data as a flag names it.

    flag: the flag, for messages.
    path: of the file or folder, absolute; of a data set of the hub its id.
    kind: json, csv, parquet, folder or hub.
    subset: the configuration of a data set of the hub; None = its only one.
    split: the split asked for; None = see `Splits`, of folders and the hub `train` where there is one.
    """

    flag: str
    path: str
    kind: str
    subset: str | None = None
    split: str | None = None

    @property
    def name(self) -> str:
        """The name of the task that it becomes: that of the file without its ending, or of the data set."""
        base = Path(self.path).name
        if self.kind in ("json", "csv", "parquet"):
            base = base.partition(".")[0] or base
        return re.sub(r"[^\w.-]+", "_", base).strip("_") or "own_data"

    @property
    def text(self) -> str:
        """As the flag is typed, with an absolute path."""
        text = self.path
        if self.subset:
            text += f"/{self.subset}"
        if self.split:
            text += f":{self.split}"
        return text

    @property
    def shown(self) -> str:
        """Its name in messages: short, since a path may be long."""
        if self.kind == "hub":
            return self.text
        return Path(self.path).name


def source_of(text: str, flag: str) -> Source:
    """What `FILE_OR_HUB[:SPLIT]` names.

    Raises:
        ValueError: one line: no such file, or none that can be read.
    """
    path = text
    split = None

    # A colon may be part of a path that exists.
    if not os.path.exists(os.path.expanduser(text)) and _SPLIT.fullmatch(text.rpartition(":")[2]):
        before, colon, behind = text.rpartition(":")
        if colon:
            path = before
            split = behind

    # A name on disk goes before one of the hub.
    place = Path(path).expanduser()
    if place.is_dir():
        return Source(flag, str(place.resolve()), "folder", None, split)

    kind = _kind(place)
    if place.is_file():
        if kind is None:
            raise ValueError(f"{flag} {text}: a {place.suffix or 'nameless'} file cannot be read: expected {FORMS}")
        return Source(flag, str(place.resolve()), kind, None, split)

    # What looks like a file is no data set of the hub, or a misspelt path would ask the network.
    hub = _HUB.fullmatch(path)
    if hub is None or kind is not None:
        raise ValueError(f"{flag} {text}: there is no such file: expected {FORMS}")
    return Source(flag, hub[1], "hub", hub[2], split)


def _kind(path: Path) -> str | None:
    """The kind of a file by its name, packed ones (`.jsonl.gz`) aside; None for another file."""
    return KINDS.get(path.suffix.lower())


def fingerprint(source: Source) -> str:
    """The SHA-256 of the file's bytes, or of the names and bytes of all files of the folder; "" for the hub.

    Raises:
        ValueError: it cannot be read.
    """
    if source.kind == "hub":
        return ""

    root = Path(source.path)
    try:
        if source.kind != "folder":
            return _digest(root)  # as `sha256sum` prints it
        parts = [f"{_digest(path)} {path.relative_to(root).as_posix()}\n" for path in sorted(root.rglob("*.*"))]
    except OSError as error:
        raise ValueError(f"{source.flag} {source.shown} cannot be read: {reason_of(error)}") from error

    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _digest(path: Path) -> str:
    """The SHA-256 of a file's bytes; "" of a folder inside a folder. Raises OSError."""
    if path.is_dir():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- rows -------------------------------------------------------------------------------------------------------------


def rows_of(source: Source, text_fields: Sequence[str]) -> Iterator[Row]:
    """Every row of the source's split; the cells of `text_fields` in a CSV file are text, whatever they look like.

    Raises:
        ValueError: one line: it cannot be read at all, or mixes splits.
    """
    if source.kind == "json":
        rows = _json(source)
    else:
        rows = _by_datasets(source, text_fields)

    # Rows may name their split themselves. Nobody trains on test questions unasked.
    splits = Splits(source.split, f"{source.flag} {source.path}:SPLIT")
    for row in rows:
        if source.kind in ("folder", "hub") or splits.takes(row.value):
            yield row
    if source.kind in ("folder", "hub"):
        return

    problem = splits.problem()
    if problem is None and source.split and not splits.counts:
        problem = f"the rows name no split: leave :{source.split} out"
    if problem:
        raise ValueError(f"{source.flag} {source.shown}: {problem}")


def _json(source: Source) -> Iterator[Row]:
    """The rows of a JSON file; a broken line is a row with a problem."""
    broken: list[JsonLineError] = []
    try:
        for place, value in json_rows(Path(source.path), broken.append):
            yield from _damaged(broken)
            yield Row(place, value)
        yield from _damaged(broken)
    except OSError as error:
        raise ValueError(f"{source.flag} {source.shown} cannot be read: {reason_of(error)}") from error
    except JsonLineError as error:
        raise ValueError(
            f"{source.flag} {source.shown}: line {error.number} is not JSON ({error.reason}): correct it"
        ) from error


def _damaged(broken: list[JsonLineError]) -> Iterator[Row]:
    """The broken lines met since the last call, as rows; empties the list."""
    for error in broken:
        yield Row(f"line {error.number}", None, f"is not JSON ({error.reason})")
    broken.clear()


def _by_datasets(source: Source, text_fields: Sequence[str]) -> Iterator[Row]:
    """The rows that the library `datasets` reads."""
    number = 0
    try:
        for value in _open(source, text_fields):
            number += 1
            if any("\0" in name for name in value):
                raise UnicodeError("its header holds NUL characters")
            if _SHIFTED in value:
                raise ValueError("a row has more cells than the header has names: quote cells that hold the delimiter")
            yield Row(f"row {number}", value)
    except GeneratorExit:
        raise
    except Exception as error:  # noqa: BLE001 - pandas, pyarrow, fsspec and the hub raise what they like
        raise ValueError(f"{source.flag} {source.shown} {_trouble(source, error, number)}") from error


def _trouble(source: Source, error: Exception, number: int) -> str:
    """What went wrong, and what to do, in one clause."""
    reason = reason_of(error)
    if source.kind == "hub":
        return f"is no file here, and as a data set of the hub it cannot be read ({reason}): check the name"
    if type(error).__name__ in ("EmptyDataError", "EmptyDatasetError"):
        return f"holds no rows: expected {FORMS}"
    if isinstance(error, UnicodeError) or isinstance(error.__cause__, UnicodeError):
        return f"is no UTF-8 text ({reason}): save it as UTF-8"
    if number:
        return f"cannot be read behind row {number}: {reason}"
    return f"cannot be read: {reason}"


def _open(source: Source, text_fields: Sequence[str]) -> Any:
    """The split as an iterable of rows. Raises whatever `datasets` does."""
    import datasets

    # What it finds is told in our own line; its errors would stand before that.
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    datasets.utils.logging.disable_progress_bar()

    if source.kind == "csv":
        # Cells as they stand: `007` is no 7, and NA is an answer.
        converters: dict[str, Callable[[str], str]] = dict.fromkeys(text_fields, str)
        delimiter = ","
        if source.path.lower().endswith(".tsv"):
            delimiter = "\t"
        return datasets.load_dataset(
            "csv", data_files=source.path, split="train", streaming=True, keep_default_na=False,
            converters=converters, sep=delimiter,
        )

    if source.kind == "parquet":
        return datasets.load_dataset("parquet", data_files=source.path, split="train", streaming=True)

    # A data set as `save_to_disk` writes it.
    if source.kind == "folder" and _is_saved(Path(source.path)):
        saved = datasets.load_from_disk(source.path)
        if isinstance(saved, datasets.DatasetDict):
            return saved[_split(source, list(saved))]
        return saved

    # Files of a folder are read where they lie. What comes from the hub is kept, so that the next run needs no network.
    names = datasets.get_dataset_split_names(source.path, source.subset)
    split = _split(source, names)
    streaming = source.kind == "folder" or size_of(source) > LARGE
    return datasets.load_dataset(source.path, source.subset, split=split, streaming=streaming)


def _is_saved(folder: Path) -> bool:
    """Whether the folder was written by `save_to_disk`."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def size_of(source: Source) -> int:
    """Bytes of the file, of the folder's files, or of what the hub says; 0 where it says nothing.

    Raises:
        ValueError: it cannot be read.
    """
    path = Path(source.path)
    if source.kind == "folder":
        return sum(inner.stat().st_size for inner in path.rglob("*") if inner.is_file())
    if source.kind != "hub":
        return path.stat().st_size

    import datasets

    try:
        info = datasets.load_dataset_builder(source.path, source.subset).info
    except Exception as error:  # noqa: BLE001 - the hub and its libraries raise what they like
        raise ValueError(f"{source.flag} {source.shown} {_trouble(source, error, 0)}") from error
    return max(info.download_size or 0, info.dataset_size or 0)


def _split(source: Source, names: Sequence[str]) -> str:
    """The split to read. Raises ValueError where it is not there, or not clear."""
    wanted = source.split or "train"
    if wanted in names:
        return wanted
    if source.split is None and len(names) == 1:
        return names[0]

    raise ValueError(f"there is no split {wanted}: choose from {', '.join(names)} ({source.flag} NAME:SPLIT)")
