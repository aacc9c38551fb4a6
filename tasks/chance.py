"""The level of chance: what the best constant answer solves of the very items that a model is evaluated on.

An accuracy near it shows nothing. Where one constant solves half of the items or more, accuracy means little at all.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

WORDS = ("0", "1", "yes", "no", "True", "False", "A", "nan", "")
MOST_GOLDS = 3  # of the commonest gold answers that are tried
SECONDS = 5.0  # that the search for one task's constant may take
MEANS_LITTLE = 0.5  # chance from which a task's accuracy is called into question


@dataclass(frozen=True)
class Chance:
    """What one constant answer solves.

    rate: share of the items, in 0..1.
    answer: the constant.
    n: number of items.
    is_whole: False where time ran out before every candidate was tried; `rate` is then the least it can be.
    copied: share of the items that the last word of their own question solves; 0.0 where it is below one half.
    """

    rate: float
    answer: str
    n: int
    is_whole: bool = True
    copied: float = 0.0


def chance_of(
    items: Sequence[Any],
    golds: Sequence[str | None],
    solves: Callable[[Any, str], bool],
    seconds: float = SECONDS,
) -> Chance:
    """The best of a few constants: the commonest gold answers, and words that scorers are known to accept.

    Args:
        items: what is evaluated, one or more.
        golds: the gold answer of each; None where there is none.
        solves: whether a text is a right answer to an item.
        seconds: how long the search may take. The commonest gold answer counts unasked where it repeats.
    """
    until = time.monotonic() + seconds
    commonest = collections.Counter(gold.strip() for gold in golds if gold is not None).most_common(MOST_GOLDS)
    best = ""
    most = 0
    if commonest:
        best, most = commonest[0]

    for text in dict.fromkeys([*(gold for gold, _ in commonest), *WORDS]):
        solved = 0
        for place, item in enumerate(items):
            # One that can no longer be the best is given up.
            if solved + len(items) - place <= most:
                break
            if time.monotonic() > until:
                return Chance(most / len(items), best, len(items), is_whole=False)
            solved += solves(item, text)
        if solved > most:
            best = text
            most = solved
    return Chance(most / len(items), best, len(items))


def task_chances(examples: Sequence[Any], seconds: float = SECONDS) -> dict[str, Chance]:
    """Task -> the level of chance on its examples, which have `task`, `target` and `verify`, see `chance_of`."""
    by_task: dict[str, list[Any]] = {}
    for example in examples:
        by_task.setdefault(example.task, []).append(example)

    chances = {}
    for task, own in by_task.items():
        golds = [example.target for example in own]
        chance = chance_of(own, golds, _solves, seconds)
        chances[task] = replace(chance, copied=_copied(own))
    return chances


def _copied(examples: Sequence[Any]) -> float:
    """The share of examples that the last word of their question solves; 0.0 as soon as it cannot reach `MEANS_LITTLE`.

    In string_insertion that word is the given string, and mostly nothing is to be inserted.
    """
    solved = 0
    for place, example in enumerate(examples):
        if solved + len(examples) - place < MEANS_LITTLE * len(examples):
            return 0.0
        word = (example.question.split() or [""])[-1]
        solved += example.target is not None and word in example.target and _solves(example, word)
    return solved / len(examples)


def _solves(example: Any, text: str) -> bool:
    return bool(example.verify(text).solved)


def overall(chances: Mapping[str, Chance]) -> float:
    """The share of all items that the best constant of each task solves."""
    return sum(chance.rate * chance.n for chance in chances.values()) / sum(chance.n for chance in chances.values())


def chance_warnings(chances: Mapping[str, Chance]) -> list[str]:
    """The tasks whose accuracy means little, one line each."""
    lines = []
    for task, chance in chances.items():
        if chance.rate >= MEANS_LITTLE:
            shown = " ".join(chance.answer.split())[:40]
            lines.append(
                f"{task}: the constant answer {shown!r} solves {100 * chance.rate:.1f} % of its {chance.n} evaluation "
                "items: its accuracy means little"
            )
        if chance.copied >= MEANS_LITTLE:
            lines.append(
                f"{task}: the last word of the question, given back, solves {100 * chance.copied:.1f} % of its "
                f"{chance.n} evaluation items: its accuracy means little"
            )
    return lines


def chance_notes(chances: Mapping[str, Chance]) -> list[str]:
    """What stands below a table that shows chance."""
    notes = ["chance = what the best constant answer solves of the same items"]
    cut = [task for task, chance in chances.items() if not chance.is_whole]
    if cut:
        notes.append(f"chance of {', '.join(cut)} is the least it can be, its scorer is slow")
    return notes
