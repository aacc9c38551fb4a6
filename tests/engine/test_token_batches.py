"""batches: parts of like length, batches of so many tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.batches import MOST_PADDING, Padding, like_lengths, token_batches

LENGTHS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=80)


def columns(part, items) -> int:
    return len(part) * (max(items[i][0] for i in part) + max(items[i][1] for i in part))


@given(LENGTHS, st.integers(70, 400))
def test_every_item_is_in_one_batch_of_few_enough_tokens_and_pads(items, most):
    prompts, targets = zip(*items, strict=True)
    batches = token_batches(prompts, targets, most)
    parts = [part for batch in batches for part in batch]
    assert sorted(index for part in parts for index in part) == list(range(len(items)))
    assert sorted(parts) == sorted(like_lengths(prompts, targets, most))
    for batch in batches:
        whole = sum(columns(part, items) for part in batch)
        real = sum(sum(items[index]) for part in batch for index in part)
        assert whole <= most and real >= (1 - MOST_PADDING) * whole - 1e-9


@given(LENGTHS, st.integers(70, 400))
def test_batches_are_filled_up(items, most):
    """No two of them would fit into one."""
    prompts, targets = zip(*items, strict=True)
    sizes = [sum(columns(part, items) for part in batch) for batch in token_batches(prompts, targets, most)]
    assert len(sizes) < 2 or sorted(sizes)[0] + sorted(sizes)[1] > most


def test_ranks_get_the_same_number_of_items():
    prompts, targets = [3, 9, 4, 30, 31, 5, 4, 9], [1, 1, 2, 2, 1, 1, 1, 1]
    parts = like_lengths(prompts, targets, 40, world=2)
    assert all(len(part) % 2 == 0 for part in parts)


def test_an_item_beyond_the_limit_is_alone():
    assert token_batches([50, 3], [2, 1], 10) == [[[1]], [[0]]] or token_batches([50, 3], [2, 1], 10) == [[[0]], [[1]]]


def test_padding_is_told_of_all_batches_and_of_the_worst():
    padding = Padding()
    padding.add(90, 100)
    padding.add(95, 100)
    assert padding.words() == "padding: 7.5 % of the training batches, 10.0 % of the worst"
