"""engine/batches.py: batches of similar length, results in the order of the items."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batches import by_length
from engine.stopping import StopRequested, drawn, interruptible, leavable


@given(st.lists(st.text(max_size=6)), st.integers(1, 5))
def test_results_come_in_the_order_of_the_items_and_batches_are_full_and_sorted(items, batch_size):
    batches = []

    def run(batch):
        batches.append(batch)
        return [text.upper() for text in batch]

    assert by_length(items, list(map(len, items)), batch_size, run) == [text.upper() for text in items]
    assert [text for batch in batches for text in batch] == sorted(items, key=len)
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_a_length_or_a_result_too_few_is_refused():
    with pytest.raises(ValueError, match="1 lengths for 2 items"):
        by_length(["a", "b"], [1], 2, list)
    with pytest.raises(ValueError):
        by_length(["a", "b"], [1, 1], 2, lambda batch: batch[:1])


def test_work_that_may_be_left_ends_between_two_batches_and_between_two_items():
    done = []

    def run(batch):
        done.append(batch)
        signal.raise_signal(signal.SIGTERM)
        return batch

    with interruptible() as stop:
        with leavable(alone=True), pytest.raises(StopRequested):
            by_length([1, 2, 3], [1, 1, 1], 1, run)
        assert done == [[1]] and stop.signal == signal.SIGTERM
        with leavable(alone=True), pytest.raises(StopRequested):
            drawn(iter(range(10**12)), 10**12)
        with leavable(alone=False):
            assert drawn(iter("abc"), 2) == ["a", "b"], "other processes wait for this one's part"
        assert drawn(iter("abc"), 2) == ["a", "b"], "amid a step"
    assert drawn(iter("abc"), 2) == ["a", "b"]
