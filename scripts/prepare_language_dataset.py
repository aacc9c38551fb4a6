"""Turns text and prompt/answer rows into token triples for the encoder-decoder: train, val, meta and tokenizer files.

    python scripts/prepare_language_dataset.py --source corpus/ --dest prepared/corpus --vocab_size 8192
    python scripts/prepare_language_dataset.py --source gsm8k.jsonl --dest prepared/gsm8k --tokenizer tokenizer.json

Reads .txt, .jsonl and .parquet (what a document is: documents.py). Prompts go to the encoder and answers to the
decoder. Of plain text the encoder reads the tokens that come before and the decoder continues them: after the first
few tokens every token of a document is predicted exactly once, never by a triple whose encoder has seen it. The
formats: docs/data.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.files import read_text, staged  # noqa: E402
from engine.progress import Progress  # noqa: E402
from script_tools import ScriptParser, file_sha256, run_script  # noqa: E402
from text_data.documents import ALL_SPLITS, Document, Splits, read_documents, source_files  # noqa: E402
from text_data.roundtrip import ENOUGH, RoundTrip  # noqa: E402
from text_data.tokenizer import (  # noqa: E402
    LEAST_VOCABULARY,
    SPECIAL,
    byte_counter,
    parse_tokenizer,
    special_ids,
    train_tokenizer,
    vocabulary_size,
)
from text_data.trained import META_KEY, MOST, TrainedOn  # noqa: E402

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HEAD = 32  # tokens at the start of a text that only the encoder reads; a quarter of a text shorter than four times that
BATCH_CHARS = 1 << 20  # a batch of documents ends here at the latest, so that memory stays flat for long ones
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
    parser.add_argument("--tokenizer_num_threads", type=int, default=0, help="0: the tokenizer's own choice")
    parser.add_argument("--tokenizer_batch_size", type=int, default=512, help="documents encoded at a time, at most")
    options = parser.parse_args(argv)

    problems = []
    least = {
        "vocab_size": LEAST_VOCABULARY,
        "max_seq_len": 2,
        "tokenizer_num_threads": 0,
        "tokenizer_batch_size": 1,
    }
    for name, low in least.items():
        if getattr(options, name) < low:
            problems.append(f"--{name} {getattr(options, name)} must be at least {low}")
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
    return options


# --- triples ----------------------------------------------------------------------------------------------------------


def windows(length: int, limit: int, ends: bool) -> Iterator[tuple[int, int, int]]:
    """How a text of `length` tokens is cut: (context start, target start, target end), in order.

    The targets follow each other without gap or overlap from the head's end to the text's, and a context ends where its
    target starts. Contexts and labels hold at most `limit` tokens; the last labels have room for the end of sequence.
    """
    start = min(HEAD, limit, max(length // 4, 1))
    while start < length:
        left = length - start
        if left <= limit - ends:
            end = length
        else:
            end = start + min(limit, left - 1)

        yield max(0, start - limit), start, end
        start = end


class SplitWriter:
    """Writes documents' triples to one split's file and counts what it writes.

    Attributes:
        counts: of the lines written; the keys of the split in meta.json.
        truncated: prompts and answers that were cut.
        too_short: texts of one token, which are left out.
        keys: of the documents written.
    """

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer, special: dict[str, int], limit: int):
        self.file = file
        self.limit = limit
        names = ("samples", "documents", "encoder_tokens", "decoder_tokens", "decoder_bytes")
        self.counts = dict.fromkeys(names, 0)
        self.truncated = {"prompts": 0, "answers": 0}
        self.too_short = 0
        self.keys: set[int] = set()  # of the documents written

        # An id stands in up to three lines; to format it anew each time would be half of all the work.
        self._decimal = list(map(str, range(vocabulary_size(tokenizer)))).__getitem__
        self._bytes = byte_counter(tokenizer)
        self._bos = str(special["bos"])
        self._eos = str(special["eos"])

    def _write_line(self, context: list[str], target: list[str], ends: bool) -> None:
        """Writes one triple of ids in decimal: bos and the target to read, the target (and eos if it ends) to say."""
        if ends:
            body = ", ".join(target)
            last = self._eos
        else:
            body = ", ".join(target[:-1])
            last = target[-1]
        inputs = ", ".join(filter(None, (self._bos, body)))
        labels = ", ".join(filter(None, (body, last)))

        # As json.dumps writes it, several times faster.
        line = f'{{"encoder_ids": [{", ".join(context)}], "decoder_input_ids": [{inputs}], "labels": [{labels}]}}\n'
        self.file.write(line.encode("ascii"))
        self.counts["samples"] += 1
        self.counts["encoder_tokens"] += len(context)
        self.counts["decoder_tokens"] += len(target) + ends

    def add_text(self, ids: list[int], ends: bool) -> None:
        """A plain text, or a piece of one: contexts to the encoder, continuations to the decoder.

        `ends` is False where another piece follows.
        """
        if len(ids) < 2:
            self.too_short += 1
            return

        words = list(map(self._decimal, ids))
        cuts = list(windows(len(ids), self.limit, ends))
        for context, start, end in cuts:
            self._write_line(words[context:start], words[start:end], ends and end == len(ids))

        _, first, _ = cuts[0]  # what stands before is never predicted
        self.counts["decoder_bytes"] += self._bytes(ids[first:])
        self.counts["documents"] += ends

    def add_answer(self, prompt: list[int], ids: list[int]) -> None:
        """A prompt to the encoder, its END if it is too long; an answer to the decoder, its BEGINNING if too long."""
        ends = len(ids) < self.limit
        self.truncated["prompts"] += len(prompt) > self.limit
        self.truncated["answers"] += not ends

        prompt = prompt[-self.limit :]
        ids = ids[: self.limit]
        self._write_line(list(map(self._decimal, prompt)), list(map(self._decimal, ids)), ends)
        self.counts["decoder_bytes"] += self._bytes(ids)
        self.counts["documents"] += 1


def batched(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Lists of at most `size` documents and about BATCH_CHARS characters."""
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text) + len(document.prompt or "")
        if len(batch) >= size or chars >= BATCH_CHARS:
            yield batch
            batch = []
            chars = 0
    if batch:
        yield batch


def encoded(
    batches: Iterable[list[Document]], tokenizer: Tokenizer
) -> Iterator[tuple[list[Document], list[list[int]]]]:
    """(documents, ids of their texts and then of their prompts), encoded one batch ahead in a thread."""

    def encode(batch: list[Document]) -> list[list[int]]:
        texts = [document.text for document in batch]
        prompts = [document.prompt for document in batch if document.prompt is not None]
        encodings = tokenizer.encode_batch_fast(texts + prompts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    with ThreadPoolExecutor(1) as pool:
        running: deque[tuple[list[Document], Future[list[list[int]]]]] = deque()
        for batch in batches:
            running.append((batch, pool.submit(encode, batch)))
            if len(running) > 1:
                done, future = running.popleft()
                yield done, future.result()
        for done, future in running:
            yield done, future.result()


def check_sample(files: list[Path], tokenizer: Tokenizer, least: float, place: str) -> None:
    """Raises ValueError where of a sample not half of `least` comes back: only the whole pass tells the share.

    The sample are the first documents of every file, of whatever split.
    """
    trip = RoundTrip()
    part = max(ENOUGH // len(files), 1)
    for path in files:
        documents = read_documents([path], Splits(ALL_SPLITS))
        for _ in checked(itertools.islice(documents, part), tokenizer, trip):
            pass

    lossy = trip.problem(least, part=0.5)
    if lossy:
        raise ValueError(f"{place}: of a sample {lossy}")


def checked(documents: Iterable[Document], tokenizer: Tokenizer, trip: RoundTrip) -> Iterator[Document]:
    """The documents as they are; of a part of them `trip` counts those that the tokenizer gives back."""

    def decode(text: str) -> str:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return tokenizer.decode(ids, skip_special_tokens=False)

    for number, document in enumerate(documents):
        if trip.wants(number):
            trip.add([text for text in (document.prompt, document.text) if text], decode)
        yield document


def write_splits(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    train: SplitWriter,
    val: SplitWriter,
    batch_size: int,
    threshold: int,
    progress: Callable[[int], None],
) -> int:
    """Writes every document's triples, to val if its key is below `threshold`, else to train.

    `progress` is called after each batch with the number of documents so far. Returns the number of blank documents.
    """
    blank = 0
    done = 0
    for batch, ids in encoded(batched(documents, batch_size), tokenizer):
        # The prompts' ids follow the texts'.
        texts = ids[: len(batch)]
        prompts = iter(ids[len(batch) :])

        for document, text in zip(batch, texts, strict=True):
            prompt = next(prompts) if document.prompt is not None else None
            if not text or prompt == [] or not document.text.strip():
                blank += 1
                continue
            writer = val if document.key < threshold else train
            if len(writer.keys) <= MOST:  # of more documents nothing is recorded
                writer.keys.add(document.key)
            if prompt is None:
                writer.add_text(text, document.ends)
            else:
                writer.add_answer(prompt, text)

        done += len(batch)
        progress(done)
    return blank


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
            smallest = min(smallest, document.key)
            largest = max(largest, document.key)
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

    def texts() -> Iterator[str]:
        with Progress(None, "tokenizer", "documents") as progress:
            for number, document in enumerate(read_documents(files, Splits(options.split)), start=1):
                progress.update(number)
                if document.key >= threshold:
                    yield from filter(None, (document.prompt, document.text))

    return train_tokenizer(texts(), options.vocab_size).to_str()


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
        train = SplitWriter(train_file, tokenizer, special, options.max_seq_len)
        val = SplitWriter(val_file, tokenizer, special, options.max_seq_len)
        splits = Splits(options.split)
        trip = RoundTrip()
        documents = checked(read_documents(files, splits), tokenizer, trip)
        size = options.tokenizer_batch_size
        with Progress(None, "prepare", "documents") as progress:
            blank = write_splits(documents, tokenizer, train, val, size, threshold, progress.update)
        lossy = trip.problem(options.min_roundtrip)
        if lossy:
            raise ValueError(f"{place}: {lossy}")
        too_short = train.too_short + val.too_short
        if not train.counts["samples"]:
            raise ValueError(
                f"--source {options.source} gives no training triple ({val.counts['documents']} documents fell to val, "
                f"{blank} are blank, {too_short} have one token): add documents"
            )

        # What was done; the keys stand in the file in this order.
        meta: dict[str, Any] = {"format": "prepared-triples", "version": 1, "vocab_size": vocabulary_size(tokenizer)}
        meta |= {f"{role}_id": number for role, number in special.items()}
        meta["tokenizer_sha256"] = file_sha256(Path(tokenizer_file.name))
        meta["max_seq_len"] = options.max_seq_len
        meta["val_ratio"] = options.val_ratio
        meta["sources"] = [{"name": source_name(path, options.source)} for path in files]
        meta["roundtrip"] = {"rows": trip.rows, "back": trip.back}
        meta["source_splits"] = dict(sorted(splits.counts.items()))
        meta["splits"] = {"train": train.counts, "val": val.counts}
        meta["truncated"] = {name: count + val.truncated[name] for name, count in train.truncated.items()}
        meta["left_out"] = {"blank": blank, "too_short": too_short}
        meta[META_KEY] = TrainedOn(train.keys).record()
        meta_file.write((json.dumps(meta, indent=2) + "\n").encode())
    return meta


def source_name(path: Path, source: Path) -> str:
    """A file's path inside the source folder, or the name of a source that is one file."""
    return path.name if path == source else str(path.relative_to(source))


def main(argv: list[str] | None = None) -> int:
    """Prepares and reports. Raises ValueError, OSError."""
    options = parse(argv)
    if options.tokenizer_num_threads:  # read by the tokenizer's thread pool when it first runs
        os.environ["RAYON_NUM_THREADS"] = str(options.tokenizer_num_threads)
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if options.tokenizer_num_threads > 1 else "false"
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
