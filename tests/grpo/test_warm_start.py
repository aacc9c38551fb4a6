"""warm_start: a run that is trained but not measured is not done."""

from __future__ import annotations

from grpo.warm_start import FinishedHooks


def test_a_warm_start_that_was_cut_before_its_last_evaluation_is_measured_on_every_stage():
    hooks = FinishedHooks()
    assert hooks.nothing_to_do(2, 2, 1.0, None) is None
    hooks.after_evaluation(2, None, None)
    assert hooks.nothing_to_do(2, 2, 1.0, None) == "" and hooks.nothing_to_do(1, 2, 0.5, None) is None
    hooks.extra = {}  # of a checkpoint from before this was kept
    assert hooks.nothing_to_do(2, 2, 1.0, None) == ""
