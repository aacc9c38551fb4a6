"""The tokenizer of prepared data: train one, load one, find its special tokens, count the bytes its ids stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from engine.files import read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = {"pad": "<|pad|>", "bos": "<|bos|>", "eos": "<|eos|>"}
# The usual names of each special token; of a foreign tokenizer's tokens, the first of these that it has is taken.
USUAL_NAMES = {
    "pad": (SPECIAL["pad"], "<pad>", "[PAD]"),
    "bos": (SPECIAL["bos"], "<s>", "<bos>", "[BOS]", "[CLS]"),
    "eos": (SPECIAL["eos"], "</s>", "<eos>", "<|endoftext|>", "[EOS]", "[SEP]"),
}
LEAST_VOCABULARY = len(SPECIAL) + 256  # the special tokens and every byte


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE, which gives any text back exactly, with at most `vocab_size` tokens.

    Every digit is a token of its own. The ids of pad, bos and eos are 0, 1 and 2.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()

    # The alphabet is all 256 bytes, so that no text is unknown.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def parse_tokenizer(text: str, place: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json's text, which neither cuts nor pads and reads `<|eos|>` in a text as text.

    Everything opens a tokenizer.json here, so that a model is asked in the tokens that its data were prepared in.

    Raises:
        ValueError: it is none; `place` says where it comes from.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception
        raise ValueError(f"{place} is no tokenizer.json: {' '.join(str(error).split())}") from error
    read_whole(tokenizer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def read_tokenizer(path: Path, flag: str = "") -> Tokenizer:
    """`parse_tokenizer` of a file. Raises ValueError: it cannot be read; `flag` stands before its path."""
    place = f"{flag} {path}".lstrip()
    try:
        text = read_text(path)
    except ValueError as error:
        raise ValueError(f"{flag} {error}".lstrip()) from error
    return parse_tokenizer(text, place)


def read_whole(tokenizer: Tokenizer) -> None:
    """Takes out what a tokenizer.json may carry from its use elsewhere: a length to cut to, and padding."""
    tokenizer.no_truncation()
    tokenizer.no_padding()


def special_ids(tokenizer: Tokenizer, place: str, wanted: Mapping[str, str | None]) -> dict[str, int]:
    """{"pad": id, "bos": id, "eos": id} of a tokenizer.

    Args:
        tokenizer: whose tokens.
        place: where it comes from, for messages.
        wanted: role -> its token; None or no entry: the first token with a usual name.

    Raises:
        ValueError: one line for each token that is missing.
    """
    ids = {}
    problems = []
    for role, usual in USUAL_NAMES.items():
        names = (wanted[role],) if wanted.get(role) else usual
        numbers = [number for number in map(tokenizer.token_to_id, names) if number is not None]
        if numbers:
            ids[role] = numbers[0]
        else:
            problems.append(f"{place} has no token {' or '.join(names)}: name its {role} token with --{role}_token")
    if problems:
        raise ValueError("\n".join(problems))
    return ids


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id, which counts where a vocabulary has holes."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def byte_counter(tokenizer: Tokenizer) -> Callable[[list[int]], int]:
    """A function of ids: UTF-8 bytes of the text they stand for; exact for byte-level BPE, even amid a character."""
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    if decoder.get("type") != "ByteLevel":

        def count_decoded(ids: list[int]) -> int:
            return len(tokenizer.decode(ids, skip_special_tokens=False).encode())

        return count_decoded

    # Byte-level BPE writes each byte as one character, except in tokens added later, which are plain text.
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    lengths = [0] * vocabulary_size(tokenizer)
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        lengths[number] = len(token.encode()) if token in added else len(token)

    def count_bytes(ids: list[int]) -> int:
        return sum(map(lengths.__getitem__, ids))

    return count_bytes
