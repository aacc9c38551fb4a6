"""Writes one reasoning data set as JSON lines of `prompt`, `answer`, `source` and what its evaluation needs.

    python scripts/build_reasoning_dataset.py --dataset gsm8k --split train --output gsm8k.jsonl
    python scripts/build_reasoning_dataset.py --dataset mbpp --source mbpp.jsonl --output mbpp.jsonl
    python scripts/build_reasoning_dataset.py --dataset science_qa --source problems.json --output science.jsonl
    python scripts/build_reasoning_dataset.py --dataset reasoning_gym:chain_sum,syllogism --limit 5000 --output rg.jsonl

Without `--source` the data come from the Hugging Face hub. The rows' fields: docs/data.md.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from batching import TrainStream  # noqa: E402
from engine.files import JsonLineError, json_lines, staged  # noqa: E402
from engine.logs import Progress  # noqa: E402
from engine.records import normalise  # noqa: E402
from reasoning_gym_wrapper import (  # noqa: E402
    EVAL_SEED,
    MAX_REJECTED,
    Reserve,
    make_tasks,
    task_problems,
    task_warnings,
    train_seed,
)
from script_tools import ScriptParser, run_script  # noqa: E402

HUB = {
    "gsm8k": ("openai/gsm8k", "main"),
    "mbpp": ("google-research-datasets/mbpp", "full"),
    "science_qa": ("derek-thomas/ScienceQA", None),
}
# The raw MBPP file holds every split; these are the ranges of task_id its authors give.
MBPP_SPLITS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}
CALCULATOR = re.compile(r"<<[^<>]*>>")
PROBLEMS_SHOWN = 5
RESERVED = 1024  # evaluation questions of each Reasoning Gym task that no training row may repeat
Raw = tuple[str, dict[str, Any]]  # where the item stands, for messages; the item


class Skip(Exception):
    """This item is left out on purpose, and counted."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("--dataset", required=True, help="gsm8k, mbpp, science_qa or reasoning_gym:TASK,TASK")
    parser.add_argument("--split", help="default: train from the hub and for reasoning_gym, all of a --source file")
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
    problems = []
    if name == "reasoning_gym":
        if not options.tasks:
            problems.append("--dataset reasoning_gym needs tasks: reasoning_gym:chain_sum,syllogism")
        if options.source:
            problems.append("--source does not go with reasoning_gym, whose items are generated: leave it out")
        if options.split not in (None, "train", "test"):
            problems.append(f"--split {options.split} of reasoning_gym: expected train or test")
        options.limit = options.limit or 1000
    elif name not in HUB or colon:
        problems.append(f"--dataset {options.dataset!r}: expected {', '.join(HUB)} or reasoning_gym:TASK,TASK")
    if name == "mbpp" and options.split not in (None, *MBPP_SPLITS):
        problems.append(f"--split {options.split} of mbpp: expected {', '.join(MBPP_SPLITS)}")
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


# --- raw items --------------------------------------------------------------------------------------------------------


def raw_items(options: argparse.Namespace) -> Iterator[Raw]:
    """Every item as upstream has it, with a name for its place."""
    if options.source is None:
        yield from _hub_items(options.dataset, options.split or "train")
    elif options.dataset == "science_qa":
        yield from _problems(options.source)
    else:
        yield from _lines(options.source)


def _lines(path: Path) -> Iterator[Raw]:
    try:
        for number, item in json_lines(path):
            yield f"{path} line {number}", item
    except JsonLineError as error:
        raise ValueError(f"{path} line {error.number} is not JSON ({error.__cause__}): give the file as upstream has "
                         "it, one object a line") from error


def _problems(path: Path) -> Iterator[Raw]:
    try:
        problems = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): give ScienceQA's problems.json") from error
    if not isinstance(problems, dict):
        raise ValueError(f"{path} holds a {type(problems).__name__}: expected ScienceQA's problems.json, items by id")
    for key, item in problems.items():
        yield f"{path} item {key}", item if not isinstance(item, dict) else {"id": key, **item}


def _hub_items(dataset: str, split: str) -> Iterator[Raw]:
    import datasets

    name, config = HUB[dataset]
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # noqa: BLE001 - hub, network and cache raise what they like
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"cannot load {name} split {split} from the hub ({type(error).__name__}: {reason}): check the "
                         "network and the split, or give the raw file with --source") from error
    if dataset == "science_qa":
        loaded = loaded.cast_column("image", datasets.Image(decode=False))  # bytes: no need to decode what is dropped
    for number, item in enumerate(loaded, start=1):
        yield f"{name} {split} item {number}", item


def in_split(options: argparse.Namespace, item: dict[str, Any]) -> bool:
    """Whether an item of a raw file belongs to `--split`; the hub's items are chosen already."""
    if options.source is None or options.split is None or options.dataset == "gsm8k":
        return True
    if options.dataset == "science_qa":
        return item.get("split") == options.split
    first, last = MBPP_SPLITS[options.split]
    if type(item.get("task_id")) is not int:
        raise ValueError("task_id must be a whole number, the splits are ranges of it")
    return first <= item["task_id"] <= last


# --- rows -------------------------------------------------------------------------------------------------------------


def _text(item: dict[str, Any], key: str, default: str | None = None) -> str:
    value = item.get(key, default)
    if value is None and default is not None:
        value = default
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text, got {type(value).__name__}")
    value = value.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not value and default is None:
        raise ValueError(f"{key} is empty")
    return value


def gsm8k_row(item: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Worked steps without calculator marks, and the final number without thousands separators (Cobbe et al. 2021)."""
    steps, mark, final = _text(item, "answer").rpartition("####")
    if not mark or not final.strip():
        raise ValueError("answer has no final line '#### N'")
    steps = CALCULATOR.sub("", steps).strip()
    final = final.strip().replace(",", "")
    return {"prompt": _text(item, "question"), "answer": f"{steps}\n#### {final}".lstrip(), "source": "gsm8k",
            "steps": steps, "final_answer": final}


def mbpp_row(item: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The task with its set-up and first test, which fixes the function's name and arguments (Austin et al. 2021)."""
    tests = item.get("test_list")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError("test_list must be a list of at least one text")
    tests = [_text({"test": test}, "test") for test in tests]
    setup, code = _text(item, "test_setup_code", ""), _text(item, "code")
    shown = f"{setup}\n{tests[0]}" if setup else tests[0]
    prompt = f"{_text(item, 'text')}\nThe code must pass this test:\n{shown}"
    return {"prompt": prompt, "answer": code, "source": "mbpp", "tests": tests, "setup": setup, "code": code,
            "task_id": item.get("task_id")}


def science_qa_row(item: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Hint, question and lettered choices; lecture, solution, then the choice as the last line (Lu et al. 2022).

    Raises:
        Skip: a question that needs its picture, with `--image_questions drop`.
    """
    if item.get("image") and options.image_questions == "drop":
        raise Skip
    choices, index = item.get("choices"), item.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("choices must be a list of at least two texts")
    if type(index) is not int or not 0 <= index < len(choices):
        raise ValueError(f"answer is {index!r}, expected an index from 0 to {len(choices) - 1}")
    hint = _text(item, "hint", "")
    picture = _picture(item, options) if item.get("image") else {}
    shown = f"[picture, {picture['width']} x {picture['height']} pixels]" if "width" in picture else "[picture]"
    parts = [hint] if hint else []
    parts += [shown] if picture else []
    parts += [_text(item, "question"), *(f"({chr(65 + i)}) {choice.strip()}" for i, choice in enumerate(choices))]
    rationale = "\n".join(filter(None, (_text(item, "lecture", ""), _text(item, "solution", ""))))
    answer = "\n".join(filter(None, (rationale, f"The answer is ({chr(65 + index)}).")))
    row = {"prompt": "\n".join(parts), "answer": answer, "source": "science_qa", "choices": choices,
           "answer_index": index, "rationale": rationale}
    return row | {"image": picture} if picture else row


def _picture(item: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The picture's name, and its size in pixels where it is at hand: in the hub's row, or in `images/` beside the
    raw file as upstream unpacks it, `images/<split>/<id>/<name>`."""
    image = item["image"]
    if isinstance(image, str):
        path = options.source.parent / "images" / str(item.get("split")) / str(item.get("id")) / image
        name, content = image, path.read_bytes() if path.is_file() else None
    else:
        name, content = image.get("path") or "image.png", image.get("bytes")
    if not content:
        return {"name": name}
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as picture:
            return {"name": name, "width": picture.width, "height": picture.height}
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is no picture that can be read") from error


ROWS = {"gsm8k": gsm8k_row, "mbpp": mbpp_row, "science_qa": science_qa_row}


def rows(options: argparse.Namespace, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The finished rows; `counts` gets what was left out.

    Raises:
        ValueError: broken items, up to `PROBLEMS_SHOWN` of them, one line each.
    """
    problems: list[str] = []
    for place, item in raw_items(options):
        try:
            if not isinstance(item, dict):
                raise ValueError(f"expected an object, got {type(item).__name__}")
            if not in_split(options, item):
                counts["of other splits"] += 1
                continue
            row = ROWS[options.dataset](item, options)
        except Skip:
            counts["with images"] += 1
        except ValueError as error:
            problems.append(f"{place}: {error}")
            if len(problems) >= PROBLEMS_SHOWN:
                break
        else:
            if not problems:  # after a broken item only its like are looked for, so that no limit hides it
                yield row
    if problems:
        raise ValueError("\n".join([*problems, f"no {options.dataset} data as upstream has them: correct the source"]))


def reasoning_gym_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Distinct generated questions, balanced over the tasks. `train`: none that evaluation reserves; `test`: those."""
    problems = task_problems(options.tasks, options.task_config, options.allow_code_tasks, supervised=True)
    if problems:
        raise ValueError("\n".join(problems))
    for warning in task_warnings(options.tasks):
        print(f"WARNING: {warning}", file=sys.stderr)
    tasks = make_tasks(options.tasks, options.task_config)
    if options.split == "test":
        per_task = -(-options.limit // len(tasks))
        drawn: Iterable = Reserve(tasks, per_task, EVAL_SEED, must_fill=False).examples
    else:
        drawn = TrainStream(tasks, Reserve(tasks, RESERVED, EVAL_SEED, must_fill=False), train_seed(options.seed))
    seen: set[str] = set()
    repeated = 0
    for example in drawn:
        question = normalise(example.question)
        if question in seen:
            repeated += 1
            if repeated >= MAX_REJECTED:
                return
            continue
        seen.add(question)
        repeated = 0
        yield {"prompt": example.question, "answer": example.target, "source": "reasoning_gym", "task": example.task}


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    counts: Counter[str] = Counter()
    made = reasoning_gym_rows(options) if options.dataset == "reasoning_gym" else rows(options, counts)
    if options.dataset == "gsm8k" and options.source and options.split:
        print(f"--split {options.split}: a raw GSM8K file is one split, all of it is read", file=sys.stderr)
    written = 0
    with (staged(options.output.parent, [options.output.name]) as (file,),
          Progress(options.limit or None, options.dataset, "rows") as progress):
        for row in itertools.islice(made, options.limit or None):
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
            written += 1
            progress.update(written)
        if not written:
            left = ", ".join(f"{count} {why}" for why, count in counts.items())
            raise ValueError(f"not one row to write ({left or 'the source is empty'}): change --split, --source or "
                             "--image_questions")
    for why, count in counts.items():
        print(f"left out: {count} {why}")
    if options.dataset == "science_qa" and options.image_questions == "keep":
        print("image questions are kept: the text names the picture, it does not show it")
    if options.limit and written < options.limit:
        print(f"only {written} rows, {options.limit} were asked for: there are no more")
    print(f"{options.output}: {written} rows of {options.dataset}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
