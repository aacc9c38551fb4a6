"""Prepared data: JSON lines of token triples on disk, read by line number in flat memory, drawn as resumable batches.

A prepared folder holds `train.jsonl`, `val.jsonl`, `meta.json` and `tokenizer.json` (docs/data.md). Each line is one
triple: what the encoder reads, what the decoder reads (bos first) and what it must say. Shapes: B batch, E encoder
tokens, T decoder tokens. The synthetic task at the end needs no folder.
"""

from __future__ import annotations

import json
import os
import random
import string
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.batches import IGNORE

SPLITS = ("train", "val")
COUNTS = ("vocab_size", "pad_id", "bos_id", "eos_id", "max_seq_len")
ANCHOR_BITS = 12  # one index entry per 4 KiB of file: 16 bytes of memory each, and at most 4 KiB read in excess


class Triple(NamedTuple):
    """One example; `decoder_input_ids` and `labels` have equal lengths, labels[i] is what follows decoder input i."""

    encoder_ids: list[int]
    decoder_input_ids: list[int]
    labels: list[int]


def _integers(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and set(map(type, value)) == {int}


def line_problem(row: Any, vocab_size: int) -> str | None:
    """What is wrong with one parsed line as a triple, or None."""
    if not isinstance(row, dict):
        return f"expected an object, got {type(row).__name__}"
    missing = [key for key in Triple._fields if key not in row]
    if missing:
        return f"has no {', '.join(missing)}"
    for key in Triple._fields:
        if not _integers(row[key]):
            return f"{key} must be a list of at least one integer"
        low, high = min(row[key]), max(row[key])
        if key == "labels" and low == IGNORE:
            low = min((label for label in row[key] if label != IGNORE), default=None)
            if low is None:
                return f"every label is {IGNORE}, so nothing is learned from it"
        if low < 0 or high >= vocab_size:
            return f"{key} holds {low if low < 0 else high}, expected ids from 0 to {vocab_size - 1}"
    read, said = row["decoder_input_ids"], row["labels"]
    if len(read) != len(said):
        return f"{len(read)} decoder_input_ids and {len(said)} labels, expected equally many"
    if read[1:] != said[:-1]:
        pairs = zip(read[1:], said, strict=False)
        place = next((i for i, (seen, label) in enumerate(pairs) if label not in (IGNORE, seen)), None)
        if place is not None:
            return f"labels[{place}] is {said[place]}, but decoder_input_ids[{place + 1}] is {read[place + 1]}"
    return None


def parse_line(line: bytes, vocab_size: int) -> Triple:
    """Raises ValueError with what is wrong; the caller knows the file and the line number."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # undecodable bytes raise UnicodeDecodeError, which is one
        raise ValueError(f"not JSON ({error})" if line.strip() else "an empty line") from error
    problem = line_problem(row, vocab_size)
    if problem:
        raise ValueError(problem)
    return Triple(*(row[key] for key in Triple._fields))


def read_meta(folder: Path | str) -> dict[str, Any]:
    """The checked `meta.json` of a prepared folder.

    Raises:
        ValueError: it is missing or broken; one line, with every problem in it.
    """
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no meta.json, so it is no (finished) prepared folder: "
                         "make one with scripts/prepare_language_dataset.py") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): prepare the folder again") from error
    problems = [] if isinstance(meta, dict) else [f"holds a {type(meta).__name__}, expected an object"]
    if not problems:
        least = {"vocab_size": 1, "max_seq_len": 1}
        problems = [f"{key} is {meta.get(key)!r}, expected a whole number of at least {least.get(key, 0)}"
                    for key in COUNTS if type(meta.get(key)) is not int or meta[key] < least.get(key, 0)]
        if not problems:
            problems = [f"{key} {meta[key]} is not below vocab_size {meta['vocab_size']}"
                        for key in ("pad_id", "bos_id", "eos_id") if meta[key] >= meta["vocab_size"]]
        if not isinstance(meta.get("tokenizer_sha256"), str):
            problems.append("tokenizer_sha256 is missing")
        splits = meta.get("splits")
        for split in SPLITS:
            entry = splits.get(split) if isinstance(splits, dict) else None
            if not isinstance(entry, dict) or type(entry.get("samples")) is not int:
                problems.append(f"splits.{split}.samples is missing")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}: prepare the folder again")
    return meta


class LineIndex:
    """The lines of a file by number, from a sparse index: memory is 0.4 % of the file, whatever the lines' lengths.

    Only newline ends a line; a last line without one counts. Safe to read from several threads.

    Raises:
        ValueError: the file cannot be read.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        try:
            self._file = open(self.path, "rb", buffering=0)
            self._lines, self._offsets, self._count = self._scan()
        except OSError as error:
            raise ValueError(f"cannot read {self.path}: {error.strerror or error}") from error

    def _scan(self, chunk: int = 1 << 22) -> tuple[np.ndarray, np.ndarray, int]:
        """(number of each anchor's line, its byte offset with the file's size at the end, lines in all)."""
        lines, offsets, count, position, block = [], [], 0, 0, -1
        carry = np.zeros(1, dtype=np.int64)  # the line start that the part before left over: first of all, 0
        while data := self._file.read(chunk):
            starts = np.concatenate([carry, np.flatnonzero(np.frombuffer(data, np.uint8) == 10) + (position + 1)])
            position += len(data)
            carry = starts[starts == position]
            starts = starts[starts < position]
            blocks, first = np.unique(starts >> ANCHOR_BITS, return_index=True)
            if len(blocks) and blocks[0] == block:
                blocks, first = blocks[1:], first[1:]
            lines.append(first + count)
            offsets.append(starts[first])
            count, block = count + len(starts), blocks[-1] if len(blocks) else block
        offsets.append(np.array([position], dtype=np.int64))
        return np.concatenate([np.zeros(0, np.int64), *lines]), np.concatenate(offsets), count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> bytes:
        """Line `number`, counted from 0, without its line break."""
        if not 0 <= number < self._count:
            raise IndexError(f"line {number} of {self._count} lines")
        anchor = int(np.searchsorted(self._lines, number, side="right")) - 1
        start, end = int(self._offsets[anchor]), int(self._offsets[anchor + 1])
        skipped = number - int(self._lines[anchor])
        return os.pread(self._file.fileno(), end - start, start).split(b"\n", skipped + 1)[skipped]


class PreparedData:
    """One split of a prepared folder: `data[i]` reads and checks line i from disk; nothing but a sparse index stays.

    A triple longer than `max_seq_len` (0: no limit) keeps the END of its encoder side, which is the nearest context,
    and the BEGINNING of its decoder side. With `on_bad_line="skip"` the next good line takes a bad one's place, so
    that every rank draws the same order without having read the others' lines; `skipped` counts the bad lines met.

    Raises:
        ValueError: a broken folder, an empty split; on reading with `on_bad_line="error"`, a bad line (file and line
            number are named); with `"skip"`, a split without one good line.
    """

    def __init__(self, folder: Path | str, split: str, max_seq_len: int = 0, on_bad_line: str = "error"):
        if on_bad_line not in ("error", "skip"):
            raise ValueError(f"on_bad_line is {on_bad_line!r}, expected error or skip")
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected {' or '.join(SPLITS)}")
        if max_seq_len < 0:
            raise ValueError(f"max_seq_len is {max_seq_len}, expected at least 1, or 0 for no limit")
        self.meta = read_meta(folder)
        self.path, self.max_seq_len, self.on_bad_line = Path(folder) / f"{split}.jsonl", max_seq_len, on_bad_line
        self._index = LineIndex(self.path)
        self._bad: set[int] = set()
        if not len(self._index):
            raise ValueError(f"{self.path} is empty: prepare the folder again with more documents or another ratio")

    def __len__(self) -> int:
        return len(self._index)

    @property
    def skipped(self) -> int:
        """Bad lines met so far."""
        return len(self._bad)

    def __getitem__(self, number: int) -> Triple:
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"item {number} of {len(self)} items")
        for step in range(len(self)):
            place = (number + step) % len(self)
            triple = self.line(place)
            if triple is not None:
                return triple
        raise ValueError(f"{self.path} has no good line; see them with: python scripts/validate_dataset.py "
                         f"{self.path.parent}")

    def __iter__(self) -> Iterator[Triple]:
        """The good triples in file order, each once."""
        triples = (self.line(place) for place in range(len(self)))
        return (triple for triple in triples if triple is not None)

    def line(self, place: int) -> Triple | None:
        """The triple of line `place` itself; None where it is bad and bad lines are skipped."""
        try:
            triple = parse_line(self._index[place], self.meta["vocab_size"])
        except ValueError as error:
            if self.on_bad_line == "error":
                raise ValueError(f"{self.path} line {place + 1}: {error}; see all bad lines with: python "
                                 f"scripts/validate_dataset.py {self.path.parent}") from error
            self._bad.add(place)
            return None
        limit = self.max_seq_len or None
        return Triple(triple.encoder_ids[-limit:] if limit else triple.encoder_ids,
                      triple.decoder_input_ids[:limit], triple.labels[:limit])


# --- batches ----------------------------------------------------------------------------------------------------------


def pad_batch(triples: Sequence[Triple], pad_id: int) -> dict[str, Tensor]:
    """Right-padded int64 tensors: encoder_ids, encoder_mask (B, E); decoder_input_ids, labels, decoder_mask (B, T).

    Masks are 1 at tokens and 0 at pads; labels are IGNORE (-100) at pads.
    """
    sides = [*zip(*triples, strict=True)]
    encoder, encoder_mask = _pad(sides[0], pad_id)
    decoder, decoder_mask = _pad(sides[1], pad_id)
    labels, _ = _pad(sides[2], IGNORE)
    return {"encoder_ids": encoder, "decoder_input_ids": decoder, "labels": labels,
            "encoder_mask": encoder_mask, "decoder_mask": decoder_mask}


def _pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    ids = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


class PreparedBatches:
    """Endless batches of `size` triples per rank, from a PreparedData or a list of Triples, reshuffled every epoch.

    The order is a function of `seed` and the epoch alone. Epochs are joined end to end, so every batch is full. Every
    rank draws the same order and takes its share. With `bucket` > 1, that many batches are drawn together, sorted by
    length, cut and put in random order, so that little is spent on padding. `workers` threads read ahead without
    changing the order. Resuming from `state_dict()` gives exactly the batches an uninterrupted run would see.

    Raises:
        ValueError: no data, sizes out of range; from `next`, what reading raises.
    """

    def __init__(self, data: PreparedData | Sequence[Triple], size: int, seed: int, pad_id: int, rank: int = 0,
                 world: int = 1, workers: int = 0, bucket: int = 1):
        problems = [f"{name} is {value}, expected at least {least}" for name, value, least in
                    (("size", size, 1), ("world", world, 1), ("bucket", bucket, 1), ("workers", workers, 0),
                     ("seed", seed, 0), ("rank", rank, 0)) if value < least]
        problems += [f"rank {rank} is not below world {world}"] if rank >= world >= 1 else []
        problems += [] if len(data) else ["there is no data"]
        if problems:
            raise ValueError("; ".join(problems))
        self.data, self.size, self.seed, self.pad_id = data, size, seed, pad_id
        self.rank, self.world, self.workers, self.bucket = rank, world, workers, bucket
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="prepared") if workers else None
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.uint32))
        self._ahead: deque[Future[list[dict[str, Tensor]]]] = deque()
        self._given = 0
        self._rewind()

    def _rewind(self) -> None:
        while self._ahead:
            self._ahead.popleft().cancel()
        self._planned = self._given // self.bucket  # the next window to draw
        self._window: list[dict[str, Tensor]] = []

    @property
    def epoch(self) -> int:
        """Whole passes over the data, by all ranks together, in the batches handed out."""
        return self._given * self.size * self.world // len(self.data)

    def state_dict(self) -> dict[str, int]:
        """The position; JSON-able. The same on every rank."""
        return {"given": self._given, "seed": self.seed, "size": self.size, "world": self.world,
                "bucket": self.bucket, "length": len(self.data)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises ValueError if the state belongs to other data or to batches of another shape."""
        ours = self.state_dict()
        changed = [f"{key} was {state.get(key)} and is {ours[key]}" for key in ours
                   if key != "given" and state.get(key) != ours[key]]
        if changed:
            raise ValueError(f"the saved position belongs to other batches ({', '.join(changed)}): "
                             "resume with the same data and options")
        self._given = int(state["given"])
        self._rewind()

    def __iter__(self) -> PreparedBatches:
        return self

    def __next__(self) -> dict[str, Tensor]:
        if not self._window:
            self._window = self._next_window()
            self._window = self._window[self._given % self.bucket:]  # resumed inside a window
        batch = self._window.pop(0)
        self._given += 1
        return batch

    def _next_window(self) -> list[dict[str, Tensor]]:
        if self._pool is None:
            self._planned += 1
            return self._load(self._planned - 1, self._indices(self._planned - 1))
        while len(self._ahead) <= self.workers:
            indices = self._indices(self._planned)  # planned here, in order; only reading goes to the threads
            self._ahead.append(self._pool.submit(self._load, self._planned, indices))
            self._planned += 1
        return self._ahead.popleft().result()

    def _indices(self, window: int) -> list[int]:
        """The items of window `window`: the next bucket * size * world of all epochs joined end to end."""
        count = self.bucket * self.size * self.world
        found: list[int] = []
        while len(found) < count:
            epoch, place = divmod(window * count + len(found), len(self.data))
            if self._order[0] != epoch:
                order = np.arange(len(self.data), dtype=np.uint32)
                np.random.default_rng([self.seed, 0, epoch]).shuffle(order)
                self._order = (epoch, order)
            found += self._order[1][place: place + count - len(found)].tolist()
        return found

    def _load(self, window: int, indices: list[int]) -> list[dict[str, Tensor]]:
        """This rank's padded batches of one window."""
        if self.bucket == 1:
            return [pad_batch([self.data[i] for i in indices[self.rank:: self.world]], self.pad_id)]
        triples = sorted((self.data[i] for i in indices), key=lambda triple: len(triple[0]) + len(triple[1]))
        step = self.size * self.world
        parts = [triples[start: start + step][self.rank:: self.world] for start in range(0, len(triples), step)]
        order = np.random.default_rng([self.seed, 1, window]).permutation(len(parts))
        return [pad_batch(parts[number], self.pad_id) for number in order]


# --- the synthetic task -----------------------------------------------------------------------------------------------


class SimpleTokenizer:
    """Character-level tokenizer; `tokenizer` is the real `tokenizers.Tokenizer` behind it.

    `PreTrainedTokenizerFast(tokenizer_file=...)` of a saved file gives the same ids. A character outside `characters`
    (printable ASCII unless told) becomes the unknown token.
    """

    SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>")

    def __init__(self, characters: str = string.printable):
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

        vocabulary = {token: number for number, token in enumerate([*self.SPECIAL, *dict.fromkeys(characters)])}
        self.tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=self.SPECIAL[3]))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        self.tokenizer.decoder = decoders.Fuse()
        self.tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                           for token in self.SPECIAL])
        self.pad_id, self.bos_id, self.eos_id, self.unk_id = range(4)
        self.vocab_size = len(vocabulary)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def save(self, path: Path | str) -> None:
        self.tokenizer.save(str(path))


def held_out(a: int, b: int) -> bool:
    """Whether the UNORDERED pair {a, b} belongs to the held-out split: about one in ten, fixed for good."""
    return zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % 10 == 0


def synthetic_questions(n: int, seed: int = 0, split: str = "train") -> list[tuple[str, str]]:
    """`n` (prompt, answer) pairs of the addition task; every pair of numbers once before any comes again.

    Raises:
        ValueError: unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected {' or '.join(SPLITS)}")
    pairs = [(a, b) for a in range(100) for b in range(100) if held_out(a, b) == (split == "val")]
    draw, chosen = random.Random(f"{seed}/{split}"), []
    while len(chosen) < n:
        draw.shuffle(pairs)
        chosen += pairs[: n - len(chosen)]
    return [(f"What is {a} + {b}?", str(a + b)) for a, b in chosen]


def build_synthetic_dataset(n: int, seed: int = 0, split: str = "train",
                            tokenizer: SimpleTokenizer | None = None) -> list[Triple]:
    """`n` triples of two-number addition (0 to 99): `What is 12 + 7?` to the encoder, `19` to the decoder.

    Neither order of a pair held out for `val` ever stands in `train`.
    """
    tokenizer = tokenizer or SimpleTokenizer()
    triples = []
    for prompt, answer in synthetic_questions(n, seed, split):
        target = tokenizer.encode(answer)
        triples.append(Triple(tokenizer.encode(prompt), [tokenizer.bos_id, *target], [*target, tokenizer.eos_id]))
    return triples
