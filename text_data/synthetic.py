"""The synthetic task: sums of two numbers from 0 to 99, and a tokenizer of single characters. It needs no folder."""

from __future__ import annotations

import itertools
import random
import string
import zlib
from collections.abc import Sequence
from pathlib import Path

from text_data.triples import SPLITS, Triple

NUMBERS = 100  # the terms of a sum are 0 to 99


class SimpleTokenizer:
    """A tokenizer with one token for each character; `tokenizer` is the `tokenizers.Tokenizer` behind it.

    `PreTrainedTokenizerFast(tokenizer_file=...)` of a saved file gives the same ids; it must be asked with
    `split_special_tokens=True`, so that the names of special tokens are text. A character that is not in `characters`
    (default: printable ASCII) becomes the unknown token.
    """

    SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>")

    def __init__(self, characters: str = string.printable):
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

        # Ids: the special tokens first, then each distinct character in the order given.
        tokens = [*self.SPECIAL, *dict.fromkeys(characters)]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        self.pad_id, self.bos_id, self.eos_id, self.unk_id = range(len(self.SPECIAL))
        self.vocab_size = len(vocabulary)

        # Every character is a word, and words are joined without a space.
        self.tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=self.SPECIAL[3]))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        self.tokenizer.decoder = decoders.Fuse()
        added = [AddedToken(token, special=True, normalized=False) for token in self.SPECIAL]
        self.tokenizer.add_special_tokens(added)
        self.tokenizer.encode_special_tokens = True  # in a text their names are text

    def encode(self, text: str) -> list[int]:
        """The ids of a text, no special tokens added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def save(self, path: Path | str) -> None:
        """Writes the tokenizer.json that `tokenizers` and transformers read."""
        self.tokenizer.save(str(path))


def is_held_out(a: int, b: int) -> bool:
    """True if the sums a + b and b + a belong to the split `val`: about one unordered pair in ten, the same ever."""
    return zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % 10 == 0


def synthetic_questions(n: int, seed: int = 0, split: str = "train") -> list[tuple[str, str]]:
    """`n` (prompt, answer) pairs, such as ("What is 12 + 7?", "19").

    Every pair of numbers of the split comes once before any comes again. Neither order of a pair of `val` ever stands
    in `train`.

    Raises:
        ValueError: unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected {' or '.join(SPLITS)}")

    every_pair = itertools.product(range(NUMBERS), repeat=2)
    pairs = [(a, b) for a, b in every_pair if is_held_out(a, b) == (split == "val")]

    # Each round takes all pairs in a new order; the last round is cut.
    draw = random.Random(f"{seed}/{split}")
    chosen: list[tuple[int, int]] = []
    while len(chosen) < n:
        draw.shuffle(pairs)
        chosen += pairs[: n - len(chosen)]
    return [(f"What is {a} + {b}?", str(a + b)) for a, b in chosen]


def build_synthetic_dataset(
    n: int, seed: int = 0, split: str = "train", tokenizer: SimpleTokenizer | None = None
) -> list[Triple]:
    """The triples of `synthetic_questions`: the encoder reads the prompt, the decoder says the answer and ends.

    Raises:
        ValueError: unknown split.
    """
    tokenizer = tokenizer or SimpleTokenizer()
    triples = []
    for prompt, answer in synthetic_questions(n, seed, split):
        target = tokenizer.encode(answer)
        triples.append(Triple(tokenizer.encode(prompt), [tokenizer.bos_id, *target], [*target, tokenizer.eos_id]))
    return triples
