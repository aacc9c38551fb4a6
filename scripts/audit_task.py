"""What `audit_verifiers.py` measures of one task, in a process of its own that can be killed."""

from __future__ import annotations

import collections
import contextlib
import importlib.metadata
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow

from audit_probes import RIGHT, probes_of
from engine.records import normalise
from reasoning_gym_wrapper import EVAL_SEED, Example, Task, TaskError, registry
from tasks.limits import JudgeConfig
from verify.table import RULES

FIRST = 10  # items whose figures a quick comparison repeats
WORDS = ("0", "1", "yes", "no", "True", "False")
STRICT = JudgeConfig(draw_timeout_s=30.0, score_timeout_s=10.0)  # of the clock on the wall
LOOSE = replace(STRICT, verifier_strict=False)  # makes every item, and asks the scorer alone
Tally = dict[str, list[int]]  # probe -> items asked, accepted by the scorer, solved by the strict verdict, out of time


def version() -> str:
    """reasoning_gym's version; its `__version__` is stale."""
    return importlib.metadata.version("reasoning-gym")


def audit(name: str, items: int, draws: int, budget_s: float) -> dict[str, Any]:
    """Figures of the task `name` at its default difficulty, JSON-able; see docs/tasks.md for their meaning.

    Args:
        name: of the task.
        items: items that are scored.
        draws: items that are drawn to count distinct questions.
        budget_s: CPU seconds that all of it may take. What is not measured by then is left out, and `out_of_time` says
            so.
    """
    registry()  # importing Reasoning Gym is no time of the task
    began = time.process_time()
    end = began + budget_s
    row: dict[str, Any] = {"task": name, "reasoning_gym": version(), "asked_items": items, "asked_draws": draws}
    with counted_stdout() as printed:
        examples, seconds, failed = _drawn(Task(name, limits=LOOSE), items, began + budget_s / 3)
        row |= {"items": len(examples), "s_item": _mean(seconds), "s_item_most": max(seconds, default=0.0)}
        if examples:
            row |= _facts(examples)
            row |= _scored(examples, began + budget_s * 0.6)
            row |= _solved(examples, row, began + budget_s * 0.8)
        row |= _distinct(name, draws, end)
    row["prints"] = printed[0] > 0
    row["failure"] = failed
    row["out_of_time"] = bool(failed) or row.get("judged", 0) < items or row["draws"] < draws
    row["seconds"] = round(time.process_time() - began, 1)
    return row


def audit_strictly(row: dict[str, Any], budget_s: float) -> dict[str, Any]:
    """The row with what the strict verdict says now; what the scorer said stays."""
    registry()
    until = time.process_time() + budget_s
    with counted_stdout():
        examples, _, _ = _drawn(Task(row["task"], limits=LOOSE), row["items"], until)
        if len(examples) < row["items"] or not row.get("scored"):
            return row
        return row | _solved(examples, row, until)


@contextlib.contextmanager
def counted_stdout() -> Iterator[list[int]]:
    """Keeps what foreign code prints off stdout; the list holds the number of bytes afterwards."""
    written = [0]
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile("w", encoding="utf-8", errors="replace") as file:
        os.dup2(file.fileno(), 1)
        try:
            with contextlib.redirect_stdout(file):
                yield written
        finally:
            file.flush()
            os.dup2(kept, 1)
            os.close(kept)
            written[0] = os.fstat(file.fileno()).st_size


def _drawn(task: Task, n: int, until: float) -> tuple[list[Example], list[float], str]:
    """(examples, seconds that each took, why there are fewer than `n` or "")."""
    examples: list[Example] = []
    seconds: list[float] = []
    stream = task.items(EVAL_SEED)
    while len(examples) < n and time.process_time() < until:
        began = time.process_time()
        try:
            example = next(stream)[1]
        except TaskError as error:
            return examples, seconds, str(error)
        seconds.append(time.process_time() - began)
        examples.append(example)
    return examples, seconds, ""


def _facts(examples: list[Example]) -> dict[str, Any]:
    """What the items hold."""
    golds = collections.Counter(str(example.target) for example in examples)
    return {
        "gold_none": sum(example.target is None for example in examples),
        "commonest_gold": golds.most_common(1)[0][1] / len(examples),
        "not_arrow": sum(not fits_arrow(example.item) for example in examples),
    }


def fits_arrow(entry: dict[str, Any]) -> bool:
    """Whether one row of an Arrow table, and so of a data set, can hold an item."""
    try:
        pyarrow.Table.from_pylist([entry])
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError):
        return False
    return True


def _scored(examples: list[Example], until: float) -> dict[str, Any]:
    """What the scorer accepts of the probes, and in how many seconds. A tally's third figure is left to `_solved`."""
    tally: Tally = {}
    first: Tally = {}
    seconds: list[float] = []
    raised = 0
    scored = 0

    # Item by item, so that time that runs out leaves every probe with some items.
    for index, probes in enumerate(_probes(examples)):
        if time.process_time() > until:
            break
        for probe, text in probes.items():
            began = time.process_time()
            verdict = examples[index].verify(text)
            seconds.append(time.process_time() - began)
            raised += verdict.raised
            counts = [1, int(verdict.score == 1.0), 0, int(verdict.timed_out)]
            _add(tally, probe, counts)
            if index < FIRST:
                _add(first, probe, counts)
        scored += 1

    return {
        "scored": scored,
        "s_score": _mean(seconds),
        "s_score_most": max(seconds, default=0.0),
        "raised": raised,
        "late": sum(counts[3] for counts in tally.values()),
        "probes": _worth_keeping(tally),
        "first": _worth_keeping(first),
    }


def _solved(examples: list[Example], row: dict[str, Any], until: float) -> dict[str, Any]:
    """What the strict verdict accepts of the items that were scored, and the level of chance; `judged` counts them.

    A rule refuses more than the scorer does, unless it knows the one right answer: only then it is asked of all probes.
    """
    task = Task(examples[0].task, limits=STRICT)
    rule = RULES.get(task.name)
    golds = [example.target for example in examples if example.target is not None]
    candidates = [gold for gold, _ in collections.Counter(golds).most_common(4)]
    constants = dict.fromkeys([*candidates, *WORDS], 0)

    tally: Tally = {}
    first: Tally = {}
    judged = 0
    for index, probes in enumerate(_probes(examples[: row["scored"]], examples)):
        if time.process_time() > until:
            break
        strict = replace(examples[index], source=task)
        for probe, text in probes.items():
            accepted = probe in RIGHT or row["probes"].get(probe, [0, 0])[1]
            if accepted or (rule is not None and rule.one_answer):
                counts = [1, 0, int(strict.verify(text).solved), 0]
                _add(tally, probe, counts)
                if index < FIRST:
                    _add(first, probe, counts)
        for text in constants:
            constants[text] += strict.verify(text).solved
        judged += 1

    best = max(constants, key=lambda text: constants[text])
    return {
        "judged": judged,
        "chance": constants[best] / max(judged, 1),
        "chance_answer": best,
        "probes": _with_solved(row["probes"], tally),
        "first": _with_solved(row["first"], first),
    }


def _probes(asked: list[Example], examples: list[Example] | None = None) -> Iterator[dict[str, str]]:
    """The probes of each item. Of the first items they do not depend on how many there are, save the commonest gold."""
    examples = examples or asked
    golds = [example.target for example in examples if example.target is not None]
    commonest = None
    if golds:
        commonest = collections.Counter(golds).most_common(1)[0][0]
    for index, example in enumerate(asked):
        size = len(examples)
        if index < FIRST:
            size = min(size, FIRST)
        yield probes_of(example, examples[(index + 1) % size].target, commonest)


def _worth_keeping(tally: Tally) -> Tally:
    """The right probes, and of the wrong ones those that were accepted or ran out of time at least once."""
    return {probe: counts for probe, counts in tally.items() if probe in RIGHT or any(counts[1:])}


def _with_solved(probes: Tally, solved: Tally) -> Tally:
    """The scorer's tally with the strict verdict's figures."""
    merged = {}
    for probe, (asked, accepted, _, late) in probes.items():
        merged[probe] = [asked, accepted, solved.get(probe, [0, 0, 0, 0])[2], late]
    for probe, counts in solved.items():
        if probe not in merged and counts[2]:
            merged[probe] = counts
    return merged


def _add(tally: dict[str, list[int]], name: str, counts: list[int]) -> None:
    before = tally.get(name, [0] * len(counts))
    tally[name] = [one + other for one, other in zip(before, counts, strict=True)]


def _distinct(name: str, draws: int, until: float) -> dict[str, int]:
    """How many distinct questions there are among the first draws, and how many could be drawn."""
    task = Task(name, limits=LOOSE)
    questions = set()
    count = 0
    try:
        for _, example in itertools.islice(task.items(EVAL_SEED), draws):
            count += 1
            questions.add(normalise(example.question))
            if time.process_time() > until:
                break
    except TaskError:  # `_drawn` has told it
        pass
    return {"draws": count, "distinct": len(questions)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def wrongly_accepted(row: dict[str, Any], column: int) -> dict[str, float]:
    """Wrong probe -> share of its items that were accepted; column 1 is the scorer, 2 the strict verdict."""
    # The strict verdict may have run out of time before the scorer did.
    judged = 1.0
    if column == 2:
        judged = row.get("judged", 0) / max(row.get("scored", 0), 1)
    shares = {}
    for probe, counts in row.get("probes", {}).items():
        if probe not in RIGHT and counts[column]:
            shares[probe] = min(counts[column] / (counts[0] * judged), 1.0)
    return dict(sorted(shares.items(), key=lambda pair: -pair[1]))
