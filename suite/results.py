"""What the suite measured, as rows of the CSV, lines of predictions and a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.intervals import Interval, proportion
from engine.report import metric_row, percent, prediction_line, text_table
from suite.text_model import Cuts

LEFT_OUT = "trained_on"  # number of items that were left out because they were trained on; n counts them in
QUESTIONS_CUT = "questions_cut"  # share of the questions, or of the contexts of a text, that lost their beginning
ANSWERS_CUT = "answers_cut"  # share of the answers that the limit of tokens ended
# Metrics in 0..1 that people read in per cent.
SHARES = ("accuracy", "exact", "final_number", "passed", QUESTIONS_CUT, ANSWERS_CUT)
NO_ANSWERS = "suite/perplexity"  # its predictions hold no text


@dataclass(frozen=True)
class Prediction:
    """One item: what was answered, and its score; of a document, the score is its nats per token.

    index: the item's place in its file.
    prompt: what was asked; of a document, the context of its first window.
    bare_score: of what the model is compared with; None without it.
    gold: the answer that is asked for; None where there is none to show.
    bare_text: what the other answered; None without it.
    """

    index: int
    prompt: str
    text: str
    score: float
    bare_score: float | None
    gold: str | None = None
    bare_text: str | None = None


@dataclass(frozen=True)
class Part:
    """One entry of the suite as measured.

    task: its name in the records, `suite/NAME`.
    estimates, bare: metric -> value and interval, of the model and of what it is compared with (empty without it).
    segments_used: mean HRM segments of an answer; None without HRM.
    trained: items of the file that were left out because the model was trained on them.
    chance: share of the items that the best constant option solves, in 0..1; None where there are no options.
    """

    task: str
    estimates: dict[str, Interval]
    bare: dict[str, Interval]
    predictions: list[Prediction]
    segments_used: float | None
    trained: int = 0
    chance: float | None = None


@dataclass
class SuiteResult:
    """Everything the suite measured, in the order of its entries."""

    parts: list[Part] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """Rows of eval.csv, one per metric, without `step` and `elapsed_s`."""
        # What the model is compared with may lack a metric: BLEU needs rationales.
        rows = []
        for part in self.parts:
            for metric, estimate in part.estimates.items():
                bare = part.bare.get(metric)
                rows.append(
                    metric_row(
                        part.task,
                        metric,
                        estimate.value,
                        estimate.n,
                        interval=(estimate.low, estimate.high),
                        bare=bare.value if bare else None,
                        segments_used=part.segments_used,
                    )
                )
            if part.trained:
                rows.append(metric_row(part.task, LEFT_OUT, part.trained, part.trained + len(part.predictions)))
        return rows

    def predictions(self) -> list[dict[str, Any]]:
        """One line per item, or per document, which paired statistics need; without `step`."""
        # Ids hold the place in the file, so runs that drew other items can still be paired.
        lines = []
        for part in self.parts:
            for prediction in part.predictions:
                lines.append(
                    prediction_line(
                        part.task,
                        prediction.index,
                        prediction.prompt,
                        prediction.text,
                        prediction.score,
                        prediction.gold,
                        bare_score=prediction.bare_score,
                        bare_prediction=prediction.bare_text,
                    )
                )
        return lines

    def table(self, compared_with: str = "bare LLM") -> list[str]:
        """Lines for the terminal: each metric with its n and interval, beside that of what it is compared with."""
        # The column of the other model stands just before the model's own, and only where there is one.
        compared = any(part.bare for part in self.parts)
        heading = ["suite", "metric", "n", "model"]
        if compared:
            heading.insert(-1, compared_with)

        rows = [heading]
        for part in self.parts:
            for metric, estimate in part.estimates.items():
                row = [part.task.removeprefix("suite/"), metric, str(estimate.n), shown(metric, estimate)]
                if compared:
                    row.insert(-1, shown(metric, part.bare.get(metric)))
                rows.append(row)

        return text_table(rows).split("\n") + self._notes()

    def _notes(self) -> list[str]:
        """A line for each entry with empty answers: a model that says nothing is wrong in another way."""
        lines = []
        for part in self.parts:
            empty = sum(not prediction.text for prediction in part.predictions)
            if empty and part.task != NO_ANSWERS:
                lines.append(f"note: {empty} of {len(part.predictions)} answers to {part.task} are empty")
            lines += cut_notes(part)
            if part.chance is not None:
                lines.append(f"note: one option, always the same, is right in {percent(part.chance)} of {part.task}")
            if part.trained:
                lines.append(f"note: {part.trained} items of {part.task} were left out: the model was trained on them")
        return lines


def cut_notes(part: Part) -> list[str]:
    """A line for each thing that was cut: what a model did not read, or was not let say, is no mistake of its own."""
    questions = part.estimates.get(QUESTIONS_CUT)
    answers = part.estimates.get(ANSWERS_CUT)
    lines = []
    if questions and questions.value:
        count = round(questions.value * questions.n)
        what = "contexts" if part.task == NO_ANSWERS else "questions"
        lines.append(
            f"note: {count} of {questions.n} {what} of {part.task} lost their beginning: they have more tokens than "
            "the model reads (--max_seq_len)"
        )
    if answers and answers.value:
        count = round(answers.value * answers.n)
        lines.append(
            f"note: {count} of {answers.n} answers to {part.task} were cut at the limit of tokens (--max_new_tokens)"
        )
    return lines


def cut_shares(cuts: Sequence[Cuts]) -> dict[str, Interval]:
    """Metric -> share of what was cut in some calls, with its interval; nothing where no call told."""
    questions = [cut for call in cuts for cut in call.questions]
    answers = [cut for call in cuts for cut in call.answers]
    shares = {}
    if questions:
        shares[QUESTIONS_CUT] = proportion(questions)
    if answers:
        shares[ANSWERS_CUT] = proportion(answers)
    return shares


def shown(metric: str, estimate: Interval | None) -> str:
    """An estimate for people, with its interval where it has one; `-` for none."""
    if estimate is None:
        return "-"

    interval = None
    if estimate.low is not None and estimate.high is not None:
        interval = (estimate.low, estimate.high)
    if metric in SHARES:
        return percent(estimate.value, interval)

    # Perplexities, bits and scores have no unit and every size: four digits.
    if interval is None:
        return f"{estimate.value:.4g}"
    return f"{estimate.value:.4g} [{estimate.low:.4g}, {estimate.high:.4g}]"
