"""Lines of several files in one random order, copied a stretch at a time, by one process or by several.

The order is a function of the seeds and of the files' numbers of lines alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.labels import IGNORE
from text_data.order import EpochOrder
from text_data.tokenizer import byte_counter, parse_tokenizer
from text_data.triples import parse_line

STRETCH = 1 << 22  # bytes that are copied at a time, about
MOST_LINES = 1 << 15  # of them
COUNTS = ("encoder_tokens", "decoder_tokens", "decoder_bytes")

Counts = dict[str, int]
LineCounter = Callable[[Sequence[bytes]], Counts]


class Vocabulary(NamedTuple):
    """What the tokens of lines are counted with.

    tokenizer: the text of a tokenizer.json.
    sources: the folders of the lines, for messages; the first is the tokenizer's.
    size: ids are below it.
    eos_id: the end of sequence, which stands for no text.
    """

    tokenizer: str
    sources: list[str]
    size: int
    eos_id: int


def add_counts(totals: Counts, counts: Counts) -> None:
    """Adds `counts` to `totals`."""
    for name, number in counts.items():
        totals[name] += number


def line_counter(vocabulary: Vocabulary | None) -> LineCounter:
    """A function of lines: their tokens, and bytes of their decoder's text, of which bits per byte are taken.

    Without a vocabulary it counts nothing, since parsing lines costs far more than copying them. The function raises
    ValueError: a line is no triple.
    """
    if vocabulary is None:
        return lambda lines: {}
    bytes_of = byte_counter(parse_tokenizer(vocabulary.tokenizer, vocabulary.sources[0]))

    def count(lines: Sequence[bytes]) -> Counts:
        totals = dict.fromkeys(COUNTS, 0)
        for line in lines:
            try:
                triple = parse_line(line, vocabulary.size)
            except ValueError as error:
                raise ValueError(
                    f"a val line of a source is bad ({error}): find it with scripts/validate_dataset.py, each of "
                    f"{' '.join(vocabulary.sources)}"
                ) from error
            labels = [label for label in triple.labels if label != IGNORE]
            text = labels[:-1] if labels[-1] == vocabulary.eos_id else labels
            totals["encoder_tokens"] += len(triple.encoder_ids)
            totals["decoder_tokens"] += len(labels)
            totals["decoder_bytes"] += bytes_of(text)
        return totals

    return count


# --- the order --------------------------------------------------------------------------------------------------------


class ShuffledLines:
    """The lines of one file in endless reshuffled epochs; 12 bytes of memory a line.

    Raises:
        ValueError: the file is torn, or does not hold as many lines as its meta.json says.
    """

    def __init__(self, path: Path, expected: int, seed: list[int]):
        self.drawn = 0  # lines taken so far, in all epochs

        last = b"\n"
        with open(path, "rb", buffering=1 << 18) as file:
            self.starts = np.concatenate([[0], np.cumsum(np.fromiter(map(len, file), np.int64))])
            if self.starts[-1]:
                file.seek(-1, os.SEEK_END)
                last = file.read()

        if last != b"\n" or len(self) != expected:
            raise ValueError(
                f"{path} is torn: it holds {len(self)} lines, its meta.json says {expected}; prepare it again"
            )
        self._order = EpochOrder(len(self), seed)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def mean_size(self) -> float:
        """Bytes of a line, on average; 0 of none."""
        return float(self.starts[-1]) / max(len(self), 1)

    def places(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(first bytes, ends) of the next `count` lines, line breaks included; both (count,) int64."""
        chosen = self._order.stretch(self.drawn, count)
        self.drawn += count
        return self.starts[chosen], self.starts[chosen + np.uint32(1)]


class Stretch(NamedTuple):
    """Lines that follow each other in the output.

    offset: of their first byte in the output.
    which: (lines,) uint16, the source of each.
    starts, ends: (lines,) int64, its place in the source.
    """

    offset: int
    which: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @property
    def size(self) -> int:
        """Bytes of all lines."""
        return int(self.ends.sum() - self.starts.sum())


class Mix:
    """`counts[s]` lines of source s, in one random order; to be gone through once.

    Attributes:
        size: bytes of all lines, about.
    """

    def __init__(self, sources: list[ShuffledLines], counts: list[int], seed: list[int]):
        self.sources = sources
        self.size = int(sum(count * source.mean_size for source, count in zip(sources, counts, strict=True)))
        self._order = np.repeat(np.arange(len(sources), dtype=np.uint16), counts)
        np.random.default_rng(seed).shuffle(self._order)

    def stretches(self) -> Iterator[Stretch]:
        """The lines in their order, about STRETCH bytes at a time."""
        lines = min(max(STRETCH * len(self._order) // max(self.size, 1), 1), MOST_LINES)
        offset = 0
        for first in range(0, len(self._order), lines):
            # Each source fills its own places of the stretch.
            which = self._order[first : first + lines]
            starts = np.zeros(len(which), np.int64)
            ends = np.zeros(len(which), np.int64)
            for number, source in enumerate(self.sources):
                places = np.flatnonzero(which == number)
                starts[places], ends[places] = source.places(len(places))

            stretch = Stretch(offset, which, starts, ends)
            yield stretch
            offset += stretch.size


# --- copying ----------------------------------------------------------------------------------------------------------


class Copied(NamedTuple):
    """How many lines were copied, and their counts."""

    lines: int
    counts: Counts


def copier(sources: Sequence[Path], output: Path, vocabulary: Vocabulary | None) -> Callable[[Stretch], Copied]:
    """A function that copies the lines of a stretch to their place in the file `output`, and counts them.

    The function raises OSError, as of a full disk, and ValueError: a line that is to be counted is no triple. Memory
    holds a stretch; sources are not mapped, because pages of a map count as memory that the process holds.
    """
    count = line_counter(vocabulary)

    def copy(stretch: Stretch) -> Copied:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "rb", buffering=0)) for path in sources]
            read_from = [files[source].fileno() for source in stretch.which.tolist()]
            sizes = (stretch.ends - stretch.starts).tolist()
            lines = list(map(os.pread, read_from, sizes, stretch.starts.tolist()))

            target = stack.enter_context(open(output, "r+b", buffering=0))
            _write_at(target, memoryview(b"".join(lines)), stretch.offset)
        return Copied(len(lines), count(lines))

    return copy


def _write_at(file: FileIO, content: memoryview, offset: int) -> None:
    """Writes all of `content` at a place of the file. Raises OSError, which names the file."""
    written = 0
    while written < len(content):
        try:
            written += os.pwrite(file.fileno(), content[written:], offset + written)
        except OSError as error:
            raise OSError(error.errno, error.strerror, file.name) from error
