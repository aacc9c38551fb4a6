"""run: killed and resumed equals uninterrupted, what is inherited and refused, records, signals, full disks."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import addon_run as run
import options
import train
from addon import evaluator
from addon.large import SizeConfig, size_warnings
from engine import checkpoints as checkpointing
from engine.checkpoints import MANIFEST
from engine.records import normalise
from evaluation import Evaluation
from own_tasks import choice
from patience import HANG_S
from tiny_runs import (
    ROOT,
    arguments,
    assert_same_run,
    command,
    error_lines,
    newest,
    only_run,
    records,
    tensors,
)
from training import AddonStepConfig, Trainer, mean_segments, segments_of_step

pytestmark = pytest.mark.usefixtures("no_curve")  # conftest.py

# Dies of SIGKILL in the middle of batch 4 (from 0), behind an optimizer step, with checkpoints of steps 2 and 4.
KILLED = """
import os, signal, sys, training
plain = training.Trainer._update
def update(self, step, loss):
    norm = plain(self, step, loss)
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return norm
training.Trainer._update = update
import train
from addon import items
sys.exit(train.main(sys.argv[1:]))
"""
SIX = "--max_steps 6 --save_every 2 --eval_every 3 --checkpoint_limit 0".split()


@pytest.fixture
def done(call, tmp_path) -> Path:
    """The folder of a run of six steps, `runs/done`, trained with three segments and another injector."""
    status, _, err = call("--run_name", "done", *SIX, "--segments", "3", "--injector", "grb", "--ema", "0.9")
    assert status == 0, err
    return tmp_path / "runs" / "done"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- killed and resumed


@pytest.mark.parametrize("flags", [
    "--train_n 0 --init_state random --segments 3 --segments_sampling uniform --ema 0.9 --optimizer muon",
    "--train_n 10 --init_state fixed --segments_sampling fixed --supervised_segments 0 --optimizer adamw --use_act "
    "--verifier_weight 0.1 --verifier_every 2 --decode_temperature 0.8",
    "--train_n 0 --task none --tasks toy_add,chain_sum --task_config small --init_state random --lora_layers 1 "
    "--grad_accum_steps 2 --overlong drop --optimizer adamw --segments 3 --segments_sampling growing",
    "--train_n 10 --optimizer adamw_8bit --d_h 64 --cab_mem 2 --ema 0 --max_minutes 60",
], ids=["fresh items", "epochs and heads", "two tasks and lora", "8 bit"])
def test_a_run_killed_in_the_middle_and_resumed_equals_an_uninterrupted_one(call, tiny_host, tmp_path, flags):
    flags = [*SIX, *flags.split()]
    assert call("--run_name", "whole", *flags)[0] == 0
    argv = arguments(tiny_host, tmp_path / "runs", "--run_name", "killed", *flags)
    dead = subprocess.run([sys.executable, "-c", KILLED, *argv], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    killed = tmp_path / "runs" / "killed"
    assert newest(killed).name == "step-00000004" and records(killed)["metrics"][-1]["step"] == 4
    status, _, err = call("--run_name", "killed", *flags)
    assert status == 0 and ", from step 4" in err
    assert_same_run(tmp_path / "runs" / "whole", killed)
    assert (killed / "config.resolved.yaml").read_text(encoding="utf-8") == (
        tmp_path / "runs" / "whole" / "config.resolved.yaml").read_text(encoding="utf-8")


def test_growing_segments_follow_the_share_of_the_run_that_is_done(call, tmp_path):
    assert call("--run_name", "grown", *SIX, *"--segments 3 --segments_sampling growing".split())[0] == 0
    counts = [record["segments"] for record in records(tmp_path / "runs" / "grown")["metrics"]]
    assert counts[:2] == [1, 1] and max(counts) > 1, counts


@pytest.mark.parametrize("flags", ["", "--use_act", "--segments_sampling uniform", "--segments_sampling growing"])
def test_the_cost_told_beforehand_counts_the_segments_that_will_be_drawn(flags):
    opts = options.parse(["--segments", "5", *flags.split()])
    config = options.part(AddonStepConfig, opts)
    expected = mean_segments(config)
    drawn = [segments_of_step(config, step, step / 4000) for step in range(4000)]
    assert sum(drawn) / len(drawn) == pytest.approx(expected, rel=0.03)


def test_resumed_in_a_process_of_its_own_by_flags_alone(call, tiny_host, tmp_path):
    """--resume RUN needs no other flag: the run's own options apply."""
    assert call("--run_name", "whole", *SIX)[0] == 0
    shutil.copytree(tmp_path / "runs" / "whole", tmp_path / "runs" / "cut")
    shutil.rmtree(newest(tmp_path / "runs" / "cut"))
    process = command("--resume", str(tmp_path / "runs" / "cut"))
    _, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, err
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "cut")


@pytest.mark.parametrize("number,status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_step_with_all_saved(call, tmp_path, monkeypatch, number, status):
    flags = "--max_steps 5 --eval_every 2".split()
    assert call("--run_name", "whole", *flags)[0] == 0
    plain = Trainer.step

    def interrupted(self, batches, step, lr):
        if step == 2:
            signal.raise_signal(number)
        return plain(self, batches, step, lr)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        stopped, out, err = call("--run_name", "a stopped, run", *flags)
    folder = tmp_path / "runs" / "a stopped, run"
    assert stopped == status and out == "" and signal.getsignal(number) is handler
    assert f"stopped at step 3, saved; go on with: python train.py --resume {shlex.quote(str(folder))}" in err
    assert newest(folder).name == "step-00000003"
    assert call("--run_name", "a stopped, run", *flags)[0] == 0
    assert_same_run(tmp_path / "runs" / "whole", folder)


def test_a_second_signal_ends_at_once(call, monkeypatch, request):
    plain = signal.getsignal(signal.SIGINT)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, plain))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it

    def impatient(self, batches, step, lr):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second signal did nothing")

    monkeypatch.setattr(Trainer, "step", impatient)
    status, _, err = call("--run_name", "stopped")
    assert status == 130 and "stopping after this step; once more to stop at once" in err
    (line,) = error_lines(err.splitlines()[-1])
    assert line == "interrupted: what was saved before stays, --resume goes on from there"


def test_sigterm_from_outside_is_orderly_too(tiny_host, tmp_path):
    process = command(*arguments(tiny_host, tmp_path / "runs", "--max_steps", "1000000"))
    for line in process.stderr:
        if line.startswith("step 1/"):
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 143 and "stopped at step " in err and "Traceback" not in err
    state = json.loads((newest(only_run(tmp_path / "runs")) / "training_state.json").read_text(encoding="utf-8"))
    assert state["step"] >= 1


def test_an_evaluation_cut_short_costs_nothing_that_was_trained(call, tmp_path, monkeypatch):
    assert call("--run_name", "whole")[0] == 0
    with monkeypatch.context() as patch:
        def cut(self, *rest):
            raise KeyboardInterrupt

        patch.setattr(evaluator, "evaluate", cut)
        status, _, err = call("--run_name", "cut")
    assert status == 130 and "Traceback" not in err
    assert newest(tmp_path / "runs" / "cut").name == "step-00000003"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda *a: pytest.fail("trained again"))
        assert call("--run_name", "cut")[0] == 0
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "cut")


def test_a_finished_run_of_that_name_goes_straight_to_evaluation(call, done, monkeypatch):
    before, rows = tensors(newest(done)), records(done)
    monkeypatch.setattr(Trainer, "step", lambda *a: pytest.fail("trained again"))
    status, out, _ = call("--run_name", "done", *SIX, "--segments", "3", "--injector", "grb", "--ema", "0.9")
    assert status == 0 and out.startswith("task")
    assert records(done) == rows  # not once more
    after = tensors(newest(done))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_finished_run_goes_on_when_given_more_steps(call, tmp_path):
    flags = "--lr_scheduler constant --warmup_steps 0".split()
    for name, steps in (("two", "2"), ("two", "4"), ("four", "4")):
        assert call("--run_name", name, "--max_steps", steps, *flags)[0] == 0
    two, four = (tensors(newest(tmp_path / "runs" / name), "adapter_model") for name in ("two", "four"))
    assert newest(tmp_path / "runs" / "two").name == "step-00000004"
    assert all(torch.equal(two[name], four[name]) for name in four)
    steps = [row["step"] for row in records(tmp_path / "runs" / "two")["eval"]]
    assert steps == ["2"] * 7 + ["4"] * 7


def test_typed_step_limits_hold_after_a_resume(call, tmp_path, monkeypatch):
    """Minutes replace the default steps, never typed ones, before and after a resume."""
    flags = ["--run_name", "both", "--max_minutes", "60", "--save_every", "2"]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(evaluator, "evaluate", lambda *a: 1 / 0)
        call(*flags)
    status, _, err = call("--resume", str(tmp_path / "runs" / "both" / "checkpoints" / "step-00000002"))
    assert status == 0 and "3 steps" in err
    assert newest(tmp_path / "runs" / "both").name == "step-00000003"


# --- limits of a run


@pytest.mark.parametrize("flags,steps", [
    ("--train_n 10 --epochs 2 --max_steps 0", 5), ("--train_n 10 --epochs 2 --max_steps 3", 3),
    ("--train_n 10 --epochs 1 --max_steps 0 --grad_accum_steps 2", 2)])
def test_epochs_and_steps_limit_a_run(call, tmp_path, flags, steps):
    assert call(*flags.split())[0] == 0
    assert records(only_run(tmp_path / "runs"))["metrics"][-1]["step"] == steps


def test_minutes_limit_a_run_and_anneal_over_their_time(call, tmp_path, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr("engine.logs.time.monotonic", lambda: 5.0 * next(clock))
    flags = "--max_steps 0 --max_minutes 2 --warmup_steps 0 --lr 0.01 --lr_scheduler cosine --lr_min_ratio 0"
    status, _, err = call(*flags.split())
    assert status == 0 and "2.0 minutes of 4 examples" in err
    rates = [line["lr"] for line in records(only_run(tmp_path / "runs"))["metrics"]]
    assert 2 < len(rates) < 24 and rates == sorted(rates, reverse=True) and rates[-1] < 0.004


def test_typed_minutes_replace_the_default_steps(tiny_host, tmp_path, capsys):
    argv = [word for word in arguments(tiny_host, tmp_path / "runs") if word not in ("--max_steps", "3")]
    assert train.main([*argv, "--max_minutes", "0.01"]) == 0
    saved = options.read_resolved((only_run(tmp_path / "runs") / "config.resolved.yaml").read_text(encoding="utf-8"))
    assert saved["max_steps"] == 0 and "0.01 minutes of 4 examples" in capsys.readouterr().err


# --- what is inherited and what is refused


@pytest.mark.parametrize("more", [(), ("--task_config", '{"max_value": 30}'), ("--eval_n", "5")])
def test_a_next_stage_on_other_items_needs_no_warning(call, done, more):
    shape = ("--segments", "3", "--injector", "grb")
    status, _, err = call("--resume", str(done), "--reset_progress", "--run_name", "B", *shape, *more)
    assert status == 0 and "training items begin anew" in err and "WARNING" not in err


def test_a_next_stage_may_train_a_halting_head_on_weights_that_had_none(call, done, tmp_path):
    shape = ("--segments", "3", "--injector", "grb")
    head = ("--use_act", "--halt_detach")
    status, _, err = call("--resume", str(done), "--reset_progress", "--run_name", "B", *shape, *head)
    assert status == 0 and "WARNING: training" not in err, err
    (weight,) = [
        tensor for name, tensor in tensors(newest(tmp_path / "runs" / "B"), "adapter_model").items()
        if name.endswith("core.halt.weight")
    ]
    assert weight.any(), "the head has learnt"

    # The same run goes on with its head, and no run changes its head's shape in its course.
    status, _, err = call("--resume", str(tmp_path / "runs" / "B"), "--max_steps", "4", *shape, *head)
    assert status == 0, err
    status, _, err = call("--resume", str(done), *shape, *head)
    assert status == 2 and "was trained with another shape: --use_act True (checkpoint: False)" in err


def test_evaluation_only_inherits_the_runs_options_and_touches_no_checkpoint(call, done, tmp_path, capsys):
    before = {path: content for path, content in contents(done).items() if path.startswith("checkpoints")}
    trained = {line["id"]: line["prediction"] for line in records(done)["predictions"] if line["step"] == 6}
    status = train.main(["--resume", str(done), "--eval_only", "--eval_n", "8", "--eval_every", "1000"])
    out, err = capsys.readouterr()
    assert status == 0 and "evaluation only" in err and str(newest(done)) in out and "WARNING" not in err
    after = {path: content for path, content in contents(done).items() if path.startswith("checkpoints")}
    assert after == before
    lines = records(done)["predictions"][-8:]
    assert {line["segments_used"] for line in lines} == {3}
    assert all(line["prediction"] == trained[line["id"]] for line in lines if line["id"] in trained)
    rows = [row for row in records(done)["eval"] if row["metric"] == "solved"]
    assert [(row["step"], row["n"], row["segments_used"]) for row in rows] == [
        ("3", "4", "3"), ("6", "4", "3"), ("6", "8", "3")]


def test_evaluation_only_of_an_older_checkpoint_keeps_later_rows(call, done):
    rows = records(done)["eval"]
    older = done / "checkpoints" / "step-00000002"
    status, out, err = call("--resume", str(older), "--eval_only", "--eval_segments", "1")
    assert status == 0 and "WARNING" not in err and str(older) in out
    assert records(done)["eval"][: len(rows)] == rows
    assert [(row["step"], row["segments_used"]) for row in records(done)["eval"][len(rows):]] == [("2", "1")] * 7


def test_evaluation_only_needs_the_weights_alone(call, done, tmp_path):
    for path in newest(done).glob("training_state.*"):
        path.unlink()
    lone = tmp_path / "mail" / "step-00000006"
    shutil.copytree(newest(done), lone)
    status, out, err = call("--resume", str(lone), "--eval_only")
    assert status == 0, err
    assert contents(lone) == contents(newest(done)) and os.listdir(tmp_path / "mail") == [lone.name]
    (found,) = [path for path in (tmp_path / "runs").iterdir() if path != done]  # a run of its own, nothing beside it
    assert {row["step"] for row in records_of_evaluation(found)} == {"6"}
    status, _, err = call("--resume", str(lone))
    assert status == 2 and "training_state" in error_lines(err)[0]


def records_of_evaluation(folder: Path) -> list[dict[str, str]]:
    with open(folder / "eval.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def other_host(tiny_host, tmp_path_factory) -> Path:
    """A model of the same sizes with other weights."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("other") / "host"
    shutil.copytree(tiny_host, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("typed,told", [
    ("--d_h 32", ["--d_h 32 (checkpoint: 16)"]),
    ("--injector cab", ["--injector cab (checkpoint: grb)"]),
    ("--d_h 32 --injector cab --use_act --hrm_read last --lora_layers 1",
     ["--d_h 32 (checkpoint: 16)", "--injector cab (checkpoint: grb)", "--use_act True (checkpoint: False)",
      "--hrm_read last (checkpoint: embed+last)", "--lora_layers 1 (checkpoint: 0)"]),
    ("--optimizer adamw_8bit", ["optimizer"]),
    ("--verifier_weight 0.5", ["model.addon.verifier"]),
])
def test_another_shape_is_refused_by_name(done, typed, told, capsys):
    before = contents(done)
    assert train.main(["--resume", str(done), *typed.split()]) == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert all(part in line for part in told)
    assert contents(done) == before


@pytest.mark.parametrize("eval_only", [[], ["--eval_only"]])
def test_another_base_model_is_refused_by_name(done, other_host, tiny_host, eval_only, capsys):
    before = contents(done)
    assert train.main(["--resume", str(done), "--model_name", str(other_host), *eval_only]) == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert "was trained on another base model" in line and "head_digest" in line and str(tiny_host) in line
    assert contents(done) == before


def test_two_runs_at_once_are_refused(call, done):
    status, out, err = call("--resume", str(done), "--run_name", "other")
    (line,) = error_lines(err)
    assert status == 2 and line == f"--resume {done} and --run_name other are different runs: leave one out"
    assert call("--resume", str(done), "--run_name", "done", "--eval_only")[0] == 0


def test_other_training_items_begin_anew_and_say_so(call, done):
    for flags in (["--train_n", "9"], ["--task", "chain_sum"]):
        status, _, err = call("--resume", str(done), "--max_steps", "7", "--save_every", "0", *flags)
        assert status == 0 and "the training items are not those of the checkpoint: they begin anew" in err, err
        shutil.rmtree(newest(done))


def broken(checkpoint: Path, how: str) -> None:
    if how == "missing file":
        (checkpoint / "training_state.safetensors").unlink()
    elif how == "truncated":
        os.truncate(checkpoint / "adapter_model.safetensors", 100)
    elif how == "bit flipped":
        path = checkpoint / "training_state.safetensors"
        content = bytearray(path.read_bytes())
        content[-3] ^= 8
        path.write_bytes(content)
    elif how == "config cut":
        os.truncate(checkpoint / "config.resolved.yaml", 50)
    elif how == "no manifest":
        (checkpoint / MANIFEST).unlink()
    elif how == "foreign":
        (checkpoint / MANIFEST).write_text('{"format": "another", "version": 7, "files": {}}', encoding="utf-8")


@pytest.mark.parametrize("how,told", [
    ("missing file", "is missing"), ("truncated", "is truncated: 100 bytes, expected "), ("bit flipped", "sha256"),
    ("config cut", "config.resolved.yaml is truncated"), ("no manifest", "manifest"), ("foreign", "format another")])
def test_a_broken_or_foreign_checkpoint_is_one_line(done, how, told, capsys):
    checkpoint = newest(done)
    broken(checkpoint, how)
    before = contents(done)
    assert train.main(["--resume", str(checkpoint)]) == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert told in line and str(checkpoint) in line and len(line) < 500
    assert contents(done) == before


def test_a_run_goes_on_from_an_earlier_whole_checkpoint(call, done):
    """A run killed while its newest checkpoint was unreadable (a missing file) falls back by itself."""
    broken(newest(done), "missing file")
    status, _, err = call("--run_name", "done", *SIX, "--segments", "3", "--injector", "grb", "--ema", "0.9")
    assert status == 0 and ", from step 4" in err


# --- a loss that is no number


def test_a_loss_that_is_no_number_exits_3_with_the_weights_before_it(call, tmp_path, monkeypatch):
    flags = "--max_steps 4 --save_every 2 --checkpoint_limit 0".split()
    assert call("--run_name", "whole", *flags)[0] == 0
    plain = Trainer._supervise

    def spoilt(self, *rest):
        metrics, carries = plain(self, *rest)
        return ({**metrics, "loss": float("nan")} if self.at == 2 else metrics), carries

    def step(self, batches, number, lr, inner=Trainer.step):
        self.at = number
        return inner(self, batches, number, lr)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_supervise", spoilt)
        patch.setattr(Trainer, "step", step)
        status, out, err = call("--run_name", "bad", *flags)
    folder = tmp_path / "runs" / "bad"
    assert status == 3 and out == "" and "batch 2: loss nan" in err and "bad_batch.json" in err
    bad = json.loads((folder / "bad_batch.json").read_text(encoding="utf-8"))
    assert bad["step"] == 2 and len(bad["examples"]) == 4
    assert set(bad["examples"][0]) == {"task", "question", "target"}
    kept = tensors(newest(folder), "adapter_model")
    good = tensors(tmp_path / "runs" / "whole" / "checkpoints" / "step-00000002", "adapter_model")
    assert newest(folder).name == "step-00000002" and all(torch.equal(kept[name], good[name]) for name in good)
    assert call("--run_name", "bad", *flags)[0] == 0  # and it goes on, with the next batch


def test_an_absurd_learning_rate_exits_3(call, tmp_path):
    status, _, err = call("--lr", "1e30", "--warmup_steps", "0", "--max_steps", "6", "--optimizer", "adamw")
    assert status == 3 and "stopped before the step" in err and "Traceback" not in err
    assert (only_run(tmp_path / "runs") / "bad_batch.json").exists()


# --- checkpoints kept, full disks, records


def solved_rates(monkeypatch, *rates: float) -> None:
    """Makes evaluation after evaluation report these rates."""
    left, measured = list(rates), []

    def rate(self, bare: bool = False) -> float:
        if not any(evaluation is self for evaluation, _ in measured):
            measured.append((self, left.pop(0)))
        return next(value for evaluation, value in measured if evaluation is self)

    monkeypatch.setattr(Evaluation, "solved_rate", rate)


def test_the_best_checkpoint_outlives_the_limit(call, tmp_path, monkeypatch):
    solved_rates(monkeypatch, 0.25, 0.75, 0.5, 0.0)
    status, _, err = call("--run_name", "best", "--max_steps", "4", "--eval_every", "1", "--save_every", "1",
                          "--checkpoint_limit", "1", "--save_best_model")
    folder = tmp_path / "runs" / "best"
    assert status == 0, err
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    best = json.loads((folder / "best.json").read_text(encoding="utf-8"))
    assert (best["checkpoint"], best["value"]) == ("step-00000002", 0.75)


def test_without_save_every_a_better_model_is_saved_all_the_same(call, tmp_path, monkeypatch):
    solved_rates(monkeypatch, 0.25, 0.75, 0.5)
    assert call("--run_name", "best", "--eval_every", "1", "--save_best_model")[0] == 0
    assert [path.name for path in sorted((tmp_path / "runs" / "best" / "checkpoints").iterdir())] == [
        "step-00000001", "step-00000002", "step-00000003"]
    best = json.loads((tmp_path / "runs" / "best" / "best.json").read_text(encoding="utf-8"))
    assert best["checkpoint"] == "step-00000002"


def test_older_checkpoints_go_and_the_newest_stay(call, tmp_path):
    assert call("--max_steps", "5", "--save_every", "1", "--checkpoint_limit", "2")[0] == 0
    kept = sorted(path.name for path in (only_run(tmp_path / "runs") / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000005"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", place]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_one_line_and_leaves_whole_files_only(small_disk, tiny_host, capsys):
    argv = arguments(tiny_host, small_disk / "runs", "--run_name", "mine", "--d_h", "64", "--max_steps", "2")
    assert train.main(argv) == 2
    line = error_lines(capsys.readouterr().err.splitlines()[-1])[0]
    assert "the disk is full" in line and "choose another --save_dir" in line
    left = [path for path in (small_disk / "runs").rglob("*") if path.is_file()]
    assert not [path for path in left if "checkpoints" in path.parts or path.name.startswith(".")]
    for path in left:
        assert path.read_text(encoding="utf-8").endswith("\n")


def test_a_disk_that_fills_up_later_keeps_the_checkpoint_before(call, tmp_path, monkeypatch):
    def fills(temporary, *rest, plain=checkpointing._fill):
        if temporary.name.startswith(".tmp-step-00000004"):
            (temporary / "begun").write_text("half", encoding="utf-8")
            raise OSError(28, "No space left on device")
        return plain(temporary, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "_fill", fills)
        status, _, err = call("--run_name", "mine", "--max_steps", "6", "--save_every", "2", "--checkpoint_limit", "0")
    assert status == 2 and "the disk is full" in error_lines(err.splitlines()[-1])[0]
    assert os.listdir(tmp_path / "runs" / "mine" / "checkpoints") == ["step-00000002"]
    assert call("--run_name", "mine", "--max_steps", "6", "--save_every", "2")[0] == 0


def test_a_resolved_configuration_alone_reruns_the_run(call, done, tmp_path, capsys):
    again = tmp_path / "again"
    status = train.main(["--config", str(done / "config.resolved.yaml"), "--save_dir", str(again)])
    assert status == 0, capsys.readouterr().err
    assert_same_run(done, only_run(again))
    for checkpoint in ("step-00000002", "step-00000006"):  # each checkpoint holds the same
        saved = (done / "checkpoints" / checkpoint / "config.resolved.yaml").read_text(encoding="utf-8")
        own = (done / "config.resolved.yaml").read_text(encoding="utf-8")
        assert options.read_resolved(saved) == options.read_resolved(own)


def test_a_resumed_runs_configuration_reruns_from_the_start(call, tmp_path, capsys):
    assert call("--run_name", "mine", "--max_steps", "2")[0] == 0
    assert call("--resume", str(tmp_path / "runs" / "mine"), "--max_steps", "3")[0] == 0
    saved = options.read_resolved((tmp_path / "runs" / "mine" / "config.resolved.yaml").read_text(encoding="utf-8"))
    assert all(saved.get(name) in (None, False) for name in options.INVOCATION)  # a plugin's path is not even written
    status = train.main(["--config", str(tmp_path / "runs" / "mine" / "config.resolved.yaml"), "--seed", "1"])
    assert status == 0 and ", from step" not in capsys.readouterr().err
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_the_difficulty_that_was_trained_is_kept_for_other_tasks(tiny_host, tmp_path, monkeypatch):
    drawn, plain = [], choice.make_tasks
    monkeypatch.setattr(choice, "make_tasks", lambda names, config, limits: (
        drawn.append((names, config)) or plain(names, config, limits)))
    argv = [word for word in arguments(tiny_host, tmp_path / "runs") if word not in ("--task", "toy_add")]
    assert train.main([*argv, "--run_name", "mine"]) == 0  # no task named: the default ones, small
    assert train.main(["--resume", str(tmp_path / "runs" / "mine"), "--task", "chain_sum", "--eval_only"]) == 0
    assert drawn == [(run.task_names(options.parse([])), "small"), (["chain_sum"], "small")]


def test_rows_of_several_runs_share_a_table_on_request(call, tmp_path):
    for name in ("one", "two"):
        assert call("--run_name", name, "--log_csv", str(tmp_path / "deep" / "all.csv"))[0] == 0
    lines = (tmp_path / "deep" / "all.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 2 * 7 and lines[0].startswith("step,task,metric")
    assert not (tmp_path / "runs" / "one" / "eval.csv").exists()


def test_records_hold_what_they_promise(call, tmp_path):
    status, _, _ = call("--max_steps", "4", "--log_steps", "2", "--task", "none", "--tasks", "toy_add,chain_sum",
                        "--task_config", "small", "--eval_n", "3")
    assert status == 0
    found = records(only_run(tmp_path / "runs"))
    assert [line["step"] for line in found["metrics"]] == [2, 4]
    assert {"loss", "grad_norm", "lr", "segments", "tokens", "answer_loss"} <= set(found["metrics"][0])
    assert [row["task"] for row in found["eval"][::7]] == ["toy_add", "chain_sum", "overall"]
    assert [line["id"] for line in found["predictions"]] == [
        f"{task}/{i:05d}" for task in ("toy_add", "chain_sum") for i in range(3)]
    questions = {line["prompt_hash"] for line in found["predictions"]}
    assert len(questions) == 6


def test_evaluation_questions_are_never_trained_on(call, monkeypatch):
    trained, reserved, plain = set(), set(), Trainer.step

    def step(self, batches, number, lr):
        trained.update(normalise(example.question) for batch in batches for example in batch.examples)
        return plain(self, batches, number, lr)

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(run.AddonEvaluator, "evaluate", lambda self, step, plain=run.AddonEvaluator.evaluate: (
        reserved.update(self.data.reserve.questions), plain(self, step))[1])
    config = json.dumps({"max_value": 5})  # 36 questions in all
    for train_n in ("0", "20"):
        trained.clear()
        assert call("--task_config", config, "--eval_n", "12", "--max_steps", "20", "--train_n", train_n)[0] == 0
        assert len(reserved) == 12 and len(trained) > 10 and not trained & reserved


def test_the_embedded_llm_s_batch_size_and_lr_on_a_large_llm_bring_a_warning():
    def warnings(parameters, *words):
        return size_warnings(options.part(SizeConfig, options.parse(list(words))), parameters)

    (line,) = warnings(494_000_000)
    assert line.startswith("--batch_size 64 and --lr 0.003 were chosen on an LLM of 3.6 M parameters")
    assert "has 494 M: begin with a file of configs/recipes/" in line
    assert warnings(3_600_000) == warnings(494_000_000, "--lr", "1e-3") == []
    assert warnings(494_000_000, "--batch_size", "8") == []


def test_every_recipe_is_legal_and_those_that_nobody_ran_say_so():
    folder = Path(run.__file__).parent / "configs" / "recipes"
    for path in sorted(folder.glob("*.yaml")):
        opts = options.parse(["--config", str(path)])
        assert opts.cache_hidden == "disk" and opts.train_n
        is_tried = path.stem == "smollm2_135m"
        assert ("UNTESTED" in path.read_text(encoding="utf-8")) != is_tried, path
