"""Measures data preparation: against what it cannot beat, and one process against several.

    python scripts/benchmark_data.py                          # on generated text
    python scripts/benchmark_data.py --source corpus/ --repeats 9
    python scripts/benchmark_data.py --workers 2 --source text.txt --megabytes 200

Each repeat runs both sides one after the other; the ratio of their throughputs is taken within the repeat. Printed are
the medians with the smallest and largest value seen. Preparing includes reading, hashing, cutting, formatting, writing
and fsync; merging includes reading the index, drawing, writing and fsync, so `cat` is shown with fsync and without.

With `--workers` every script runs twice on the same text: as one process with one tokenizer thread, and with so many
workers. Both must write the same bytes. The text is that of the source, again and again with other digits, until there
are `--megabytes` of it. For N MB of text it needs about 10 N MB of disk.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import json
import os
import random
import shutil
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
    parser.add_argument("--megabytes", type=float, default=8, help="of generated text; with --workers, of any text")
    parser.add_argument("--workers", type=int, default=0, help="compare one process with so many workers, from 2; "
                        "0: compare with encode_batch and cat")
    parser.add_argument("--merge_megabytes", type=float, default=150, help="of prepared lines to merge")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokenizer_num_threads", type=int, default=1)
    parser.add_argument("--tokenizer_batch_size", type=int, default=4096)
    parser.add_argument("--work", type=Path, help="folder for the files, on the disk to measure (default: temporary)")
    options = parser.parse_args(argv)
    for name in ("megabytes", "merge_megabytes", "repeats", "tokenizer_num_threads", "tokenizer_batch_size"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} {getattr(options, name)} must be positive")
    if options.workers < 0 or options.workers == 1:
        parser.error(f"--workers {options.workers} must be at least 2, or 0")
    if options.workers and options.source and not options.source.is_file():
        parser.error(f"--source {options.source} must be one text file with --workers")
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


# --- several processes ------------------------------------------------------------------------------------------------


class Run:
    """One run of a script, as the system counted it.

    Attributes:
        wall_s: seconds of the clock.
        cpu_s: of the CPU, of all its processes.
        peak_mb: the most memory that one of its processes held, mapped files included.
        digest: of all the files that it wrote.
    """

    def __init__(self, name: str, words: Sequence[object], output: Path | None):
        if output is not None:
            shutil.rmtree(output, ignore_errors=True)
        os.sync()  # no run pays for what another left to be written
        command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, words)]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        self.wall_s = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise ValueError(f"{' '.join(command)} ended with status {process.returncode}: run it alone to see why")

        self.cpu_s = usage.ru_utime + usage.ru_stime
        self.peak_mb = usage.ru_maxrss * 1024 / 1e6
        digest = hashlib.sha256()
        for path in sorted(output.iterdir()) if output is not None else ():
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        self.digest = digest.hexdigest()[:12] if output is not None else "-"


def repeated_text(source: Path, path: Path, megabytes: float) -> None:
    """Writes the text of `source` again and again, each time with its digits exchanged, until there is so much."""
    text = source.read_text(encoding="utf-8").rstrip("\n") + "\n\n"
    draw = random.Random(0)
    size = len(text.encode())
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(max(round(megabytes * 1e6 / size), 1)):
            digits = "".join(draw.sample("0123456789", 10))
            file.write(text.translate(str.maketrans("0123456789", digits)))


def compare(label: str, name: str, words: Sequence[object], output: Path | None, workers: int,
            alone: Sequence[object] = ()) -> None:
    """Runs a script as one process, with the words `alone` besides, and with workers, and prints both.

    Raises:
        ValueError: they did not write the same.
    """
    one = Run(name, [*words, "--workers", 1, *alone], output)
    several = Run(name, [*words, "--workers", workers], output)
    for count, run in ((1, one), (workers, several)):
        print(f"{label:32} {count:3} {run.wall_s:9.1f} {run.cpu_s:9.1f} {run.peak_mb:9.0f}  {run.digest}", flush=True)
    print(f"{'':32} {one.wall_s / several.wall_s:.2f} times as fast", flush=True)
    if one.digest != several.digest:
        raise ValueError(f"{label}: {workers} workers do not write what one process writes")


def measure_workers(options: argparse.Namespace, work: Path) -> None:
    """Runs prepare, merge and validate as one process and with workers."""
    text = work / "text.txt"
    source = options.source
    if not source:
        source = work / "generated.txt"
        generated_text(source, min(options.megabytes, 8))
    repeated_text(source, text, options.megabytes)

    print(f"{text.stat().st_size / 1e6:.0f} MB of text, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'':32} {'':3} {'wall s':>9} {'CPU s':>9} {'peak MB':>9}  files")
    prepared = work / "prepared"
    words: list[object] = ["--source", text, "--dest", prepared]
    alone = ("--tokenizer_num_threads", 1)
    compare("prepare, tokenizer trained", "prepare_language_dataset", words, prepared, options.workers, alone)

    tokenizer = work / "tokenizer.json"
    shutil.copy(prepared / "tokenizer.json", tokenizer)
    words += ["--tokenizer", tokenizer]
    compare("prepare, tokenizer given", "prepare_language_dataset", words, prepared, options.workers, alone)

    splits = json.loads((prepared / "meta.json").read_text(encoding="utf-8"))["splits"]
    merged = work / "merged"
    compare("merge, every line once", "merge_prepared_batches", [
        "--sources", prepared, "--weights", 1, "--output", merged, "--train_samples", splits["train"]["samples"],
        "--val_samples", splits["val"]["samples"]], merged, options.workers)
    shutil.rmtree(merged)
    compare("validate", "validate_dataset", [prepared], None, options.workers)


def main(argv: list[str] | None = None) -> int:
    """Measures and prints."""
    options = parse(argv)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        if options.workers:
            measure_workers(options, Path(folder))
            return 0
        prepared = measure_prepare(options, Path(folder))
        measure_merge(options, prepared, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
