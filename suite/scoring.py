"""From generated text to scores: numbers, exact answers and rationales. Options are read by `text_data.choices`."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from engine.intervals import Interval, bootstrap
from text_data.choices import choose_option
from text_data.numbers import final_number

__all__ = ["choose_option", "corpus_bleu", "exact", "rationale_of", "rouge_l", "same_number"]

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
