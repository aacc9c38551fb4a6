"""patience: what counts against it, for a rate, a loss and a rise."""

from __future__ import annotations

import json

import pytest

from engine.patience import Patience, PatienceConfig, patience_warning
from engine.report import Report

NAN = float("nan")


def counts(on: str, values: list, grace: int = 0) -> list[int]:
    """The count after each evaluation, at steps 1, 2, ..."""
    patience = Patience(PatienceConfig(2, on, grace))
    seen = []
    for step, value in enumerate(values, start=1):
        patience.update(step, Report([], [], "", **({"value": value} if on == "solved" else {"loss": value})))
        seen.append(patience.worse)
    return seen


@pytest.mark.parametrize("on,values,expected", [
    ("solved", [0.1, 0.1, 0.2, 0.1, 0.15, 0.3], [0, 1, 0, 1, 2, 0]),
    ("loss", [3.0, 2.0, 2.5, 2.1, NAN, 1.9], [0, 0, 1, 2, 3, 0]),
    ("rise", [3.0, 4.0, 4.0, 5.0, NAN, 4.0, 4.5], [0, 1, 0, 1, 2, 0, 1]),
    ("loss", [NAN, 2.0, None, 2.1], [0, 0, 0, 1]),
])
def test_what_counts_against_patience(on, values, expected):
    assert counts(on, values) == expected


def test_grace_steps_count_nothing_but_their_best_stays_to_be_beaten():
    assert counts("solved", [0.5, 0.4, 0.3, 0.4, 0.6], grace=3) == [0, 0, 0, 1, 0]


def test_a_solved_rate_that_is_not_the_value_is_what_is_watched():
    patience = Patience(PatienceConfig(1))
    for value, solved in ((1.0, 0.5), (2.0, 0.5)):
        patience.update(1, Report([], [], "", value, solved=solved))
    assert patience.ended() == "the solved rate was no better than the best before 1 times in a row (--patience 1)"
    assert Patience(PatienceConfig(0)).ended() is None


def test_a_checkpoint_keeps_the_count_but_not_for_another_figure():
    patience = Patience(PatienceConfig(2, "loss"))
    for loss in (1.0, 2.0):
        patience.update(1, Report([], [], "", loss=loss))
    saved = json.loads(json.dumps(patience.document()))
    again, other = Patience(PatienceConfig(2, "loss")), Patience(PatienceConfig(2, "rise"))
    again.restore(saved, {})
    other.restore(saved, {})
    assert (again.worse, again.best) == (1, -1.0) and (other.worse, other.best) == (0, None)


def test_the_hybrids_count_of_before_goes_on():
    patience = Patience(PatienceConfig(3, "rise"))
    patience.restore({}, {"evaluated": 6, "validation_loss": 2.0, "rises": 2})
    patience.update(7, Report([], [], "", loss=2.5))
    assert patience.ended() == "the validation loss rose 3 times in a row (--patience 3)"


@pytest.mark.parametrize(("patience", "eval_every", "steps", "amid"), [(1, 380, 2, 0), (1, 10, 20, 1), (3, 10, 40, 3)])
def test_a_run_too_short_for_patience_is_told(patience, eval_every, steps, amid):
    line = patience_warning(patience, eval_every, steps)
    assert line.startswith(f"WARNING: --patience {patience} needs {patience + 1} evaluations amid training, and")
    assert f"--eval_every {eval_every} gives {amid} in {steps} steps" in line
    assert patience_warning(patience, eval_every, (patience + 1) * eval_every + 1) is None
    assert patience_warning(0, eval_every, steps) is patience_warning(patience, 0, steps) is None
