"""Perplexities that any language model must beat: an add-one unigram, and a bigram interpolated with it.

A row is `[preceding token, label, label, ...]`: every token but the first is predicted, the bigram from the token
before it. V is the size of the vocabulary.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.batches import IGNORE  # noqa: E402
from engine.files import JsonLineError, json_lines  # noqa: E402

FOLD = 10  # one in ten rows of the training data fits the interpolation weight
MOST_WEIGHT = 0.999  # of the bigram: some mass always stays with the unigram, which knows every token


class InterpolatedBigram:
    """P(w | v) = weight * count(v, w) / count(v) + (1 - weight) * P1(w), with P1(w) = (count(w) + 1) / (N + V).

    After a token v that training never saw in front of another, P(w | v) = P1(w). Counts come from `pairs`
    (tokens, 2) of (preceding, label).
    """

    def __init__(self, pairs: np.ndarray, vocab_size: int, weight: float = 0.5):
        self.vocab_size, self.weight = vocab_size, weight
        counts = np.bincount(pairs[:, 1], minlength=vocab_size)
        self.unigram = (counts + 1) / (len(pairs) + vocab_size)  # (V,)
        self._before = np.bincount(pairs[:, 0], minlength=vocab_size)
        self._keys, self._counts = np.unique(self._key(pairs), return_counts=True)

    def _key(self, pairs: np.ndarray) -> np.ndarray:
        return pairs[:, 0] * self.vocab_size + pairs[:, 1]

    def maximum_likelihood(self, pairs: np.ndarray) -> np.ndarray:
        """(tokens,) count(v, w) / count(v); NaN where v was never seen."""
        keys = self._key(pairs)
        counts = np.zeros(len(pairs))
        if len(self._keys):
            places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
            counts = np.where(self._keys[places] == keys, self._counts[places], 0)
        before = self._before[pairs[:, 0]]
        return np.where(before > 0, counts / np.maximum(before, 1), np.nan)

    def probabilities(self, pairs: np.ndarray) -> np.ndarray:
        """(tokens,) P(label | preceding)."""
        unigram, bigram = self.unigram[pairs[:, 1]], self.maximum_likelihood(pairs)
        return np.where(np.isnan(bigram), unigram, self.weight * bigram + (1 - self.weight) * unigram)


def fit_weight(bigram: np.ndarray, unigram: np.ndarray, halvings: int = 40) -> float:
    """The weight from 0 to MOST_WEIGHT that maximises the likelihood of held-out tokens (Jelinek and Mercer, 1980).

    `bigram` and `unigram` (tokens,) are the two probabilities of each; tokens without a bigram (NaN) say nothing, and
    one half is returned where all are such. The log-likelihood is concave, so its slope is bisected.
    """
    known = ~np.isnan(bigram)
    bigram, unigram = bigram[known], unigram[known]
    if not len(bigram):
        return 0.5

    def slope(weight: float) -> float:
        return float(((bigram - unigram) / (weight * bigram + (1 - weight) * unigram)).sum())

    low, high = 0.0, MOST_WEIGHT
    if slope(low) <= 0 or slope(high) >= 0:
        return low if slope(low) <= 0 else high
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2


def _pairs(rows: Iterable[Sequence[int]], vocab_size: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """(pairs (tokens, 2) of (preceding, label), row of each (tokens,)). Raises ValueError."""
    arrays = [np.asarray(row, dtype=np.int64) for row in rows]
    arrays = [row for row in arrays if len(row) > 1]
    if not arrays:
        raise ValueError(f"the {what} data hold no token to predict: rows are [preceding token, labels ...]")
    pairs = np.concatenate([np.stack([row[:-1], row[1:]], axis=1) for row in arrays])
    low, high = int(pairs.min()), int(pairs.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"the {what} data hold token {low if low < 0 else high}, expected 0 to {vocab_size - 1}")
    return pairs, np.repeat(np.arange(len(arrays)), [len(row) - 1 for row in arrays])


def unigram_bigram_baselines(
    train_ids: Iterable[Sequence[int]], val_ids: Iterable[Sequence[int]], vocab_size: int
) -> dict[str, float]:
    """Perplexities on `val_ids` of both models counted on `train_ids`; rows as the module says.

    The weight is fitted on every tenth training row (every tenth token where there are fewer than ten rows) with
    counts from the others; then everything is counted. Validation tokens fit nothing.

    Raises:
        ValueError: no tokens, or a token outside the vocabulary.
    """
    train, row = _pairs(train_ids, vocab_size, "training")
    val, _ = _pairs(val_ids, vocab_size, "validation")
    unit = row if row[-1] >= FOLD - 1 else np.arange(len(train))
    held = unit % FOLD == FOLD - 1
    part = InterpolatedBigram(train[~held], vocab_size)
    weight = fit_weight(part.maximum_likelihood(train[held]), part.unigram[train[held, 1]])
    model = InterpolatedBigram(train, vocab_size, weight)
    return {
        "unigram_perplexity": math.exp(-np.log(model.unigram[val[:, 1]]).mean()),
        "bigram_perplexity": math.exp(-np.log(model.probabilities(val)).mean()),
        "bigram_weight": weight,
        "train_tokens": len(train),
        "val_tokens": len(val),
    }


# --- prepared data ----------------------------------------------------------------------------------------------------


def label_rows(decoder_input_ids: Sequence[int], labels: Sequence[int]) -> Iterator[list[int]]:
    """Rows `[preceding token, labels ...]` of one prepared example; labels that are ignored split it."""
    row: list[int] = []
    for before, label in zip(decoder_input_ids, labels, strict=True):
        if row and (label == IGNORE or row[-1] != before):
            yield row
            row = []
        if label != IGNORE:
            row = row or [before]
            row.append(label)
    if row:
        yield row


def read_label_rows(path: Path) -> Iterator[list[int]]:
    """Label rows of a prepared JSONL file. Raises ValueError naming the line that is wrong."""
    expected = "expected decoder_input_ids and labels, lists of token ids of one length"
    try:
        for number, example in json_lines(path):
            try:
                yield from label_rows(example["decoder_input_ids"], example["labels"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {expected} ({error}); prepare the data anew") from error
    except JsonLineError as error:
        reason = f"{path}, line {error.number}: {expected} ({error.__cause__})"
        raise ValueError(f"{reason}; prepare the data anew") from error


def baseline_perplexities(folder: Path | str, vocab_size: int | None = None) -> dict[str, float]:
    """`unigram_bigram_baselines` of the prepared data in `folder`: train.jsonl, val.jsonl and, where no `vocab_size`
    is given, that of meta.json.

    Raises:
        ValueError: a file is missing or broken.
    """
    names = ("train.jsonl", "val.jsonl", *(["meta.json"] if vocab_size is None else []))
    paths = [Path(folder) / name for name in names]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"no file {', '.join(missing)}: give a folder with prepared data")
    if vocab_size is None:
        try:
            vocab_size = int(json.loads(paths[2].read_text(encoding="utf-8"))["vocab_size"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{paths[2]} tells no vocab_size ({error}): prepare the data anew") from error
    train, val = (read_label_rows(path) for path in paths[:2])
    return unigram_bigram_baselines(train, val, vocab_size)
