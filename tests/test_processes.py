"""Runs of `train.py` in two processes, beside one: figures, evaluations, files, an end by death, going on.

Two processes with micro-batches of 4 train on the global batches of one process with two such micro-batches.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.watch import DEAD_EXIT
from run_pairs import STEADY, assert_alike, logs, metrics, performed, rows, run
from several import BUSY_S
from tiny_hybrid import RUN as HYBRID
from tiny_runs import arguments, newest

SUMS = {"chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}}
PLANNER = (
    "--arch enhanced --d_model 16 --n_heads 2 --n_planner_layers 1 --n_worker_layers 1 --max_cycles 2 --thought_dim 8 "
    "--mixed_precision none --log_steps 1 --num_threads 1 --device cpu --max_completion_length 4"
).split()
GRPO = "--objective grpo --num_generations 4 --grpo_batch_size 4 --grpo_lr 1e-3".split()


def stages(*names: str) -> list[str]:
    """Small stages of sums."""
    stage = {"size": 8, "epochs": 1, "levels": [SUMS], "eval_n": 5, "warm": 1}
    return ["--stages", json.dumps(dict.fromkeys(names, stage))]


def arguments_of(system: str, host: Path, folder: Path) -> list[str]:
    """A tiny run of a system; two steps, unless told otherwise."""
    planner = [*PLANNER, "--tokenizer", str(host), "--save_dir", str(folder)]
    own = {
        "addon": arguments(host, folder, "--init_state", "fixed"),
        "hybrid": [*HYBRID, "--dataset", "synthetic", "--hrm_gate_warmup_steps", "0", "--save_dir", str(folder)],
        "enhanced": [*planner, "--objective", "ce", *stages("format", "math")],
        "grpo": [*planner, *GRPO, *stages("format")],
    }
    return [*own[system], *STEADY, "--max_steps", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("system", ["addon", "hybrid", "enhanced"])
def test_two_processes_are_one_and_one_goes_on_where_two_stopped(system, tiny_host, tmp_path):
    first = arguments_of(system, tiny_host, tmp_path)
    longer = [*first, "--max_steps", "4"]
    two = performed(
        tmp_path,
        run(2, *first, "--run_name", "two"),
        run(1, *longer, "--run_name", "one", "--grad_accum_steps", "2"),
    )
    assert two == [[0, 0], [0]], logs(tmp_path)
    assert_alike(tmp_path / "two", tmp_path / "one", last_step=2)
    assert "2 processes, 8 examples a batch" in (tmp_path / "log0.txt").read_text(encoding="utf-8")

    # One process, which has to do the other's share as well, goes on with the items of the third step.
    alone = run(1, *longer, "--run_name", "two", "--grad_accum_steps", "2")
    assert performed(tmp_path, alone) == [[0]], logs(tmp_path)
    assert metrics(tmp_path / "two")[2:] and metrics(tmp_path / "one")[2:]
    at_end = [{place: value for place, value in rows(tmp_path / name).items() if place[0] == "4"}
              for name in ("two", "one")]
    assert_alike(tmp_path / "two", tmp_path / "one", last_step=4)
    assert at_end[0] == pytest.approx(at_end[1], rel=1e-5, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["addon", "enhanced"])
def test_a_stage_of_grpo_in_two_processes_is_one_s_and_one_goes_on_amid_it(system, tiny_host, tmp_path):
    """One process alone is told to stop, and both do."""
    call = arguments_of("grpo", tiny_host, tmp_path)
    if system == "addon":
        base = run(1, *arguments_of("addon", tiny_host, tmp_path), "--run_name", "base", log=str(tmp_path / "base.txt"))
        assert performed(tmp_path, base) == [[0]]
        stage = {"task": {"size": 8, "epochs": 1, "eval_n": 5, "rewards": {"verifier": 1, "brevity": 1}}}
        call = [*arguments(tiny_host, tmp_path), *GRPO, "--resume", str(newest(tmp_path / "base")), "--reset_progress",
                "--stages", json.dumps(stage), "--max_completion_length", "6"]
    statuses = performed(
        tmp_path,
        run(2, *call, "--run_name", "two", "--grpo_accum_steps", "1", stop=[1, 1]),
        run(1, *call, "--run_name", "one", "--grpo_accum_steps", "2", "--grad_accum_steps", "2"),
        run(1, *call, "--run_name", "two", "--grpo_accum_steps", "1"),
    )
    assert statuses == [[143, 143], [0], [0]], logs(tmp_path)
    assert "goes on with 8 completions a step, as it began: --grpo_accum_steps 2" in logs(tmp_path)
    assert_alike(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_where_a_process_dies_the_other_ends_and_names_it(rank, tiny_host, tmp_path):
    call = [*arguments_of("addon", tiny_host, tmp_path), "--run_name", "two", "--max_steps", "4", "--save_every", "1"]
    (statuses,) = performed(tmp_path, run(2, *call, kill=[rank, 2]))
    assert (statuses[rank], statuses[1 - rank]) == (-9, DEAD_EXIT), logs(tmp_path)
    assert f"process {rank} of 2 (rank {rank}, pid " in logs(tmp_path) and "--resume goes on from" in logs(tmp_path)
    assert "Traceback" not in logs(tmp_path)

    # The newest checkpoint is whole, and one process goes on from it.
    assert newest(tmp_path / "two").name == "step-00000002"
    alone = run(1, *call, "--grad_accum_steps", "2", log=str(tmp_path / "log1.txt"))
    assert performed(tmp_path, alone) == [[0]], logs(tmp_path)
    assert [line["step"] for line in metrics(tmp_path / "two")] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_busy_for_longer_than_the_limit_ends_no_run(rank, tiny_host, tmp_path):
    """No thread of it can give a sign of life meanwhile, as where a large checkpoint is written."""
    call = [*arguments_of("addon", tiny_host, tmp_path), "--run_name", "two", "--ddp_timeout_s", str(BUSY_S / 5)]
    assert performed(tmp_path, run(2, *call, busy=[rank, 1])) == [[0, 0]], logs(tmp_path)
    assert [line["step"] for line in metrics(tmp_path / "two")] == [1, 2]
