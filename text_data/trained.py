"""Which documents a prepared folder trains on: hashes in its meta.json, so that nobody evaluates on them unawares."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from text_data.documents import key_of

META_KEY = "train_keys"
KEPT_BYTES = 6  # of a document's key: among a million documents, one question in 280 million is taken for another
MOST = 1_000_000  # documents that are recorded, 8 MB of meta.json


class TrainedOn:
    """The documents that a prepared folder trains on; `in` asks for a text (of a question: for the prompt).

    A text counts as the same whatever its case and its white space (`key_of`).
    """

    def __init__(self, keys: Iterable[int]):
        kept = {_kept(key) for key in keys}
        self._keys = frozenset(kept)

    def __contains__(self, text: str) -> bool:
        return _kept(key_of(text)) in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def __or__(self, other: TrainedOn) -> TrainedOn:
        """The documents of both."""
        union = TrainedOn(())
        union._keys = self._keys | other._keys
        return union

    def record(self) -> str | None:
        """What meta.json keeps; None where there are more than MOST."""
        if len(self) > MOST:
            return None
        numbers = np.array(sorted(self._keys), dtype=">u8")
        rows = numbers.view(np.uint8).reshape(-1, 8)[:, 8 - KEPT_BYTES :]
        return base64.b64encode(rows.tobytes()).decode()


def _kept(key: int) -> int:
    """The part of a document's 64-bit key that is recorded."""
    return key >> (64 - 8 * KEPT_BYTES)


def trained_on(meta: Mapping[str, Any]) -> TrainedOn | None:
    """The documents that a folder's meta.json records; None where it records none: too many, or an older folder.

    Raises:
        ValueError: the record is damaged.
    """
    text = meta.get(META_KEY)
    if text is None:
        return None
    try:
        content = base64.b64decode(text, validate=True)
        rows = np.frombuffer(content, np.uint8).reshape(-1, KEPT_BYTES)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"{META_KEY} of meta.json is damaged: prepare the folder again") from error

    wide = np.zeros((len(rows), 8), np.uint8)
    wide[:, 8 - KEPT_BYTES :] = rows
    record = TrainedOn(())
    record._keys = frozenset(wide.reshape(-1).view(">u8").tolist())
    return record
