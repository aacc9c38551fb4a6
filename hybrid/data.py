"""What the hybrid trains and is validated on: prepared triples, the synthetic addition, or random tokens."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import options
from text_data.batches import PreparedBatches, pad_batch
from text_data.synthetic import SimpleTokenizer, build_synthetic_dataset, synthetic_questions
from text_data.triples import PreparedData, Triple, read_meta

SYNTHETIC = "synthetic"
SYNTHETIC_TRAIN = 9000  # about every pair of numbers that is not held out
RANDOM_VOCABULARY = 1000


@dataclass
class HybridData:
    """Training and validation triples with the tokenizer's facts. `train` is None where nothing is trained."""

    train: PreparedData | Sequence[Triple] | None
    val: PreparedData | Sequence[Triple]
    dev: dict[str, PreparedData]
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    tokenizer_json: str | None  # the tokenizers file; None for random tokens
    questions: list[tuple[str, str]]  # (prompt, answer) that validation answers by generation: the synthetic task's


def dev_sets(text: str | None) -> dict[str, Path]:
    """`math=DIR,code=DIR` by name."""
    return {name: Path(folder) for name, _, folder in (part.partition("=") for part in options.names(text))}


def data_problems(opts: argparse.Namespace) -> list[str]:
    """Every reason why --dataset and --dev_sets cannot be used, one line each."""
    folders = [Path(opts.dataset)] if opts.dataset not in (None, SYNTHETIC) else []
    found, seals = [], set()
    for folder in [*folders, *dev_sets(opts.dev_sets).values()]:
        try:
            seals.add(read_meta(folder)["tokenizer_sha256"])
            (folder / "tokenizer.json").stat()
        except OSError:
            found.append(f"{folder} has no tokenizer.json: prepare the folder again")
        except ValueError as error:
            found.append(str(error))
    found += [f"--dev_sets {name}=... would hide the run's own {name} rows: choose another name"
              for name in dev_sets(opts.dev_sets) if name in ("validation", SYNTHETIC)]
    if opts.dev_sets and opts.dataset == SYNTHETIC:
        found.append("--dev_sets cannot join --dataset synthetic, whose tokenizer knows single characters")
    if len(seals) > 1:
        found.append("--dataset and --dev_sets were prepared with different tokenizers: prepare them with one")
    return found


def workers_of(opts: argparse.Namespace) -> tuple[int, str | None]:
    """(threads that read ahead, a warning where fewer than asked)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if opts.dataset_workers <= cores:
        return opts.dataset_workers, None
    return cores, f"WARNING: --dataset_workers {opts.dataset_workers}: this machine has {cores} cores, using {cores}"


def open_data(opts: argparse.Namespace) -> HybridData:
    """The data of `--dataset`. Raises ValueError: a broken folder."""
    if opts.dataset == SYNTHETIC:
        return _synthetic(opts)
    if opts.dataset is None:
        return _random(opts)
    folder, meta = Path(opts.dataset), read_meta(opts.dataset)

    def split(where: Path, name: str) -> PreparedData:
        return PreparedData(where, name, opts.max_seq_len, opts.on_bad_line)

    return HybridData(
        train=None if opts.eval_only else split(folder, "train"), val=split(folder, "val"),
        dev={name: split(where, "val") for name, where in dev_sets(opts.dev_sets).items()},
        vocab_size=meta["vocab_size"], pad_id=meta["pad_id"], bos_id=meta["bos_id"], eos_id=meta["eos_id"],
        tokenizer_json=(folder / "tokenizer.json").read_text(encoding="utf-8"), questions=[],
    )


def _synthetic(opts: argparse.Namespace) -> HybridData:
    tokenizer = SimpleTokenizer()
    return HybridData(
        train=build_synthetic_dataset(SYNTHETIC_TRAIN, opts.seed, "train", tokenizer),
        val=build_synthetic_dataset(opts.eval_n, 0, "val", tokenizer), dev={}, vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
        tokenizer_json=tokenizer.tokenizer.to_str(), questions=synthetic_questions(opts.eval_n, 0, "val"),
    )


def _random(opts: argparse.Namespace) -> HybridData:
    """Random tokens in full length, for --dry_run: the memory and time of the longest batch."""
    draw = random.Random(opts.seed)

    def row() -> list[int]:
        return [draw.randrange(3, RANDOM_VOCABULARY) for _ in range(opts.max_seq_len)]

    triples = [Triple(row(), [1, *labels[:-1]], labels) for labels in (row() for _ in range(opts.batch_size))]
    return HybridData(triples, triples, {}, RANDOM_VOCABULARY, 0, 1, 2, None, [])


def training_batches(data: HybridData, opts: argparse.Namespace, rank: int, world: int, workers: int
                     ) -> PreparedBatches:
    """Endless batches of `--batch_size` triples a rank."""
    return PreparedBatches(data.train, opts.batch_size, opts.seed, data.pad_id, rank, world, workers,
                           opts.bucket_batches)


def validation_batches(part: PreparedData | Sequence[Triple], size: int, pad_id: int, most: int, rank: int = 0,
                       world: int = 1) -> Iterator[dict[str, Tensor]]:
    """The whole split in order (its first `most` samples, 0: all), in batches; each rank its share of the rows.

    A bad line that is skipped leaves its place empty: in training another takes it, here that would count twice.
    """
    end = min(most or len(part), len(part))
    for start in range(0, end, size * world):
        rows = range(start + rank, min(start + size * world, end), world)
        triples = [part.line(index) if isinstance(part, PreparedData) else part[index] for index in rows]
        triples = [triple for triple in triples if triple is not None]
        if triples:
            yield pad_batch(triples, pad_id)
