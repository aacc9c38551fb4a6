"""The suite's language entry: documents, the windows of them that are predicted, perplexity and bits per byte.

A document is cut into windows of `WINDOW` characters. Each window but the first is predicted from the
`CONTEXT_WINDOWS` before it, so that every character after the first window counts once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.files import read_text
from engine.intervals import Interval, bootstrap
from suite.questions import SPLIT_FLAG, SuiteError, SuiteItem, chosen, keys_of, rows_of
from suite.text_model import TextModel
from text_data.documents import Splits

WINDOW = 512  # characters that are predicted at a time
CONTEXT_WINDOWS = 2  # windows before them that are read
BLOCK = 16  # windows of a resampled block where the language file is one document
CHUNK = 64  # pairs between two reports of progress
LARGEST_EXPONENT = 700  # of e in float64
TITLE = re.compile(r"^ = [^=\n]+ = *$", re.MULTILINE)  # WikiText's mark of a new article


# --- documents --------------------------------------------------------------------------------------------------------


def read_documents(path: Path, first_only: bool = False, split: str | None = None) -> list[str]:
    """Documents of the key `text` of a .jsonl file; of any other file, its WikiText articles, or else the whole text.

    `first_only` reads no further than the first line of a .jsonl file (of rows that name a split, the splits of all).
    `split` chooses such rows, see `SuiteItem`. White space around a document goes.

    Raises:
        SuiteError: the file cannot be read, a line has no `text`, or there is no text at all.
    """
    if path.suffix == ".jsonl":
        documents = _documents_of_lines(path, first_only, split)
    else:
        documents = _articles(path)

    stripped = map(str.strip, documents)
    documents = list(filter(None, stripped))
    if not documents:
        raise SuiteError(f"perplexity: {path} holds no text")
    return documents


def _documents_of_lines(path: Path, first_only: bool, split: str | None) -> list[str]:
    """The text of each line."""
    splits = Splits(split, SPLIT_FLAG)
    documents: list[str] = []
    for where, row in rows_of(path):
        if not splits.takes(row) or (first_only and documents):
            continue
        if not isinstance(row.get("text"), str):
            raise SuiteError(f"perplexity: {where}: expected the key text, got {keys_of(row)}")
        documents.append(row["text"])
        if first_only and not splits.counts:
            break

    if splits.problem():
        raise SuiteError(f"perplexity: {path}: {splits.problem()}")
    return documents


def _articles(path: Path) -> list[str]:
    """The text cut before each title line; what stands before the first title comes first."""
    try:
        text = read_text(path)
    except ValueError as error:
        raise SuiteError(f"perplexity: {error}") from error

    # A title belongs to the article that it opens.
    articles = []
    begin = 0
    for title in TITLE.finditer(text):
        articles.append(text[begin : title.start()])
        begin = title.start()
    articles.append(text[begin:])
    return articles


def cut_windows(text: str, size: int = WINDOW) -> list[str]:
    """`text` in pieces of at most `size` characters that join to it, cut before white space where there is any."""
    # Joined, the pieces are the text again, so that no character is predicted twice or left out.
    pieces = []
    start = 0
    while len(text) - start > size:
        # The last white space of the window, or its end where there is none: a long word is cut.
        cut = start + size
        while cut > start and not text[cut].isspace():
            cut -= 1
        if cut == start:
            cut = start + size
        pieces.append(text[start:cut])
        start = cut

    pieces.append(text[start:])
    return pieces


def window_pairs(document: str, size: int = WINDOW) -> list[tuple[str, str]]:
    """(context, continuation) of each window but the first, so that all text after it is predicted once."""
    pieces = cut_windows(document, size)
    pairs = []
    for place in range(1, len(pieces)):
        context = "".join(pieces[max(place - CONTEXT_WINDOWS, 0) : place])
        pairs.append((context, pieces[place]))
    return pairs


# --- likelihoods ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """(context, continuation) pairs to predict, each with its document's number; a document's pairs stand together.

    `trained` counts the documents that were left out because they were trained on.
    """

    pairs: list[tuple[str, str]]
    documents: list[int]
    trained: int = 0

    @classmethod
    def read(cls, item: SuiteItem, n: int, seed: int, trained_on: Container[str] = ()) -> Windows:
        """`n` windows of an entry's file (0: all), drawn from its documents that are not among `trained_on`.

        Raises:
            SuiteError: as `read_documents`, or no document has a second window, or all were trained on.
        """
        path = item.path
        read = read_documents(path, split=item.split)
        texts = [text for text in read if text not in trained_on]
        if not texts:
            raise SuiteError(f"perplexity: all {len(read)} documents of {path} were trained on: give a held-out file")

        # A pair for every window but the first of its document.
        pairs = []
        documents = []
        for number, text in enumerate(texts):
            own = window_pairs(text)
            pairs += own
            documents += [number] * len(own)
        if not pairs:
            longest = max(len(cut_windows(text)[0]) for text in texts)
            raise SuiteError(
                f"perplexity: no document of {path} is longer than its first window of {longest} characters"
            )

        # The bootstrap resamples documents. Of a single one, blocks of windows stand in for them.
        if len(set(documents)) == 1:
            documents = [place // BLOCK for place in range(len(pairs))]

        places = chosen(len(pairs), n, seed)
        numbers = [documents[place] for place in places]
        return cls([pairs[place] for place in places], numbers, len(read) - len(texts))

    def first_contexts(self) -> dict[int, str]:
        """Number of each document -> the context of its first window, in order."""
        contexts: dict[int, str] = {}
        for number, (context, _) in zip(self.documents, self.pairs, strict=True):
            contexts.setdefault(number, context)
        return contexts

    def measure(self, model: TextModel, progress: Callable[[int], None]) -> list[tuple[float, int, int]]:
        """(sum of log p in nats, tokens, UTF-8 bytes) of each document, in order.

        `progress` is called with the number of windows that are done.
        """
        # A document's sums grow in the order of its windows, so a run repeats to the last bit.
        nats: dict[int, float] = {}
        tokens: dict[int, int] = {}
        size: dict[int, int] = {}
        for start in range(0, len(self.pairs), CHUNK):
            pairs = self.pairs[start : start + CHUNK]
            for place, (log_p, count) in enumerate(model.log_likelihoods(pairs), start):
                number = self.documents[place]
                continuation = self.pairs[place][1]
                nats[number] = nats.get(number, 0.0) + log_p
                tokens[number] = tokens.get(number, 0) + count
                size[number] = size.get(number, 0) + len(continuation.encode())
            progress(start + len(pairs))

        return [(nats[number], tokens[number], size[number]) for number in nats]


def _perplexity(sums: np.ndarray) -> float:
    """e to the nats per token, from (sum of log p, tokens, bytes)."""
    nats = -sums[0] / max(sums[1], 1.0)
    return math.exp(nats) if nats < LARGEST_EXPONENT else math.inf


def _bits_per_byte(sums: np.ndarray) -> float:
    """From (sum of log p in nats, tokens, bytes)."""
    return -sums[0] / math.log(2) / max(sums[2], 1.0)


def language_estimates(documents: Sequence[tuple[float, int, int]], seed: int) -> dict[str, Interval]:
    """Perplexity per token and bits per byte from each document's (sum of log p in nats, tokens, bytes).

    Their n are tokens and bytes; the intervals come from resampling documents, drawn by `seed`.
    """
    # A text model of other tokens has another perplexity; bits per byte can be compared.
    columns = np.array(documents, dtype=np.float64)
    tokens = int(columns[:, 1].sum())
    size = int(columns[:, 2].sum())
    return {
        "perplexity": bootstrap(columns, _perplexity, tokens, seed),
        "bits_per_byte": bootstrap(columns, _bits_per_byte, size, seed),
    }
