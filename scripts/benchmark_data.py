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
import importlib.util
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from script_tools import ScriptParser, run_script  # noqa: E402
from text_data.documents import read_documents, source_files  # noqa: E402
from text_data.tokenizer import parse_tokenizer  # noqa: E402


def parse(argv: list[str] | None = None) -> argparse.Namespace:
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


def script(name: str):
    """The script `name` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generated_text(path: Path, megabytes: float) -> None:
    """Documents of random words, frequent ones short as in language (Zipf), numbers and punctuation among them."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucmfwygpbvkxqjz", k=2 + rank // 2500)) for rank in range(20_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    with open(path, "w") as file:
        while file.tell() < megabytes * 1e6:
            drawn = draw.choices(words, weights, k=draw.randint(30, 800))
            drawn[::17] = [f"{draw.randint(0, 9999)}," for _ in drawn[::17]]
            file.write(" ".join(drawn) + ".\n\n")


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def quietly(action: Callable[[], object]) -> None:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        action()


def show(name: str, values: list[float], unit: str) -> None:
    print(f"{name:44} {statistics.median(values):8.2f} {unit}  ({min(values):.2f} to {max(values):.2f})")


def measure_prepare(options: argparse.Namespace, work: Path) -> Path:
    """Prepares the text `repeats` times beside bare `encode_batch`; the prepared folder."""
    source = options.source or work / "generated.txt"
    if not options.source:
        generated_text(source, options.megabytes)
    prepare, dest = script("prepare_language_dataset"), work / "prepared"
    threads, size = options.tokenizer_num_threads, options.tokenizer_batch_size
    command = ["--source", source, "--dest", dest, "--tokenizer_num_threads", threads, "--tokenizer_batch_size", size]
    quietly(lambda: prepare.main(list(map(str, command))))  # trains the tokenizer, warms the file cache
    tokenizer_file = work / "tokenizer.json"
    tokenizer_file.write_bytes((dest / "tokenizer.json").read_bytes())
    documents = [document for document in read_documents(source_files(source))]
    texts = [text for document in documents for text in (document.prompt, document.text) if text]
    tokenizer = parse_tokenizer(tokenizer_file.read_text(), str(tokenizer_file))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    parts = [texts[start: start + size] for start in range(0, len(texts), size)]
    command += ["--tokenizer", tokenizer_file]
    bare, whole = [], []
    for _ in range(options.repeats):
        bare.append(seconds(lambda: [tokenizer.encode_batch(part, add_special_tokens=False) for part in parts]))
        whole.append(seconds(lambda: quietly(lambda: prepare.main(list(map(str, command))))))
    print(f"{len(texts)} texts, {megabytes:.1f} MB, {threads} tokenizer threads, {options.repeats} repeats; median "
          "(smallest to largest)")
    show("bare encode_batch", [megabytes / took for took in bare], "MB/s")
    show("prepare_language_dataset", [megabytes / took for took in whole], "MB/s")
    show("prepare / encode_batch (at least 0.6)", [a / b for a, b in zip(bare, whole, strict=True)], "x   ")
    return dest


def grown(prepared: Path, folder: Path, megabytes: float, part: int) -> int:
    """A prepared folder of about `megabytes`, its lines repeated from those of `prepared`; its number of lines."""
    folder.mkdir()
    lines = (prepared / "train.jsonl").read_bytes().splitlines(keepends=True)[part::3]
    once = sum(map(len, lines))
    times = max(1, round(megabytes * 1e6 / once))
    (folder / "train.jsonl").write_bytes(b"".join(lines) * times)
    (folder / "val.jsonl").write_bytes(b"")
    (folder / "tokenizer.json").write_bytes((prepared / "tokenizer.json").read_bytes())
    meta = json.loads((prepared / "meta.json").read_text())
    meta["splits"] = {"train": {"samples": len(lines) * times}, "val": {"samples": 0}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return len(lines) * times


def measure_merge(options: argparse.Namespace, prepared: Path, work: Path) -> None:
    folders = [work / f"source{part}" for part in range(3)]
    counts = [grown(prepared, folder, options.merge_megabytes / 3, part) for part, folder in enumerate(folders)]
    files = [str(folder / "train.jsonl") for folder in folders]
    merge, output, copy = script("merge_prepared_batches"), work / "merged", work / "copy"
    command = ["--sources", *folders, "--weights", *counts, "--output", output, "--train_samples", sum(counts),
               "--val_samples", 0]

    def cat(sync: bool) -> None:
        with open(copy, "wb") as file:
            subprocess.run(["cat", *files], stdout=file, check=True)
            if sync:
                os.fsync(file.fileno())

    plain, synced, merged = [], [], []
    for _ in range(options.repeats):
        for action, took in ((lambda: cat(False), plain), (lambda: cat(True), synced),
                             (lambda: quietly(lambda: merge.main(list(map(str, command)))), merged)):
            for old in (copy, *output.glob("*")):
                old.unlink(missing_ok=True)
            os.sync()  # nobody pays for what another left to be written
            took.append(seconds(action))
    megabytes = sum(Path(file).stat().st_size for file in files) / 1e6
    print(f"\n{sum(counts)} lines, {megabytes:.0f} MB in three sources, every line once")
    for name, took in (("cat", plain), ("cat, fsync", synced), ("merge_prepared_batches", merged)):
        show(name, [megabytes / one for one in took], "MB/s")
    show("merge / cat (at least 0.3)", [a / b for a, b in zip(plain, merged, strict=True)], "x   ")
    show("merge / cat, fsync", [a / b for a, b in zip(synced, merged, strict=True)], "x   ")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        measure_merge(options, measure_prepare(options, Path(folder)), Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
