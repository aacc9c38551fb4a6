"""From generated text to scores: numbers, exact answers, options and rationales."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from engine.intervals import Interval, bootstrap
from suite.questions import LETTERS
from text_data.numbers import final_number

# What announces an answer: "the answer is", "Option:", "choice should be".
STATED = re.compile(r"\b(?:answer|option|choice)(?:\s+(?:is|would be|should be))?\s*[:=]?\s*", re.IGNORECASE)
# What ends an announced option: the line, the sentence, a reason.
STATED_END = re.compile(r"[\n.;](?:\s|$)|\bbecause\b")
# A letter that opens an answer: bracketed, with a mark behind it, alone on its line, or a word of its own. A and I are
# words too, so they count only where a reason follows.
OPENING_LETTER = re.compile(
    r"\s*(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])[.):](?!\w)|([A-Z])(?=\s*(?:$|[\n,;]))|([B-HJ-Z])(?=\s)"
    r"|([AI])(?=\s+(?:because|since|as)\b))"
)
BRACKETED_LETTER = re.compile(r"\(([A-Z])\)")
WORD = re.compile(r"[^\W_]+(?:[./'-][^\W_]+)*")

# The sentences of a rationale, and those of them that only state the answer.
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
STATEMENT = re.compile(
    r"\W*(?:so|thus|therefore|hence)?\W*(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)\b\s*(?:is|:)", re.IGNORECASE
)
LETTER_ALONE = re.compile(r"\W*[A-Z]\W*")
CUE = re.compile(r"^\W*(?:because|rationale|explanation|reason|solution)\s*[:.,]\s*", re.IGNORECASE)


# --- answers ----------------------------------------------------------------------------------------------------------


def same_number(text: str, gold: str) -> bool:
    """The final numbers of both texts are equal: 12.0 = 12. False where either has none."""
    number = final_number(text)
    return number is not None and number == final_number(gold)


def exact(text: str, gold: str) -> bool:
    """The text is the answer, up to white space around it and one trailing point."""
    return text.strip().removesuffix(".") == gold.strip().removesuffix(".")


# --- options ----------------------------------------------------------------------------------------------------------


def _place_of(letter: str, count: int) -> int | None:
    """The place of the option that a letter names; None where there are not so many."""
    place = LETTERS.index(letter.upper())
    return place if place < count else None


def _letter(text: str, count: int) -> int | None:
    """The option whose letter opens `text`: `(B)`, `B.`, `B)`, `B:`, `B`; not the article in `A force`."""
    match = OPENING_LETTER.match(text)
    if match is None:
        return None
    return _place_of(match[match.lastindex], count)


def _words(text: str) -> str:
    """The words of a text in lower case, between single spaces."""
    return " ".join(WORD.findall(text.lower()))


def _holds(words: str, part: str) -> bool:
    """Whether the words of `part` stand together in `words`."""
    return f" {part} " in f" {words} "


def _named(text: str, choices: Sequence[str], whole: bool) -> int | None:
    """The one option whose words `text` is (`whole`) or holds; None where it is none or not clear.

    If a shorter option is part of a longer one that also matches, the longer one wins.
    """
    words = _words(text)
    options = [_words(choice) for choice in choices]
    places = []
    for place, option in enumerate(options):
        if option == words or (not whole and _holds(words, option)):
            places.append(place)

    if not whole:
        matching = {options[place] for place in places}
        places = [place for place in places if not _is_part(options[place], matching)]
    return places[0] if len(places) == 1 else None


def _is_part(option: str, options: set[str]) -> bool:
    """Whether an option is part of another one of `options`."""
    return any(option != other and _holds(other, option) for other in options)


def _verbatim(text: str, choices: Sequence[str]) -> int | None:
    """The longest option that `text` opens with to the letter: some differ in case or punctuation alone."""
    longest = None
    length = -1
    for place, choice in enumerate(choices):
        choice = choice.strip()
        goes_on = re.match(r"\w", text[len(choice) :])  # text opens with a longer word
        if text.startswith(choice) and not goes_on and len(choice) > length:
            longest = place
            length = len(choice)
    return longest


def _stated_option(rests: Sequence[str], choices: Sequence[str]) -> int | None:
    """The option that stands behind an announcement; `rests` are what follows each, in the order they are tried."""
    for rest in rests:
        place = _letter(_unmarked(rest), len(choices))
        if place is not None:
            return place

    for rest in rests:
        place = _verbatim(rest.lstrip(), choices)
        if place is None:
            line = STATED_END.split(rest.lstrip("*_` \"'"), maxsplit=1)[0]
            place = _named(line, choices, whole=True)
        if place is not None:
            return place
    return None


def _unmarked(text: str) -> str:
    """Without Markdown's stars, and without quotes and the like at its start."""
    return text.replace("*", "").lstrip("_` \"'")


def choose_option(text: str, choices: Sequence[str]) -> int | None:
    """The place of the option that a generated answer gives, or None where it gives none or is not clear.

    Tried in this order: a letter after "answer is", "answer:" and the like, then the words of an option there (the
    last such place counts); a letter at the start; a text that opens with an option, or whose first line is one; the
    one option that the first line, then the whole text, names; the one letter in brackets.
    """
    rests = [text[mark.end() :] for mark in STATED.finditer(text)]
    place = _stated_option(rests[::-1], choices)
    if place is not None:
        return place

    # How the text begins.
    place = _letter(_unmarked(text), len(choices))
    if place is None:
        place = _verbatim(text.strip(), choices)
    if place is not None:
        return place

    # What it names at all.
    first_line = text.strip().partition("\n")[0]
    for part, whole in ((first_line, True), (first_line, False), (text, False)):
        place = _named(part, choices, whole)
        if place is not None:
            return place

    letters = {_place_of(letter, len(choices)) for letter in BRACKETED_LETTER.findall(text)} - {None}
    return letters.pop() if len(letters) == 1 else None


# --- rationales -------------------------------------------------------------------------------------------------------


def rationale_of(text: str) -> str:
    """What a generated answer says beside the option: without lines or opening letters that only state the answer."""
    kept = []
    for sentence in SENTENCE_END.split(text.strip()):
        sentence = sentence.strip()
        states_answer = STATEMENT.match(sentence) or LETTER_ALONE.fullmatch(sentence)
        if sentence and not states_answer:
            kept.append(CUE.sub("", sentence))
    return " ".join(kept)


def corpus_bleu(texts: Sequence[str], references: Sequence[str], seed: int) -> Interval:
    """sacrebleu's corpus BLEU, 0 to 100 (13a tokens, exponential smoothing), bootstrapped over items.

    Papineni et al. 2002; Post 2018. One reference for each text.
    """
    from sacrebleu.metrics import BLEU

    # Four counts of matching n-grams, their four totals, and the lengths of text and reference: sums of them over items
    # make the corpus score.
    bleu = BLEU()
    rows = []
    for text, reference in zip(texts, references, strict=True):
        score = bleu.corpus_score([text], [[reference]])
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])

    def score_of(sums: np.ndarray) -> float:
        counts = sums[:4].astype(int).tolist()
        totals = sums[4:8].astype(int).tolist()
        return bleu.compute_bleu(counts, totals, int(sums[8]), int(sums[9]), smooth_method="exp").score

    return bootstrap(np.array(rows), score_of, len(texts), seed)


def _mean(sums: np.ndarray) -> float:
    """From (sum of values, how many)."""
    return sums[0] / sums[1]


def rouge_l(texts: Sequence[str], references: Sequence[str], seed: int) -> Interval:
    """Mean sentence-level ROUGE-L F1, 0 to 1 (rouge-score, no stemming), bootstrapped over items. Lin 2004."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rows = []
    for text, reference in zip(texts, references, strict=True):
        score = scorer.score(reference, text)["rougeL"]
        rows.append([score.fmeasure, 1.0])
    return bootstrap(np.array(rows), _mean, len(texts), seed)
