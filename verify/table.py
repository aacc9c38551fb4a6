"""The table of strict rules: one per task, entered with the decorator `strict`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Entry = Mapping[str, Any]
Check = Callable[[str, Entry], bool]
Shown = tuple[str, dict[str, Any]]


def gold_of(entry: Entry) -> Shown:
    """The gold answer and the item, as the task's own scorer is given them."""
    return entry["answer"], dict(entry)


@dataclass(frozen=True)
class Rule:
    """What an answer to one task must be beside what its scorer demands.

    name: of the rule, a few words for tables.
    check: whether the rule accepts an answer (stripped text) to an item.
    one_answer: the task has one right answer, which the rule knows: in place of an accepted answer the scorer is given
        what `gold` returns, so that `1,234` scores as `1234` does.
    gold: the gold answer and the item in a form that the scorer understands.
    readable: whether the scorer, which evaluates answers or takes them literally, may see a text; None: any.
    floor: the score of a text that the scorer may not see.
    gold_check: whether a gold answer is one (None where the task has none, but an example), where asking the scorer
        would cost too much, or say nothing; None: the scorer is asked.
    """

    name: str
    check: Check
    one_answer: bool = False
    gold: Callable[[Entry], Shown] = gold_of
    readable: Check | None = None
    floor: float = 0.0
    gold_check: Check | None = None


RULES: dict[str, Rule] = {}


def strict(*tasks: str, name: str, **more: Any) -> Callable[[Check], Check]:
    """Enters the decorated check as the rule of these tasks; `more` are further fields of `Rule`."""

    def enter(check: Check) -> Check:
        for task in tasks:
            if task in RULES:
                raise ValueError(f"task {task} has two strict rules")
            RULES[task] = Rule(name, check, **more)
        return check

    return enter


def strict_form(task: str, form: re.Pattern[str], name: str) -> None:
    """Enters the rule that the whole answer to a task must have a form."""

    @strict(task, name=name)
    def has_form(answer: str, entry: Entry) -> bool:
        return form.fullmatch(answer) is not None
