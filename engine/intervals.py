"""Intervals for comparing runs: a mean over seeds, and the difference of two arms on the same items.

The interval over seeds is Student's t: it says how far another seed of the same arm may lie. The paired bootstrap
resamples items, both arms alike, so an item that is hard for both adds nothing to the difference's uncertainty
(Efron and Tibshirani, An Introduction to the Bootstrap, section 10.3; Koehn 2004 for paired systems).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
CELLS = 4_000_000  # resampled items held at once; bounds the memory of a bootstrap


@dataclass(frozen=True)
class Interval:
    """A figure with its interval; `low` and `high` are None where one value says nothing of the spread."""

    value: float
    low: float | None
    high: float | None
    n: int  # what was averaged: seeds, or items


def student_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's t with an integer number of degrees of freedom (Abramowitz and Stegun, 26.7.3, 26.7.4).

    Raises:
        ValueError: df below 1.
    """
    if df < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {df}")
    angle = math.atan2(t, math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    term = total = 1.0 if df % 2 == 0 else cosine
    for k in range(2 if df % 2 == 0 else 3, df, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    if df % 2 == 0:
        inside = sine * total
    else:
        inside = 2 / math.pi * (angle + (sine * total if df > 1 else 0.0))
    return 0.5 + inside / 2


def student_quantile(probability: float, df: int) -> float:
    """The t with `student_cdf(t, df) == probability`, for a probability in (0, 1)."""
    if not 0 < probability < 1:
        raise ValueError(f"a quantile needs a probability in (0, 1), got {probability}")
    if probability < 0.5:
        return -student_quantile(1 - probability, df)
    low, high = 0.0, 1.0
    while student_cdf(high, df) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if student_cdf(middle, df) < probability else (low, middle)
    return high


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean and t interval of values of independent runs (seeds). One value has no interval.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a mean needs at least one value")
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Interval(mean, None, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = student_quantile(0.5 + level / 2, n - 1) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired_bootstrap(ours: Sequence[float], theirs: Sequence[float], draws: int = DRAWS, seed: int = 0,
                     level: float = 0.95) -> Interval:
    """Mean difference `ours - theirs` over the same items and its percentile interval.

    Raises:
        ValueError: no items, or not one value of each arm per item.
    """
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(f"a paired comparison needs the same items of both, got {len(ours)} and {len(theirs)}")
    differences = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    n, generator = len(differences), np.random.default_rng(seed)
    means, at_once = [], max(CELLS // n, 1)
    for start in range(0, draws, at_once):
        picked = generator.integers(0, n, size=(min(at_once, draws - start), n))
        means.append(differences[picked].mean(axis=1))
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Interval(float(differences.mean()), float(low), float(high), n)


def paired_seeds(
    ours: Mapping[int, Mapping[str, float]], theirs: Mapping[int, Mapping[str, float]], draws: int = DRAWS,
    seed: int = 0,
) -> Interval | None:
    """As `paired_bootstrap`, of two arms with several seeds each: {seed: {item: score}}.

    Only seeds that both arms have and items that all of their runs have count; each item's score is its mean over
    those seeds. None where the arms have nothing in common. The interval is about items, given these seeds.
    """
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    items = set.intersection(*(set(arm[s]) for arm in (ours, theirs) for s in shared))
    if not items:
        return None
    order = sorted(items)
    mean = [[math.fsum(arm[s][item] for s in shared) / len(shared) for item in order] for arm in (ours, theirs)]
    return paired_bootstrap(mean[0], mean[1], draws, seed)
