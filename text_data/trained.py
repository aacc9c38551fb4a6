"""What a prepared folder, or a checkpoint, was trained on, as hashes, so that nobody evaluates on it unawares.

A folder keeps them in its meta.json, a checkpoint in `trained_questions.json`. That file tells apart what the run has
trained on itself and what the stages before it have: a run's evaluation items are those that no earlier stage has met.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoints import read_checkpoint
from text_data.documents import key_of

META_KEY = "train_keys"
KEPT_BYTES = 6  # of a document's key: among a million documents, one question in 280 million is taken for another
MOST = 1_000_000  # documents that are recorded, 8 MB of meta.json
TRAINED = "trained_questions.json"  # a checkpoint's file


class TrainedOn:
    """Documents that are trained on; `in` asks for a text (of a question: for the prompt).

    A text counts as the same whatever its case and its white space (`key_of`).
    """

    def __init__(self, keys: Iterable[int] = ()):
        self._keys = {_kept(key) for key in keys}

    def add(self, text: str) -> None:
        """Records one more."""
        self._keys.add(_kept(key_of(text)))

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and _kept(key_of(text)) in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def __or__(self, other: TrainedOn) -> TrainedOn:
        """The documents of both."""
        union = TrainedOn()
        union._keys = self._keys | other._keys
        return union

    def record(self) -> str | None:
        """What meta.json keeps; None where there are more than MOST."""
        return self.packed() if len(self) <= MOST else None

    def packed(self) -> str:
        """The hashes as base64, 8 characters each."""
        return _packed(np.array(sorted(self._keys), np.uint64))


class KeyRecord:
    """The keys of documents as they come by the million, as `TrainedOn` would record them: 8 bytes of memory each."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._pending = 0  # keys that may be there already
        self._is_over = False  # more than MOST: nothing is recorded

    def add(self, keys: np.ndarray) -> None:
        """Keys of more documents, (n,) uint64, in any order."""
        if self._is_over:
            return
        self._parts.append(keys >> np.uint64(64 - 8 * KEPT_BYTES))
        self._pending += len(keys)
        if self._pending > MOST:
            self._distinct()

    def _distinct(self) -> np.ndarray:
        distinct = np.unique(np.concatenate([np.zeros(0, np.uint64), *self._parts]))
        self._parts = [distinct]
        self._pending = 0
        if len(distinct) > MOST:
            self._parts = []
            self._is_over = True
        return distinct

    def record(self) -> str | None:
        """What meta.json keeps; None where there are more than MOST."""
        distinct = self._distinct()
        return None if self._is_over else _packed(distinct)


def _packed(kept: np.ndarray) -> str:
    """(n,) uint64, rising, as base64 of their last KEPT_BYTES bytes."""
    rows = kept.astype(">u8").view(np.uint8).reshape(-1, 8)[:, 8 - KEPT_BYTES :]
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
    return _read(text)


def _read(text: Any) -> TrainedOn:
    """What `TrainedOn.record` wrote. Raises ValueError."""
    try:
        content = base64.b64decode(text, validate=True)
        rows = np.frombuffer(content, np.uint8).reshape(-1, KEPT_BYTES)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"{META_KEY} of meta.json is damaged: prepare the folder again") from error

    wide = np.zeros((len(rows), 8), np.uint8)
    wide[:, 8 - KEPT_BYTES :] = rows
    record = TrainedOn()
    record._keys = set(wide.reshape(-1).view(">u8").tolist())
    return record


# --- of a checkpoint --------------------------------------------------------------------------------------------------


@dataclass
class TrainedQuestions:
    """What a run's weights were trained on; `in` asks for a question.

    earlier: by the stages before this run. Its evaluation leaves them out.
    own: by this run so far.
    is_whole: False where more is unknown: a stage kept no record, or trained on more than `MOST` questions.
    """

    earlier: TrainedOn = field(default_factory=TrainedOn)
    own: TrainedOn = field(default_factory=TrainedOn)
    is_whole: bool = True

    def __contains__(self, question: object) -> bool:
        return question in self.earlier or question in self.own

    def add(self, question: str) -> None:
        """Records that the run has trained on a question. Beyond `MOST` it only notes that the record is not whole."""
        if question in self:
            return
        if len(self.earlier) + len(self.own) >= MOST:
            self.is_whole = False
        else:
            self.own.add(question)

    def documents(self) -> dict[str, str]:
        """File name -> text of what a checkpoint keeps, 8 bytes a question."""
        record = {"earlier": self.earlier.packed(), "own": self.own.packed(), "whole": self.is_whole}
        return {TRAINED: json.dumps(record)}


def trained_by(checkpoint: Path | None, goes_on: bool) -> TrainedQuestions:
    """What a run that begins with the weights of `checkpoint` (None: with its own) must know of their training.

    Args:
        checkpoint: a checkpoint.
        goes_on: True where the run is the checkpoint's own, with the same evaluation items: these are drawn as before.
            Else all that the checkpoint was trained on counts as earlier.

    Raises:
        ValueError: a broken checkpoint.
    """
    if checkpoint is None:
        return TrainedQuestions()
    return trained_in(read_checkpoint(checkpoint, stems=[]).documents, goes_on)


def trained_in(documents: Mapping[str, str], goes_on: bool) -> TrainedQuestions:
    """As `trained_by`, of the documents of a checkpoint; nothing is known of one from before they were kept."""
    if TRAINED not in documents:
        return TrainedQuestions(is_whole=False)

    record = json.loads(documents[TRAINED])
    earlier = _read(record["earlier"])
    own = _read(record["own"])
    if goes_on:
        return TrainedQuestions(earlier, own, record["whole"])
    return TrainedQuestions(earlier | own, TrainedOn(), record["whole"])
