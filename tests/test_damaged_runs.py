"""Runs whose newest checkpoint is damaged: what is passed over, refused, and left alone."""

from __future__ import annotations

import shutil

import pytest

from soak_damage import snapshot
from tiny_cache import flip
from tiny_runs import assert_same_run, error_lines, newest

pytestmark = pytest.mark.usefixtures("no_curve")  # conftest.py

SIX = "--max_steps 6 --save_every 2 --eval_every 3 --checkpoint_limit 0".split()


def test_a_flipped_bit_is_named_and_passed_over_where_no_checkpoint_is_named(call, tmp_path):
    assert call("--run_name", "done", *SIX)[0] == 0
    done = tmp_path / "runs" / "done"
    shutil.copytree(done, tmp_path / "whole")
    damaged = newest(done)
    flip(damaged / "training_state.safetensors")
    assert call("--resume", str(damaged), *SIX)[0] == 2
    status, _, err = call("--resume", "auto", *SIX)
    (warning,) = [line for line in err.splitlines() if "passed over" in line]
    assert status == 0 and ", from step 4" in err
    assert warning.startswith(f"WARNING: {damaged / 'training_state.safetensors'} is damaged")
    assert_same_run(tmp_path / "whole", done)

    # Where nothing is whole, a run of that name does not begin anew over what can perhaps be mended.
    for folder in (done / "checkpoints").iterdir():
        flip(folder / "training_state.safetensors")
    before = snapshot(done)
    status, _, err = call("--run_name", "done", *SIX)
    assert status == 2 and "has no whole checkpoint" in error_lines(err)[-1] and snapshot(done) == before
