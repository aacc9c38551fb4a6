"""Documents of a source folder, one at a time: plain text, WikiText, JSON lines and parquet.

- `.txt`: documents are separated by blank lines. A file whose first line that is not blank is a WikiText title
  (` = Title = `) is WikiText: its documents are whole articles, each from a title that stands between blank lines (or
  at the start) to the next; blank lines and the heads of sections (` = = Head = = `) belong to the article.
- `.jsonl`, `.parquet`: `prompt` and `answer`, or `text`; other fields are ignored.

A text longer than MAX_CHARS is handed out in pieces, so that memory stays flat; all of them share one key.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.files import JsonLineError, json_lines

MAX_CHARS = 1 << 20
SUFFIXES = (".txt", ".jsonl", ".parquet")
TITLE = re.compile(r" ?= (?!=)(?:.*[^= ])? ?= ?")


class Document(NamedTuple):
    """A text, or an answer to a prompt. `ends` is False where a piece of a long text is followed by another."""

    prompt: str | None
    text: str
    key: int
    ends: bool = True


def key_of(text: str) -> int:
    """64 bits that are equal for texts equal but for case and white space; they decide the split."""
    normal = " ".join(text.lower().split())
    return int.from_bytes(hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def source_files(source: Path) -> list[Path]:
    """The readable files of a folder and its subfolders, in the order of their names; or the one file given.

    Raises:
        ValueError: no such place, no such files.
    """
    if source.is_file() and source.suffix in SUFFIXES:
        return [source]
    if not source.is_dir():
        raise ValueError(f"--source {source}: expected a folder, or a file that ends in {', '.join(SUFFIXES)}")
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.suffix in SUFFIXES
                   and not any(part.startswith(".") for part in path.relative_to(source).parts))
    if not files:
        raise ValueError(f"--source {source} has no file that ends in {', '.join(SUFFIXES)}")
    return files


def read_documents(files: Sequence[Path]) -> Iterator[Document]:
    """Every document of the files, in order; a blank text, prompt or answer comes as it is, the caller counts it.

    Raises:
        ValueError: a file that is not what its name says; the file, the line or the column is named.
    """
    for path in files:
        yield from {".txt": _text_file, ".jsonl": _json_lines, ".parquet": _parquet}[path.suffix](path)


def _text_file(path: Path) -> Iterator[Document]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            first = ""
            while not first.strip() and (line := file.readline(MAX_CHARS)):
                first = line
            file.seek(0)
            lines = iter(lambda: file.readline(MAX_CHARS), "")
            yield from _gather(_wikitext(lines) if TITLE.fullmatch(first.rstrip("\n")) else _paragraphs(lines))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from error


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
    held, after_blank = None, True  # a title is known by the line after it
    for line in lines:
        blank = not line.strip()
        if held is not None:
            yield held, blank
            held = None
        if after_blank and TITLE.fullmatch(line.rstrip("\n")):
            held = line
        else:
            yield line, False
        after_blank = blank
    if held is not None:
        yield held, True


def _gather(lines: Iterable[tuple[str, bool]]) -> Iterator[Document]:
    """Documents of lines marked where one starts; blank space around a document is dropped."""
    kept: list[str] = []
    size, key = 0, None
    for line, starts in lines:
        if starts and kept:
            yield _piece("".join(kept).rstrip(), key, ends=True)
            kept, size, key = [], 0, None
        elif size + len(line) > MAX_CHARS and kept:
            whole = _piece("".join(kept), key, ends=False)
            yield whole
            kept, size, key = [], 0, whole.key
        if kept or key is not None or line.strip():
            kept.append(line)
            size += len(line)
    if kept:
        yield _piece("".join(kept).rstrip(), key, ends=True)


def _piece(text: str, key: int | None, ends: bool) -> Document:
    return Document(None, text, key_of(text) if key is None else key, ends)


def _row(row: dict[str, Any]) -> Iterator[Document]:
    if "prompt" in row and "answer" in row:
        if not isinstance(row["prompt"], str) or not isinstance(row["answer"], str):
            raise ValueError("prompt and answer must be text")
        yield Document(row["prompt"], row["answer"], key_of(row["prompt"]))
    elif isinstance(row.get("text"), str):
        text, key = row["text"], None
        for start in range(0, max(len(text), 1), MAX_CHARS):
            piece = _piece(text[start: start + MAX_CHARS], key, ends=start + MAX_CHARS >= len(text))
            key = piece.key
            yield piece
    else:
        raise ValueError(f"expected prompt and answer, or text; found {', '.join(map(str, row)) or 'nothing'}")


def _json_lines(path: Path) -> Iterator[Document]:
    try:
        for number, row in json_lines(path):
            try:
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, got {type(row).__name__}")
                yield from _row(row)
            except ValueError as error:
                raise ValueError(f"{path} line {number}: {error}: each line must be a JSON object") from error
    except JsonLineError as error:
        reason = f"{path} line {error.number}: {error.__cause__}"
        raise ValueError(f"{reason}: each line must be a JSON object") from error


def _parquet(path: Path) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            wanted = ["prompt", "answer"] if {"prompt", "answer"} <= set(names) else ["text"]
            if not set(wanted) <= set(names):
                raise ValueError(f"has the columns {', '.join(names)}; expected prompt and answer, or text")
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                for row in batch.to_pylist():
                    yield from _row({key: "" if value is None else value for key, value in row.items()})
    except (pyarrow.ArrowException, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
