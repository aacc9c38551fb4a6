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
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.batches import IGNORE  # noqa: E402
from engine.files import staged  # noqa: E402
from engine.logs import Progress  # noqa: E402
from script_tools import ScriptParser, run_script, sha256  # noqa: E402
from text_data.tokenizer import byte_counter, parse_tokenizer  # noqa: E402
from text_data.triples import SPLITS, parse_line, read_meta  # noqa: E402

BLOCK = min(1024, os.sysconf("SC_IOV_MAX"))  # lines handed to the system in one write
FORGET = 1 << 26  # bytes after which the mapped pages of the sources are given back


def weight(text: str) -> Fraction:
    try:
        return Fraction(text)  # exact: .05 is 1/20
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def parse(argv: list[str] | None = None) -> argparse.Namespace:
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
        problems.append(f"--weights has {len(options.weights)} numbers for {len(options.sources)} --sources: give one "
                        "for each")
    if min(options.weights) < 0 or not sum(options.weights):
        shown = " ".join(f"{float(share):g}" for share in options.weights)
        problems.append(f"--weights {shown}: none may be negative, one must be positive")
    for name, least in (("train_samples", 1), ("val_samples", 0), ("seed", 0)):
        if getattr(options, name) < least:
            problems.append(f"--{name} {getattr(options, name)} must be at least {least}")
    resolved = [source.resolve() for source in options.sources]
    problems += [f"--sources names {path} more than once" for path, n in Counter(resolved).items() if n > 1]
    if options.output.resolve() in resolved:
        problems.append(f"--output {options.output} is one of the --sources: choose another folder")
    if problems:
        raise ValueError("\n".join(problems))
    return options


def quotas(weights: list[Fraction], total: int) -> list[int]:
    """Whole numbers in the ratio of `weights` that add up to `total`: the largest remainders are rounded up, the
    earlier source first where they tie."""
    shares = [total * share / sum(weights) for share in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


class Lines:
    """The lines of one file in endless reshuffled epochs; 12 bytes of memory a line.

    Raises:
        ValueError: the file is torn, or does not hold as many lines as its meta.json says.
    """

    def __init__(self, path: Path, expected: int, seed: list[int]):
        self.seed, self.drawn, self._order = seed, 0, (-1, np.zeros(0, np.uint32))
        with open(path, "rb", buffering=1 << 18) as file:
            self.starts = np.concatenate([[0], np.cumsum(np.fromiter(map(len, file), np.int64))])
            size = int(self.starts[-1])
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else None
        self.view = memoryview(self.map or b"")
        if bytes(self.view[-1:]) not in (b"", b"\n") or len(self) != expected:
            raise ValueError(f"{path} is torn: it holds {len(self)} lines, its meta.json says {expected}; prepare it "
                             "again")

    def __len__(self) -> int:
        return len(self.starts) - 1

    def take(self, count: int) -> list[memoryview]:
        """The next `count` lines, line breaks included."""
        found: list[memoryview] = []
        while len(found) < count:
            epoch, place = divmod(self.drawn, len(self))
            if self._order[0] != epoch:
                order = np.arange(len(self), dtype=np.uint32)
                np.random.default_rng([*self.seed, epoch]).shuffle(order)
                self._order = (epoch, order)
            chosen = self._order[1][place: place + count - len(found)]
            starts, ends = self.starts[chosen].tolist(), self.starts[chosen + np.uint32(1)].tolist()
            found += [self.view[start:end] for start, end in zip(starts, ends, strict=True)]
            self.drawn += len(chosen)
        return found

    def forget(self) -> None:
        """Gives the mapped pages back; they stay in the system's cache."""
        if self.map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


def mixed(sources: list[Lines], counts: list[int], seed: list[int]) -> Iterator[list[memoryview]]:
    """Blocks of lines: `counts[s]` of source s, in one random order."""
    order = np.repeat(np.arange(len(sources), dtype=np.uint16), counts)
    np.random.default_rng(seed).shuffle(order)
    copied = 0
    for start in range(0, len(order), BLOCK):
        which = order[start: start + BLOCK]
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


def checked_sources(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The sources' metas.

    Raises:
        ValueError: every broken source, one line each; else one line for tokenizers that differ.
    """
    metas, problems = [], []
    for source in options.sources:
        try:
            metas.append(read_meta(source))
            if not (source / "tokenizer.json").is_file():
                problems.append(f"{source} has no tokenizer.json: prepare it again")
            elif sha256(source / "tokenizer.json") != metas[-1]["tokenizer_sha256"]:
                problems.append(f"{source}/tokenizer.json is not the one its meta.json names: prepare it again")
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    keys = ("tokenizer_sha256", "vocab_size", "pad_id", "bos_id", "eos_id")
    for source, meta in zip(options.sources, metas, strict=True):
        differing = [key for key in keys if meta[key] != metas[0][key]]
        if differing:
            raise ValueError(f"{source} and {options.sources[0]} have different tokenizers ({', '.join(differing)}): "
                             "prepare them with one --tokenizer")
    for split in SPLITS:
        share = quotas(options.weights, getattr(options, f"{split}_samples"))
        problems += [f"{source} has no {split} triple, {count} are asked of it: set its weight or --{split}_samples to "
                     "0, or prepare it with another --val_ratio"
                     for source, meta, count in zip(options.sources, metas, share, strict=True)
                     if count and not meta["splits"][split]["samples"]]
    if problems:
        raise ValueError("\n".join(problems))
    return metas


def measure(lines: list[memoryview], vocab_size: int, count_bytes: Callable[[list[int]], int], eos_id: int,
            totals: Counter[str]) -> None:
    """Adds the tokens and the decoder's bytes of `lines` to `totals`."""
    for line in lines:
        triple = parse_line(bytes(line), vocab_size)
        said = [label for label in triple.labels if label != IGNORE]
        totals["encoder_tokens"] += len(triple.encoder_ids)
        totals["decoder_tokens"] += len(said)
        totals["decoder_bytes"] += count_bytes(said[:-1] if said[-1] == eos_id else said)


def merge(options: argparse.Namespace) -> dict[str, Any]:
    """Writes the mixed folder; its meta.json as a dict. Raises ValueError, OSError."""
    metas = checked_sources(options)
    tokenizer_bytes = (options.sources[0] / "tokenizer.json").read_bytes()
    meta = {key: metas[0][key] for key in ("vocab_size", "pad_id", "bos_id", "eos_id", "tokenizer_sha256")}
    meta |= {"format": "prepared-triples", "version": 1, "max_seq_len": max(entry["max_seq_len"] for entry in metas),
             "seed": options.seed, "splits": {}}
    meta["sources"] = [{"name": source.resolve().name, "weight": float(share / sum(options.weights))}
                       for source, share in zip(options.sources, options.weights, strict=True)]
    tokenizer = parse_tokenizer(tokenizer_bytes.decode(), str(options.sources[0])) if options.val_samples else None
    count_bytes = byte_counter(tokenizer) if tokenizer else sum
    with staged(options.output, ["train.jsonl", "val.jsonl", "tokenizer.json", "meta.json"]) as files:
        for number, (split, file) in enumerate(zip(SPLITS, files, strict=False)):
            total = getattr(options, f"{split}_samples")
            counts = quotas(options.weights, total)
            sources = [Lines(source / f"{split}.jsonl", entry["splits"][split]["samples"], [options.seed, number, i])
                       for i, (source, entry) in enumerate(zip(options.sources, metas, strict=True))]
            totals: Counter[str] = Counter(encoder_tokens=0, decoder_tokens=0, decoder_bytes=0)
            blocks = mixed(sources, counts, [options.seed, number])
            for block in write(blocks, file, split, total):
                if split == "val":  # small, and what bits per byte are taken of; train is not parsed, for speed
                    try:
                        measure(block, meta["vocab_size"], count_bytes, meta["eos_id"], totals)
                    except ValueError as error:
                        names = " ".join(map(str, options.sources))
                        raise ValueError(f"a val line of a source is bad ({error}): find it with "
                                         f"scripts/validate_dataset.py, each of {names}") from error
            meta["splits"][split] = {"samples": total, **(totals if split == "val" else {})}
            for entry, source, count in zip(meta["sources"], sources, counts, strict=True):
                epochs = round(count / len(source), 4) if count else 0.0
                entry[split] = {"samples": count, "available": len(source), "epochs": epochs}
        files[2].write(tokenizer_bytes)
        files[3].write((json.dumps(meta, indent=2) + "\n").encode())
    return meta


def write(blocks: Iterator[list[memoryview]], file: BinaryIO, label: str, total: int) -> Iterator[list[memoryview]]:
    """Writes the blocks as they pass, straight from the mapped sources."""
    done = 0
    file.flush()
    with Progress(total, label, "triples") as progress:
        for block in blocks:
            if os.writev(file.fileno(), block) != sum(map(len, block)):
                raise OSError(errno.ENOSPC, "only a part could be written, the disk is full", file.name)
            done += len(block)
            progress.update(done)
            yield block


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    gc.freeze()  # a view of every line passes by: looking through the imported libraries each time costs a third
    try:
        meta = merge(options)
    finally:
        gc.unfreeze()
    for entry in meta["sources"]:
        for split in SPLITS:
            told = entry[split]
            repeated = f", each {told['epochs']:.2f} times on average" if told["epochs"] > 1 else ""
            print(f"{entry['name']}: {told['samples']} {split} triples of {told['available']}{repeated}")
    print(f"{options.output}: {options.train_samples} train and {options.val_samples} val triples")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
