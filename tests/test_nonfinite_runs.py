"""Whole runs of each system with a loss, a gradient or a weight that is no number: they end in order, or go on."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import engine.loop
import train
from engine.nonfinite import MOST_IN_A_ROW
from engine.optimization import BaseTrainer
from grpo import rewards, stage_loop
from grpo.stage_trainer import StageTrainer
from hybrid import data as hybrid_data
from tiny_hybrid import RUN
from tiny_runs import TINY, newest, tensors

SUMS = {"chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}}
STAGE = {"size": 4, "eval_n": 2, "levels": [SUMS], "rewards": {"brevity": 1}}
ENHANCED = (
    "--arch enhanced --d_model 16 --n_heads 2 --n_planner_layers 1 --n_worker_layers 1 --max_cycles 2 "
    "--thought_dim 8 --batch_size 4 --warmup_steps 1 --eval_n 2 --mixed_precision none --log_steps 1 "
    "--num_threads 1 --device cpu --report 0 --max_completion_length 4"
).split()
SYSTEMS = {"addon": TINY, "hybrid": [*RUN, "--dataset", "synthetic"], "enhanced": [*ENHANCED, "--objective", "ce"]}
BAD = 2  # the batch that is spoilt, from 0
EVERY = ["--save_every", "1", "--checkpoint_limit", "0"]


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """Drawing takes longer than a tiny run, and so do thousands of additions."""
    monkeypatch.setattr(engine.loop, "draw_curve", lambda *arguments: None)
    monkeypatch.setattr(stage_loop, "draw_curve", lambda *arguments: None)
    monkeypatch.setattr(hybrid_data, "SYNTHETIC_TRAIN", 50)


@pytest.fixture(params=SYSTEMS)
def run(request, tiny_host, tmp_path, capsys) -> Callable[..., tuple[int, list[str]]]:
    """Runs train.py with one system, in `tmp_path/NAME`: (exit status, lines on stderr)."""
    own = {
        "addon": ["--model_name", str(tiny_host)],
        "hybrid": [],
        "enhanced": ["--tokenizer", str(tiny_host), "--stages", json.dumps({"format": STAGE})],
    }

    def run_here(name: str, *more: str) -> tuple[int, list[str]]:
        words = [*SYSTEMS[request.param], *own[request.param], "--save_dir", str(tmp_path), "--run_name", name]
        status = train.main([*words, *EVERY, *more])
        return status, capsys.readouterr().err.splitlines()
    return run_here


def spoil(monkeypatch, kind: str, batches: range) -> dict[int, dict[str, Tensor]]:
    """Puts NaN into the loss, a gradient or a weight of these batches. Returns batch -> the weights before it."""
    begin = BaseTrainer.begin
    accumulate = BaseTrainer.accumulate
    seen: dict[int, dict[str, Tensor]] = {}

    def begin_and_note(self, step, lr):
        self.at = step
        seen.setdefault(step, {name: p.detach().clone() for name, p in self.parameters.items()})
        if step in batches and kind == "weight":
            next(iter(self.parameters.values())).data.view(-1)[0] = math.nan
        return begin(self, step, lr)

    def accumulate_badly(self, micro, loss_of):
        def bad_loss(batch):
            made = loss_of(batch)
            parts = {name: value * math.nan for name, value in made.parts.items()}
            return dataclasses.replace(made, loss=made.loss * math.nan, parts=parts)

        bad = self.at in batches
        sums = accumulate(self, micro, bad_loss if bad and kind == "loss" else loss_of)
        if bad and kind == "gradient":
            next(p for p in self.parameters.values() if p.grad is not None).grad.view(-1)[-1] = math.inf
        return sums

    monkeypatch.setattr(BaseTrainer, "begin", begin_and_note)
    monkeypatch.setattr(BaseTrainer, "accumulate", accumulate_badly)
    return seen


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def raw(checkpoint: Path) -> dict[str, Tensor]:
    """The weights as they train."""
    return {name.removeprefix("raw/"): t for name, t in tensors(checkpoint).items() if name.startswith("raw/")}


def left_out(folder: Path) -> list[int]:
    """`batches_left_out` of each line of metrics.jsonl that has it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["batches_left_out"] for line in lines if "batches_left_out" in line]


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_by_default_a_run_ends_before_the_step_and_goes_on_behind_the_batch(run, kind, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        seen = spoil(patch, kind, range(BAD, BAD + 1))
        status, lines = run("r", "--max_steps", "4")
    errors = [line for line in lines if "error" in line or "stopped before" in line]
    assert status == 3 and len(errors) == 1 and not any("Traceback" in line for line in lines)
    assert errors[0].startswith(f"train.py: batch {BAD}: loss ")
    assert errors[0].endswith(f"the weights are saved, the batch is in {tmp_path / 'r' / 'bad_batch.json'}")

    # As before the batch; and the next call takes the batch behind it.
    kept = newest(tmp_path / "r")
    assert kept.name == f"step-{BAD:08d}" and same(raw(kept), seen[BAD])
    assert run("r", "--max_steps", "4")[0] == 0 and newest(tmp_path / "r").name == "step-00000004"


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_skip_leaves_the_batch_out_with_the_weights_as_they_were(run, kind, monkeypatch, tmp_path):
    seen = spoil(monkeypatch, kind, range(BAD, BAD + 1))
    status, lines = run("r", "--max_steps", "4", "--on_nonfinite", "skip")
    assert status == 0 and left_out(tmp_path / "r") == [0, 0, 1, 1]
    assert same(seen[BAD], seen[BAD + 1]) and not same(seen[BAD - 1], seen[BAD])
    assert not same(seen[BAD + 1], raw(newest(tmp_path / "r"))), "the last batch moves them again"
    assert [line for line in lines if line.startswith(f"WARNING: batch {BAD}: loss ")]


def test_ten_in_a_row_end_a_run_that_skips(run, monkeypatch, tmp_path):
    seen = spoil(monkeypatch, "loss", range(1, 99))
    status, lines = run("r", "--max_steps", "20", "--on_nonfinite", "skip", "--save_every", "0")
    assert status == 3 and "the 10th batch in a row without a number (--on_nonfinite skip)" in lines[-1]
    kept = newest(tmp_path / "r")
    assert kept.name == f"step-{MOST_IN_A_ROW:08d}" and same(raw(kept), seen[1])


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_weights_without_numbers_end_the_run_and_are_never_saved(run, choice, monkeypatch, tmp_path):
    """No batch is at fault, and checkpoints of them would drive out the good ones."""
    with monkeypatch.context() as patch:
        spoil(patch, "weight", range(BAD, BAD + 1))
        status, lines = run("r", "--max_steps", "6", "--on_nonfinite", choice)
    good = tmp_path / "r" / "checkpoints" / f"step-{BAD:08d}"
    assert status == 3 and newest(tmp_path / "r") == good
    assert f"train.py: after batch {BAD} the weights " in lines[-1]
    assert lines[-1].endswith(f"nothing of them is saved; go on from {good} with a lower --lr")
    assert run("r", "--max_steps", "4")[0] == 0


def test_weights_that_the_last_step_spoils_are_not_saved_either(run, monkeypatch, tmp_path):
    plain = BaseTrainer._update

    def update(self, step, loss):
        norm = plain(self, step, loss)
        if step == BAD:
            next(iter(self.parameters.values())).data.view(-1)[0] = math.inf
        return norm

    monkeypatch.setattr(BaseTrainer, "_update", update)
    status, lines = run("r", "--max_steps", str(BAD + 1))
    assert status == 3 and "are not all numbers: nothing of them is saved" in lines[-1]
    assert newest(tmp_path / "r").name == f"step-{BAD:08d}"


# --- GRPO's stages


def reward_of_ids(prompts, completions, completion_ids=None, **columns) -> list[float]:
    """Differs inside groups, whatever a random model writes."""
    return [sum(ids) % 7 / 6 for ids in completion_ids or [[0]] * len(completions)]


@pytest.fixture(params=["enhanced", "addon"])
def stages(request, tiny_host, tmp_path, capsys, monkeypatch) -> Callable[..., tuple[int, list[str]]]:
    """Runs GRPO with one system after a supervised run of its own: (exit status, lines on stderr)."""
    monkeypatch.setitem(rewards.REWARDS, "brevity", reward_of_ids)
    grpo = ["--objective", "grpo", "--stages", json.dumps({"format" if request.param == "enhanced" else "task": STAGE}),
            "--num_generations", "4", "--grpo_batch_size", "4", "--grpo_accum_steps", "1", "--grpo_save_every", "1",
            "--max_completion_length", "4", "--grpo_lr", "1e-3"]
    place = ["--save_dir", str(tmp_path), "--run_name", "r"]

    def run_here(*more: str) -> tuple[int, list[str]]:
        words = [*ENHANCED, "--tokenizer", str(tiny_host), *grpo]
        if request.param == "addon":
            if not (tmp_path / "r").exists():
                assert train.main([*TINY, "--model_name", str(tiny_host), *place]) == 0
            words = ["--resume", str(tmp_path / "r"), *grpo]
        status = train.main([*words, "--max_steps", "3", *place, *more])
        return status, capsys.readouterr().err.splitlines()
    return run_here


def spoil_stage(monkeypatch, kind: str, bad: range) -> dict[int, dict[str, Tensor]]:
    """As `spoil`, of a stage's steps (from 0)."""
    plain = StageTrainer.training_step
    seen: dict[int, dict[str, Tensor]] = {}

    def training_step(self, model, inputs, *rest):
        step = self.state.global_step
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        seen.setdefault(step, {name: p.detach().clone() for name, p in trained.items()})
        loss = plain(self, model, inputs, *rest)
        if step in bad:
            first = next(p for p in trained.values() if p.grad is not None)
            spoilt = first.grad if kind == "gradient" else first.data
            spoilt.view(-1)[0] = math.nan
        return loss

    monkeypatch.setattr(StageTrainer, "training_step", training_step)
    return seen


def test_a_stage_ends_before_the_step_by_default_and_leaves_it_out_on_request(stages, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        spoil_stage(patch, "gradient", range(1, 2))
        status, lines = stages()
    assert status == 3 and ", step 1: the gradient of " in lines[-1]
    assert "is no number: stopped before the step; the newest state is in " in lines[-1]

    seen = spoil_stage(monkeypatch, "gradient", range(2, 3))
    status, lines = stages("--on_nonfinite", "skip")
    counts = left_out(tmp_path / "r")
    assert status == 0 and counts == [0] + [1] * (len(counts) - 1)
    assert same(seen[2], seen[3]) and not same(seen[1], seen[2])
    assert json.loads((newest(tmp_path / "r") / "grpo.json").read_text(encoding="utf-8"))["left_out"] == 1


def test_weights_of_a_stage_without_numbers_end_it_in_one_line_and_are_not_saved(stages, monkeypatch, tmp_path):
    spoil_stage(monkeypatch, "weight", range(1, 2))
    status, lines = stages("--on_nonfinite", "skip")
    assert status == 3 and "are not all numbers: stopped" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert [path.name for path in (tmp_path / "r" / "stages").glob("*/state-*")] == ["state-1"]
