"""Attention on a CPU: few keys in bf16 by products, masks, gradients, the same as float32 within bf16's rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine import attention
from engine.attention import FEW_KEYS, attend, key_mask, rope, rotate

LATER = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]])


def states(dtype, keys=5, queries=5):
    """Query, key and value (2, 3, T or S, 8)."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, length, 8, generator=draw).to(dtype) for length in (queries, keys, keys)]


@pytest.mark.parametrize("keys", [5, FEW_KEYS + 1])
@pytest.mark.parametrize("masked", [False, True])
def test_bf16_is_float32_within_its_rounding(keys, masked):
    query, key, value = (part.requires_grad_() for part in states(torch.bfloat16, keys))
    mask = key_mask(F.pad(LATER, (0, keys - 5), value=1)) if masked else None
    exact = [part.detach().float().requires_grad_() for part in (query, key, value)]
    expected = F.scaled_dot_product_attention(*exact, attn_mask=mask)
    mixed = attend(query, key, value, mask)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), expected, atol=0.03, rtol=0.03)

    mixed.float().square().sum().backward()
    expected.square().sum().backward()
    for part, other in zip((query, key, value), exact, strict=True):
        torch.testing.assert_close(part.grad.float(), other.grad, atol=0.08, rtol=0.08)


def test_float32_is_torchs_own():
    parts = states(torch.float32)
    assert torch.equal(attend(*parts, None), F.scaled_dot_product_attention(*parts))


def test_keys_that_may_not_be_read_change_nothing_and_get_no_gradient():
    query, key, value = states(torch.bfloat16)
    mask = key_mask(LATER)
    before = attend(query, key, value, mask)
    key.requires_grad_()
    hidden = ~mask[:, :, 0, :, None].expand_as(key)
    after = attend(query, key, value.masked_fill(hidden, 50.0), mask)
    assert torch.equal(before, after)
    after.float().sum().backward()
    assert torch.equal(key.grad[hidden], torch.zeros_like(key.grad[hidden]))


def test_a_row_without_any_key_stays_finite():
    mask = torch.tensor([[True] * 5, [False] * 5])[:, None, None, :]
    assert bool(attend(*states(torch.bfloat16), mask).isfinite().all())


def test_products_serve_few_keys_in_bf16_alone(monkeypatch):
    served = []
    monkeypatch.setattr(attention, "_by_products", lambda query, *_: served.append(query.dtype) or query)
    attend(*states(torch.bfloat16, FEW_KEYS), None)
    attend(*states(torch.bfloat16, FEW_KEYS + 1), None)
    attend(*states(torch.float32), None)
    assert served == [torch.bfloat16]


def test_queries_and_keys_turned_together_are_turned_alike():
    query, key, _ = states(torch.float32)
    turned = rope(torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 7]]), 8)
    both = rotate(torch.stack([query, key]), *turned)
    assert torch.equal(both[0], rotate(query, *turned)) and torch.equal(both[1], rotate(key, *turned))
