"""Prepared data on disk: JSON lines of token triples, read by line number in flat memory.

A prepared folder holds `train.jsonl`, `val.jsonl`, `meta.json` and `tokenizer.json` (docs/data.md). Each line is one
triple: what the encoder reads, what the decoder reads (bos first) and what it must say.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.files import json_reason, read_json, shell_path
from engine.labels import IGNORE

SPLITS = ("train", "val")
LEAST_COUNTS = {"vocab_size": 1, "pad_id": 0, "bos_id": 0, "eos_id": 0, "max_seq_len": 1}  # of meta.json
ANCHOR_BITS = 12  # one index entry per 4 KiB of file: 16 bytes of memory each, and at most 4 KiB read in excess
NEWLINE = 10


class Triple(NamedTuple):
    """One example; `decoder_input_ids` and `labels` have equal lengths, labels[i] is what follows decoder input i."""

    encoder_ids: list[int]
    decoder_input_ids: list[int]
    labels: list[int]


# --- lines ------------------------------------------------------------------------------------------------------------


def line_problem(row: Any, vocab_size: int) -> str | None:
    """What is wrong with one parsed line as a triple, or None."""
    if not isinstance(row, dict):
        return f"expected an object, got {type(row).__name__}"

    # The fields are checked one by one, in their order, then what ties the decoder's two sides.
    missing = [key for key in Triple._fields if key not in row]
    if missing:
        return f"has no {', '.join(missing)}"
    for key in Triple._fields:
        problem = _ids_problem(key, row[key], vocab_size)
        if problem:
            return problem
    return _shift_problem(row["decoder_input_ids"], row["labels"])


def _ids_problem(key: str, ids: Any, vocab_size: int) -> str | None:
    """What is wrong with one side of a triple, or None. Labels may be IGNORE, but not all of them."""
    if not isinstance(ids, list) or not ids or set(map(type, ids)) != {int}:
        return f"{key} must be a list of at least one integer"

    low = min(ids)
    high = max(ids)
    if key == "labels" and low == IGNORE:
        low = min((label for label in ids if label != IGNORE), default=None)
        if low is None:
            return f"every label is {IGNORE}, so nothing is learned from it"

    if low < 0 or high >= vocab_size:
        return f"{key} holds {low if low < 0 else high}, expected ids from 0 to {vocab_size - 1}"
    return None


def _shift_problem(inputs: list[int], labels: list[int]) -> str | None:
    """Teacher forcing: the decoder reads each label one place later. What contradicts it, or None."""
    if len(inputs) != len(labels):
        return f"{len(inputs)} decoder_input_ids and {len(labels)} labels, expected equally many"
    if inputs[1:] == labels[:-1]:  # nearly every line, and fast
        return None

    for place, (label, following) in enumerate(zip(labels, inputs[1:], strict=False)):
        if label not in (IGNORE, following):
            return f"labels[{place}] is {label}, but decoder_input_ids[{place + 1}] is {following}"
    return None


def parse_line(line: bytes, vocab_size: int) -> Triple:
    """The checked triple of one line.

    Raises:
        ValueError: what is wrong; the caller knows the file and the line number.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # undecodable bytes raise UnicodeDecodeError, which is one
        raise ValueError(f"not JSON ({json_reason(error)})" if line.strip() else "an empty line") from error

    problem = line_problem(row, vocab_size)
    if problem:
        raise ValueError(problem)
    return Triple(*(row[key] for key in Triple._fields))


# --- meta.json --------------------------------------------------------------------------------------------------------


def read_meta(folder: Path | str) -> dict[str, Any]:
    """The checked `meta.json` of a prepared folder.

    Raises:
        ValueError: it is missing or broken; one line, with every problem in it.
    """
    path = Path(folder) / "meta.json"
    if not path.exists():
        raise ValueError(
            f"{folder} has no meta.json, so it is no (finished) prepared folder: "
            "make one with scripts/prepare_language_dataset.py"
        )
    try:
        meta = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}: prepare the folder again") from error

    problems = _meta_problems(meta)
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}: prepare the folder again")
    return meta


def _meta_problems(meta: Any) -> list[str]:
    """What is wrong with a parsed meta.json, one phrase each."""
    if not isinstance(meta, dict):
        return [f"holds a {type(meta).__name__}, expected an object"]

    problems = []
    for key, least in LEAST_COUNTS.items():
        if type(meta.get(key)) is not int or meta[key] < least:  # bool is an int to isinstance
            problems.append(f"{key} is {meta.get(key)!r}, expected a whole number of at least {least}")

    # Ids can be compared with the vocabulary only where both are numbers.
    if not problems:
        for key in ("pad_id", "bos_id", "eos_id"):
            if meta[key] >= meta["vocab_size"]:
                problems.append(f"{key} {meta[key]} is not below vocab_size {meta['vocab_size']}")

    if not isinstance(meta.get("tokenizer_sha256"), str):
        problems.append("tokenizer_sha256 is missing")

    splits = meta.get("splits")
    for split in SPLITS:
        entry = splits.get(split) if isinstance(splits, dict) else None
        if not isinstance(entry, dict) or type(entry.get("samples")) is not int:
            problems.append(f"splits.{split}.samples is missing")
    return problems


# --- reading ----------------------------------------------------------------------------------------------------------


class LineIndex:
    """The lines of a file by number, from a sparse index: memory is 0.4 % of the file, whatever the lines' lengths.

    The index holds, for each block of 4 KiB in which a line starts, the first such line (the block's anchor). Only
    newline ends a line; a last line without one counts. Safe to read from several threads.

    Raises:
        ValueError: the file cannot be read.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        try:
            self._file = open(self.path, "rb", buffering=0)
            self._lines, self._offsets, self._count = self._scan()
        except OSError as error:
            raise ValueError(f"cannot read {self.path}: {error.strerror or error}") from error

    def _scan(self, chunk: int = 1 << 22) -> tuple[np.ndarray, np.ndarray, int]:
        """(line number of each anchor, its byte offset with the file's size at the end, lines in all).

        `chunk` is the number of bytes read at a time.
        """
        lines = [np.zeros(0, np.int64)]
        offsets = []
        count = 0  # lines before this chunk
        position = 0  # bytes before this chunk
        block = -1  # of the newest anchor
        carry = np.zeros(1, dtype=np.int64)  # a line start that the chunk before left over; at first, byte 0

        while data := self._file.read(chunk):
            newlines = np.flatnonzero(np.frombuffer(data, np.uint8) == NEWLINE)
            starts = np.concatenate([carry, newlines + (position + 1)])
            position += len(data)

            # A line that would start where the chunk ends is there only if another chunk follows.
            carry = starts[starts == position]
            starts = starts[starts < position]

            # The first line start of each block is its anchor; the first block may have one from the chunk before.
            blocks, first = np.unique(starts >> ANCHOR_BITS, return_index=True)
            if len(blocks) and blocks[0] == block:
                blocks = blocks[1:]
                first = first[1:]
            lines.append(first + count)
            offsets.append(starts[first])

            count += len(starts)
            if len(blocks):
                block = blocks[-1]

        offsets.append(np.array([position], dtype=np.int64))
        return np.concatenate(lines), np.concatenate(offsets), count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> bytes:
        """Line `number`, counted from 0, without its line break."""
        if not 0 <= number < self._count:
            raise IndexError(f"line {number} of {self._count} lines")

        # The block from this line's anchor to the next anchor is read whole.
        anchor = int(np.searchsorted(self._lines, number, side="right")) - 1
        start = int(self._offsets[anchor])
        end = int(self._offsets[anchor + 1])
        block = os.pread(self._file.fileno(), end - start, start)  # threads share the file's position

        skipped = number - int(self._lines[anchor])
        return block.split(b"\n", skipped + 1)[skipped]


class PreparedData:
    """One split of a prepared folder: `data[i]` reads and checks line i from disk; only a sparse index is in memory.

    A triple longer than `max_seq_len` (0: no limit) keeps the END of its encoder side, which is the nearest context,
    and the BEGINNING of its decoder side. With `on_bad_line="skip"` the next good line takes a bad one's place, so
    that every rank draws the same order without having read the others' lines; `skipped` counts the bad lines met.

    Raises:
        ValueError: a broken folder, an empty split; on reading with `on_bad_line="error"`, a bad line (file and line
            number are named); with `"skip"`, a split without one good line.
    """

    def __init__(self, folder: Path | str, split: str, max_seq_len: int = 0, on_bad_line: str = "error"):
        if on_bad_line not in ("error", "skip"):
            raise ValueError(f"on_bad_line is {on_bad_line!r}, expected error or skip")
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected {' or '.join(SPLITS)}")
        if max_seq_len < 0:
            raise ValueError(f"max_seq_len is {max_seq_len}, expected at least 1, or 0 for no limit")

        self.meta = read_meta(folder)
        self.path = Path(folder) / f"{split}.jsonl"
        self.max_seq_len = max_seq_len
        self.on_bad_line = on_bad_line
        self._bad: set[int] = set()  # numbers of bad lines met

        self._index = LineIndex(self.path)
        if not len(self._index):
            raise ValueError(f"{self.path} is empty: prepare the folder again with more documents or another ratio")

    def __len__(self) -> int:
        return len(self._index)

    @property
    def skipped(self) -> int:
        """Bad lines met so far."""
        return len(self._bad)

    def __getitem__(self, number: int) -> Triple:
        """Triple `number`; a negative number counts from the end."""
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"item {number} of {len(self)} items")

        # The line itself, or the next good one; behind the last line comes the first.
        for step in range(len(self)):
            triple = self.line((number + step) % len(self))
            if triple is not None:
                return triple
        raise ValueError(f"{self.path} has no good line; see them with: {self._validation}")

    def __iter__(self) -> Iterator[Triple]:
        """The good triples in file order, each once."""
        for place in range(len(self)):
            triple = self.line(place)
            if triple is not None:
                yield triple

    def line(self, place: int) -> Triple | None:
        """The triple of line `place` itself; None where it is bad and bad lines are skipped."""
        try:
            triple = parse_line(self._index[place], self.meta["vocab_size"])
        except ValueError as error:
            if self.on_bad_line == "error":
                raise ValueError(
                    f"{self.path} line {place + 1}: {error}; see all bad lines with: {self._validation}"
                ) from error
            self._bad.add(place)
            return None

        limit = self.max_seq_len
        if not limit:
            return triple
        return Triple(triple.encoder_ids[-limit:], triple.decoder_input_ids[:limit], triple.labels[:limit])

    @property
    def _validation(self) -> str:
        """The command that lists every bad line."""
        return f"python scripts/validate_dataset.py {shell_path(self.path.parent)}"
