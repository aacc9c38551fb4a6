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
import json
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.files import staged  # noqa: E402
from engine.logs import Progress  # noqa: E402
from script_tools import ScriptParser, run_script, sha256  # noqa: E402
from text_data.documents import Document, read_documents, source_files  # noqa: E402
from text_data.tokenizer import (  # noqa: E402
    LEAST_VOCABULARY,
    SPECIAL,
    byte_counter,
    parse_tokenizer,
    special_ids,
    train_tokenizer,
    vocabulary_size,
)

HEAD = 32  # tokens at the start of a text that only the encoder reads; a quarter of a text shorter than four times that
BATCH_CHARS = 1 << 20  # a batch of documents ends here at the latest, so that memory stays flat for long ones


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("--source", type=Path, required=True, help="a folder of .txt, .jsonl, .parquet, or one file")
    parser.add_argument("--dest", type=Path, required=True, help="the prepared folder to write")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json; without it one is trained on the source")
    parser.add_argument("--vocab_size", type=int, default=8192, help="of the tokenizer that is trained, at most")
    for role in SPECIAL:
        parser.add_argument(f"--{role}_token", help=f"the given tokenizer's {role} token, where it is not found")
    parser.add_argument("--max_seq_len", type=int, default=512, help="tokens of each side of a triple, at most")
    parser.add_argument("--val_ratio", type=float, default=0.01, help="share of the documents kept for val")
    parser.add_argument("--tokenizer_num_threads", type=int, default=0, help="0: the tokenizer's own choice")
    parser.add_argument("--tokenizer_batch_size", type=int, default=512, help="documents encoded at a time, at most")
    options = parser.parse_args(argv)
    problems = [f"--{name} {getattr(options, name)} must be at least {low}" for name, low in (
        ("vocab_size", LEAST_VOCABULARY), ("max_seq_len", 2), ("tokenizer_num_threads", 0), ("tokenizer_batch_size", 1))
        if getattr(options, name) < low]
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
    """Writes documents' triples to one split's file and counts what it writes."""

    def __init__(self, file: BinaryIO, tokenizer, special: dict[str, int], limit: int):
        self.file, self.limit = file, limit
        self.counts = Counter(samples=0, documents=0, encoder_tokens=0, decoder_tokens=0, decoder_bytes=0)
        self.truncated, self.too_short = Counter(prompts=0, answers=0), 0
        self._bytes = byte_counter(tokenizer)
        # An id stands in up to three lines; to format it anew each time would be half of all the work.
        self._decimal = list(map(str, range(vocabulary_size(tokenizer)))).__getitem__
        self._bos, self._eos = str(special["bos"]), str(special["eos"])

    def _line(self, context: list[str], target: list[str], ends: bool) -> None:
        body = ", ".join(target) if ends else ", ".join(target[:-1])
        read = f"{self._bos}, {body}" if body else self._bos
        last = self._eos if ends else target[-1]
        said = f"{body}, {last}" if body else last
        line = f'{{"encoder_ids": [{", ".join(context)}], "decoder_input_ids": [{read}], "labels": [{said}]}}\n'
        self.file.write(line.encode("ascii"))
        self.counts["samples"] += 1
        self.counts["encoder_tokens"] += len(context)
        self.counts["decoder_tokens"] += len(target) + ends

    def text(self, ids: list[int], ends: bool) -> None:
        """A plain text: contexts to the encoder, continuations to the decoder."""
        if len(ids) < 2:
            self.too_short += 1
            return
        words = list(map(self._decimal, ids))
        first = None
        for context, start, end in windows(len(ids), self.limit, ends):
            first = start if first is None else first
            self._line(words[context:start], words[start:end], ends and end == len(ids))
        self.counts["decoder_bytes"] += self._bytes(ids[first:])
        self.counts["documents"] += ends

    def answer(self, prompt: list[int], ids: list[int]) -> None:
        """A prompt to the encoder, its END if it is too long; an answer to the decoder, its BEGINNING if too long."""
        ends = len(ids) < self.limit
        self.truncated["prompts"] += len(prompt) > self.limit
        self.truncated["answers"] += not ends
        ids = ids[: self.limit]
        self._line(list(map(self._decimal, prompt[-self.limit:])), list(map(self._decimal, ids)), ends)
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
            batch, chars = [], 0
    if batch:
        yield batch


def encoded(batches: Iterable[list[Document]], tokenizer) -> Iterator[tuple[list[Document], list[list[int]]]]:
    """(documents, ids of their texts and then of their prompts), encoded one batch ahead in a thread."""
    def encode(batch: list[Document]) -> list:
        prompts = [document.prompt for document in batch if document.prompt is not None]
        return tokenizer.encode_batch_fast([document.text for document in batch] + prompts, add_special_tokens=False)

    with ThreadPoolExecutor(1) as pool:
        running: deque[tuple[list[Document], Future[list]]] = deque()
        for batch in batches:
            running.append((batch, pool.submit(encode, batch)))
            if len(running) > 1:
                done, future = running.popleft()
                yield done, [encoding.ids for encoding in future.result()]
        for done, future in running:
            yield done, [encoding.ids for encoding in future.result()]


def write_splits(documents: Iterable[Document], tokenizer, train: SplitWriter, val: SplitWriter, batch_size: int,
                 threshold: int, shown: Callable[[int], None]) -> int:
    """Writes every document's triples, to val if its key is below `threshold`, else to train.

    Returns the number of blank documents.
    """
    blank = done = 0
    for batch, ids in encoded(batched(documents, batch_size), tokenizer):
        prompts = iter(ids[len(batch):])
        for document, text in zip(batch, ids, strict=False):  # the prompts' ids follow the texts'
            prompt = next(prompts) if document.prompt is not None else None
            if not text or prompt == [] or not document.text.strip():
                blank += 1
                continue
            writer = val if document.key < threshold else train
            if prompt is None:
                writer.text(text, document.ends)
            else:
                writer.answer(prompt, text)
        done += len(batch)
        shown(done)
    return blank


# --- the command ------------------------------------------------------------------------------------------------------


def val_threshold(files: list[Path], ratio: float) -> int:
    """The key below which a document goes to val: `ratio` of all keys, moved to the nearest document's where one split
    of a small source would stay empty by chance."""
    threshold, smallest, largest = int(ratio * (1 << 64)), 1 << 64, -1
    if not threshold:
        return 0
    for document in read_documents(files):
        if document.text.strip() and document.prompt != "":
            smallest, largest = min(smallest, document.key), max(largest, document.key)
        if smallest < threshold <= largest:
            return threshold  # of any larger source only the beginning is read here
    return min(max(threshold, smallest + 1), largest) if smallest < largest else threshold


def tokenizer_text(files: list[Path], options: argparse.Namespace, threshold: int) -> str:
    if options.tokenizer:
        try:
            return options.tokenizer.read_text(encoding="utf-8")
        except ValueError as error:
            raise ValueError(f"--tokenizer {options.tokenizer} is not UTF-8 text") from error

    def texts() -> Iterator[str]:  # of the training split alone
        with Progress(None, "tokenizer", "documents") as progress:
            for number, document in enumerate(read_documents(files), start=1):
                progress.update(number)
                if document.key >= threshold:
                    yield from filter(None, (document.prompt, document.text))

    return train_tokenizer(texts(), options.vocab_size).to_str()


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Writes the prepared folder; its meta.json as a dict. Raises ValueError, OSError."""
    files = source_files(options.source)
    threshold = val_threshold(files, options.val_ratio)
    names = ["train.jsonl", "val.jsonl", "tokenizer.json", "meta.json"]
    with staged(options.dest, names) as (train_file, val_file, tokenizer_file, meta_file):
        text, place = tokenizer_text(files, options, threshold), f"--tokenizer {options.tokenizer}"
        tokenizer = parse_tokenizer(text, place)
        special = special_ids(tokenizer, place, {role: getattr(options, f"{role}_token") for role in SPECIAL})
        tokenizer_file.write(text.encode())
        tokenizer_file.flush()
        train, val = (SplitWriter(file, tokenizer, special, options.max_seq_len) for file in (train_file, val_file))
        with Progress(None, "prepare", "documents") as progress:
            blank = write_splits(read_documents(files), tokenizer, train, val, options.tokenizer_batch_size, threshold,
                                 progress.update)
        if not train.counts["samples"]:
            raise ValueError(f"--source {options.source} gives no training triple ({val.counts['documents']} documents "
                             f"fell to val, {blank} are blank, {train.too_short + val.too_short} have one token): add "
                             "documents")
        meta = {
            "format": "prepared-triples", "version": 1, "vocab_size": vocabulary_size(tokenizer),
            **{f"{role}_id": number for role, number in special.items()},
            "tokenizer_sha256": sha256(Path(tokenizer_file.name)),
            "max_seq_len": options.max_seq_len, "val_ratio": options.val_ratio,
            "sources": [{"name": str(path.relative_to(options.source)) if path != options.source else path.name}
                        for path in files],
            "splits": {"train": dict(train.counts), "val": dict(val.counts)},
            "truncated": {what: train.truncated[what] + val.truncated[what] for what in train.truncated},
            "left_out": {"blank": blank, "too_short": train.too_short + val.too_short},
        }
        meta_file.write((json.dumps(meta, indent=2) + "\n").encode())
    return meta


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.tokenizer_num_threads:  # read by the tokenizer's thread pool when it first runs
        os.environ["RAYON_NUM_THREADS"] = str(options.tokenizer_num_threads)
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if options.tokenizer_num_threads > 1 else "false"
    meta = prepare(options)
    for split, counts in meta["splits"].items():
        print(f"{split}: {counts['samples']} triples of {counts['documents']} documents, {counts['encoder_tokens']} "
              f"encoder and {counts['decoder_tokens']} decoder tokens, {counts['decoder_bytes']} bytes to predict")
    cut, out = meta["truncated"], meta["left_out"]
    print(f"cut to {options.max_seq_len} tokens: {cut['prompts']} prompts (the end kept), {cut['answers']} answers "
          f"(the beginning kept); left out: {out['blank']} blank documents, {out['too_short']} texts of one token")
    print(f"{options.dest}: vocabulary {meta['vocab_size']}, tokenizer {meta['tokenizer_sha256'][:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
