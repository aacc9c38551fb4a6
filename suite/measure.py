"""The evaluation suite on any `TextModel`: language, sums, maths, code and science questions, beside the bare LLM.

All answers are generated, greedily; all estimates carry their n and a 95 % interval: Wilson for shares, a seeded
bootstrap for the others (over documents for language, over items for rationales).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace

from engine.intervals import Interval, proportion
from sandbox import runner
from suite.language import Windows, language_estimates
from suite.questions import Question, SuiteError, SuiteItem, chosen, read_questions
from suite.results import Part, Prediction, SuiteResult, cut_shares
from suite.scoring import choose_option, corpus_bleu, exact, rationale_of, rouge_l, same_number
from suite.spec import LANGUAGE, check_code_runner
from suite.text_model import Cuts, TextModel
from text_data.programs import program_of

BUDGETS = {"synthetic": 16, "gsm8k": 320, "mbpp": 384, "science_qa": 192}  # new tokens of an answer
BARE = " (bare LLM)"
Progress = Callable[[str, int, int], None]  # entry (and whose turn it is), done, of
Scores = tuple[dict[str, Interval], list[float]]  # estimates, score of each item


def silent(entry: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


# --- scoring, entry by entry ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What scorers need beside questions and texts.

    seed: of the bootstraps.
    allow_unconfined: run code where nothing confines it.
    """

    seed: int = 0
    allow_unconfined: bool = False


def _as_scores(outcomes: Sequence[bool]) -> list[float]:
    return [float(outcome) for outcome in outcomes]


def _same_numbers(questions: Sequence[Question], texts: Sequence[str]) -> list[bool]:
    pairs = zip(texts, questions, strict=True)
    return [same_number(text, question.answer) for text, question in pairs]


def _score_synthetic(questions: Sequence[Question], texts: Sequence[str], settings: Settings) -> Scores:
    """`exact`: the text is the answer and nothing else; `final_number`: its last number is the answer's."""
    pairs = zip(texts, questions, strict=True)
    right = [exact(text, question.answer) for text, question in pairs]
    estimates = {"exact": proportion(right), "final_number": proportion(_same_numbers(questions, texts))}
    return estimates, _as_scores(right)


def _score_gsm8k(questions: Sequence[Question], texts: Sequence[str], settings: Settings) -> Scores:
    """`accuracy`: the text's final number is the answer's."""
    right = _same_numbers(questions, texts)
    return {"accuracy": proportion(right)}, _as_scores(right)


def _score_mbpp(questions: Sequence[Question], texts: Sequence[str], settings: Settings) -> Scores:
    """`passed`: an item is solved when its code passes all its tests."""
    # A model may talk around its code, or be cut off inside it.
    jobs = []
    for text, question in zip(texts, questions, strict=True):
        jobs.append(runner.CodeJob(program_of(text, question.tests), question.tests, question.setup))
    results = runner.run_many(jobs, allow_unconfined=settings.allow_unconfined)
    right = [result.passed for result in results]
    return {"passed": proportion(right)}, _as_scores(right)


def _score_science_qa(questions: Sequence[Question], texts: Sequence[str], settings: Settings) -> Scores:
    """`accuracy` of the option; `bleu` and `rouge_l` of what is said beside it, where there is a gold rationale."""
    # Not every item has a gold rationale: the two scores are of those that have one.
    right = []
    rationales = []
    golds = []
    for text, question in zip(texts, questions, strict=True):
        right.append(choose_option(text, question.choices) == question.answer_index)
        if question.rationale.strip():
            rationales.append(rationale_of(text))
            golds.append(question.rationale)

    estimates = {"accuracy": proportion(right)}
    if golds:
        estimates["bleu"] = corpus_bleu(rationales, golds, settings.seed)
        estimates["rouge_l"] = rouge_l(rationales, golds, settings.seed)
    return estimates, _as_scores(right)


SCORERS: dict[str, Callable[[Sequence[Question], Sequence[str], Settings], Scores]] = {
    "synthetic": _score_synthetic,
    "gsm8k": _score_gsm8k,
    "mbpp": _score_mbpp,
    "science_qa": _score_science_qa,
}


# --- the run ----------------------------------------------------------------------------------------------------------


def read_items(
    item: SuiteItem, n: int, seed: int, trained_on: Container[str]
) -> tuple[Windows | list[Question], int]:
    """(what an entry asks, `n` of it drawn by `seed` (0: all); how much was left out because it was trained on).

    Raises:
        SuiteError: a file with a wrong line; nothing is left to ask.
    """
    if item.name == LANGUAGE:
        windows = Windows.read(item, n, seed, trained_on)
        return windows, windows.trained

    read = read_questions(item)
    questions = [question for question in read if question.prompt not in trained_on]
    if not questions:
        raise SuiteError(f"{item.name}: all {len(read)} questions of {item.path} were trained on: give a held-out file")
    return [questions[place] for place in chosen(len(questions), n, seed)], len(read) - len(questions)


def _run_perplexity(
    model: TextModel, windows: Windows, bare: TextModel | None, settings: Settings, progress: Progress
) -> Part:
    """The language entry, measured on `model` and then on `bare`."""
    total = len(windows.pairs)
    cuts: list[Cuts] = []
    bare_cuts: list[Cuts] = []

    def tell(done: int) -> None:
        cuts.append(latest_cuts(model))
        progress(LANGUAGE, done, total)

    def tell_bare(done: int) -> None:
        bare_cuts.append(latest_cuts(bare))
        progress(LANGUAGE + BARE, done, total)

    # `segments_used` is that of the latest call, so it is read before the next one.
    ours = windows.measure(model, tell)
    segments_used = model.segments_used
    estimates = language_estimates(ours, settings.seed) | cut_shares(cuts)
    bare_estimates: dict[str, Interval] = {}
    bare_scores: list[float | None] = [None] * len(ours)
    if bare is not None:
        theirs = windows.measure(bare, tell_bare)
        bare_estimates = language_estimates(theirs, settings.seed) | cut_shares(bare_cuts)
        bare_scores = _per_token(theirs)

    # A document has no answer; its first context stands for it in the records.
    predictions = []
    documents = zip(windows.first_contexts().items(), _per_token(ours), bare_scores, strict=True)
    for (number, context), score, bare_score in documents:
        predictions.append(Prediction(number, context, "", score, bare_score))
    return Part(f"suite/{LANGUAGE}", estimates, bare_estimates, predictions, segments_used)


def latest_cuts(model: TextModel) -> Cuts:
    """What the latest call of a model cut; nothing where it does not tell."""
    return getattr(model, "cuts", Cuts())


def _per_token(documents: Sequence[tuple[float, int, int]]) -> list[float]:
    """Log p of a token in nats, mean over each document, from (sum of log p, tokens, bytes)."""
    return [nats / max(tokens, 1) for nats, tokens, _ in documents]


def _run_questions(
    model: TextModel,
    name: str,
    questions: list[Question],
    bare: TextModel | None,
    settings: Settings,
    budget: int,
    progress: Progress,
) -> Part:
    """The entry `name`, answered by `model` and then by `bare` in at most `budget` tokens each."""
    prompts = [question.prompt for question in questions]

    def tell(done: int) -> None:
        progress(name, done, len(prompts))

    def tell_bare(done: int) -> None:
        progress(name + BARE, done, len(prompts))

    # The same prompts and the same budget for both, so that their scores can be paired item by item.
    texts = model.generate(prompts, budget, tell)
    segments_used = model.segments_used
    cuts = latest_cuts(model)
    estimates, scores = SCORERS[name](questions, texts, settings)
    estimates |= cut_shares([cuts])
    bare_estimates: dict[str, Interval] = {}
    bare_scores: Sequence[float | None] = [None] * len(questions)
    bare_texts: Sequence[str | None] = [None] * len(questions)
    if bare is not None:
        bare_texts = bare.generate(prompts, budget, tell_bare)
        bare_cuts = latest_cuts(bare)
        bare_estimates, bare_scores = SCORERS[name](questions, bare_texts, settings)
        bare_estimates |= cut_shares([bare_cuts])

    predictions = []
    for question, text, score, *bare_own in zip(questions, texts, scores, bare_scores, bare_texts, strict=True):
        bare_score, bare_text = bare_own
        predictions.append(
            Prediction(question.index, question.prompt, text, score, bare_score, question.gold, bare_text)
        )
    chance = constant_option(questions)
    return Part(f"suite/{name}", estimates, bare_estimates, predictions, segments_used, chance=chance)


def constant_option(questions: Sequence[Question]) -> float | None:
    """The share of questions that the commonest place of the right option solves; None where some have no options."""
    places = [question.answer_index for question in questions if question.choices]
    if not places or len(places) < len(questions):
        return None
    return max(map(places.count, places)) / len(places)


def run_suite(
    model: TextModel,
    items: Sequence[SuiteItem],
    n: int = 0,
    seed: int = 0,
    bare: TextModel | None = None,
    allow_unconfined: bool = False,
    progress: Progress = silent,
    max_new_tokens: int = 0,
    trained_on: Container[str] = (),
) -> SuiteResult:
    """Measures `model`, and `bare` on the same items, on every entry. Every file is read before the first answer.

    Args:
        model: what is measured.
        items: the entries; `synthetic` without a file needs its pairs.
        n: caps the items of an entry (language: its windows), drawn by `seed`; 0 takes all.
        seed: of that draw and of the bootstraps.
        bare: what the model is compared with, such as its bare LLM.
        allow_unconfined: run generated code where nothing confines it.
        progress: called with the entry, how many of its items are done, and of how many.
        max_new_tokens: tokens of an answer; 0 takes each entry's own budget.
        trained_on: tells of a prompt, or of a document, whether it was trained on: such items are left out and counted.

    Raises:
        SuiteError: a file with a wrong line, or with trained items alone; generated code that could not be confined.
    """
    # Everything that can be wrong is found here, before a model is asked for minutes.
    check_code_runner(items, allow_unconfined)
    settings = Settings(seed, allow_unconfined)
    asked = [read_items(item, n, seed, trained_on) for item in items]

    result = SuiteResult()
    for item, (entry, trained) in zip(items, asked, strict=True):
        if isinstance(entry, Windows):
            part = _run_perplexity(model, entry, bare, settings, progress)
        else:
            budget = max_new_tokens or BUDGETS[item.name]
            part = _run_questions(model, item.name, entry, bare, settings, budget, progress)
        result.parts.append(replace(part, trained=trained))
    return result
