"""Checks the lines of a prepared split, a range of bytes at a time, so that several processes can share a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.labels import IGNORE
from text_data.triples import Triple, parse_line

SHOWN = 10  # bad lines named per split
RANGE = 1 << 23  # bytes that are checked at a time, about
SIDES = ("encoder", "decoder")


class Range(NamedTuple):
    """The lines of a file that begin at one of the bytes `start` to `end`."""

    path: Path
    start: int
    end: int


def ranges(path: Path, size: int) -> Iterator[Range]:
    """Ranges of a file of `size` bytes, which hold each of its lines once."""
    for start in range(0, size, RANGE):
        yield Range(path, start, min(start + RANGE, size))


def lines_of(part: Range) -> Iterator[bytes]:
    """The lines that begin in a range, without their line breaks; the last one may end behind it.

    Only a newline ends a line; a last line without one counts.
    """
    with open(part.path, "rb") as file:
        position = part.start
        if position:
            # The line that the byte before belongs to began before the range.
            file.seek(position - 1)
            position += len(file.readline()) - 1

        while position < part.end and (line := file.readline()):
            position += len(line)
            yield line.removesuffix(b"\n")


@dataclass
class Found:
    """What some lines are like.

    Attributes:
        lines: all of them.
        bad: those that are wrong.
        problems: (number from 0, what is wrong) of the first SHOWN of these.
        tokens, longest: of the good ones, by side.
        ignored: labels that nothing is learned from.
        digests: (good lines,) uint64, a hash of each.
    """

    lines: int = 0
    bad: int = 0
    problems: list[tuple[int, str]] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 0))
    longest: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 0))
    ignored: int = 0
    digests: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))

    def count(self, later: Found) -> None:
        """Adds what was found in the lines that follow, but for their digests."""
        for number, problem in later.problems[: SHOWN - len(self.problems)]:
            self.problems.append((self.lines + number, problem))
        self.lines += later.lines
        self.bad += later.bad
        self.ignored += later.ignored
        for side in SIDES:
            self.tokens[side] += later.tokens[side]
            self.longest[side] = max(self.longest[side], later.longest[side])


def checked_triple(line: bytes, meta: dict[str, Any]) -> Triple:
    """The triple of a line, held against what meta.json says. Raises ValueError."""
    triple = parse_line(line, meta["vocab_size"])
    length = max(len(triple.encoder_ids), len(triple.labels))
    if length > meta["max_seq_len"]:
        raise ValueError(f"{length} tokens on one side, meta.json says at most {meta['max_seq_len']}")

    first = triple.decoder_input_ids[0]
    if first != meta["bos_id"]:
        raise ValueError(f"decoder_input_ids starts with {first}, expected bos {meta['bos_id']}")
    return triple


def line_checker(meta: dict[str, Any]) -> Callable[[Range], Found]:
    """A function that checks the lines of a range against what meta.json says."""

    def check(part: Range) -> Found:
        found = Found()
        digests = []
        for number, line in enumerate(lines_of(part)):
            found.lines += 1
            try:
                triple = checked_triple(line, meta)
            except ValueError as error:
                found.bad += 1
                if len(found.problems) < SHOWN:
                    found.problems.append((number, str(error)))
                continue

            digests.append(hashlib.blake2b(line, digest_size=8).digest())
            for side, ids in zip(SIDES, (triple.encoder_ids, triple.labels), strict=True):
                found.tokens[side] += len(ids)
                found.longest[side] = max(found.longest[side], len(ids))
            found.ignored += triple.labels.count(IGNORE)

        found.digests = np.frombuffer(b"".join(digests), np.uint64)
        return found

    return check
