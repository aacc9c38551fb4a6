"""Whether a tokenizer gives texts back: what it loses, no model can read or say.

Two texts count as the same when their NFKC forms are equal but for white space around them: SentencePiece normalises
so, and puts a space in front. Case, inner white space and unknown characters count.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from text_data.frames import text_ids

ENOUGH = 1000  # rows checked of a large source
EVERY = 64  # beyond these, one row in so many
ROWS_TRIED = 128  # questions of a run, with their answers, that are checked
MOST_CHARS = 20_000  # of a text that are checked


def same_text(text: str, decoded: str) -> bool:
    """Whether a decoded text is the text."""
    return text == decoded or unicodedata.normalize("NFKC", text).strip() == unicodedata.normalize(
        "NFKC", decoded
    ).strip()


@dataclass
class RoundTrip:
    """Counts the rows that come back, and keeps the first that does not.

    Attributes:
        rows: rows checked.
        back: those of which every text came back.
        first: (text, decoded) of the first text that did not.
    """

    rows: int = 0
    back: int = 0
    first: tuple[str, str] | None = None

    @property
    def share(self) -> float:
        """Share of the checked rows that came back; 1 of none."""
        return self.back / self.rows if self.rows else 1.0

    def wants(self, number: int) -> bool:
        """Whether row `number` is checked: the first ENOUGH, then one in EVERY."""
        return number < ENOUGH or number % EVERY == 0

    def add(self, texts: Sequence[str], decode: Callable[[str], str]) -> None:
        """Checks a row; `decode` gives what the tokenizer makes of a text."""
        self.rows += 1
        for text in texts:
            decoded = decode(text[:MOST_CHARS])
            if not same_text(text[:MOST_CHARS], decoded):
                self.first = self.first or (text, decoded)
                return
        self.back += 1

    def count(self, later: RoundTrip) -> None:
        """Adds what was counted of later rows."""
        self.rows += later.rows
        self.back += later.back
        self.first = self.first or later.first

    def shown(self) -> str:
        """`59 of 60 rows (98.3 %) come back`, for people."""
        return f"{self.back} of {self.rows} rows ({100 * self.share:.1f} %) come back from the tokenizer as they were"

    def problem(self, least: float, part: float = 1.0) -> str | None:
        """One line where the share is below `part` of `least`, which is --min_roundtrip; else None."""
        if self.share >= part * least:
            return None
        text, decoded = self.first
        return (
            f"{self.shown()}, --min_roundtrip is {least:g}: {_beginning(text)} becomes {_beginning(decoded)}: choose a "
            "tokenizer that loses nothing (byte-level BPE), or accept the loss with a lower --min_roundtrip"
        )


def host_round_trip(tokenizer: Any, rows: Iterable[Sequence[str]]) -> RoundTrip:
    """How many rows of texts a Hugging Face tokenizer gives back."""

    def decode(text: str) -> str:
        ids = text_ids(tokenizer, [text])[0]
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    trip = RoundTrip()
    for texts in rows:
        trip.add(texts, decode)
    return trip


def check_round_trip(
    tokenizer: Any, rows: Iterable[Sequence[str]], least: float, place: str, say: Callable[[str], None]
) -> None:
    """Says how many rows of texts a Hugging Face tokenizer loses.

    Args:
        tokenizer: whose.
        rows: the texts; empty ones count as kept.
        least: share of the rows that it must give back.
        place: what names the tokenizer, for messages.
        say: shows a line to the user.

    Raises:
        ValueError: it gives back fewer.
    """
    trip = host_round_trip(tokenizer, rows)
    lossy = trip.problem(least)
    if lossy:
        raise ValueError(f"{place}: {lossy}")
    if trip.share < 1:
        say(f"WARNING: {place}: {trip.shown()}")


def _beginning(text: str) -> str:
    """The first characters of a text, quoted, on one line."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
