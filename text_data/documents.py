"""Documents of a source folder, one at a time: plain text, WikiText, JSON lines and parquet.

- `.txt`: documents are separated by blank lines. A file whose first line that is not blank is a WikiText title
  (` = Title = `) is WikiText: its documents are whole articles, each from a title that stands between blank lines (or
  at the start) to the next; blank lines and the heads of sections (` = = Head = = `) belong to the article.
- `.jsonl`, `.parquet`: `prompt` and `answer`, or `text`, or `question` and `answer`, or the chat `messages`, whose last
  assistant turn answers what precedes it. A row that could be read in several ways is read in the first of these.
  `split`, if there is one, chooses (`Splits`); other fields are ignored.

A text longer than MAX_CHARS is handed out in pieces, so that memory stays flat; all of them share one key.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from engine.files import JsonLineError, NoTextError, holds_nul, json_lines, not_utf8
from engine.records import normalise
from text_data.row_fields import answer_text, chat_texts, prompt_text

MAX_CHARS = 1 << 20
SUFFIXES = (".txt", ".jsonl", ".parquet")
TITLE = re.compile(r" ?= (?!=)(?:.*[^= ])? ?= ?")
FORMS = (("prompt", "answer"), ("text",), ("question", "answer"), ("messages",))  # fields of a row that is read
MORE = "question and answer, or a chat in messages, serve as well"
PARQUET_ROWS = 256  # read at a time


class Document(NamedTuple):
    """A text, or an answer to a prompt. `ends` is False where a piece of a long text is followed by another.

    `shared_key` is the key of a long text, which all its pieces have.
    """

    prompt: str | None
    text: str
    shared_key: int | None = None
    ends: bool = True

    @property
    def key(self) -> int:
        """`key_of` the prompt, or of the text where there is none; computed at each call."""
        if self.shared_key is not None:
            return self.shared_key
        return key_of(self.text if self.prompt is None else self.prompt)


ALL_SPLITS = "all"


class Splits:
    """Which rows of data sets are taken: those of one split.

    Args:
        wanted: the split's name; ALL_SPLITS takes every row; None takes the only one that the rows name, so that
            nobody trains on test questions unasked. Rows without a `split` are always taken.
        flag: the option that names a split, for messages.

    Attributes:
        counts: rows by the split they name, taken or not.
    """

    def __init__(self, wanted: str | None, flag: str = "--split"):
        self.wanted = wanted
        self.flag = flag
        self.counts: Counter[str] = Counter()

    def takes(self, row: Any) -> bool:
        """Counts a row; whether it is taken, as far as is known without the rows that follow."""
        name = row.get("split") if isinstance(row, dict) else None
        if isinstance(name, int):
            name = str(name)
        if not isinstance(name, str) or not name.strip():
            return True
        self.counts[name] += 1
        return self.wanted in (None, ALL_SPLITS, name)

    def shown(self) -> str:
        """The splits seen, with their rows: `test (12), train (40)`."""
        return ", ".join(f"{name} ({self.counts[name]})" for name in sorted(self.counts))

    def problem(self) -> str | None:
        """What is wrong with the choice, given the rows so far, or None."""
        if self.wanted is None and len(self.counts) > 1:
            return (
                f"rows of the splits {self.shown()} are mixed: name one with {self.flag}, or mix them with "
                f"{self.flag} {ALL_SPLITS}"
            )
        if self.wanted not in (None, ALL_SPLITS) and self.counts and self.wanted not in self.counts:
            return f"no row is of {self.flag} {self.wanted}, there are {self.shown()}: name one of these"
        return None


def key_of(text: str) -> int:
    """64 bits that are equal for texts equal but for case and white space; they decide the split."""
    encoded = normalise(text).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest())


def source_files(source: Path) -> list[Path]:
    """The readable files of a folder and its subfolders, in the order of their names; or the one file given.

    Raises:
        ValueError: no such place, no such files.
    """
    if source.is_file() and source.suffix in SUFFIXES:
        return [source]
    if not source.exists():
        raise ValueError(f"--source {source}: there is no such file or folder: check the path")
    if not source.is_dir():
        raise ValueError(f"--source {source}: expected a folder, or a file that ends in {', '.join(SUFFIXES)}")

    files = []
    for path in sorted(source.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
        if path.is_file() and path.suffix in SUFFIXES and not hidden:
            files.append(path)
    if not files:
        raise ValueError(f"--source {source} has no file that ends in {', '.join(SUFFIXES)}")
    return files


class Meter:
    """How far `read_documents` has come, in bytes of the files; of a parquet file it knows the end alone."""

    def __init__(self) -> None:
        self._behind = 0  # bytes of the files that are done
        self._file: IO[Any] | None = None

    def enter(self, file: IO[Any]) -> None:
        """The file that is read now."""
        self._file = file

    def leave(self, path: Path) -> None:
        """A file is done."""
        self._behind += path.stat().st_size
        self._file = None

    @property
    def megabytes(self) -> int:
        """What has been read, whole megabytes of 1e6 bytes."""
        here = os.lseek(self._file.fileno(), 0, os.SEEK_CUR) if self._file is not None else 0
        return (self._behind + here) // 10**6


def source_megabytes(files: Sequence[Path]) -> int:
    """The size of all files, whole megabytes."""
    return sum(path.stat().st_size for path in files) // 10**6


def read_documents(
    files: Sequence[Path], splits: Splits | None = None, meter: Meter | None = None
) -> Iterator[Document]:
    """Every document of the files, in order; a blank text, prompt or answer comes as it is, the caller counts it.

    Args:
        files: what `source_files` gives.
        splits: which rows are taken, and their counts; None: those of the only split that they name.
        meter: follows the reading.

    Raises:
        ValueError: a file that is not what its name says; the file, the line or the column is named. Rows of several
            splits where none is chosen; in the end, no row of the chosen one.
    """
    if splits is None:
        splits = Splits(None)
    meter = meter or Meter()
    for path in files:
        if path.suffix == ".txt":
            yield from _text_file(path, meter)
        elif path.suffix == ".jsonl":
            yield from _json_file(path, splits, meter)
        else:
            yield from _parquet_file(path, splits)
        meter.leave(path)
    if splits.problem():
        raise ValueError(splits.problem())


def _is_taken(row: Any, splits: Splits, path: Path, number: int) -> bool:
    """Whether a row is of the chosen split. Raises ValueError where a second split turns up and none is chosen."""
    taken = splits.takes(row)
    if splits.wanted is None and splits.problem():
        raise ValueError(f"{path} row {number}: {splits.problem()}")
    return taken


# --- text -------------------------------------------------------------------------------------------------------------


def _text_file(path: Path, meter: Meter) -> Iterator[Document]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            meter.enter(file)
            # The first line that is not blank decides between WikiText and paragraphs.
            first = ""
            while not first.strip() and (line := file.readline(MAX_CHARS)):
                first = line
            file.seek(0)

            lines = _plain_lines(path, iter(functools.partial(file.readline, MAX_CHARS), ""))
            if TITLE.fullmatch(first.rstrip("\n")):
                yield from _gather(_wikitext(lines))
            else:
                yield from _gather(_paragraphs(lines))
    except UnicodeDecodeError as error:
        raise ValueError(_first_fault(path, error)) from error


def _plain_lines(path: Path, lines: Iterable[str]) -> Iterator[str]:
    """The lines, or pieces of long ones. Raises ValueError, which names the line that holds a NUL."""
    number = 1
    for line in lines:
        if "\0" in line:
            raise ValueError(holds_nul(path, number))
        yield line
        number += line.endswith("\n")


def _first_fault(path: Path, error: UnicodeDecodeError) -> str:
    """One line that names the first line of a file that is not UTF-8; `error` is what its reader met."""
    # The reader decodes blocks, so its error knows no line.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as first:
                return not_utf8(path, number, first)
    return not_utf8(path, 1, error)  # the file has changed meanwhile


def _paragraphs(lines: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """(line, whether a document starts with it); blank lines are left out."""
    starts = True
    for line in lines:
        if line.strip():
            yield line, starts
            starts = False
        else:
            starts = True


def _wikitext(lines: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """(line, whether an article starts with it); a title counts only between blank lines."""
    title = None  # a line that may be a title: the line after it decides
    after_blank = True
    for line in lines:
        blank = not line.strip()
        if title is not None:
            yield title, blank
            title = None

        if after_blank and TITLE.fullmatch(line.rstrip("\n")):
            title = line
        else:
            yield line, False
        after_blank = blank

    # The file ends with a title: an article without a text.
    if title is not None:
        yield title, True


def _gather(lines: Iterable[tuple[str, bool]]) -> Iterator[Document]:
    """Documents of lines marked where one starts; blank space around a document is dropped."""
    kept: list[str] = []
    size = 0  # characters in `kept`
    key = None  # of the document whose first pieces are out
    for line, starts in lines:
        if starts and kept:
            yield _piece("".join(kept).rstrip(), key, ends=True)
            kept = []
            size = 0
            key = None
        elif size + len(line) > MAX_CHARS and kept:
            piece = _piece("".join(kept), key, ends=False)
            yield piece
            kept = []
            size = 0
            key = piece.shared_key

        # Blank lines before a document's first text are dropped; within one they stay.
        if kept or key is not None or line.strip():
            kept.append(line)
            size += len(line)

    if kept:
        yield _piece("".join(kept).rstrip(), key, ends=True)


def _piece(text: str, key: int | None, ends: bool) -> Document:
    """A text or a part of one; the first part's own key is that of all parts."""
    if key is None and not ends:
        key = key_of(text)
    return Document(None, text, key, ends)


# --- rows -------------------------------------------------------------------------------------------------------------


def form_of(names: Collection[Any]) -> tuple[str, ...] | None:
    """The fields among `names` that are read; None where they are those of no row that can be read."""
    return next((form for form in FORMS if set(form) <= set(names)), None)


def _row_documents(row: dict[str, Any]) -> Iterator[Document]:
    """The documents of one row: an answer to a prompt, or a text in pieces. Raises ValueError."""
    form = form_of(row)
    if form == ("prompt", "answer"):
        if not isinstance(row["prompt"], str) or not isinstance(row["answer"], str):
            raise ValueError("prompt and answer must be text")
        yield Document(row["prompt"], row["answer"])
        return

    if form == ("question", "answer"):
        yield Document(prompt_text(row["question"], "question"), answer_text(row["answer"], "answer"))
        return
    if form == ("messages",):
        yield Document(*chat_texts(row["messages"], "messages"))
        return

    if form is None:
        found = ", ".join(map(str, row)) or "nothing"
        raise ValueError(f"expected prompt and answer, or text; found {found} ({MORE})")

    text = row["text"]
    if not isinstance(text, str):
        raise ValueError(f"text must be text, it is {type(text).__name__}")

    key = None
    for start in range(0, max(len(text), 1), MAX_CHARS):  # a blank text is a document too
        end = start + MAX_CHARS
        piece = _piece(text[start:end], key, ends=end >= len(text))
        key = piece.shared_key
        yield piece


def _json_file(path: Path, splits: Splits, meter: Meter) -> Iterator[Document]:
    try:
        for number, row in json_lines(path, strict=True, on_open=meter.enter):
            if not _is_taken(row, splits, path, number):
                continue
            try:
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, got {type(row).__name__}: each line must be a JSON object")
                yield from _row_documents(row)
            except ValueError as error:
                raise ValueError(f"{path} line {number}: {error}") from error
    except JsonLineError as error:
        reason = error.reason
        if not isinstance(error.__cause__, NoTextError):
            reason += ": each line must be a JSON object"
        raise ValueError(f"{path} line {error.number}: {reason}") from error


def _parquet_file(path: Path, splits: Splits) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            form = form_of(names)
            if form is None:
                found = ", ".join(names)
                raise ValueError(f"{path}: has the columns {found}; expected prompt and answer, or text ({MORE})")
            wanted = list(form)

            if "split" in names:
                wanted.append("split")

            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    # An empty cell is a blank text.
                    filled = {key: "" if value is None else value for key, value in row.items()}
                    if _is_taken(row, splits, path, number):
                        yield from _parquet_row(filled, path, number)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read behind row {number}: {' '.join(str(error).split())}") from error


def _parquet_row(row: dict[str, Any], path: Path, number: int) -> Iterator[Document]:
    """The documents of row `number` of a file. Raises ValueError, which names both."""
    try:
        for name, value in row.items():
            if isinstance(value, str) and "\0" in value:
                raise ValueError(f"{name} holds a NUL character, which no text has: take it out")
        yield from _row_documents(row)
    except ValueError as error:
        raise ValueError(f"{path} row {number}: {error}") from error
