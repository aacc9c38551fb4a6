"""Measures the evaluation suite (`--eval_suite`) on the weights that a run ends with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from engine.logs import Progress
from engine.report import Report
from suite.measure import run_suite
from suite.questions import SuiteItem, parse_suite
from suite.text_model import TextModel


@dataclass(frozen=True)
class SuiteConfig:
    """The flags of the suite.

    eval_suite: its entries, `NAME` or `NAME=FILE` with commas between.
    eval_suite_n: items of each entry; 0 = all.
    eval_seed: seed of what is drawn.
    max_new_tokens: tokens of an answer; 0 = as many as the entry allows.
    allow_unconfined_code: generated code may run where nothing confines it.
    """

    eval_suite: str
    eval_suite_n: int = 0
    eval_seed: int = 10**9
    max_new_tokens: int = 0
    allow_unconfined_code: bool = False


def unchanged(items: list[SuiteItem]) -> list[SuiteItem]:
    """The entries as they were asked for."""
    return items


@dataclass(frozen=True)
class Subject:
    """What a run shows of itself to be measured, on the process that measures."""

    text_models: Callable[[], tuple[TextModel, TextModel | None]]  # the model, and what it is compared with
    compared_with: str  # heading of the column beside the model's
    evaluation_weights: Callable[[], contextlib.AbstractContextManager]  # inside, the model carries these
    record: Callable[[Report], None]  # writes rows and predictions at the run's step
    items: Callable[[list[SuiteItem]], list[SuiteItem]] = unchanged  # changes what the run has trained on


def measure_after_run(subject: Subject, config: SuiteConfig) -> None:
    """Measures the suite once, writes it to the run's records and prints its table."""
    with subject.evaluation_weights(), Progress(None, "suite", "item") as progress:
        model, bare = subject.text_models()
        items = subject.items(parse_suite(config.eval_suite))

        def tell(entry: str, done: int, total: int) -> None:
            progress.update(done, entry=entry, of=total)

        result = run_suite(
            model, items, config.eval_suite_n, config.eval_seed, bare, config.allow_unconfined_code, tell,
            config.max_new_tokens,
        )
    table = "\n".join(result.table(subject.compared_with))
    subject.record(Report(result.rows(0, 0.0), result.predictions(0), table))
    print(table)
