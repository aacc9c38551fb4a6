"""Checks every line of a prepared folder and sums it up; exit status 2 if anything is wrong.

    python scripts/validate_dataset.py prepared/mix
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from engine.progress import Progress  # noqa: E402
from engine.worker_pool import WorkerError, WorkerPool, worker_count, workers_problem  # noqa: E402
from script_tools import ScriptParser, file_sha256, run_script  # noqa: E402
from text_data.checking import SHOWN, SIDES, Found, Range, line_checker, ranges  # noqa: E402
from text_data.tokenizer import read_tokenizer, vocabulary_size  # noqa: E402
from text_data.triples import SPLITS, read_meta  # noqa: E402


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises ValueError: one line."""
    parser = ScriptParser(__doc__)
    parser.add_argument("folder", type=Path, help="the prepared folder")
    parser.add_argument("--workers", type=int, default=1, help="processes that check; 0: one for each core")
    options = parser.parse_args(argv)
    problem = workers_problem(options.workers)
    if problem:
        raise ValueError(problem)
    options.workers = worker_count(options.workers)
    return options


def tokenizer_problems(folder: Path, meta: dict[str, Any]) -> list[str]:
    """What is wrong with the folder's tokenizer.json, one line each."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return [f"{path} is missing"]
    if file_sha256(path) != meta["tokenizer_sha256"]:
        return [f"{path} is not the one meta.json names (sha256)"]

    try:
        size = vocabulary_size(read_tokenizer(path))
    except ValueError as error:
        return [str(error)]
    if size != meta["vocab_size"]:
        return [f"{path} has {size} tokens, meta.json says {meta['vocab_size']}"]
    return []


def check_split(path: Path, pool: WorkerPool[Range, Found], known: np.ndarray | None) -> tuple[Found, np.ndarray, int]:
    """Goes through a split's lines: what they are like, their digests, and how many are among the digests `known`.

    With `known` the digests are dropped as they come: only those of val, which is small, are worth their memory.

    Raises:
        ValueError: the file cannot be read; a worker has ended.
    """
    found = Found()
    digests = [np.zeros(0, np.uint64)]
    repeated = 0
    try:
        size = path.stat().st_size
        with Progress(size // 10**6 or None, path.stem, "MB") as progress:
            for part, later in zip(ranges(path, size), pool.in_order(ranges(path, size)), strict=True):
                found.count(later)
                if known is None:
                    digests.append(later.digests)
                else:
                    repeated += int(np.isin(later.digests, known).sum())
                progress.update(part.end // 10**6, lines=found.lines)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    return found, np.concatenate(digests), repeated


def problems_of(path: Path, found: Found, samples: int) -> list[str]:
    """What is wrong with a split of which meta.json says that it holds `samples` lines, one line each."""
    problems = [f"{path} line {number + 1}: {problem}" for number, problem in found.problems]
    if found.bad > SHOWN:
        problems.append(f"{path}: {found.bad} bad lines in all, the first {SHOWN} are named")
    if found.lines != samples:
        problems.append(f"{path} holds {found.lines} lines, meta.json says {samples}")
    return problems


def summary_of(split: str, found: Found) -> str:
    """What a split holds, on one line."""
    good = max(found.lines - found.bad, 1)
    sides = []
    for side in SIDES:
        tokens = found.tokens[side]
        sides.append(f"{side} {tokens} tokens (mean {tokens / good:.1f}, longest {found.longest[side]})")
    return f"{split}: {found.lines} triples, {', '.join(sides)}, {found.ignored} labels ignored"


def main(argv: list[str] | None = None) -> int:
    """Prints the summary. Raises ValueError: everything that is wrong, one line each."""
    options = parse(argv)
    folder = options.folder
    meta = read_meta(folder)
    problems = tokenizer_problems(folder, meta)

    summary = []
    repeated = 0
    known: np.ndarray | None = None  # digests of val
    with WorkerPool(line_checker, (meta,), options.workers) as pool:
        for split in reversed(SPLITS):  # val first
            path = folder / f"{split}.jsonl"
            try:
                found, digests, again = check_split(path, pool, known)
            except WorkerError:
                raise
            except ValueError as error:
                problems.append(str(error))
                continue
            problems += problems_of(path, found, meta["splits"][split]["samples"])
            summary.append(summary_of(split, found))
            repeated += again
            known = digests if known is None else known

    if problems:
        raise ValueError("\n".join(problems))

    print("\n".join(summary))
    if repeated:
        print(f"WARNING: {repeated} triples of train stand in val as well", file=sys.stderr)
    print(f"{folder}: every line is good; vocabulary {meta['vocab_size']}, at most {meta['max_seq_len']} tokens a side")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
