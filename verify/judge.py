"""Judges one answer: a task's strict rule, then the scorer that Reasoning Gym has for it.

An answer is solved where the rule accepts it and the scorer gives it a full score. The scorer's own score is kept as it
is, so that mean scores compare with those of others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.time_limit import TimeLimitError, call_within
from tasks.limits import USUAL, JudgeConfig
from verify import algebra, figures, logic, puzzles, texts  # noqa: F401 - they fill the table
from verify.table import RULES, Check, Entry

LONGEST = 50_000  # characters of an answer; a longer one is wrong unread
FULL = 1.0 - 1e-9  # a full score: sums of parts miss 1.0 by rounding on either side
UNTIMED = JudgeConfig(0.0, 0.0)  # which items are drawn must not depend on the machine
NO_RULE = "the task's own scorer alone"
UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Verdict:
    """What the verifiers said of one answer.

    score: in [0, 1], of the task's own scorer.
    raised: the scorer raised; then the score is 0.
    timed_out: it took longer than it may; then the score is 0.
    refused: the score is full, and the strict rule refuses the answer all the same.
    """

    score: float
    raised: bool = False
    timed_out: bool = False
    refused: bool = False

    @property
    def solved(self) -> bool:
        """Only a full score that is not refused is a solved item: gsm_symbolic gives 0.01 to any wrong number."""
        return self.score == 1.0 and not self.refused

    @property
    def reward(self) -> float:
        """The score as a reward: nothing for a full score that the strict rule refuses."""
        return 0.0 if self.refused else self.score


def verdict(task: str, answer: str, entry: dict[str, Any], scorer: Any, limits: JudgeConfig = USUAL) -> Verdict:
    """What is said of an answer, stripped of surrounding whitespace, to an item of the task.

    Args:
        task: name of the task; without a rule of its own, its scorer alone decides.
        answer: generated text.
        entry: the item, with `question`, `answer` and `metadata`.
        scorer: has the task's `score_answer`; one that raises gives score 0.
        limits: how long it may take, and whether the rule is asked at all.
    """
    rule = RULES.get(task)
    if not limits.verifier_strict or rule is None:
        return scored(scorer, answer, entry, limits.score_timeout_s)

    if len(answer) > LONGEST:
        return Verdict(rule.floor)

    # The one right answer is given to the scorer in the form that the scorer knows.
    accepted = _passes(rule.check, answer, entry)
    if accepted and rule.one_answer:
        given = scored(scorer, *rule.gold(entry), limits.score_timeout_s)

    # The scorer never sees what it would run as a program, or could not read in any time.
    elif rule.readable is not None and not _passes(rule.readable, answer, entry):
        return Verdict(rule.floor)
    else:
        given = scored(scorer, answer, entry, limits.score_timeout_s)

    if not is_full(given.score):
        return given
    return Verdict(1.0, refused=not accepted)


def is_full(score: float) -> bool:
    """Whether a scorer's score is a full one."""
    return score >= FULL


def scored(scorer: Any, answer: str, entry: dict[str, Any], timeout_s: float) -> Verdict:
    """What a task's own scorer says; one that raises, or runs out of time, counts as score 0, as does NaN."""
    try:
        score = float(call_within(timeout_s, scorer.score_answer, answer, entry))
    except TimeLimitError:
        return Verdict(0.0, timed_out=True)
    except (Exception, SystemExit):  # noqa: BLE001 - foreign scorers raise anything on odd text, or evaluate `exit()`
        return Verdict(0.0, raised=True)
    return Verdict(min(max(score, 0.0), 1.0) if score == score else 0.0)


def _passes(check: Check, answer: str, entry: Entry) -> bool:
    """Whether the answer passes a check of its rule; text that the check cannot read at all does not."""
    try:
        return bool(check(answer, entry))
    except UNREADABLE:
        return False


def gold_fails(task: str, entry: dict[str, Any], scorer: Any) -> bool:
    """Whether the item has a gold answer, or an example of one, that fails the task's own verifiers."""
    gold = entry["answer"]
    rule = RULES.get(task)
    if rule is not None and rule.gold_check is not None:
        return not _passes(rule.gold_check, gold, entry)
    if gold is None:
        return False
    return not verdict(task, gold.strip(), entry, scorer, UNTIMED).solved


def rule_name(task: str) -> str:
    """The strict rule of a task in a few words, for tables."""
    return RULES[task].name if task in RULES else NO_RULE
