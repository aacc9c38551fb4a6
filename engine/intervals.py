"""Intervals of everything that is measured: shares, means over seeds, any statistic, and differences of two arms.

- A share of items is given Wilson's score interval (Wilson 1927), which holds near 0 and 1, where the normal one fails.
- A mean over seeds is given Student's t: it says how far another seed of the same arm may lie.
- Any other statistic is bootstrapped over its units.
- The paired bootstrap resamples items, both arms alike, so an item that is hard for both adds nothing to the
  difference's uncertainty (Efron and Tibshirani, An Introduction to the Bootstrap, section 10.3; Koehn 2004).

All intervals are 95 % unless a level is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
DRAWS = 10_000  # resamples of a paired comparison
RESAMPLES = 1000  # resamples of a single statistic
CELLS = 4_000_000  # resampled items held at once; bounds the memory of a bootstrap


@dataclass(frozen=True)
class Interval:
    """A measured value with the ends of its interval.

    Attributes:
        value: the estimate.
        low, high: ends of the interval; None where a single unit was measured, which tells nothing of the spread.
        n: what was averaged: items, documents, or seeds.
    """

    value: float
    low: float | None
    high: float | None
    n: int


# --- shares -----------------------------------------------------------------------------------------------------------


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Ends of the Wilson score interval of the share `successes / n`; (0, 1) for n = 0.

    `z` is the normal quantile of the level, that of 95 % by default.
    """
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    spread = z * z / n
    middle = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / n + spread / (4 * n)) / (1 + spread)

    # Rounding must not push an end past the rate itself.
    return max(min(middle - half, rate), 0.0), min(max(middle + half, rate), 1.0)


def proportion(outcomes: Sequence[bool]) -> Interval:
    """Share of true outcomes with the Wilson interval. Raises ZeroDivisionError without outcomes."""
    n = len(outcomes)
    hits = sum(map(bool, outcomes))
    low, high = wilson(hits, n)
    return Interval(hits / n, low, high, n)


# --- means over seeds -------------------------------------------------------------------------------------------------


def student_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's t with an integer number of degrees of freedom (Abramowitz and Stegun, 26.7.3, 26.7.4).

    Raises:
        ValueError: df below 1.
    """
    if df < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {df}")
    angle = math.atan2(t, math.sqrt(df))
    sine = math.sin(angle)
    cosine = math.cos(angle)
    even = df % 2 == 0

    # The finite series in powers of the cosine: even powers for an even df, odd ones for an odd df.
    term = total = 1.0 if even else cosine
    for k in range(2 if even else 3, df, 2):
        term *= (k - 1) / k * cosine**2
        total += term

    if even:
        inside = sine * total
    elif df > 1:
        inside = 2 / math.pi * (angle + sine * total)
    else:
        inside = 2 / math.pi * angle
    return 0.5 + inside / 2


def student_quantile(probability: float, df: int) -> float:
    """The t with `student_cdf(t, df) == probability`, found by bisection to the last bit.

    Raises:
        ValueError: a probability outside (0, 1), or df below 1.
    """
    if not 0 < probability < 1:
        raise ValueError(f"a quantile needs a probability in (0, 1), got {probability}")
    if probability < 0.5:
        return -student_quantile(1 - probability, df)

    low = 0.0
    high = 1.0
    while student_cdf(high, df) < probability:
        high *= 2

    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):  # no number lies between them any more
            break
        if student_cdf(middle, df) < probability:
            low = middle
        else:
            high = middle
    return high


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean and t interval of values of independent runs (seeds). One value has no interval.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a mean needs at least one value")
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, None, 1)

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = student_quantile(0.5 + level / 2, n - 1) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


# --- bootstraps -------------------------------------------------------------------------------------------------------


def bootstrap(
    columns: np.ndarray,
    statistic: Callable[[np.ndarray], float],
    n: int,
    seed: int,
    resamples: int = RESAMPLES,
) -> Interval:
    """A statistic of sums over units, with its 95 % percentile interval over resampled units.

    Args:
        columns: (units, k) figures of each unit, such as a document's log-likelihood and its tokens.
        statistic: takes the (k,) column sums, returns the value, such as their ratio.
        n: the count that is reported, such as items, where it differs from the units resampled.
        seed: of the resampling.
        resamples: how many times the units are drawn with replacement.
    """
    columns = np.asarray(columns, dtype=np.float64)
    units = len(columns)
    value = statistic(columns.sum(axis=0))
    if units < 2:
        return Interval(value, None, None, n)

    generator = np.random.default_rng(seed)
    drawn = [statistic(columns[generator.integers(0, units, units)].sum(axis=0)) for _ in range(resamples)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value, float(low), float(high), n)


def paired_bootstrap(
    ours: Sequence[float], theirs: Sequence[float], draws: int = DRAWS, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean difference `ours - theirs` over the same items, in the same order, and its percentile interval.

    Raises:
        ValueError: no items, or not one value of each arm per item.
    """
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(f"a paired comparison needs the same items of both, got {len(ours)} and {len(theirs)}")
    differences = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    n = len(differences)

    # Resamples are drawn in parts, so that memory does not grow with items times draws.
    generator = np.random.default_rng(seed)
    at_once = max(CELLS // n, 1)
    means = []
    for start in range(0, draws, at_once):
        picked = generator.integers(0, n, size=(min(at_once, draws - start), n))
        means.append(differences[picked].mean(axis=1))

    tail = 100 * (1 - level) / 2
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Interval(float(differences.mean()), float(low), float(high), n)


Scores = Mapping[int, Mapping[str, float]]  # seed -> item -> score


def paired_seeds(ours: Scores, theirs: Scores, draws: int = DRAWS, seed: int = 0) -> Interval | None:
    """As `paired_bootstrap`, of two arms with several seeds each.

    Only seeds that both arms have and items that all of their runs have count. Each item's score is its mean over those
    seeds. The interval is about items, given these seeds. None where the arms have no seed or no item in common.
    """
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    items = sorted(set.intersection(*(set(arm[s]) for arm in (ours, theirs) for s in shared)))
    if not items:
        return None
    return paired_bootstrap(_means(ours, shared, items), _means(theirs, shared, items), draws, seed)


def _means(arm: Scores, seeds: Sequence[int], items: Sequence[str]) -> list[float]:
    """Each item's score, averaged over the seeds."""
    return [math.fsum(arm[seed][item] for seed in seeds) / len(seeds) for item in items]
