"""Writes one reasoning data set as JSON lines of `prompt`, `answer`, `source` and what its evaluation needs.

    python scripts/build_reasoning_dataset.py --dataset gsm8k --split train --output gsm8k.jsonl
    python scripts/build_reasoning_dataset.py --dataset mbpp --source mbpp.jsonl --output mbpp.jsonl
    python scripts/build_reasoning_dataset.py --dataset science_qa --source problems.json --split train \
        --output science.jsonl
    python scripts/build_reasoning_dataset.py --dataset reasoning_gym:chain_sum,syllogism --limit 5000 --output rg.jsonl

Without `--source` the data come from the Hugging Face hub. The rows' fields: docs/data.md.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from addon.streams import TrainStream  # noqa: E402
from engine.files import staged  # noqa: E402
from engine.progress import Progress  # noqa: E402
from engine.records import normalise  # noqa: E402
from reasoning_gym_wrapper import (  # noqa: E402
    EVAL_SEED,
    MAX_REJECTED,
    Example,
    Reserve,
    make_tasks,
    task_problems,
    task_warnings,
    train_seed,
)
from script_tools import ScriptParser, run_script  # noqa: E402
from text_data.documents import ALL_SPLITS, Splits  # noqa: E402
from upstream_rows import HUB, MBPP_SPLITS, ROWS, Row, Skip, in_split, raw_items, split_of  # noqa: E402

PROBLEMS_SHOWN = 5
RESERVED = 1024  # evaluation questions of each Reasoning Gym task that no training row may repeat
GENERATED_ROWS = 1000  # of Reasoning Gym, whose items have no end


# --- the command line -------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; `dataset` without its tasks, which are in `tasks`.

    Raises:
        ValueError: everything wrong with it, one line each.
    """
    parser = ScriptParser(__doc__)
    parser.add_argument("--dataset", required=True, help="gsm8k, mbpp, science_qa or reasoning_gym:TASK,TASK")
    parser.add_argument("--split", help="default: train from the hub and for reasoning_gym; the only one of a --source "
                        "file; `all` mixes those of a ScienceQA file")
    parser.add_argument("--limit", type=int, default=0, help="rows at most; 0: all (reasoning_gym: 1000)")
    parser.add_argument("--output", type=Path, required=True, help="FILE.jsonl")
    parser.add_argument("--source", type=Path, help="the upstream's raw file, instead of the hub")
    parser.add_argument("--image_questions", choices=("drop", "keep"), default="drop", help="science_qa only")
    parser.add_argument("--task_config", default="default", help="reasoning_gym only: as in train.py")
    parser.add_argument("--allow_code_tasks", action="store_true", help="reasoning_gym only: as in train.py")
    parser.add_argument("--seed", type=int, default=0, help="reasoning_gym only")
    options = parser.parse_args(argv)

    name, colon, tasks = options.dataset.partition(":")
    options.tasks = [task for task in tasks.split(",") if task]
    if name == "reasoning_gym":
        problems = generated_problems(options)
        options.limit = options.limit or GENERATED_ROWS
    else:
        problems = upstream_problems(options, name, bool(colon))

    # What holds for every data set.
    if options.limit < 0:
        problems.append(f"--limit {options.limit} must be at least 0 (all)")
    if options.seed < 0:
        problems.append(f"--seed {options.seed} must be at least 0")
    if options.source and not options.source.is_file():
        problems.append(f"--source {options.source} is no file: give the upstream's raw file, or leave it out")
    if options.output.is_dir():
        problems.append(f"--output {options.output} is a folder: give the path of a file")

    if problems:
        raise ValueError("\n".join(problems))
    options.dataset = name
    return options


def generated_problems(options: argparse.Namespace) -> list[str]:
    """What is wrong with a request for Reasoning Gym, one line each."""
    problems = []
    if not options.tasks:
        problems.append("--dataset reasoning_gym needs tasks: reasoning_gym:chain_sum,syllogism")
    if options.source:
        problems.append("--source does not go with reasoning_gym, whose items are generated: leave it out")
    if options.split not in (None, "train", "test"):
        problems.append(f"--split {options.split} of reasoning_gym: expected train or test")
    return problems


def upstream_problems(options: argparse.Namespace, name: str, has_tasks: bool) -> list[str]:
    """What is wrong with a request for the upstream data set `name`, one line each."""
    problems = []
    if name not in HUB or has_tasks:
        problems.append(f"--dataset {options.dataset!r}: expected {', '.join(HUB)} or reasoning_gym:TASK,TASK")
    if options.split == ALL_SPLITS and not options.source:
        problems.append(f"--split {ALL_SPLITS} needs --source: the hub gives one split at a time")
    if name == "mbpp" and options.split not in (None, ALL_SPLITS, *MBPP_SPLITS):
        problems.append(f"--split {options.split} of mbpp: expected {', '.join(MBPP_SPLITS)}")
    return problems


# --- rows -------------------------------------------------------------------------------------------------------------


def source_splits(options: argparse.Namespace) -> Splits:
    """The splits of a raw file of ScienceQA or MBPP and their items; none of the hub, which gives one at a time.

    Raises:
        ValueError: a ScienceQA file holds several splits and none is chosen, or none of the chosen one.
    """
    splits = Splits(options.split)
    if options.source is None or options.dataset == "gsm8k":
        return splits
    for _, item in raw_items(options.dataset, options.source, options.split):
        splits.takes({"split": split_of(options.dataset, item)})

    # MBPP is published with one number a task in place of a split: its file is taken whole unless a split is named.
    if options.dataset == "science_qa" and splits.problem():
        raise ValueError(f"{options.source}: {splits.problem()}")
    return splits


def upstream_rows(options: argparse.Namespace, left_out: Counter[str]) -> Iterator[Row]:
    """The finished rows of an upstream data set; `left_out` counts, by reason, what is not among them.

    Raises:
        ValueError: broken items, up to `PROBLEMS_SHOWN` of them, one line each.
    """
    make_row = ROWS[options.dataset]
    if options.dataset == "science_qa":
        images = options.source.parent / "images" if options.source else None
        make_row = functools.partial(make_row, keep_images=options.image_questions == "keep", images=images)
    split = options.split if options.source else None  # the hub gives one split alone
    if split == ALL_SPLITS:
        split = None

    problems: list[str] = []
    for place, item in raw_items(options.dataset, options.source, options.split):
        try:
            if not isinstance(item, dict):
                raise ValueError(f"expected an object, got {type(item).__name__}")
            if split and not in_split(options.dataset, split, item):
                left_out["of other splits"] += 1
                continue
            row = make_row(item)
        except Skip:
            left_out["with images"] += 1
        except ValueError as error:
            problems.append(f"{place}: {error}")
            if len(problems) >= PROBLEMS_SHOWN:
                break
        else:
            if not problems:  # after a broken item only its like are looked for, so that no limit hides it
                yield row

    if problems:
        raise ValueError("\n".join([*problems, f"no {options.dataset} data as upstream has them: correct the source"]))


def reasoning_gym_rows(options: argparse.Namespace, left_out: Counter[str]) -> Iterator[Row]:
    """Distinct generated questions, balanced over the tasks. `train`: none that evaluation reserves; `test`: those.

    `left_out` counts, by reason, the drawn items that are not among them.

    Raises:
        ValueError: tasks that cannot be used, one line each.
    """
    problems = task_problems(options.tasks, options.task_config, options.allow_code_tasks, supervised=True)
    if problems:
        raise ValueError("\n".join(problems))
    for warning in task_warnings(options.tasks):
        print(f"WARNING: {warning}", file=sys.stderr)

    tasks = make_tasks(options.tasks, options.task_config)
    if options.split == "test":
        per_task = -(-options.limit // len(tasks))
        examples: Iterable[Example] = Reserve(tasks, per_task, EVAL_SEED, must_fill=False).examples
    else:
        reserve = Reserve(tasks, RESERVED, EVAL_SEED, must_fill=False)
        examples = TrainStream(tasks, reserve, train_seed(options.seed))

    # Small tasks run out of new questions: after so many repetitions in a row there are none.
    seen: set[str] = set()
    repeated = 0
    for example in examples:
        question = normalise(example.question)
        if question in seen:
            repeated += 1
            if repeated >= MAX_REJECTED:
                return
            continue

        seen.add(question)
        repeated = 0
        failing = sum(len(task.left_out) for task in tasks)
        if failing:
            left_out["items whose gold answer fails its own verifier"] = failing
        yield {"prompt": example.question, "answer": example.target, "source": "reasoning_gym", "task": example.task}


# --- the command ------------------------------------------------------------------------------------------------------


def write_rows(rows: Iterable[Row], output: Path, limit: int, label: str) -> int:
    """Writes rows as JSON lines, at most `limit` (0: all); returns their number. Nothing stays where it raises."""
    written = 0
    with (
        staged(output.parent, [output.name]) as (file,),
        Progress(limit or None, label, "rows") as progress,
    ):
        for row in itertools.islice(rows, limit or None):
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
            written += 1
            progress.update(written)
        if not written:
            raise NoRows
    return written


class NoRows(Exception):
    """There is nothing to write."""


def main(argv: list[str] | None = None) -> int:
    """Builds and reports. Raises ValueError, OSError."""
    options = parse(argv)
    left_out: Counter[str] = Counter()
    splits = Splits(options.split)
    if options.dataset == "reasoning_gym":
        rows = reasoning_gym_rows(options, left_out)
    else:
        splits = source_splits(options)
        rows = upstream_rows(options, left_out)
    if options.dataset == "gsm8k" and options.source and options.split:
        print(f"--split {options.split}: a raw GSM8K file is one split, all of it is read", file=sys.stderr)

    try:
        written = write_rows(rows, options.output, options.limit, options.dataset)
    except NoRows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise ValueError(
            f"not one row to write ({reasons or 'the source is empty'}): change --split, --source or --image_questions"
        ) from None

    if len(splits.counts) > 1 and options.split in (None, ALL_SPLITS):
        print(f"mixed: items of the splits {splits.shown()}; --split takes one")
    elif splits.counts:
        print(f"the source has items of: {splits.shown()}")
    for reason, count in left_out.items():
        print(f"left out: {count} {reason}")
    if options.dataset == "science_qa" and options.image_questions == "keep":
        print("image questions are kept: the text names the picture, it does not show it")
    if options.limit and written < options.limit:
        print(f"only {written} rows, {options.limit} were asked for: there are no more")
    print(f"{options.output}: {written} rows of {options.dataset}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
