"""What the hybrid trains and is validated on: prepared triples, the synthetic addition, or random tokens."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.files import named_paths, read_text
from text_data.batches import PreparedBatches, pad_batch
from text_data.synthetic import SimpleTokenizer, build_synthetic_dataset, synthetic_questions
from text_data.tokenizer import read_tokenizer
from text_data.triples import PreparedData, Triple, read_meta

SYNTHETIC = "synthetic"
SYNTHETIC_TRAIN = 9000  # about every pair of numbers that is not held out
RANDOM_VOCABULARY = 1000
RANDOM_IDS = (0, 1, 2)  # pad, bos and eos of the random tokens


@dataclass(frozen=True)
class HybridDataConfig:
    """Which data the hybrid uses and how they are batched. The fields are flags of `train.py --arch hybrid`.

    Attributes:
        dataset: "synthetic", a folder of prepared triples, or None for random tokens.
        dev_sets: further prepared folders that are scored at each validation: `NAME=DIR,NAME=DIR`.
        on_bad_line: what to do with a broken line of a prepared file: "error" or "skip".
        max_seq_len: most tokens of each side of a triple.
        eval_n: questions of the synthetic task that are held out.
        eval_only: True where nothing is trained, so that no training split is opened.
        seed: of the order of the training data, and of synthetic and random ones themselves.
        batch_size: triples of one batch on one rank.
        bucket_batches: batches drawn together and grouped by length; 1: none.
    """

    dataset: str | None = None
    dev_sets: str | None = None
    on_bad_line: str = "error"
    max_seq_len: int = 512
    eval_n: int = 256
    eval_only: bool = False
    seed: int = 0
    batch_size: int = 32
    bucket_batches: int = 1


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


def dev_folders(dev_sets: str | None) -> dict[str, Path]:
    """`math=DIR,code=DIR` by name; `named_paths` says how a path may hold a comma."""
    return {name: Path(folder) for name, folder in named_paths(dev_sets)} if dev_sets else {}


def _name_problems(dev_sets: str | None) -> list[str]:
    """What is wrong with the names of `--dev_sets`, one line each."""
    if not dev_sets:
        return []
    lines = []
    names = [name for name, _ in named_paths(dev_sets)]
    for name, folder in named_paths(dev_sets):
        if not re.fullmatch(r"[\w.-]+", name) or not folder:
            entry = f"{name}={folder}" if folder else name
            lines.append(f"--dev_sets: {entry!r} is no NAME=DIR: write NAME=DIR,NAME=DIR, and a comma in a path as \\,")
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            lines.append(f"--dev_sets: {name} is named twice: choose another name")
    return lines


def data_problems(dataset: str | None, dev_sets: str | None) -> list[str]:
    """Every reason why `--dataset` and `--dev_sets` cannot be used, one line each."""
    dev = dev_folders(dev_sets)
    problems = _name_problems(dev_sets)
    folders = list(dev.values())
    if dataset not in (None, SYNTHETIC):
        folders.insert(0, Path(dataset))

    # Each folder alone: its meta.json and its tokenizer.
    tokenizers = set()  # SHA-256
    for folder in folders:
        try:
            tokenizers.add(read_meta(folder)["tokenizer_sha256"])
            if not (folder / "tokenizer.json").exists():
                raise ValueError(f"{folder} has no tokenizer.json: prepare the folder again")
            read_tokenizer(folder / "tokenizer.json")
        except ValueError as error:
            problems.append(str(error))

    # The dev sets beside the rest: names of their own, one tokenizer for all.
    for name in dev:
        if name in ("validation", SYNTHETIC):
            problems.append(f"--dev_sets {name}=... would hide the run's own {name} rows: choose another name")
    if dev_sets and dataset == SYNTHETIC:
        problems.append("--dev_sets cannot join --dataset synthetic, whose tokenizer knows single characters")
    if len(tokenizers) > 1:
        problems.append("--dataset and --dev_sets were prepared with different tokenizers: prepare them with one")
    return problems


def usable_workers(dataset_workers: int) -> tuple[int, str | None]:
    """(threads that read ahead, at most one a core; a warning where that is fewer than asked for, else None)."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1

    if dataset_workers <= cores:
        return dataset_workers, None
    return cores, f"WARNING: --dataset_workers {dataset_workers}: this machine has {cores} cores, using {cores}"


def open_data(config: HybridDataConfig) -> HybridData:
    """The data that `config` names.

    Raises:
        ValueError: a broken folder.
    """
    if config.dataset == SYNTHETIC:
        return _synthetic_data(config)
    if config.dataset is None:
        return _random_data(config)
    return _prepared_data(config, Path(config.dataset))


def _prepared_data(config: HybridDataConfig, folder: Path) -> HybridData:
    """A prepared folder and the dev sets beside it. Raises ValueError."""
    meta = read_meta(folder)

    def split(place: Path, name: str) -> PreparedData:
        return PreparedData(place, name, config.max_seq_len, config.on_bad_line)

    return HybridData(
        train=None if config.eval_only else split(folder, "train"),
        val=split(folder, "val"),
        dev={name: split(place, "val") for name, place in dev_folders(config.dev_sets).items()},
        vocab_size=meta["vocab_size"],
        pad_id=meta["pad_id"],
        bos_id=meta["bos_id"],
        eos_id=meta["eos_id"],
        tokenizer_json=read_text(folder / "tokenizer.json"),
        questions=[],
    )


def _synthetic_data(config: HybridDataConfig) -> HybridData:
    """Sums; the validation split does not depend on the seed, so that runs can be compared."""
    tokenizer = SimpleTokenizer()
    return HybridData(
        train=build_synthetic_dataset(SYNTHETIC_TRAIN, config.seed, "train", tokenizer),
        val=build_synthetic_dataset(config.eval_n, 0, "val", tokenizer),
        dev={},
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        tokenizer_json=tokenizer.tokenizer.to_str(),
        questions=synthetic_questions(config.eval_n, 0, "val"),
    )


def _random_data(config: HybridDataConfig) -> HybridData:
    """Random tokens in full length, for --dry_run: the memory and time of the longest batch."""
    draw = random.Random(config.seed)
    pad, bos, eos = RANDOM_IDS

    def row() -> list[int]:
        return [draw.randrange(len(RANDOM_IDS), RANDOM_VOCABULARY) for _ in range(config.max_seq_len)]

    # One batch, which comes again and again.
    triples = []
    for _ in range(config.batch_size):
        labels = row()
        triples.append(Triple(row(), [bos, *labels[:-1]], labels))
    return HybridData(triples, triples, {}, RANDOM_VOCABULARY, pad, bos, eos, None, [])


def training_batches(
    data: HybridData, config: HybridDataConfig, rank: int = 0, world: int = 1, workers: int = 0
) -> PreparedBatches:
    """Endless batches of `config.batch_size` triples a rank; `workers` threads read ahead (see `usable_workers`)."""
    return PreparedBatches(
        data.train, config.batch_size, config.seed, data.pad_id, rank, world, workers, config.bucket_batches
    )


def validation_batches(
    part: PreparedData | Sequence[Triple], size: int, pad_id: int, most: int, rank: int = 0, world: int = 1
) -> Iterator[dict[str, Tensor]]:
    """The whole split in order (its first `most` samples, 0: all), in batches; each rank its share of the rows.

    A bad line that is skipped leaves its place empty: in training another takes it, here that would count twice.

    Args:
        part: the split.
        size: triples of one batch on one rank.
        pad_id: token that fills up shorter rows.
        most: samples read, at most.
        rank: this process, from 0.
        world: number of processes.
    """
    end = min(most or len(part), len(part))
    for start in range(0, end, size * world):
        rows = range(start + rank, min(start + size * world, end), world)

        # A rank whose rows are all bad, or are none at the end, has no batch here.
        if isinstance(part, PreparedData):
            lines = [part.line(index) for index in rows]
            triples = [triple for triple in lines if triple is not None]
        else:
            triples = [part[index] for index in rows]
        if triples:
            yield pad_batch(triples, pad_id)
