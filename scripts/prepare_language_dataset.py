"""Turns text and prompt/answer rows into token triples for the encoder-decoder: train, val, meta and tokenizer files.

    python scripts/prepare_language_dataset.py --source corpus/ --dest prepared/corpus --vocab_size 8192
    python scripts/prepare_language_dataset.py --source gsm8k.jsonl --dest prepared/gsm8k --tokenizer tokenizer.json

Reads .txt, .jsonl and .parquet (what a document is: documents.py). Prompts go to the encoder and answers to the
decoder. Of plain text the encoder reads the tokens that come before and the decoder continues them: after the first
few tokens every token of a document is predicted exactly once, never by a triple whose encoder has seen it. `--workers`
processes do it. The formats: docs/data.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.files import read_text, staged  # noqa: E402
from engine.progress import Progress  # noqa: E402
from engine.worker_pool import WorkerPool, worker_count, workers_problem  # noqa: E402
from script_tools import ScriptParser, file_sha256, run_script  # noqa: E402
from text_data.documents import ALL_SPLITS, Meter, Splits, read_documents, source_files, source_megabytes  # noqa: E402
from text_data.encoding import Encoded, Part, Recipe, batch_encoder, batched, set_threads  # noqa: E402
from text_data.roundtrip import ENOUGH, RoundTrip  # noqa: E402
from text_data.tokenizer import (  # noqa: E402
    LEAST_VOCABULARY,
    SPECIAL,
    parse_tokenizer,
    special_ids,
    train_tokenizer,
    vocabulary_size,
)
from text_data.trained import META_KEY, KeyRecord  # noqa: E402
from text_data.word_cache import WordEncoder  # noqa: E402

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SAMPLE_CHARS = 500  # of a document that is checked before the pass over the data
FILES = ("train.jsonl", "val.jsonl", "tokenizer.json", "meta.json")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises ValueError: everything wrong with it, one line each."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--source", type=Path, required=True, help="a folder of .txt, .jsonl, .parquet, or one file")
    parser.add_argument("--dest", type=Path, required=True, help="the prepared folder to write")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json; without it one is trained on the source")
    parser.add_argument("--vocab_size", type=int, default=8192, help="of the tokenizer that is trained, at most")
    for role in SPECIAL:
        parser.add_argument(f"--{role}_token", help=f"the given tokenizer's {role} token, where it is not found")
    parser.add_argument("--max_seq_len", type=int, default=512, help="tokens of each side of a triple, at most")
    parser.add_argument("--val_ratio", type=float, default=0.01, help="share of the documents kept for val")
    parser.add_argument("--min_roundtrip", type=float, default=0.95, help="refuse a tokenizer from which a smaller "
                        "share of the rows comes back as it was")
    parser.add_argument("--split", help="of rows with a field split: those of this one; `all` mixes them")
    parser.add_argument("--tokenizer_megabytes", type=int, default=50, help="about so much text, spread evenly over "
                        "the source, trains the tokenizer; 0: all, and memory grows with it")
    parser.add_argument("--tokenizer_num_threads", type=int, default=0, help="in each process; 0: one with several "
                        "--workers, else the tokenizer's own choice")
    parser.add_argument("--tokenizer_batch_size", type=int, default=4096, help="documents encoded at a time, at most")
    parser.add_argument("--workers", type=int, default=1, help="processes that encode; 0: one for each core. The files "
                        "are the same for any number")
    options = parser.parse_args(argv)

    problems = []
    least = {
        "vocab_size": LEAST_VOCABULARY,
        "max_seq_len": 2,
        "tokenizer_megabytes": 0,
        "tokenizer_num_threads": 0,
        "tokenizer_batch_size": 1,
    }
    for name, low in least.items():
        if getattr(options, name) < low:
            problems.append(f"--{name} {getattr(options, name)} must be at least {low}")
    problems += filter(None, [workers_problem(options.workers)])
    if not 0 <= options.min_roundtrip <= 1:
        problems.append(f"--min_roundtrip {options.min_roundtrip} must be at least 0 and at most 1")
    if not 0 <= options.val_ratio < 1:
        problems.append(f"--val_ratio {options.val_ratio} must be at least 0 and below 1")
    if options.tokenizer and not options.tokenizer.is_file():
        problems.append(f"--tokenizer {options.tokenizer} is no file: give a tokenizer.json")
    if options.dest.resolve().is_relative_to(options.source.resolve()):
        problems.append(f"--dest {options.dest} lies in --source {options.source}: a rerun would read its own output")
    if problems:
        raise ValueError("\n".join(problems))
    options.workers = worker_count(options.workers)
    return options


# --- the pass over the data -------------------------------------------------------------------------------------------


def check_sample(files: list[Path], tokenizer: Tokenizer, least: float, place: str) -> None:
    """Raises ValueError where of a sample not half of `least` comes back: only the whole pass tells the share.

    The sample are the beginnings of the first documents of every file, of whatever split.
    """
    trip = RoundTrip()
    encoder = WordEncoder(tokenizer)

    def decode(text: str) -> str:
        return tokenizer.decode(encoder.encode([text])[0], skip_special_tokens=False)

    part = max(ENOUGH // len(files), 1)
    for path in files:
        documents = read_documents([path], Splits(ALL_SPLITS))
        for document in itertools.islice(documents, part):
            trip.add([text[:SAMPLE_CHARS] for text in (document.prompt, document.text) if text], decode)

    lossy = trip.problem(least, part=0.5)
    if lossy:
        raise ValueError(f"{place}: of a sample {lossy}")


class Totals:
    """What all batches gave together; `keys` are those of the documents of train."""

    def __init__(self) -> None:
        self.train = Part()
        self.val = Part()
        self.blank = 0
        self.trip = RoundTrip()
        self.keys = KeyRecord()
        self.documents = 0

    def count(self, batch: Encoded) -> None:
        """Adds a batch."""
        self.train.count(batch.train)
        self.val.count(batch.val)
        self.blank += batch.blank
        self.trip.count(batch.trip)
        self.keys.add(batch.train.keys)
        self.documents += batch.documents


def write_splits(options: argparse.Namespace, files: list[Path], recipe: Recipe, splits: Splits,
                 train_file: BinaryIO, val_file: BinaryIO) -> Totals:
    """Writes the triples of every document, those of val apart. Raises ValueError, OSError.

    This process reads and writes, the workers do what lies between. Lines come in the order of the documents.
    """
    totals = Totals()
    meter = Meter()
    batches = batched(read_documents(files, splits, meter), options.tokenizer_batch_size)
    with (
        WorkerPool(batch_encoder, (recipe,), options.workers) as pool,
        Progress(source_megabytes(files) or None, "prepare", "MB") as progress,
    ):
        for batch in pool.in_order(batches):
            train_file.write(batch.train.lines)
            val_file.write(batch.val.lines)
            totals.count(batch)
            progress.update(meter.megabytes, documents=totals.documents)
    return totals


# --- the command ------------------------------------------------------------------------------------------------------


def val_threshold(files: list[Path], ratio: float, split: str | None) -> int:
    """The key below which a document goes to val: `ratio` of all 64-bit keys.

    Where one split of a small source would stay empty by chance, the threshold is moved to the nearest document's key.
    """
    keys = 1 << 64
    threshold = int(ratio * keys)
    if not threshold:
        return 0

    # Most sources have a document on either side near their beginning; only that is read.
    smallest = keys
    largest = -1
    for document in read_documents(files, Splits(split)):
        if document.text.strip() and document.prompt != "":
            key = document.key
            smallest = min(smallest, key)
            largest = max(largest, key)
        if smallest < threshold <= largest:
            return threshold

    # All documents are on one side.
    if smallest < largest:
        return min(max(threshold, smallest + 1), largest)
    return threshold


def tokenizer_text(options: argparse.Namespace, files: list[Path], threshold: int) -> str:
    """The text of the tokenizer.json given, or of one trained on the training split of `files`.

    Raises:
        ValueError: the file is not text.
    """
    if options.tokenizer:
        try:
            return read_text(options.tokenizer)
        except ValueError as error:
            raise ValueError(f"--tokenizer {error}") from error

    set_threads(options.tokenizer_num_threads or (options.workers if options.workers > 1 else 0))
    return train_tokenizer(training_texts(options, files, threshold), options.vocab_size).to_str()


def training_texts(options: argparse.Namespace, files: list[Path], threshold: int) -> Iterator[str]:
    """Texts of the training split, every n-th document, so that there are about `--tokenizer_megabytes` of them."""
    every = 1
    if options.tokenizer_megabytes:
        every = max(-(-source_megabytes(files) // options.tokenizer_megabytes), 1)

    meter = Meter()
    documents = itertools.islice(read_documents(files, Splits(options.split), meter), 0, None, every)
    with Progress(source_megabytes(files) or None, "tokenizer", "MB") as progress:
        for document in documents:
            progress.update(meter.megabytes)
            if document.key >= threshold:
                yield from filter(None, (document.prompt, document.text))


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Writes the prepared folder; its meta.json as a dict. Raises ValueError, OSError."""
    files = source_files(options.source)
    threshold = val_threshold(files, options.val_ratio, options.split)
    with staged(options.dest, FILES) as (train_file, val_file, tokenizer_file, meta_file):
        # The tokenizer: given or trained.
        text = tokenizer_text(options, files, threshold)
        place = f"--tokenizer {options.tokenizer}"
        tokenizer = parse_tokenizer(text, place)
        special = special_ids(tokenizer, place, {role: getattr(options, f"{role}_token") for role in SPECIAL})
        tokenizer_file.write(text.encode())
        tokenizer_file.flush()

        if options.tokenizer:  # one that is trained here loses nothing
            check_sample(files, tokenizer, options.min_roundtrip, place)

        # The triples of both splits in one pass.
        threads = options.tokenizer_num_threads or int(options.workers > 1)
        recipe = Recipe(text, special, options.max_seq_len, threshold, threads)
        splits = Splits(options.split)
        totals = write_splits(options, files, recipe, splits, train_file, val_file)
        problem = totals.trip.problem(options.min_roundtrip)
        if problem:
            raise ValueError(f"{place}: {problem}")
        too_short = totals.train.too_short + totals.val.too_short
        if not totals.train.counts["samples"]:
            raise ValueError(
                f"--source {options.source} gives no training triple ({totals.val.counts['documents']} documents fell "
                f"to val, {totals.blank} are blank, {too_short} have one token): add documents"
            )

        meta = {"format": "prepared-triples", "version": 1, "vocab_size": vocabulary_size(tokenizer)}
        meta |= {f"{role}_id": number for role, number in special.items()}
        meta["tokenizer_sha256"] = file_sha256(Path(tokenizer_file.name))
        meta |= record(options, files, totals, splits)
        meta_file.write((json.dumps(meta, indent=2) + "\n").encode())
    return meta


def record(options: argparse.Namespace, files: list[Path], totals: Totals, splits: Splits) -> dict[str, Any]:
    """What was done, for meta.json; the keys stand in the file in this order."""
    cut = Part()
    cut.count(totals.train)
    cut.count(totals.val)
    return {
        "max_seq_len": options.max_seq_len,
        "val_ratio": options.val_ratio,
        "sources": [{"name": source_name(path, options.source)} for path in files],
        "roundtrip": {"rows": totals.trip.rows, "back": totals.trip.back},
        "source_splits": dict(sorted(splits.counts.items())),
        "splits": {"train": totals.train.counts, "val": totals.val.counts},
        "truncated": cut.truncated,
        "left_out": {"blank": totals.blank, "too_short": cut.too_short},
        META_KEY: totals.keys.record(),
    }


def source_name(path: Path, source: Path) -> str:
    """A file's path inside the source folder, or the name of a source that is one file."""
    return path.name if path == source else str(path.relative_to(source))


def main(argv: list[str] | None = None) -> int:
    """Prepares and reports. Raises ValueError, OSError."""
    options = parse(argv)
    set_threads(options.tokenizer_num_threads)
    meta = prepare(options)

    for split, counts in meta["splits"].items():
        print(f"{split}: {counts['samples']} triples of {counts['documents']} documents, {counts['encoder_tokens']} "
              f"encoder and {counts['decoder_tokens']} decoder tokens, {counts['decoder_bytes']} bytes to predict")
    cut = meta["truncated"]
    out = meta["left_out"]
    print(f"cut to {options.max_seq_len} tokens: {cut['prompts']} prompts (the end kept), {cut['answers']} answers "
          f"(the beginning kept); left out: {out['blank']} blank documents, {out['too_short']} texts of one token")
    trip = RoundTrip(**meta["roundtrip"])
    print(f"round trip: {trip.shown()}")
    sources = ", ".join(f"{name} ({count})" for name, count in meta["source_splits"].items())
    if options.split == ALL_SPLITS and len(meta["source_splits"]) > 1:
        print(f"mixed: rows of the splits {sources}")
    elif sources:
        print(f"rows of --split {options.split or 'as they are'}, among: {sources}")
    print(f"{options.dest}: vocabulary {meta['vocab_size']}, tokenizer {meta['tokenizer_sha256'][:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
