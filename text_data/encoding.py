"""From documents to the lines of a prepared folder: encoded, cut into triples and written as JSON, a batch at a time.

A batch depends on nothing but itself, so it does not matter which process does it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from text_data.documents import Document
from text_data.roundtrip import RoundTrip
from text_data.tokenizer import byte_counter, parse_tokenizer, vocabulary_size
from text_data.word_cache import WordEncoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HEAD = 32  # tokens at the start of a text that only the encoder reads; a quarter of a text shorter than four times that
BATCH_CHARS = 1 << 19  # a batch of documents ends here at the latest, so that memory stays flat for long ones
COUNTS = ("samples", "documents", "encoder_tokens", "decoder_tokens", "decoder_bytes")


class Batch(NamedTuple):
    """Documents, of which the first is number `first` of the source."""

    first: int
    documents: list[Document]


@dataclass(frozen=True)
class Recipe:
    """How documents become lines.

    Attributes:
        tokenizer: the text of a tokenizer.json.
        special: role -> id.
        limit: tokens of each side of a triple, at most.
        threshold: documents whose key is below it go to val.
        threads: of the tokenizer; 0: its own choice.
    """

    tokenizer: str
    special: dict[str, int]
    limit: int
    threshold: int
    threads: int


def batched(documents: Iterable[Document], size: int) -> Iterator[Batch]:
    """Batches of at most `size` documents and about BATCH_CHARS characters."""
    first = 0
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text) + len(document.prompt or "")
        if len(batch) >= size or chars >= BATCH_CHARS:
            yield Batch(first, batch)
            first += len(batch)
            batch = []
            chars = 0
    if batch:
        yield Batch(first, batch)


# --- triples ----------------------------------------------------------------------------------------------------------


def windows(length: int, limit: int, ends: bool) -> Iterator[tuple[int, int, int]]:
    """How a text of `length` tokens is cut: (context start, target start, target end), in order.

    The targets follow each other without gap or overlap from the head's end to the text's, and a context ends where its
    target starts. Contexts and labels hold at most `limit` tokens; the last labels have room for the end of sequence.
    """
    start = min(HEAD, limit, max(length // 4, 1))
    while start < length:
        left = length - start
        if left <= limit - ends:
            end = length
        else:
            end = start + min(limit, left - 1)

        yield max(0, start - limit), start, end
        start = end


@dataclass
class Part:
    """What a batch, or a whole source, gives to one split.

    Attributes:
        lines: JSON lines, each with its line break.
        counts: of these lines; the keys of the split in meta.json.
        truncated: prompts and answers that were cut.
        too_short: texts of one token, which are left out.
        keys: (documents,) uint64, of the documents written.
    """

    lines: bytes = b""
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    truncated: dict[str, int] = field(default_factory=lambda: {"prompts": 0, "answers": 0})
    too_short: int = 0
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))

    def count(self, other: Part) -> None:
        """Adds the counts of another part; lines and keys stay as they are."""
        for name, number in other.counts.items():
            self.counts[name] += number
        for name, number in other.truncated.items():
            self.truncated[name] += number
        self.too_short += other.too_short


class Encoded(NamedTuple):
    """What a batch gives: to train and to val, the number of its blank documents, and its part of the round trip."""

    train: Part
    val: Part
    blank: int
    trip: RoundTrip
    documents: int


class LineWriter:
    """Formats triples; `part` takes them."""

    def __init__(self, tokenizer: Tokenizer, special: dict[str, int], limit: int):
        self.limit = limit
        # An id stands in up to three lines; to format it anew each time would be half of all the work.
        self._decimal = list(map(str, range(vocabulary_size(tokenizer)))).__getitem__
        self._bytes = byte_counter(tokenizer)
        self._bos = str(special["bos"])
        self._eos = str(special["eos"])
        self.begin()

    def begin(self) -> None:
        """Starts an empty part."""
        self.part = Part()
        self._lines: list[str] = []
        self._keys: list[int] = []

    def finished(self) -> Part:
        """The part with all that was added since it was begun."""
        self.part.lines = "".join(self._lines).encode("ascii")
        self.part.keys = np.array(self._keys, np.uint64)
        return self.part

    def _write_line(self, context: list[str], target: list[str], ends: bool) -> None:
        """Adds one triple of ids in decimal: bos and the target to read, the target (and eos if it ends) to say."""
        if ends:
            body = ", ".join(target)
            last = self._eos
        else:
            body = ", ".join(target[:-1])
            last = target[-1]
        inputs = ", ".join(filter(None, (self._bos, body)))
        labels = ", ".join(filter(None, (body, last)))

        # As json.dumps writes it, several times faster.
        encoder = ", ".join(context)
        self._lines.append(f'{{"encoder_ids": [{encoder}], "decoder_input_ids": [{inputs}], "labels": [{labels}]}}\n')
        self.part.counts["samples"] += 1
        self.part.counts["encoder_tokens"] += len(context)
        self.part.counts["decoder_tokens"] += len(target) + ends

    def add_text(self, key: int, ids: list[int], ends: bool) -> None:
        """A plain text, or a piece of one: contexts to the encoder, continuations to the decoder.

        `ends` is False where another piece follows.
        """
        self._keys.append(key)
        if len(ids) < 2:
            self.part.too_short += 1
            return

        words = list(map(self._decimal, ids))
        cuts = list(windows(len(ids), self.limit, ends))
        for context, start, end in cuts:
            self._write_line(words[context:start], words[start:end], ends and end == len(ids))

        _, first, _ = cuts[0]  # what stands before is never predicted
        self.part.counts["decoder_bytes"] += self._bytes(ids[first:])
        self.part.counts["documents"] += ends

    def add_answer(self, key: int, prompt: list[int], ids: list[int]) -> None:
        """A prompt to the encoder, its END if it is too long; an answer to the decoder, its BEGINNING if too long."""
        self._keys.append(key)
        ends = len(ids) < self.limit
        self.part.truncated["prompts"] += len(prompt) > self.limit
        self.part.truncated["answers"] += not ends

        prompt = prompt[-self.limit :]
        ids = ids[: self.limit]
        self._write_line(list(map(self._decimal, prompt)), list(map(self._decimal, ids)), ends)
        self.part.counts["decoder_bytes"] += self._bytes(ids)
        self.part.counts["documents"] += 1


# --- a batch ----------------------------------------------------------------------------------------------------------


class BatchEncoder:
    """Makes the lines of batches."""

    def __init__(self, recipe: Recipe):
        self.tokenizer = parse_tokenizer(recipe.tokenizer, "the tokenizer")
        self.threshold = recipe.threshold
        self.encoder = WordEncoder(self.tokenizer)
        self.train = LineWriter(self.tokenizer, recipe.special, recipe.limit)
        self.val = LineWriter(self.tokenizer, recipe.special, recipe.limit)

    def __call__(self, batch: Batch) -> Encoded:
        """The lines of one batch."""
        documents = batch.documents
        texts = [document.text for document in documents]
        prompts = [document.prompt for document in documents if document.prompt is not None]
        ids = self.encoder.encode(texts + prompts)
        prompt_ids = iter(ids[len(texts) :])

        self.train.begin()
        self.val.begin()
        trip = RoundTrip()
        blank = 0
        for number, (document, text) in enumerate(zip(documents, ids[: len(texts)], strict=True), start=batch.first):
            prompt = next(prompt_ids) if document.prompt is not None else None
            if trip.wants(number):
                self._check(trip, document, prompt, text)
            if not text or prompt == [] or not document.text.strip():
                blank += 1
                continue

            key = document.key
            writer = self.val if key < self.threshold else self.train
            if prompt is None:
                writer.add_text(key, text, document.ends)
            else:
                writer.add_answer(key, prompt, text)
        return Encoded(self.train.finished(), self.val.finished(), blank, trip, len(documents))

    def _check(self, trip: RoundTrip, document: Document, prompt: list[int] | None, text: list[int]) -> None:
        """Counts a document whose ids are known among those that come back."""
        known = {document.text: text}
        if document.prompt:
            known[document.prompt] = prompt or []

        def decode(part: str) -> str:
            ids = known[part] if part in known else self.encoder.encode([part])[0]
            return self.tokenizer.decode(ids, skip_special_tokens=False)

        trip.add([part for part in (document.prompt, document.text) if part], decode)


def batch_encoder(recipe: Recipe) -> Callable[[Batch], Encoded]:
    """What a worker does with its batches. Sets the threads of this process's tokenizers."""
    set_threads(recipe.threads)
    return BatchEncoder(recipe)


def set_threads(threads: int) -> None:
    """Threads of this process's tokenizers, 0: their own choice; to be said before the first of them runs."""
    if threads:
        os.environ["RAYON_NUM_THREADS"] = str(threads)
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
