"""From generated text to scores, and from scores to estimates with their 95 % intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from engine.intervals import Interval, bootstrap
from suite.questions import LETTERS
from text_data.numbers import final_number

STATED = re.compile(r"\b(?:answer|option|choice)(?:\s+(?:is|would be|should be))?\s*[:=]?\s*", re.IGNORECASE)
CUE = re.compile(r"^\W*(?:because|rationale|explanation|reason|solution)\s*[:.,]\s*", re.IGNORECASE)


# --- answers ----------------------------------------------------------------------------------------------------------


def same_number(text: str, gold: str) -> bool:
    """The final numbers of both texts are equal: 12.0 = 12."""
    number = final_number(text)
    return number is not None and number == final_number(gold)


def exact(text: str, gold: str) -> bool:
    """The text is the answer, up to white space around it and one trailing point."""
    return text.strip().removesuffix(".") == gold.strip().removesuffix(".")


OPENING_LETTER = re.compile(
    r"\s*(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])[.):](?!\w)|([A-Z])(?=\s*(?:$|[\n,;]))|([B-HJ-Z])(?=\s)"
    r"|([AI])(?=\s+(?:because|since|as)\b))"
)


def _letter(text: str, count: int) -> int | None:
    """The option whose letter opens `text`: `(B)`, `B.`, `B)`, `B:`, `B`; not the article in `A force`."""
    found = OPENING_LETTER.match(text)
    place = LETTERS.index(next(filter(None, found.groups())).upper()) if found else count
    return place if place < count else None


def _named(text: str, choices: Sequence[str], whole: bool) -> int | None:
    """The one option whose words `text` is (`whole`) or holds; an option inside a longer one that is there yields."""
    words = _words(text)
    if whole:
        found = [place for place, choice in enumerate(choices) if _words(choice) == words]
    else:
        held = [place for place, choice in enumerate(choices) if f" {_words(choice)} " in f" {words} "]
        found = [place for place in held
                 if not any(place != other and f" {_words(choices[place])} " in f" {_words(choices[other])} "
                            and _words(choices[place]) != _words(choices[other]) for other in held)]
    return found[0] if len(found) == 1 else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+(?:[./'-][^\W_]+)*", text.lower()))


def _verbatim(text: str, choices: Sequence[str]) -> int | None:
    """The longest option that `text` opens with to the letter: some differ in case or punctuation alone."""
    found = [place for place, choice in enumerate(choices)
             if text.startswith(choice.strip()) and not re.match(r"\w", text[len(choice.strip()) :])]
    return max(found, key=lambda place: len(choices[place].strip()), default=None)


def choose_option(text: str, choices: Sequence[str]) -> int | None:
    """The place of the option that a generated answer gives, or None where it gives none or is not clear.

    Tried in this order: a letter after "answer is", "answer:" and the like, then the words of an option there (the
    last such place counts); a letter at the start; a text that opens with an option, or whose first line is one; the
    one option that the first line, then the whole text, names; the one letter in brackets.
    """
    stated = [text[mark.end() :] for mark in reversed(list(STATED.finditer(text)))]
    for rest in stated:
        found = _letter(rest.replace("*", "").lstrip("_` \"'"), len(choices))
        if found is not None:
            return found
    for rest in stated:
        line = re.split(r"[\n.;](?:\s|$)|\bbecause\b", rest.lstrip("*_` \"'"), maxsplit=1)[0]
        found = _verbatim(rest.lstrip(), choices)
        found = _named(line, choices, whole=True) if found is None else found
        if found is not None:
            return found
    found = _letter(text.replace("*", "").lstrip("_` \"'"), len(choices))
    found = _verbatim(text.strip(), choices) if found is None else found
    if found is not None:
        return found
    first = text.strip().partition("\n")[0]
    for part, whole in ((first, True), (first, False), (text, False)):
        found = _named(part, choices, whole)
        if found is not None:
            return found
    letters = {letter for letter in re.findall(r"\(([A-Z])\)", text) if LETTERS.index(letter) < len(choices)}
    return LETTERS.index(letters.pop()) if len(letters) == 1 else None


def rationale_of(text: str) -> str:
    """What a generated answer says beside the option: without lines or opening letters that only state the answer."""
    kept = []
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", text.strip()):
        stated = re.match(r"\W*(?:so|thus|therefore|hence)?\W*(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)\b"
                          r"\s*(?:is|:)", sentence, re.IGNORECASE)
        letter = re.fullmatch(r"\W*[A-Z]\W*", sentence.strip())
        if sentence.strip() and not stated and not letter:
            kept.append(CUE.sub("", sentence.strip()))
    return " ".join(kept)


# --- rationales -------------------------------------------------------------------------------------------------------


def corpus_bleu(texts: Sequence[str], references: Sequence[str], seed: int) -> Interval:
    """sacrebleu's corpus BLEU, 0 to 100 (13a tokens, exponential smoothing), bootstrapped over items."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU()
    scores = [bleu.corpus_score([text], [[reference]]) for text, reference in zip(texts, references, strict=True)]
    columns = np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores])

    def of(sums: np.ndarray) -> float:
        counts, totals = sums[:4].astype(int).tolist(), sums[4:8].astype(int).tolist()
        return bleu.compute_bleu(counts, totals, int(sums[8]), int(sums[9]), smooth_method="exp").score

    return bootstrap(columns, of, len(texts), seed)


def rouge_l(texts: Sequence[str], references: Sequence[str], seed: int) -> Interval:
    """Mean sentence-level ROUGE-L F1, 0 to 1 (rouge-score, no stemming), bootstrapped over items."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(references, texts, strict=True)
    scores = [scorer.score(reference, text)["rougeL"].fmeasure for reference, text in pairs]
    return bootstrap(np.array([[score, 1.0] for score in scores]), lambda sums: sums[0] / sums[1], len(texts), seed)


# --- language ---------------------------------------------------------------------------------------------------------


def language_estimates(documents: Sequence[tuple[float, int, int]], seed: int) -> dict[str, Interval]:
    """Perplexity per token and bits per byte from each document's (sum of log p in nats, tokens, bytes)."""
    columns = np.array(documents, dtype=np.float64)

    def perplexity(sums: np.ndarray) -> float:
        nats = -sums[0] / max(sums[1], 1.0)
        return math.exp(nats) if nats < 700 else math.inf

    def bits(sums: np.ndarray) -> float:
        return -sums[0] / math.log(2) / max(sums[2], 1.0)

    tokens, size = (int(columns[:, place].sum()) for place in (1, 2))
    return {
        "perplexity": bootstrap(columns, perplexity, tokens, seed),
        "bits_per_byte": bootstrap(columns, bits, size, seed),
    }
