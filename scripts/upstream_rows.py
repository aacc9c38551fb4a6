"""The upstreams of reasoning data: where their items come from, and one row of JSON for each item.

For `build_reasoning_dataset.py`. A further upstream is its hub name in `HUB` and a function in `ROWS`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.files import JsonLineError, read_json
from text_data.answers import without_calculator
from text_data.code_tasks import read_mbpp, text_field
from text_data.rows import json_rows

HUB = {
    "gsm8k": ("openai/gsm8k", "main"),
    "mbpp": ("google-research-datasets/mbpp", "full"),
    "science_qa": ("derek-thomas/ScienceQA", None),
}
# The raw MBPP file holds every split; these are the ranges of task_id its authors give.
MBPP_SPLITS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}

Item = dict[str, Any]  # one item as upstream has it
Row = dict[str, Any]  # one line of the output
Raw = tuple[str, Any]  # where an item stands, for messages; the item, which may be broken


class Skip(Exception):
    """This item is left out on purpose, and counted."""


# --- raw items --------------------------------------------------------------------------------------------------------


def raw_items(dataset: str, source: Path | None, split: str | None) -> Iterator[Raw]:
    """Every item as upstream has it, with a name for its place: of the hub's split, or of a whole file.

    Raises:
        ValueError: the hub is out of reach, or the file is not what upstream gives.
    """
    if source is None:
        yield from _hub_items(dataset, split or "train")
    elif dataset == "science_qa" and source.suffix != ".jsonl":
        yield from _problem_items(source)
    else:
        yield from _line_items(source)


def _line_items(path: Path) -> Iterator[Raw]:
    """The items of a file in any form of `json_rows`, one object a line above all."""
    try:
        for place, item in json_rows(path):
            yield f"{path} {place}", item
    except JsonLineError as error:
        raise ValueError(
            f"{path} line {error.number} is not JSON ({error.reason}): give the file as upstream has it, one "
            "object a line"
        ) from error


def _problem_items(path: Path) -> Iterator[Raw]:
    """The items of ScienceQA's problems.json, each with its id."""
    try:
        problems = read_json(path, strict=True)
    except ValueError as error:
        raise ValueError(f"{error}: give ScienceQA's problems.json") from error
    if not isinstance(problems, dict):
        raise ValueError(f"{path} holds a {type(problems).__name__}: expected ScienceQA's problems.json, items by id")

    for key, item in problems.items():
        if isinstance(item, dict):
            item = {"id": key, **item}
        yield f"{path} item {key}", item


def _hub_items(dataset: str, split: str) -> Iterator[Raw]:
    import datasets

    name, config = HUB[dataset]
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # noqa: BLE001 - hub, network and cache raise what they like
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"cannot load {name} split {split} from the hub ({type(error).__name__}: {reason}): check the network and "
            "the split, or give the raw file with --source"
        ) from error

    if dataset == "science_qa":
        # As bytes: most pictures are dropped, so none is decoded here.
        loaded = loaded.cast_column("image", datasets.Image(decode=False))
    for number, item in enumerate(loaded, start=1):
        yield f"{name} {split} item {number}", item


def in_split(dataset: str, split: str, item: Item) -> bool:
    """Whether an item of a raw file belongs to `split`; a raw GSM8K file is one split.

    Raises:
        ValueError: an MBPP item without a number.
    """
    if dataset == "gsm8k":
        return True
    if dataset == "science_qa":
        return item.get("split") == split

    first, last = MBPP_SPLITS[split]
    if type(item.get("task_id")) is not int:
        raise ValueError("task_id must be a whole number, the splits are ranges of it")
    return first <= item["task_id"] <= last


def split_of(dataset: str, item: Any) -> str | None:
    """The split that an item of a raw file belongs to; None where it does not say, or is no item."""
    if not isinstance(item, dict):
        return None
    if dataset == "science_qa":
        return item.get("split")

    for name in MBPP_SPLITS:
        if type(item.get("task_id")) is int and in_split(dataset, name, item):
            return name
    return None


# --- rows -------------------------------------------------------------------------------------------------------------


def gsm8k_row(item: Item) -> Row:
    """Worked steps without calculator marks, and the final number without thousands separators (Cobbe et al. 2021).

    Raises:
        ValueError: a broken item.
    """
    steps, mark, final = text_field(item, "answer").rpartition("####")
    if not mark or not final.strip():
        raise ValueError("answer has no final line '#### N'")

    # The marks are for a calculator that runs beside the model: `<<48/2=24>>`.
    steps = without_calculator(steps).strip()
    final = final.strip().replace(",", "")
    return {
        "prompt": text_field(item, "question"),
        "answer": f"{steps}\n#### {final}".lstrip(),
        "source": "gsm8k",
        "steps": steps,
        "final_answer": final,
    }


def mbpp_row(item: Item) -> Row:
    """A task of MBPP, full or sanitized, with its reference program: see `read_mbpp`.

    Raises:
        ValueError: a broken item.
    """
    task = read_mbpp(item)
    code = text_field(item, "code")
    return {
        "prompt": task.prompt,
        "answer": code,
        "source": "mbpp",
        "tests": list(task.tests),
        "setup": task.setup,
        "code": code,
        "task_id": item.get("task_id"),
    }


def science_qa_row(item: Item, keep_images: bool = False, images: Path | None = None) -> Row:
    """Hint, question and lettered choices; lecture, solution, then the choice as the last line (Lu et al. 2022).

    Args:
        item: the item.
        keep_images: keep questions that need their picture; the prompt then names it.
        images: the folder with upstream's unpacked pictures, `<split>/<id>/<name>`, if there is one.

    Raises:
        Skip: a question that needs its picture, where these are not kept.
        ValueError: a broken item.
    """
    if item.get("image") and not keep_images:
        raise Skip

    choices = item.get("choices")
    index = item.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("choices must be a list of at least two texts")
    if type(index) is not int or not 0 <= index < len(choices):
        raise ValueError(f"answer is {index!r}, expected an index from 0 to {len(choices) - 1}")

    # The prompt: hint, picture, question, choices, each on lines of its own.
    parts = [text_field(item, "hint", "")]
    picture = _picture(item, images) if item.get("image") else {}
    if "width" in picture:
        parts.append(f"[picture, {picture['width']} x {picture['height']} pixels]")
    elif picture:
        parts.append("[picture]")
    parts.append(text_field(item, "question"))
    parts += [f"({letter(place)}) {choice.strip()}" for place, choice in enumerate(choices)]

    rationale = "\n".join(filter(None, (text_field(item, "lecture", ""), text_field(item, "solution", ""))))
    row = {
        "prompt": "\n".join(filter(None, parts)),
        "answer": "\n".join(filter(None, (rationale, f"The answer is ({letter(index)})."))),
        "source": "science_qa",
        "choices": choices,
        "answer_index": index,
        "rationale": rationale,
    }
    if isinstance(item.get("split"), str):
        row["split"] = item["split"]
    if picture:
        row["image"] = picture
    return row


def letter(place: int) -> str:
    """A for the first choice, B for the second, ..."""
    return chr(ord("A") + place)


def _picture(item: Item, images: Path | None) -> dict[str, Any]:
    """The picture's name, and its size in pixels if its bytes are there: in the hub's row, or in `images`.

    Raises:
        ValueError: bytes that are no picture.
    """
    image = item["image"]
    content = None
    if isinstance(image, str):
        name = image
        path = (images or Path()) / str(item.get("split")) / str(item.get("id")) / name
        if images and path.is_file():
            content = path.read_bytes()
    else:
        name = image.get("path") or "image.png"
        content = image.get("bytes")
    if not content:
        return {"name": name}

    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as picture:
            return {"name": name, "width": picture.width, "height": picture.height}
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is no picture that can be read") from error


ROWS: dict[str, Callable[..., Row]] = {"gsm8k": gsm8k_row, "mbpp": mbpp_row, "science_qa": science_qa_row}
