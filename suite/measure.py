"""The evaluation suite on any `TextModel`: language, sums, maths, code and science questions, beside the bare LLM.

All answers are generated, greedily; all estimates carry their n and a 95 % interval: Wilson for shares, a seeded
bootstrap for the others (over documents for language, over items for rationales).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.intervals import Interval, proportion
from engine.records import question_hash
from reasoning_gym_wrapper import Reserve, make_tasks
from suite.questions import (
    Question,
    SuiteError,
    SuiteItem,
    chosen,
    cut_windows,
    parse_suite,
    read_documents,
    read_questions,
    suite_problems,
    window_pairs,
)
from suite.scoring import (
    choose_option,
    corpus_bleu,
    exact,
    language_estimates,
    rationale_of,
    rouge_l,
    same_number,
)
from suite.text_model import TextModel
from text_data.fences import first_block

__all__ = ["SuiteError", "SuiteItem", "SuiteResult", "TextModel", "parse_suite",
           "run_suite", "suite_problems"]

BUDGETS = {"synthetic": 16, "gsm8k": 320, "mbpp": 384, "science_qa": 192}  # new tokens of an answer
SYNTHETIC_N = 256  # built-in sums where no number is asked for
BLOCK = 16  # windows of a resampled block where the language file is one document
CHUNK = 64  # pairs between two reports of progress
BARE = " (bare LLM)"
PERCENT = ("accuracy", "exact", "final_number", "passed")
Progress = Callable[[str, int, int], None]  # entry (and whose turn it is), done, of


@dataclass(frozen=True)
class Prediction:
    """One item: what was said, and its score (a document: nats per token)."""

    index: int
    prompt: str
    text: str
    score: float
    bare_score: float | None


@dataclass
class Part:
    """One entry of the suite as measured."""

    task: str
    estimates: dict[str, Interval]
    bare: dict[str, Interval]
    predictions: list[Prediction]
    segments_used: float | None


@dataclass
class SuiteResult:
    """Everything the suite measured, in the order of its entries."""

    parts: list[Part] = field(default_factory=list)

    def rows(self, step: int, elapsed_s: float) -> list[dict[str, Any]]:
        """CSV rows, one per metric, in the columns of `run_logging.EVAL_HEADER`."""
        return [
            {
                "step": step,
                "task": part.task,
                "metric": metric,
                "value": found.value,
                "n": found.n,
                "ci_low": found.low,
                "ci_high": found.high,
                "bare": part.bare[metric].value if metric in part.bare else None,
                "segments_used": part.segments_used,
                "elapsed_s": elapsed_s,
            }
            for part in self.parts
            for metric, found in part.estimates.items()
        ]

    def predictions(self, step: int) -> list[dict[str, Any]]:
        """One line per item, or per document, which paired statistics need."""
        return [
            {
                "step": step,
                "id": f"{part.task}/{line.index:05d}",
                "task": part.task,
                "prompt_hash": question_hash(line.prompt),
                "prediction": line.text,
                "score": line.score,
                "bare_score": line.bare_score,
            }
            for part in self.parts
            for line in part.predictions
        ]

    def table(self, compared_with: str = "bare LLM") -> list[str]:
        """Lines for the terminal: each metric with its n and interval, beside that of what it is compared with."""
        compared = any(part.bare for part in self.parts)
        cells = [("suite", "metric", "n", *([compared_with] if compared else []), "model")]
        for part in self.parts:
            for metric, found in part.estimates.items():
                bare = [_shown(metric, part.bare.get(metric))] if compared else []
                cells.append((part.task.removeprefix("suite/"), metric, str(found.n), *bare, _shown(metric, found)))
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                 for row in cells]
        for part in self.parts:
            empty = sum(not line.text for line in part.predictions)
            if empty and part.task != "suite/perplexity":
                lines.append(f"note: {empty} of {len(part.predictions)} answers to {part.task} are empty")
        return lines


def _shown(metric: str, found: Interval | None) -> str:
    if found is None:
        return "-"
    scale, unit, form = (100, " %", ".1f") if metric in PERCENT else (1, "", ".4g")
    low, high = found.low, found.high
    interval = "" if low is None or high is None else f" [{low * scale:{form}}, {high * scale:{form}}]"
    return f"{found.value * scale:{form}}{unit}{interval}"


# --- scoring, entry by entry ------------------------------------------------------------------------------------------

Scores = tuple[dict[str, Interval], list[float]]  # estimates, score of each item


@dataclass(frozen=True)
class Settings:
    """What scorers need beside questions and texts."""

    seed: int = 0
    allow_unconfined: bool = False


def _score_synthetic(questions: Sequence[Question], texts: Sequence[str], settings: Settings) -> Scores:
    """`exact`: the text is the answer and nothing else; `final_number`: its last number is the answer's."""
    pairs = list(zip(texts, questions, strict=True))
    right = [exact(text, question.answer) for text, question in pairs]
    number = [same_number(text, question.answer) for text, question in pairs]
    return {"exact": proportion(right), "final_number": proportion(number)}, [float(hit) for hit in right]


def _score_gsm8k(questions: Sequence[Question], texts: Sequence[str], settings: Settings) -> Scores:
    right = [same_number(text, question.answer) for text, question in zip(texts, questions, strict=True)]
    return {"accuracy": proportion(right)}, [float(hit) for hit in right]


def _score_mbpp(questions: Sequence[Question], texts: Sequence[str], settings: Settings) -> Scores:
    """An item is solved when its code passes all its tests."""
    from sandbox.runner import CodeJob, run_many

    jobs = [CodeJob(first_block(text), question.tests, question.setup)
            for text, question in zip(texts, questions, strict=True)]
    right = [result.passed for result in run_many(jobs, allow_unconfined=settings.allow_unconfined)]
    return {"passed": proportion(right)}, [float(hit) for hit in right]


def _score_science_qa(questions: Sequence[Question], texts: Sequence[str], settings: Settings) -> Scores:
    """Accuracy of the option; BLEU and ROUGE-L of what is said beside it, where there is a gold rationale."""
    pairs = list(zip(texts, questions, strict=True))
    right = [choose_option(text, question.choices) == question.answer_index for text, question in pairs]
    estimates = {"accuracy": proportion(right)}
    explained = [(rationale_of(text), question.rationale) for text, question in pairs if question.rationale.strip()]
    if explained:
        said, gold = zip(*explained, strict=True)
        estimates["bleu"] = corpus_bleu(said, gold, settings.seed)
        estimates["rouge_l"] = rouge_l(said, gold, settings.seed)
    return estimates, [float(hit) for hit in right]


SCORERS: dict[str, Callable[[Sequence[Question], Sequence[str], Settings], Scores]] = {
    "synthetic": _score_synthetic,
    "gsm8k": _score_gsm8k,
    "mbpp": _score_mbpp,
    "science_qa": _score_science_qa,
}


# --- the run ----------------------------------------------------------------------------------------------------------


def synthetic_questions(n: int) -> list[Question]:
    """`n` sums "What is a + b?" of numbers below 100: toy_add's reserve, which training on toy_add rejects."""
    examples = Reserve(make_tasks(["toy_add"], "default"), n or SYNTHETIC_N).examples
    return [Question(place, example.question, example.target or "") for place, example in enumerate(examples)]


def _questions(item: SuiteItem, n: int, seed: int) -> list[Question]:
    if item.name == "synthetic" and item.path is None and not item.pairs:
        return synthetic_questions(n)
    questions = read_questions(item)
    return [questions[place] for place in chosen(len(questions), n, seed)]


@dataclass(frozen=True)
class Windows:
    """(context, continuation) pairs to predict, each with its document's number."""

    pairs: list[tuple[str, str]]
    documents: list[int]

    @classmethod
    def read(cls, item: SuiteItem, n: int, seed: int) -> Windows:
        """`n` windows of the file (0: all), drawn from all of its documents. Raises SuiteError."""
        texts = read_documents(item.path)
        every = [(place, pair) for place, text in enumerate(texts) for pair in window_pairs(text)]
        if len({place for place, _ in every}) == 1:  # blocks of one document stand in for documents
            every = [(number // BLOCK, pair) for number, (_, pair) in enumerate(every)]
        if not every:
            raise SuiteError(f"perplexity: no document of {item.path} is longer than its first window of "
                             f"{len(max(map(lambda text: cut_windows(text)[0], texts), key=len))} characters")
        kept = [every[place] for place in chosen(len(every), n, seed)]
        return cls([pair for _, pair in kept], [place for place, _ in kept])

    def measure(self, model: TextModel, progress: Callable[[int], None]) -> list[tuple[float, int, int]]:
        """(sum of log p in nats, tokens, bytes) of each document, in order."""
        found: dict[int, list[float]] = {}
        for start in range(0, len(self.pairs), CHUNK):
            part = self.pairs[start : start + CHUNK]
            for place, (nats, tokens) in enumerate(model.log_likelihoods(part), start):
                sums = found.setdefault(self.documents[place], [0.0, 0, 0])
                for column, value in enumerate((nats, tokens, len(self.pairs[place][1].encode()))):
                    sums[column] += value
            progress(start + len(part))
        return [(sums[0], int(sums[1]), int(sums[2])) for sums in found.values()]


def _run_perplexity(model: TextModel, windows: Windows, bare: TextModel | None, settings: Settings,
                    progress: Progress) -> Part:
    total = len(windows.pairs)
    ours = windows.measure(model, lambda done: progress("perplexity", done, total))
    used = model.segments_used
    theirs = None
    if bare is not None:
        theirs = windows.measure(bare, lambda done: progress("perplexity" + BARE, done, total))
    numbers = list(dict.fromkeys(windows.documents))
    firsts = [windows.pairs[windows.documents.index(number)][0] for number in numbers]
    scores = [[nats / max(tokens, 1) for nats, tokens, _ in rows] for rows in (ours, theirs or [])]
    paired = scores[1] or [None] * len(ours)
    lines = [Prediction(number, first, "", score, other)
             for number, first, score, other in zip(numbers, firsts, scores[0], paired, strict=True)]
    estimates = language_estimates(ours, settings.seed)
    bare_estimates = language_estimates(theirs, settings.seed) if theirs else {}
    return Part("suite/perplexity", estimates, bare_estimates, lines, used)


def _run_questions(model: TextModel, name: str, questions: list[Question], bare: TextModel | None, settings: Settings,
                   budget: int, progress: Progress) -> Part:
    prompts = [question.prompt for question in questions]
    texts = model.generate(prompts, budget, lambda done: progress(name, done, len(prompts)))
    used = model.segments_used
    estimates, scores = SCORERS[name](questions, texts, settings)
    bare_estimates: dict[str, Interval] = {}
    paired: Sequence[float | None] = [None] * len(questions)
    if bare is not None:
        theirs = bare.generate(prompts, budget, lambda done: progress(name + BARE, done, len(prompts)))
        bare_estimates, paired = SCORERS[name](questions, theirs, settings)
    lines = [Prediction(question.index, question.prompt, text, score, other)
             for question, text, score, other in zip(questions, texts, scores, paired, strict=True)]
    return Part(f"suite/{name}", estimates, bare_estimates, lines, used)


def check_code_runner(items: Sequence[SuiteItem], allow_unconfined: bool) -> None:
    """Raises SuiteError where the suite would run generated code that nothing confines and nobody allowed."""
    if not any(item.name == "mbpp" for item in items) or allow_unconfined:
        return
    from sandbox.runner import confinement

    reason = confinement()
    if reason is not None:
        raise SuiteError(f"mbpp runs generated code, which cannot be confined here ({reason}): leave mbpp out of "
                         "--eval_suite, or accept the risk with --allow_unconfined_code")


def spec_problems(text: str | None, allow_unconfined: bool) -> list[str]:
    """Everything wrong with an `--eval_suite` spec here, one line each; None is no suite.

    A suite that would run generated code which nothing confines is told when all else is right.
    """
    if not text:
        return []
    lines = suite_problems(text)
    if lines:
        return lines
    try:
        check_code_runner(parse_suite(text), allow_unconfined)
    except SuiteError as error:
        return [str(error)]
    return []


def run_suite(
    model: TextModel,
    items: Sequence[SuiteItem],
    n: int = 0,
    seed: int = 0,
    bare: TextModel | None = None,
    allow_unconfined: bool = False,
    progress: Progress = lambda entry, done, total: None,
    max_new_tokens: int = 0,
) -> SuiteResult:
    """Measures `model`, and `bare` on the same items, on every entry.

    `n` caps the items of an entry (language: its windows), drawn by `seed`; 0 takes all. `max_new_tokens` 0 takes each
    entry's own budget. Every file is read before the first answer.

    Raises:
        SuiteError: a file with a wrong line, or generated code that could not be confined.
    """
    check_code_runner(items, allow_unconfined)
    settings = Settings(seed, allow_unconfined)
    loaded = [Windows.read(item, n, seed) if item.name == "perplexity" else _questions(item, n, seed) for item in items]
    result = SuiteResult()
    for item, entry in zip(items, loaded, strict=True):
        if isinstance(entry, Windows):
            result.parts.append(_run_perplexity(model, entry, bare, settings, progress))
        else:
            budget = max_new_tokens or BUDGETS[item.name]
            result.parts.append(_run_questions(model, item.name, entry, bare, settings, budget, progress))
    return result
