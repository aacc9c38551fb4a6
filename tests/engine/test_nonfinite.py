"""Batches without a number: left out and counted, or the end of the run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from accelerate import Accelerator

from engine.nonfinite import MOST_IN_A_ROW, LeftOut
from engine.optimization import NonFiniteError
from three_systems import SYSTEMS


def test_the_first_one_ends_a_run_that_stops():
    left_out = LeftOut()
    assert not left_out.another()
    assert left_out.reason() == left_out.closing() == "" and left_out.metrics == {}


def test_the_tenth_in_a_row_ends_a_run_that_skips_and_a_good_batch_begins_the_row_anew():
    left_out = LeftOut("skip")
    for _ in range(MOST_IN_A_ROW - 1):
        assert left_out.another()
    left_out.good()
    for _ in range(MOST_IN_A_ROW - 1):
        assert left_out.another()
    assert not left_out.another()
    assert left_out.count == 2 * (MOST_IN_A_ROW - 1), "the one that ends the run is not left out"
    assert "the 10th batch in a row" in left_out.reason()


def test_the_count_outlives_a_checkpoint_and_an_older_one_has_none():
    left_out = LeftOut("skip")
    left_out.another()
    other = LeftOut("skip")
    other.restore(json.loads(json.dumps(left_out.document())))
    assert (other.count, other.row) == (1, 1) and other.closing().startswith("1 batch was left out")
    other.restore({})
    assert (other.count, other.row) == (0, 0)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_goes_on_after_a_batch_that_moved_nothing(system, tiny_host):
    trainer, batches = SYSTEMS[system](tiny_host, Accelerator(cpu=True))
    trainer.step(batches, 0, lr=1e-2)
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}

    hooks = [p.register_hook(lambda gradient: gradient * math.nan) for p in trainer.parameters.values()]
    with pytest.raises(NonFiniteError) as found:
        trainer.step(batches, 1, lr=1e-2)
    for hook in hooks:
        hook.remove()
    assert math.isnan(found.value.norm)
    assert all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())

    assert math.isfinite(trainer.step(batches, 2, lr=1e-2)["loss"])
    assert any(not torch.equal(p, before[name]) for name, p in trainer.parameters.items())
    assert all(p.isfinite().all() for p in trainer.parameters.values())
