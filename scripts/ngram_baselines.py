"""Perplexities that any language model must beat: an add-one unigram, and a bigram interpolated with it.

    python scripts/ngram_baselines.py prepared/mix
    python scripts/ngram_baselines.py --train corpus/ --val held_out.txt --tokenizer prepared/mix/tokenizer.json

Both are counted on the training data; the perplexities are those of the validation data. Of a prepared folder they are
taken over the decoder's labels, which is what the hybrid's validation loss is taken over too; of text files (.txt,
.jsonl, .parquet) over every token of a text or an answer but its first.

A row is `[preceding token, label, label, ...]`: every token but the first is predicted, the bigram from the token
before it. V is the size of the vocabulary.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.batches import IGNORE  # noqa: E402
from engine.files import JsonLineError, json_lines, read_json  # noqa: E402
from script_tools import ScriptParser, run_script  # noqa: E402
from text_data.documents import ALL_SPLITS, Splits, read_documents, source_files  # noqa: E402
from text_data.tokenizer import read_tokenizer, vocabulary_size  # noqa: E402

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FOLD = 10  # one in ten rows of the training data fits the interpolation weight
MOST_WEIGHT = 0.999  # of the bigram: some mass always stays with the unigram, which knows every token


# --- the two models ---------------------------------------------------------------------------------------------------


class InterpolatedBigram:
    """P(w | v) = weight * count(v, w) / count(v) + (1 - weight) * P1(w), with P1(w) = (count(w) + 1) / (N + V).

    After a token v that training never saw in front of another, P(w | v) = P1(w). Counts come from `pairs`
    (tokens, 2) of (preceding, label).
    """

    def __init__(self, pairs: np.ndarray, vocab_size: int, weight: float = 0.5):
        self.vocab_size = vocab_size
        self.weight = weight
        counts = np.bincount(pairs[:, 1], minlength=vocab_size)
        self.unigram = (counts + 1) / (len(pairs) + vocab_size)  # (V,)
        self._before = np.bincount(pairs[:, 0], minlength=vocab_size)
        self._keys, self._counts = np.unique(self._key(pairs), return_counts=True)

    def _key(self, pairs: np.ndarray) -> np.ndarray:
        """(tokens,) one number for each pair."""
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
        unigram = self.unigram[pairs[:, 1]]
        bigram = self.maximum_likelihood(pairs)
        return np.where(np.isnan(bigram), unigram, self.weight * bigram + (1 - self.weight) * unigram)


def fit_weight(bigram: np.ndarray, unigram: np.ndarray, halvings: int = 40) -> float:
    """The weight from 0 to MOST_WEIGHT that maximises the likelihood of held-out tokens (Jelinek and Mercer, 1980).

    `bigram` and `unigram` (tokens,) are the two probabilities of each; tokens without a bigram (NaN) say nothing, and
    one half is returned where all are such. The log-likelihood is concave, so its slope is bisected.
    """
    seen = ~np.isnan(bigram)
    bigram = bigram[seen]
    unigram = unigram[seen]
    if not len(bigram):
        return 0.5

    def slope(weight: float) -> float:
        return float(((bigram - unigram) / (weight * bigram + (1 - weight) * unigram)).sum())

    # The maximum may lie at an end.
    low = 0.0
    high = MOST_WEIGHT
    if slope(low) <= 0:
        return low
    if slope(high) >= 0:
        return high

    for _ in range(halvings):
        middle = (low + high) / 2
        if slope(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _pairs(rows: Iterable[Sequence[int]], vocab_size: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(pairs (tokens, 2) of (preceding, label), row of each (tokens,)) of the data called `name`. Raises ValueError."""
    arrays = [np.asarray(row, dtype=np.int64) for row in rows]
    arrays = [row for row in arrays if len(row) > 1]
    if not arrays:
        raise ValueError(f"the {name} data hold no token to predict: rows are [preceding token, labels ...]")

    pairs = np.concatenate([np.stack([row[:-1], row[1:]], axis=1) for row in arrays])
    low = int(pairs.min())
    high = int(pairs.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"the {name} data hold token {low if low < 0 else high}, expected 0 to {vocab_size - 1}")

    numbers = np.repeat(np.arange(len(arrays)), [len(row) - 1 for row in arrays])
    return pairs, numbers


def unigram_bigram_baselines(
    train_ids: Iterable[Sequence[int]], val_ids: Iterable[Sequence[int]], vocab_size: int
) -> dict[str, float]:
    """Perplexities on `val_ids` of both models counted on `train_ids`; rows as the module says.

    The weight is fitted on every tenth training row (every tenth token where there are fewer than ten rows) with
    counts from the others; then everything is counted. Validation tokens fit nothing.

    Returns:
        unigram_perplexity, bigram_perplexity, bigram_weight, train_tokens, val_tokens.

    Raises:
        ValueError: no tokens, or a token outside the vocabulary.
    """
    train, row = _pairs(train_ids, vocab_size, "training")
    val, _ = _pairs(val_ids, vocab_size, "validation")

    # The weight, from a tenth of the training data.
    unit = row if row[-1] >= FOLD - 1 else np.arange(len(train))
    fold = unit % FOLD == FOLD - 1
    part = InterpolatedBigram(train[~fold], vocab_size)
    weight = fit_weight(part.maximum_likelihood(train[fold]), part.unigram[train[fold, 1]])

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
    try:
        for number, example in json_lines(path):
            try:
                yield from label_rows(example["decoder_input_ids"], example["labels"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(_line_problem(path, number, str(error))) from error
    except JsonLineError as error:
        raise ValueError(_line_problem(path, error.number, error.reason)) from error


def _line_problem(path: Path, number: int, error: str) -> str:
    return (
        f"{path}, line {number}: expected decoder_input_ids and labels, lists of token ids of one length "
        f"({error}); prepare the data anew"
    )


def baseline_perplexities(folder: Path | str, vocab_size: int | None = None) -> dict[str, float]:
    """`unigram_bigram_baselines` of the prepared data in `folder`: train.jsonl, val.jsonl and, where no `vocab_size`
    is given, that of meta.json.

    Raises:
        ValueError: a file is missing or broken.
    """
    train, val, meta = (Path(folder) / name for name in ("train.jsonl", "val.jsonl", "meta.json"))
    needed = [train, val] if vocab_size is not None else [train, val, meta]
    missing = [str(path) for path in needed if not path.is_file()]
    if missing:
        raise ValueError(f"no file {', '.join(missing)}: give a folder with prepared data")

    if vocab_size is None:
        try:
            vocab_size = int(read_json(meta)["vocab_size"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{meta} tells no vocab_size ({error}): prepare the data anew") from error
    return unigram_bigram_baselines(read_label_rows(train), read_label_rows(val), vocab_size)


# --- text files -------------------------------------------------------------------------------------------------------


def text_rows(source: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The token ids of each text or answer in a folder or file of text; its first token is not predicted.

    A long text comes in pieces: the row of a later piece begins with the last token of the one before.

    Raises:
        ValueError: a file that cannot be read.
    """
    before: list[int] = []
    for document in read_documents(source_files(source), Splits(ALL_SPLITS)):
        row = before + tokenizer.encode(document.text, add_special_tokens=False).ids
        yield row
        before = [] if document.ends else row[-1:]


def text_perplexities(train: Path, val: Path, tokenizer_file: Path) -> dict[str, float]:
    """`unigram_bigram_baselines` of the texts in two folders or files, cut by the tokenizer of a tokenizer.json.

    Raises:
        ValueError, OSError: a file is missing or broken.
    """
    tokenizer = read_tokenizer(tokenizer_file, "--tokenizer")
    rows = [text_rows(source, tokenizer) for source in (train, val)]
    return unigram_bigram_baselines(*rows, vocabulary_size(tokenizer))


# --- the command ------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises ValueError: neither a folder nor all that text files need, or both."""
    parser = ScriptParser(__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="a prepared folder")
    parser.add_argument("--train", type=Path, help="text to count on: a folder or a file")
    parser.add_argument("--val", type=Path, help="text to predict: a folder or a file")
    parser.add_argument("--tokenizer", type=Path, help="the tokenizer.json that cuts both into tokens")
    options = parser.parse_args(argv)

    given = [options.train, options.val, options.tokenizer]
    if options.folder and any(given):
        raise ValueError(f"{options.folder} is a prepared folder, which needs no --train, --val or --tokenizer: give "
                         "the folder or the three")
    if not options.folder and not all(given):
        raise ValueError("nothing to measure: give a prepared folder, or --train, --val and --tokenizer")
    return options


def main(argv: list[str] | None = None) -> int:
    """Prints both perplexities. Raises ValueError, OSError."""
    options = parse(argv)
    if options.folder:
        values = baseline_perplexities(options.folder)
    else:
        values = text_perplexities(options.train, options.val, options.tokenizer)

    print(f"counted on {values['train_tokens']} tokens, measured on {values['val_tokens']}")
    print(f"unigram, add-one        perplexity {values['unigram_perplexity']:10.2f}")
    print(f"bigram, interpolated    perplexity {values['bigram_perplexity']:10.2f}  "
          f"(weight {values['bigram_weight']:.3f}, unigram {1 - values['bigram_weight']:.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
