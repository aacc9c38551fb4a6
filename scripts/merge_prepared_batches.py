"""Mixes prepared folders into one, in exact shares, shuffled together.

    python scripts/merge_prepared_batches.py --sources prepared/text prepared/gsm8k prepared/mbpp \\
        --weights .9 .05 .05 --output prepared/mix --train_samples 20000 --val_samples 200

Every source gives its weight's share of the triples (largest remainder, so the numbers add up exactly), drawn without
repetition until it is used up; then it starts anew in another order, and the report says how often. Lines are copied as
they are. The order is a function of `--seed` and the sources alone.
"""

from __future__ import annotations

import argparse
import errno
import gc
import json
import mmap
import os
import sys
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.batches import IGNORE  # noqa: E402
from engine.files import staged  # noqa: E402
from engine.progress import Progress  # noqa: E402
from script_tools import ScriptParser, file_sha256, run_script  # noqa: E402
from text_data.order import EpochOrder  # noqa: E402
from text_data.tokenizer import byte_counter, parse_tokenizer  # noqa: E402
from text_data.trained import META_KEY, TrainedOn, trained_on  # noqa: E402
from text_data.triples import SPLITS, parse_line, read_meta  # noqa: E402

BLOCK = min(1024, os.sysconf("SC_IOV_MAX"))  # lines handed to the system in one write
FORGET = 1 << 26  # bytes after which the mapped pages of the sources are given back
FILES = ("train.jsonl", "val.jsonl", "tokenizer.json", "meta.json")
VOCABULARY_KEYS = ("vocab_size", "pad_id", "bos_id", "eos_id")  # of meta.json; equal in all sources
VAL_COUNTS = ("encoder_tokens", "decoder_tokens", "decoder_bytes")


# --- the command line -------------------------------------------------------------------------------------------------


def weight(text: str) -> Fraction:
    """A number as it is written: .05 is 1/20."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises ValueError: everything wrong with it, one line each."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--sources", type=Path, nargs="+", required=True, help="prepared folders, of one tokenizer")
    parser.add_argument("--weights", type=weight, nargs="+", required=True, help="one each; only their ratio counts")
    parser.add_argument("--output", type=Path, required=True, help="the prepared folder to write")
    parser.add_argument("--train_samples", type=int, required=True, help="triples of train.jsonl, exactly")
    parser.add_argument("--val_samples", type=int, required=True, help="triples of val.jsonl, exactly")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    problems = []
    if len(options.weights) != len(options.sources):
        problems.append(
            f"--weights has {len(options.weights)} numbers for {len(options.sources)} --sources: give one for each"
        )
    if min(options.weights) < 0 or not sum(options.weights):
        shown = " ".join(f"{float(share):g}" for share in options.weights)
        problems.append(f"--weights {shown}: none may be negative, one must be positive")
    for name, least in (("train_samples", 1), ("val_samples", 0), ("seed", 0)):
        if getattr(options, name) < least:
            problems.append(f"--{name} {getattr(options, name)} must be at least {least}")

    resolved = [source.resolve() for source in options.sources]
    for path, times in Counter(resolved).items():
        if times > 1:
            problems.append(f"--sources names {path} more than once")
    if options.output.resolve() in resolved:
        problems.append(f"--output {options.output} is one of the --sources: choose another folder")

    if problems:
        raise ValueError("\n".join(problems))
    return options


# --- the sources ------------------------------------------------------------------------------------------------------


def quotas(weights: list[Fraction], total: int) -> list[int]:
    """Whole numbers in the ratio of `weights` that add up to `total`.

    The largest remainders are rounded up; where they tie, the earlier source's.
    """
    shares = [total * share / sum(weights) for share in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def read_metas(sources: list[Path]) -> list[dict[str, Any]]:
    """The sources' metas, in their order.

    Raises:
        ValueError: every broken source, one line each; else one line for tokenizers that differ.
    """
    metas = []
    problems = []
    for source in sources:
        try:
            meta = read_meta(source)
        except ValueError as error:
            problems.append(str(error))
            continue
        metas.append(meta)
        tokenizer = source / "tokenizer.json"
        if not tokenizer.is_file():
            problems.append(f"{source} has no tokenizer.json: prepare it again")
        elif file_sha256(tokenizer) != meta["tokenizer_sha256"]:
            problems.append(f"{source}/tokenizer.json is not the one its meta.json names: prepare it again")
    if problems:
        raise ValueError("\n".join(problems))

    # All must have the first one's tokenizer.
    keys = ("tokenizer_sha256", *VOCABULARY_KEYS)
    for source, meta in zip(sources, metas, strict=True):
        differing = [key for key in keys if meta[key] != metas[0][key]]
        if differing:
            raise ValueError(
                f"{source} and {sources[0]} have different tokenizers ({', '.join(differing)}): "
                "prepare them with one --tokenizer"
            )
    return metas


def check_shares(options: argparse.Namespace, metas: list[dict[str, Any]]) -> None:
    """Raises ValueError: each source that has no triple of a split and is to give some, one line each."""
    problems = []
    for split in SPLITS:
        counts = quotas(options.weights, samples_of(options, split))
        for source, meta, count in zip(options.sources, metas, counts, strict=True):
            if count and not meta["splits"][split]["samples"]:
                problems.append(
                    f"{source} has no {split} triple, {count} are asked of it: set its weight or --{split}_samples "
                    "to 0, or prepare it with another --val_ratio"
                )
    if problems:
        raise ValueError("\n".join(problems))


def samples_of(options: argparse.Namespace, split: str) -> int:
    """The triples that the split of the output shall hold."""
    return {"train": options.train_samples, "val": options.val_samples}[split]


class ShuffledLines:
    """The lines of one file in endless reshuffled epochs; 12 bytes of memory a line.

    Raises:
        ValueError: the file is torn, or does not hold as many lines as its meta.json says.
    """

    def __init__(self, path: Path, expected: int, seed: list[int]):
        self.drawn = 0  # lines taken so far, in all epochs

        # A mapped file: lines are handed on without a copy in between.
        with open(path, "rb", buffering=1 << 18) as file:
            self.starts = np.concatenate([[0], np.cumsum(np.fromiter(map(len, file), np.int64))])
            size = int(self.starts[-1])
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else None
        self.view = memoryview(self.map or b"")

        whole = bytes(self.view[-1:]) in (b"", b"\n")
        if not whole or len(self) != expected:
            raise ValueError(
                f"{path} is torn: it holds {len(self)} lines, its meta.json says {expected}; prepare it again"
            )
        self._order = EpochOrder(len(self), seed)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def take(self, count: int) -> list[memoryview]:
        """The next `count` lines, line breaks included."""
        chosen = self._order.stretch(self.drawn, count)
        self.drawn += count
        starts = self.starts[chosen].tolist()
        ends = self.starts[chosen + np.uint32(1)].tolist()
        return [self.view[start:end] for start, end in zip(starts, ends, strict=True)]

    def forget(self) -> None:
        """Gives the mapped pages back; they stay in the system's cache."""
        if self.map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


# --- mixing -----------------------------------------------------------------------------------------------------------


def mixed(sources: list[ShuffledLines], counts: list[int], seed: list[int]) -> Iterator[list[memoryview]]:
    """Blocks of lines: `counts[s]` of source s, in one random order."""
    order = np.repeat(np.arange(len(sources), dtype=np.uint16), counts)
    np.random.default_rng(seed).shuffle(order)

    copied = 0  # bytes since the pages were given back
    for start in range(0, len(order), BLOCK):
        # Each source fills its own places of the block.
        which = order[start : start + BLOCK]
        block = [memoryview(b"")] * len(which)
        for number, source in enumerate(sources):
            places = np.flatnonzero(which == number).tolist()
            for place, line in zip(places, source.take(len(places)), strict=True):
                block[place] = line
        yield block

        copied += len(block) * len(block[0])  # near enough
        if copied >= FORGET:
            copied = 0
            for source in sources:
                source.forget()


def write(blocks: Iterator[list[memoryview]], file: BinaryIO, label: str, total: int) -> Iterator[list[memoryview]]:
    """Writes the blocks as they pass, straight from the mapped sources. Raises OSError."""
    done = 0
    file.flush()
    with Progress(total, label, "triples") as progress:
        for block in blocks:
            if os.writev(file.fileno(), block) != sum(map(len, block)):
                raise OSError(errno.ENOSPC, "only a part could be written, the disk is full", file.name)
            done += len(block)
            progress.update(done)
            yield block


class ValCounts:
    """Tokens of the val split, and bytes of its decoder's text: what bits per byte are taken of.

    train is not counted, since parsing it would cost most of the time.
    """

    def __init__(self, tokenizer_text: str, place: str, meta: dict[str, Any]):
        self.vocab_size = meta["vocab_size"]
        self.eos_id = meta["eos_id"]
        self.count_bytes = byte_counter(parse_tokenizer(tokenizer_text, place))
        self.totals = dict.fromkeys(VAL_COUNTS, 0)

    def add(self, lines: list[memoryview]) -> None:
        """Counts some lines. Raises ValueError: a line that is no triple."""
        for line in lines:
            triple = parse_line(bytes(line), self.vocab_size)
            labels = [label for label in triple.labels if label != IGNORE]
            text = labels[:-1] if labels[-1] == self.eos_id else labels
            self.totals["encoder_tokens"] += len(triple.encoder_ids)
            self.totals["decoder_tokens"] += len(labels)
            self.totals["decoder_bytes"] += self.count_bytes(text)


def write_split(options: argparse.Namespace, metas: list[dict[str, Any]], split: str, file: BinaryIO,
                counts: ValCounts | None) -> list[dict[str, Any]]:
    """Writes one split and counts its lines into `counts`; what each source gave, for its entry in meta.json.

    Raises:
        ValueError: a torn source, a bad line of val.
        OSError: the disk is full.
    """
    total = samples_of(options, split)
    shares = quotas(options.weights, total)
    seed = [options.seed, SPLITS.index(split)]
    sources = []
    for number, (source, meta) in enumerate(zip(options.sources, metas, strict=True)):
        expected = meta["splits"][split]["samples"]
        sources.append(ShuffledLines(source / f"{split}.jsonl", expected, [*seed, number]))

    for block in write(mixed(sources, shares, seed), file, split, total):
        if counts is None:
            continue
        try:
            counts.add(block)
        except ValueError as error:
            names = " ".join(map(str, options.sources))
            raise ValueError(
                f"a val line of a source is bad ({error}): find it with scripts/validate_dataset.py, each of {names}"
            ) from error

    entries = []
    for source, share in zip(sources, shares, strict=True):
        epochs = round(share / len(source), 4) if share else 0.0
        entries.append({"samples": share, "available": len(source), "epochs": epochs})
    return entries


def merged_record(metas: list[dict[str, Any]]) -> str | None:
    """The documents that the sources train on, for meta.json; None where one source does not record them."""
    union = TrainedOn(())
    for meta in metas:
        record = trained_on(meta)
        if record is None:
            return None
        union |= record
    return union.record()


def merge(options: argparse.Namespace) -> dict[str, Any]:
    """Writes the mixed folder; its meta.json as a dict. Raises ValueError, OSError."""
    metas = read_metas(options.sources)
    check_shares(options, metas)
    tokenizer = (options.sources[0] / "tokenizer.json").read_bytes()

    # The keys stand in the file in this order.
    meta: dict[str, Any] = {key: metas[0][key] for key in (*VOCABULARY_KEYS, "tokenizer_sha256")}
    meta["format"] = "prepared-triples"
    meta["version"] = 1
    meta["max_seq_len"] = max(source["max_seq_len"] for source in metas)
    meta["seed"] = options.seed
    meta["splits"] = {}
    meta["sources"] = []
    for source, share in zip(options.sources, options.weights, strict=True):
        meta["sources"].append({"name": source.resolve().name, "weight": float(share / sum(options.weights))})

    with staged(options.output, FILES) as (train_file, val_file, tokenizer_file, meta_file):
        for split, file in (("train", train_file), ("val", val_file)):
            counts = None
            if split == "val" and options.val_samples:
                counts = ValCounts(tokenizer.decode(), str(options.sources[0]), meta)
            entries = write_split(options, metas, split, file, counts)

            meta["splits"][split] = {"samples": samples_of(options, split)}
            if counts is not None:
                meta["splits"][split] |= counts.totals
            elif split == "val":
                meta["splits"][split] |= dict.fromkeys(VAL_COUNTS, 0)
            for source, entry in zip(meta["sources"], entries, strict=True):
                source[split] = entry

        meta[META_KEY] = merged_record(metas)
        tokenizer_file.write(tokenizer)
        meta_file.write((json.dumps(meta, indent=2) + "\n").encode())
    return meta


def main(argv: list[str] | None = None) -> int:
    """Merges and reports. Raises ValueError, OSError."""
    options = parse(argv)
    gc.freeze()  # a view of every line passes by: looking through the imported libraries each time costs a third
    try:
        meta = merge(options)
    finally:
        gc.unfreeze()

    for source in meta["sources"]:
        for split in SPLITS:
            entry = source[split]
            repeated = f", each {entry['epochs']:.2f} times on average" if entry["epochs"] > 1 else ""
            print(f"{source['name']}: {entry['samples']} {split} triples of {entry['available']}{repeated}")
    print(f"{options.output}: {options.train_samples} train and {options.val_samples} val triples")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
