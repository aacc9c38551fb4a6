"""Mixes prepared folders into one, in exact shares, shuffled together.

    python scripts/merge_prepared_batches.py --sources prepared/text prepared/gsm8k prepared/mbpp \\
        --weights .9 .05 .05 --output prepared/mix --train_samples 20000 --val_samples 200

Every source gives its weight's share of the triples (largest remainder, so the numbers add up exactly), drawn without
repetition until it is used up; then it starts anew in another order, and the report says how often. Lines are copied as
they are. The order is a function of `--seed` and the sources alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.files import staged  # noqa: E402
from engine.progress import Progress  # noqa: E402
from engine.worker_pool import WorkerPool, worker_count, workers_problem  # noqa: E402
from script_tools import ScriptParser, file_sha256, run_script  # noqa: E402
from text_data.mixing import COUNTS, Counts, Mix, ShuffledLines, Vocabulary, add_counts, copier  # noqa: E402
from text_data.trained import META_KEY, TrainedOn, trained_on  # noqa: E402
from text_data.triples import SPLITS, read_meta  # noqa: E402

WORTH_WORKERS = 1 << 26  # bytes of a split; fewer are written by this process
FILES = ("train.jsonl", "val.jsonl", "tokenizer.json", "meta.json")
VOCABULARY_KEYS = ("vocab_size", "pad_id", "bos_id", "eos_id")  # of meta.json; equal in all sources


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
    parser.add_argument("--workers", type=int, default=1, help="processes that copy; 0: one for each core. The files "
                        "are the same for any number")
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

    problems += filter(None, [workers_problem(options.workers)])

    resolved = [source.resolve() for source in options.sources]
    for path, times in Counter(resolved).items():
        if times > 1:
            problems.append(f"--sources names {path} more than once")
    if options.output.resolve() in resolved:
        problems.append(f"--output {options.output} is one of the --sources: choose another folder")

    if problems:
        raise ValueError("\n".join(problems))
    options.workers = worker_count(options.workers)
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


# --- writing ----------------------------------------------------------------------------------------------------------


def write_split(options: argparse.Namespace, metas: list[dict[str, Any]], split: str, file: BinaryIO,
                vocabulary: Vocabulary | None) -> tuple[list[dict[str, Any]], Counts]:
    """Writes one split; what each source gave, for its entry in meta.json, and the counts of the lines.

    `vocabulary` is that of the split whose lines are counted.

    Raises:
        ValueError: a torn source, a bad line of val.
        OSError: the disk is full.
    """
    total = samples_of(options, split)
    shares = quotas(options.weights, total)
    seed = [options.seed, SPLITS.index(split)]
    paths = [source / f"{split}.jsonl" for source in options.sources]
    sources = []
    for number, (path, meta) in enumerate(zip(paths, metas, strict=True)):
        sources.append(ShuffledLines(path, meta["splits"][split]["samples"], [*seed, number]))
    mix = Mix(sources, shares, seed)

    # A few lines are not worth the start of a process.
    workers = options.workers if mix.size >= WORTH_WORKERS else 1
    counts: Counts = dict.fromkeys(COUNTS, 0)
    done = 0
    with (
        WorkerPool(copier, (paths, Path(file.name), vocabulary), workers) as pool,
        Progress(total, split, "triples") as progress,
    ):
        for copied in pool.in_order(mix.stretches()):
            add_counts(counts, copied.counts)
            done += copied.lines
            progress.update(done)

    entries = []
    for source, share in zip(sources, shares, strict=True):
        epochs = round(share / len(source), 4) if share else 0.0
        entries.append({"samples": share, "available": len(source), "epochs": epochs})
    return entries, counts


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
            vocabulary = None
            if split == "val" and options.val_samples:
                vocabulary = Vocabulary(
                    tokenizer.decode(), list(map(str, options.sources)), meta["vocab_size"], meta["eos_id"])
            entries, counts = write_split(options, metas, split, file, vocabulary)

            meta["splits"][split] = {"samples": samples_of(options, split)}
            if split == "val":
                meta["splits"][split] |= counts
            for source, entry in zip(meta["sources"], entries, strict=True):
                source[split] = entry

        meta[META_KEY] = merged_record(metas)
        tokenizer_file.write(tokenizer)
        meta_file.write((json.dumps(meta, indent=2) + "\n").encode())
    return meta


def main(argv: list[str] | None = None) -> int:
    """Merges and reports. Raises ValueError, OSError."""
    options = parse(argv)
    meta = merge(options)

    for source in meta["sources"]:
        for split in SPLITS:
            entry = source[split]
            repeated = f", each {entry['epochs']:.2f} times on average" if entry["epochs"] > 1 else ""
            print(f"{source['name']}: {entry['samples']} {split} triples of {entry['available']}{repeated}")
    print(f"{options.output}: {options.train_samples} train and {options.val_samples} val triples")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
