"""Intervals of shares, means, statistics and paired differences, held against slow truths and published tables."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.intervals import (
    bootstrap,
    mean_interval,
    paired_bootstrap,
    paired_seeds,
    proportion,
    student_cdf,
    student_quantile,
    wilson,
)

NUMBERS = st.floats(-100, 100, allow_nan=False)

# --- shares


@pytest.mark.parametrize("successes,n,low,high", [  # Newcombe 1998, table I, method 3
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_equals_published_values(successes, n, low, high):
    assert wilson(successes, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_rate_and_mirrors(pair):
    successes, n = pair
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    mirrored = wilson(n - successes, n)
    assert math.isclose(low, 1 - mirrored[1], abs_tol=1e-12) and math.isclose(high, 1 - mirrored[0], abs_tol=1e-12)
    narrower = wilson(successes * 4, n * 4)
    assert narrower[1] - narrower[0] < high - low


def test_wilson_of_nothing_knows_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


def test_a_proportion_has_the_wilson_interval():
    found = proportion([True, False, True, True])
    assert (found.value, found.n, found.low, found.high) == (0.75, 4, *wilson(3, 4))


# --- means over seeds


@pytest.mark.parametrize(
    ("df", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (200, 1.972)]
)
def test_the_t_quantile_is_that_of_the_printed_tables(df, quantile):
    assert student_quantile(0.975, df) == pytest.approx(quantile, abs=5e-4)
    assert student_quantile(0.025, df) == pytest.approx(-quantile, abs=5e-4)


@given(st.integers(1, 40), st.floats(-8, 8))
@settings(max_examples=40, deadline=None)
def test_the_t_distribution_is_the_integral_of_its_density(df, t):
    log = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    steps = 2000
    heights = [math.exp(log) * (1 + (t * i / steps) ** 2 / df) ** (-(df + 1) / 2) for i in range(steps + 1)]
    area = t / steps * (math.fsum(heights) - (heights[0] + heights[-1]) / 2)
    assert student_cdf(t, df) == pytest.approx(0.5 + area, abs=1e-4)


@given(st.floats(0.001, 0.999), st.integers(1, 60))
def test_quantile_and_distribution_undo_each_other(probability, df):
    assert student_cdf(student_quantile(probability, df), df) == pytest.approx(probability, abs=1e-9)


@pytest.mark.parametrize("call", [lambda: student_cdf(1.0, 0), lambda: student_quantile(1.0, 3),
                                  lambda: mean_interval([]), lambda: paired_bootstrap([], []),
                                  lambda: paired_bootstrap([1.0], [1.0, 0.0])])
def test_what_cannot_be_computed_is_refused(call):
    with pytest.raises(ValueError, match=r"at least 1|\(0, 1\)|at least one|same items"):
        call()


@given(st.lists(NUMBERS, min_size=2, max_size=8))
@settings(deadline=None)
def test_the_interval_over_seeds_is_mean_plus_minus_t_times_the_standard_error(values):
    found = mean_interval(values)
    half = student_quantile(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    assert found.value == pytest.approx(statistics.mean(values), abs=1e-9)
    assert found.high - found.value == pytest.approx(half, abs=1e-6)
    assert found.value - found.low == pytest.approx(half, abs=1e-6)
    assert found.n == len(values)


def test_one_seed_has_a_mean_and_no_interval():
    found = mean_interval([0.5])
    assert (found.value, found.low, found.high, found.n) == (0.5, None, None, 1)


def test_95_of_100_intervals_over_seeds_hold_the_true_mean():
    draw = random.Random(0)
    held = sum(
        found.low <= 3.0 <= found.high
        for found in (mean_interval([draw.gauss(3.0, 2.0) for _ in range(3)]) for _ in range(2000))
    )
    assert 1860 <= held <= 1940


# --- bootstraps


def test_the_bootstrap_is_seeded_and_covers_as_often_as_it_says():
    random = np.random.default_rng(0)

    def mean(sums):
        return sums[0] / sums[1]

    covered = 0
    for trial in range(60):
        sample = np.stack([random.normal(5, 2, 40), np.ones(40)], axis=1)
        found = bootstrap(sample, mean, 40, trial, resamples=200)
        covered += found.low <= 5 <= found.high
        assert found.value == pytest.approx(sample[:, 0].mean())
    assert 50 <= covered <= 60
    again = [bootstrap(sample, mean, 40, seed) for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]
    alone = bootstrap(sample[:1], mean, 1, 0)
    assert (alone.low, alone.high) == (None, None)


def exact_percentiles(differences):
    """Ends of the bootstrap interval over ALL n^n resamples."""
    means = sorted(sum(draw) / len(draw) for draw in itertools.product(differences, repeat=len(differences)))
    return [means[round((len(means) - 1) * share)] for share in (0.025, 0.975)]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=6), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_the_bootstrap_is_that_of_all_resamples(pairs, seed):
    ours, theirs = ([float(pair[side]) for pair in pairs] for side in (0, 1))
    found = paired_bootstrap(ours, theirs, 20_000, seed)
    low, high = exact_percentiles([a - b for a, b in zip(ours, theirs, strict=True)])
    step = 2 / len(pairs)  # neighbouring resampled means are at most so far apart; an end may fall on the neighbour
    assert abs(found.low - low) <= step + 1e-9 and abs(found.high - high) <= step + 1e-9
    assert found.value == pytest.approx(sum(ours) / len(ours) - sum(theirs) / len(theirs))
    assert found == paired_bootstrap(ours, theirs, 20_000, seed)


def test_many_items_are_resampled_in_parts_without_changing_what_is_meant(monkeypatch):
    from engine import intervals as paired_statistics

    draw = random.Random(1)
    ours, theirs = ([float(draw.random() < p) for _ in range(500)] for p in (0.6, 0.5))
    whole = paired_bootstrap(ours, theirs, 4000)
    monkeypatch.setattr(paired_statistics, "CELLS", 3000)
    parts = paired_bootstrap(ours, theirs, 4000)
    assert parts.value == whole.value
    assert parts.low == pytest.approx(whole.low, abs=0.01) and parts.high == pytest.approx(whole.high, abs=0.01)
    normal = 1.96 * statistics.stdev([a - b for a, b in zip(ours, theirs, strict=True)]) / math.sqrt(500)
    assert whole.high - whole.value == pytest.approx(normal, rel=0.1)


def test_pairing_narrows_the_interval_where_items_are_hard_for_both():
    draw = random.Random(2)
    hard = [float(draw.random() < 0.5) for _ in range(400)]
    better = [max(score, float(draw.random() < 0.1)) for score in hard]
    shuffled = draw.sample(hard, len(hard))
    paired, unpaired = paired_bootstrap(better, hard), paired_bootstrap(better, shuffled)
    assert paired.low > 0
    assert paired.high - paired.low < 0.6 * (unpaired.high - unpaired.low)


def test_only_common_seeds_and_items_are_compared():
    ours = {0: {"a": 1.0, "b": 1.0, "c": 0.0}, 1: {"a": 1.0, "b": 0.0}, 7: {"a": 0.0, "b": 0.0}}
    theirs = {0: {"a": 0.0, "b": 1.0}, 1: {"a": 0.0, "b": 0.0, "d": 1.0}}
    found = paired_seeds(ours, theirs)
    assert (found.value, found.n) == (0.5, 2)
    assert paired_seeds(ours, {5: {"a": 1.0}}) is None
    assert paired_seeds(ours, {0: {"z": 1.0}}) is None
