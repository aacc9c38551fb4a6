"""Measures data preparation against what it cannot beat: prepare against bare `encode_batch`, merge against `cat`.

    python scripts/benchmark_data.py                          # on generated text
    python scripts/benchmark_data.py --source corpus/ --repeats 9

Each repeat runs both sides one after the other; the ratio of their throughputs is taken within the repeat. Printed are
the medians with the smallest and largest value seen. Preparing includes reading, hashing, cutting, formatting, writing
and fsync; merging includes reading the index, drawing, writing and fsync, so `cat` is shown with fsync and without.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import merge_prepared_batches  # noqa: E402
import prepare_language_dataset  # noqa: E402
from script_tools import ScriptParser, run_script  # noqa: E402
from text_data.documents import read_documents, source_files  # noqa: E402
from text_data.tokenizer import read_tokenizer  # noqa: E402

MERGED_SOURCES = 3


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--source", type=Path, help="text to measure on; without it, text is generated")
    parser.add_argument("--megabytes", type=float, default=8, help="of generated text")
    parser.add_argument("--merge_megabytes", type=float, default=150, help="of prepared lines to merge")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokenizer_num_threads", type=int, default=1)
    parser.add_argument("--tokenizer_batch_size", type=int, default=512)
    parser.add_argument("--work", type=Path, help="folder for the files, on the disk to measure (default: temporary)")
    options = parser.parse_args(argv)
    for name in ("megabytes", "merge_megabytes", "repeats", "tokenizer_num_threads", "tokenizer_batch_size"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} {getattr(options, name)} must be positive")
    return options


# --- measuring --------------------------------------------------------------------------------------------------------


def seconds(action: Callable[..., object], *arguments: object) -> float:
    """The time that `action(*arguments)` takes."""
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def run_quietly(script: Any, command: Sequence[object]) -> None:
    """Runs a script's `main` on the words of `command` and prints nothing."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        script.main([str(word) for word in command])


def show(name: str, values: Sequence[float], unit: str) -> None:
    """Prints the median, the smallest and the largest value on one line."""
    print(f"{name:44} {statistics.median(values):8.2f} {unit}  ({min(values):.2f} to {max(values):.2f})")


def show_speed(name: str, megabytes: float, times: Sequence[float]) -> None:
    """Prints the throughput of runs that took `times` seconds."""
    show(name, [megabytes / time for time in times], "MB/s")


def show_ratio(name: str, best: Sequence[float], times: Sequence[float]) -> None:
    """Prints the speed of `times` (seconds) as a share of that of `best`, repeat by repeat."""
    show(name, [lower / upper for lower, upper in zip(best, times, strict=True)], "x   ")


# --- preparing --------------------------------------------------------------------------------------------------------


def generated_text(path: Path, megabytes: float) -> None:
    """Documents of random words, frequent ones short as in language (Zipf), numbers and punctuation among them."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucmfwygpbvkxqjz", k=2 + rank // 2500)) for rank in range(20_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            drawn = draw.choices(words, weights, k=draw.randint(30, 800))
            drawn[::17] = [f"{draw.randint(0, 9999)}," for _ in drawn[::17]]
            file.write(" ".join(drawn) + ".\n\n")


def measure_prepare(options: argparse.Namespace, work: Path) -> Path:
    """Prepares the text `repeats` times beside bare `encode_batch`; the prepared folder."""
    source = options.source
    if not source:
        source = work / "generated.txt"
        generated_text(source, options.megabytes)

    # A first run trains the tokenizer and warms the file cache.
    dest = work / "prepared"
    threads = options.tokenizer_num_threads
    size = options.tokenizer_batch_size
    command = ["--source", source, "--dest", dest, "--tokenizer_num_threads", threads, "--tokenizer_batch_size", size]
    run_quietly(prepare_language_dataset, command)
    tokenizer_file = work / "tokenizer.json"
    tokenizer_file.write_bytes((dest / "tokenizer.json").read_bytes())
    command += ["--tokenizer", tokenizer_file]

    # The same texts in memory, in batches of the same size, for the tokenizer alone.
    texts = []
    for document in read_documents(source_files(source)):
        texts += filter(None, (document.prompt, document.text))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    tokenizer = read_tokenizer(tokenizer_file)

    def encode() -> None:
        for part in parts:
            tokenizer.encode_batch(part, add_special_tokens=False)

    bare = []
    whole = []
    for _ in range(options.repeats):
        bare.append(seconds(encode))
        whole.append(seconds(run_quietly, prepare_language_dataset, command))

    print(f"{len(texts)} texts, {megabytes:.1f} MB, {threads} tokenizer threads, {options.repeats} repeats; median "
          "(smallest to largest)")
    show_speed("bare encode_batch", megabytes, bare)
    show_speed("prepare_language_dataset", megabytes, whole)
    show_ratio("prepare / encode_batch (at least 0.6)", bare, whole)
    return dest


# --- merging ----------------------------------------------------------------------------------------------------------


def grow(prepared: Path, folder: Path, megabytes: float, part: int) -> int:
    """Makes a prepared folder of about `megabytes` from a third of the lines of `prepared`, repeated.

    `part` (0 to 2) chooses the third. Returns the number of lines.
    """
    folder.mkdir()
    lines = (prepared / "train.jsonl").read_bytes().splitlines(keepends=True)[part::MERGED_SOURCES]
    size = sum(map(len, lines))
    times = max(1, round(megabytes * 1e6 / size))
    (folder / "train.jsonl").write_bytes(b"".join(lines) * times)
    (folder / "val.jsonl").write_bytes(b"")

    (folder / "tokenizer.json").write_bytes((prepared / "tokenizer.json").read_bytes())
    meta = json.loads((prepared / "meta.json").read_text())
    meta["splits"] = {"train": {"samples": len(lines) * times}, "val": {"samples": 0}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return len(lines) * times


def measure_merge(options: argparse.Namespace, prepared: Path, work: Path) -> None:
    """Merges three sources `repeats` times beside `cat` of their files, with fsync and without."""
    folders = [work / f"source{part}" for part in range(MERGED_SOURCES)]
    counts = []
    for part, folder in enumerate(folders):
        counts.append(grow(prepared, folder, options.merge_megabytes / MERGED_SOURCES, part))
    files = [str(folder / "train.jsonl") for folder in folders]
    megabytes = sum(Path(file).stat().st_size for file in files) / 1e6

    copy = work / "copy"
    output = work / "merged"
    command = ["--sources", *folders, "--weights", *counts, "--output", output, "--train_samples", sum(counts),
               "--val_samples", 0]

    def cat(sync: bool) -> None:
        with open(copy, "wb") as file:
            subprocess.run(["cat", *files], stdout=file, check=True)
            if sync:
                os.fsync(file.fileno())

    sides = {
        "cat": functools.partial(cat, sync=False),
        "cat, fsync": functools.partial(cat, sync=True),
        "merge_prepared_batches": functools.partial(run_quietly, merge_prepared_batches, command),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, action in sides.items():
            for old in (copy, *output.glob("*")):
                old.unlink(missing_ok=True)
            os.sync()  # no side pays for what another left to be written
            times[name].append(seconds(action))

    print(f"\n{sum(counts)} lines, {megabytes:.0f} MB in three sources, every line once")
    for name, taken in times.items():
        show_speed(name, megabytes, taken)
    show_ratio("merge / cat (at least 0.3)", times["cat"], times["merge_prepared_batches"])
    show_ratio("merge / cat, fsync", times["cat, fsync"], times["merge_prepared_batches"])


def main(argv: list[str] | None = None) -> int:
    """Measures and prints."""
    options = parse(argv)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        prepared = measure_prepare(options, Path(folder))
        measure_merge(options, prepared, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
