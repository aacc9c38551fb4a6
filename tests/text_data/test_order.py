"""text_data.order: every epoch is a permutation, and any stretch is what the whole would show there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from text_data.order import EpochOrder


@given(length=st.integers(1, 20), start=st.integers(0, 70), count=st.integers(0, 70), seed=st.integers(0, 3))
def test_any_stretch_is_a_part_of_the_epochs_joined_end_to_end(length, start, count, seed):
    whole = EpochOrder(length, [seed, 1]).stretch(0, start + count).tolist()
    order = EpochOrder(length, [seed, 1])
    order.stretch(length, length)  # whatever was asked before
    assert order.stretch(start, count).tolist() == whole[start:]
    epochs = [whole[place : place + length] for place in range(0, len(whole), length)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs if len(epoch) == length)
