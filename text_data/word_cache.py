"""Encodes texts several times faster where a tokenizer reads every word alone: a word that came before is looked up.

Byte-level BPE splits a text into words by a pattern without memory and encodes each by itself. A single space between
two visible ASCII characters is always the beginning of a new word. So texts are cut there, and only parts that are not
in the cache are encoded. The ids are those of the tokenizer.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = re.compile("(?<=[!-~]) (?=[!-~])")
MOST_WORDS = 1 << 16  # of which a cache, then the one before it goes; both together take about 40 MB
MOST_CHARS = 40  # of a word that is kept: longer ones rarely come again


def reads_words_alone(tokenizer: Tokenizer) -> bool:
    """Whether the ids of a text are those of its parts between single spaces, each with the space in front of it."""
    facts = json.loads(tokenizer.to_str())
    model = facts["model"]
    if model["type"] != "BPE" or model.get("dropout") or facts["normalizer"] is not None:
        return False

    # An added token may hold a space. Those that are special are text here, like any other.
    added = tokenizer.get_added_tokens_decoder().values()
    if not tokenizer.encode_special_tokens or not all(token.special for token in added):
        return False

    steps: list[dict[str, Any]] = [facts["pre_tokenizer"] or {}]
    if steps[0].get("type") == "Sequence":
        steps = steps[0]["pretokenizers"]
    kinds = [step.get("type") for step in steps]
    byte_level = steps[-1]
    if kinds not in (["ByteLevel"], ["Digits", "ByteLevel"]):
        return False
    return bool(byte_level.get("use_regex", True)) and not byte_level["add_prefix_space"]


class WordEncoder:
    """The ids of texts, by `tokenizer.encode_batch_fast` with a cache of words where the tokenizer allows it."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.has_cache = reads_words_alone(tokenizer)
        self._young: dict[str, tuple[int, ...]] = {}
        self._old: dict[str, tuple[int, ...]] = {}  # what was young before; a word that comes again is young again

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, no special tokens added."""
        if not self.has_cache:
            return self._plain(texts)

        # Every text: its beginning, and the words behind single spaces.
        parts = [SPACE.split(text) for text in texts]
        begins = [part[0] for part in parts]
        words = [part[1:] for part in parts]

        missing = set(itertools.chain.from_iterable(words)).difference(self._young)
        again = missing.intersection(self._old)
        self._young.update((word, self._old[word]) for word in again)

        unknown = list(missing - again)
        ids = self._plain(begins + [f" {word}" for word in unknown])
        self._young.update(zip(unknown, map(tuple, ids[len(begins) :]), strict=True))

        entry = self._young.__getitem__
        joined = []
        for begin, part in zip(ids, words, strict=False):  # behind the beginnings stand the words
            joined.append(list(itertools.chain(begin, itertools.chain.from_iterable(map(entry, part)))))
        self._forget(unknown)
        return joined

    def _forget(self, new: Sequence[str]) -> None:
        """Keeps the cache within its size."""
        for word in new:
            if len(word) > MOST_CHARS:
                del self._young[word]
        if len(self._young) > MOST_WORDS:
            self._old = self._young
            self._young = {}

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
