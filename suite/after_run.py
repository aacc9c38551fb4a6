"""Measures the evaluation suite (`--eval_suite`) on the weights that a run ends with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from engine.progress import Progress
from engine.report import Report
from suite.measure import run_suite
from suite.spec import parse_suite, with_sums
from suite.text_model import TextModel


@dataclass(frozen=True)
class SuiteConfig:
    """The flags of the suite.

    eval_suite: its entries, `NAME` or `NAME=FILE` with commas between.
    eval_suite_n: items of each entry; 0 = all.
    eval_suite_split: which rows of files that name splits are asked; see `SuiteItem`.
    eval_seed: seed of what is drawn.
    max_new_tokens: tokens of an answer; 0 = as many as the entry allows.
    allow_unconfined_code: generated code may run where nothing confines it.
    """

    eval_suite: str
    eval_suite_n: int = 0
    eval_suite_split: str | None = None
    eval_seed: int = 10**9
    max_new_tokens: int = 0
    allow_unconfined_code: bool = False


@dataclass(frozen=True)
class Subject:
    """What a run shows of itself to be measured, on the process that measures.

    text_models: gives the model, and what it is compared with (None: nothing).
    compared_with: heading of the column beside the model's.
    evaluation_weights: inside this context the model carries the weights that are evaluated.
    record: writes rows and predictions at the run's step.
    sums: gives n (prompt, answer) pairs, n 0 as many as usual, that the run has not trained on; `synthetic` without a
        file asks them.
    trained_on: tells of a prompt, or of a document, whether the model was trained on it, as far as that is recorded.
    """

    text_models: Callable[[], tuple[TextModel, TextModel | None]]
    compared_with: str
    evaluation_weights: Callable[[], contextlib.AbstractContextManager]
    record: Callable[[Report], None]
    sums: Callable[[int], Sequence[tuple[str, str]]]
    trained_on: Container[str] = ()


def measure_after_run(subject: Subject, config: SuiteConfig) -> None:
    """Measures the suite once, writes it to the run's records and prints its table. Raises SuiteError."""
    with subject.evaluation_weights(), Progress(None, "suite", "item") as progress:
        # Entries are read here and not when the command line was: a file may have changed since.
        model, bare = subject.text_models()
        items = with_sums(parse_suite(config.eval_suite, config.eval_suite_split), subject.sums, config.eval_suite_n)

        def tell(entry: str, done: int, total: int) -> None:
            progress.update(done, entry=entry, of=total)

        result = run_suite(
            model,
            items,
            config.eval_suite_n,
            config.eval_seed,
            bare,
            config.allow_unconfined_code,
            tell,
            config.max_new_tokens,
            subject.trained_on,
        )

    # The run adds step and time.
    table = "\n".join(result.table(subject.compared_with))
    subject.record(Report(result.rows(), result.predictions(), table))
    print(table)
