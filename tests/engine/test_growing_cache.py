"""growing_cache: it holds what transformers' layer holds, whatever becomes of the rows, and copies the past seldom."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from engine.growing_cache import ROOM, GrowingLayer, with_room


def states(tokens: int, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of other widths, as some families have them."""
    return torch.randn(rows, 2, tokens, 4), torch.randn(rows, 2, tokens, 6)


def first_rows(layer: DynamicLayer) -> None:
    """Leaves a view of the rows, which begins where all of them did."""
    layer.keys = layer.keys[:2]
    layer.values = layer.values[:2]


CHANGES = {
    "nothing": lambda layer: None,
    "beams change places": lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
    "tokens are cropped": lambda layer: layer.crop(-2),
    "rows are chosen": lambda layer: layer.batch_select_indices(torch.tensor([2, 1, 0])),
    "it begins anew": lambda layer: layer.reset(),
    "rows go at the end": lambda layer: first_rows(layer),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_it_holds_what_the_plain_layer_holds(change):
    plain, growing = DynamicLayer(), GrowingLayer()
    for turn, tokens in enumerate([5, 1, 1, 3, *[1] * (2 * ROOM)]):
        if turn in (3, 9):
            CHANGES[change](plain)
            CHANGES[change](growing)
        rows = 3 if plain.keys is None else len(plain.keys)
        new = states(tokens, rows)
        for one, other in zip(plain.update(*new), growing.update(*new), strict=True):
            assert torch.equal(one, other)
        assert plain.get_seq_length() == growing.get_seq_length()


@torch.no_grad()
def test_the_past_stays_where_it_is_while_there_is_room():
    layer = GrowingLayer()
    places = {layer.update(*states(tokens))[0].data_ptr() for tokens in [5] + [1] * ROOM}
    assert len(places) == 1


def test_with_gradient_nothing_is_written_in_place():
    layer = GrowingLayer()
    first = states(4)
    first[0].requires_grad_()
    layer.update(*first)
    keys, _ = layer.update(*states(1))
    keys.sum().backward()
    assert torch.equal(first[0].grad, torch.ones_like(first[0]))


def test_other_layers_and_filled_ones_stay():
    cache = DynamicCache()
    cache.layers = [DynamicLayer(), DynamicSlidingWindowLayer(4), DynamicLayer()]
    cache.layers[2].update(*states(2))
    with_room(cache)
    assert [type(layer) for layer in cache.layers] == [GrowingLayer, DynamicSlidingWindowLayer, DynamicLayer]
    with_room(None)
