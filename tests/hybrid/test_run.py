"""hybrid_run: train.py --arch hybrid from the first batch to the last file, killed, resumed, and begun anew."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForSeq2SeqLM

import engine.loop
import options
import train
from engine import checkpoints as checkpointing
from engine.loop import RunLoop
from flags import FIND, FLAGS, HYBRID
from hybrid import data as hybrid_data
from hybrid.measure import HybridEvaluator, SplitLoss
from hybrid.model import HybridModel
from hybrid.training import HybridTrainer
from text_data.documents import key_of
from text_data.synthetic import SimpleTokenizer, build_synthetic_dataset, synthetic_questions
from tiny_hybrid import RUN, rows_of, write_prepared
from tiny_runs import assert_same_run, error_lines, newest, only_run, records, tensors

# Every choice of every flag of the hybrid stands in one of these; see the test of it below.
WAYS = {
    "adamw, gate warming up": "--dataset synthetic --encoder mamba2 --bridge prefix --grad_horizon full --optimizer "
    "adamw --lr_scheduler cosine --hrm_gate_warmup_steps 3 --hrm_gate_ramp_steps 3 --hrm_gate_scale 0.5 "
    "--state_size 8 --prefix_len 3 --h_len 3 --l_len 4 --patience_grace_steps 2 --inner_T 1 --h_layers 2 "
    "--encoder_layers 2",
    "muon, halting": "--dataset synthetic --encoder transformer --bridge cross_attn --grad_horizon one_step "
    "--optimizer muon --lr_scheduler linear --use_halting 1 --deep_supervision 1 --ds_weight 0.3 --tie_embeddings 0 "
    "--ema 0.9 --bucket_batches 2 --dataset_workers 1 --h_cycles 3 --halting_weight 0.2 --halting_target 2 "
    "--halt_threshold 0.3 --l_layers 2 --decoder_layers 2 --hrm_gate_warmup_steps 1",
    "8 bit, prepared": "--dataset {data} --dev_sets more={more} --encoder mamba2 --bridge cross_attn --grad_horizon "
    "k:1 --optimizer adamw_8bit --lr_scheduler constant --grad_accum_steps 2 --d_model 32 --d_h 32 --on_bad_line skip "
    "--max_val_samples 3 --eval_loss_patience 0 --use_halting 0 --deep_supervision 0 --hrm_gate_warmup_steps 1 "
    "--report 1",
    "bf16": "--dataset {data} --mixed_precision bf16 --on_bad_line error --optimizer muon --lr_scheduler wsd "
    "--tie_embeddings 1 --hrm_gate_ramp_steps 8 --use_halting 1 --save_best_model",
}
SIX = "--max_steps 6 --save_every 2 --eval_every 3 --checkpoint_limit 0".split()
STEM = "model"
DIAGNOSTICS = ("gate_mean", "gate_min", "gate_max", "halt_sum_mean", "halt_sum_std", "z_norm")  # of each validation


class Killed(BaseException):
    """Nobody in train.py may catch it: what is on disk at that moment is all that is left."""


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """Drawing takes longer than a tiny run, and so do thousands of additions; no disk loses power here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(engine.loop, "draw_curve", lambda *arguments: None)
    monkeypatch.setattr(hybrid_data, "SYNTHETIC_TRAIN", 50)


@pytest.fixture
def call(tmp_path, capsys):
    """Runs train.py in this process, by default on the synthetic task, in `tmp_path/runs`: (status, stdout, stderr)."""
    def run_here(*more: str) -> tuple[int, str, str]:
        dataset = [] if {"--dataset", "--resume", "--dry_run"} & set(more) else ["--dataset", "synthetic"]
        status = train.main([*RUN, "--save_dir", str(tmp_path / "runs"), *dataset, *more])
        return status, *capsys.readouterr()
    return run_here


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Two prepared folders of one tokenizer."""
    place = tmp_path_factory.mktemp("prepared")
    return {"data": write_prepared(place / "data"), "more": write_prepared(place / "more", val=4, seed=9)}


def killed_at(monkeypatch, step: int):
    """Dies behind the optimizer step of batch `step` (from 0)."""
    plain = HybridTrainer._update

    def update(self, number: int, loss: float) -> float:
        norm = plain(self, number, loss)
        if number == step:
            raise Killed
        return norm

    monkeypatch.setattr(HybridTrainer, "_update", update)


def losses_are(monkeypatch, losses: dict[int, float]) -> None:
    """Makes the validation of each step find this loss."""
    plain = HybridEvaluator.evaluate

    def evaluate(self, step):
        self.step = step
        return plain(self, step)

    monkeypatch.setattr(HybridEvaluator, "evaluate", evaluate)
    monkeypatch.setattr(HybridEvaluator, "_split_loss", lambda self, split: SplitLoss(losses[self.step], 10, 4, 2.0))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def state(run: Path) -> dict:
    return json.loads((newest(run) / "training_state.json").read_text(encoding="utf-8"))


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


# --- killed and resumed


@pytest.mark.parametrize("way", WAYS)
def test_a_run_killed_in_the_middle_and_resumed_equals_an_uninterrupted_one(call, tmp_path, monkeypatch, folders, way):
    flags = [*SIX, *WAYS[way].format(**folders).split()]
    status, _, err = call("--run_name", "whole", *flags)
    assert status == 0, err
    with monkeypatch.context() as patch:
        killed_at(patch, 4 if way == "bf16" else 2)  # 2: the gate has just opened, or is still shut
        with pytest.raises(Killed):
            call("--run_name", "killed", *flags)
    killed = tmp_path / "runs" / "killed"
    assert checkpoints(killed)[-1] in (2, 4)
    status, _, err = call("--run_name", "killed", *flags)
    assert status == 0 and f", from step {4 if way == 'bf16' else 2}" in err, err
    assert_same_run(tmp_path / "runs" / "whole", killed, STEM)
    assert [line["step"] for line in metrics(killed)] == [1, 2, 3, 4, 5, 6]
    if way == "8 bit, prepared":
        kinds = {name.rsplit("/", 1)[1]: tensor.dtype for name, tensor in tensors(newest(killed)).items()
                 if name.startswith("0/optimizer/")}
        assert "state1" in kinds and any(
            tensor.dtype == torch.uint8 for tensor in tensors(newest(killed)).values() if tensor.ndim == 2)


def test_every_choice_of_every_hybrid_flag_is_run_here(folders):
    """So that a choice which nobody runs cannot rot: `WAYS` is complete."""
    ways = [options.parse([*RUN, *text.format(**folders).split()]) for text in WAYS.values()]
    ours = [flag for flag in FLAGS if flag.archs == HYBRID or flag.name in ("optimizer", "lr_scheduler")]
    assert len(ours) >= 24
    for flag in ours:
        values = {getattr(way, flag.name) for way in ways}
        if flag.choices:
            assert values == set(flag.choices), flag.name
        elif flag.type == "bool":
            assert values == {False, True}, flag.name
        else:
            assert values - {FIND[flag.name].default_in("hybrid")}, flag.name
    assert {way.grad_horizon for way in ways} >= {"one_step", "full", "k:1"}


@pytest.mark.parametrize("number,status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_step_with_all_saved(call, tmp_path, monkeypatch, number, status):
    flags = "--max_steps 5 --eval_every 2 --hrm_gate_warmup_steps 4".split()
    assert call("--run_name", "whole", *flags)[0] == 0
    plain = HybridTrainer.step

    def interrupted(self, batches, step, lr):
        if step == 2:
            signal.raise_signal(number)
        return plain(self, batches, step, lr)

    with monkeypatch.context() as patch:
        patch.setattr(HybridTrainer, "step", interrupted)
        stopped, out, err = call("--run_name", "stopped", *flags)
    folder = tmp_path / "runs" / "stopped"
    assert stopped == status and out == "" and newest(folder).name == "step-00000003"
    assert f"stopped at step 3, saved; go on with: python train.py --resume {folder}" in err
    assert call("--run_name", "stopped", *flags)[0] == 0
    assert_same_run(tmp_path / "runs" / "whole", folder, STEM)


@pytest.mark.parametrize("how", ["signal in the last step", "killed in the last evaluation"])
def test_a_run_that_ends_before_its_last_evaluation_makes_up_for_it(call, tmp_path, monkeypatch, how):
    assert call("--run_name", "whole")[0] == 0
    plain, record = HybridTrainer.step, RunLoop.record

    def interrupted(self, batches, step, lr):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return plain(self, batches, step, lr)

    def dies(self, report):
        record(self, report)
        raise Killed

    with monkeypatch.context() as patch:
        if how == "signal in the last step":
            patch.setattr(HybridTrainer, "step", interrupted)
            assert call("--run_name", "cut")[0] == 143
        else:
            patch.setattr(RunLoop, "record", dies)
            with pytest.raises(Killed):
                call("--run_name", "cut")
    folder = tmp_path / "runs" / "cut"
    assert checkpoints(folder) == [3]
    assert call("--run_name", "cut")[0] == 0
    assert_same_run(tmp_path / "runs" / "whole", folder, STEM)
    before = contents(folder)
    status, _, err = call("--run_name", "cut")
    assert status == 0 and "nothing to do" in err and contents(folder) == before


def test_a_named_run_resumes_by_itself_and_is_left_alone_once_its_steps_are_done(call, tmp_path):
    assert call("--run_name", "mine", "--max_steps", "4", "--lr_scheduler", "constant")[0] == 0
    folder = tmp_path / "runs" / "mine"
    before = contents(folder)
    status, out, err = call("--run_name", "mine", "--max_steps", "4")
    assert (status, out) == (0, "") and "has done its 4 steps: nothing to do; raise --steps to go on" in err
    assert contents(folder) == before
    status, _, err = call("--run_name", "mine", "--steps", "6")
    assert status == 0 and ", from step 4" in err
    assert call("--run_name", "whole", "--max_steps", "6", "--lr_scheduler", "constant")[0] == 0
    one, two = (tensors(newest(tmp_path / "runs" / name), STEM) for name in ("mine", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_a_weight_decay_typed_on_resume_holds_for_all_weights(call, tmp_path):
    assert call("--run_name", "mine", "--weight_decay", "0.1")[0] == 0
    assert call("--run_name", "mine", "--weight_decay", "0.7", "--beta1", "0.8", "--max_steps", "4")[0] == 0
    (optimizer,) = state(tmp_path / "runs" / "mine")["optimizers"]
    assert {group["weight_decay"] for group in optimizer["groups"]} == {0.7, 0.0}  # 0: vectors
    assert {group["weight_decay"] for group in optimizer["groups"] if group.get("apart")} == {0.7}
    assert [group["weight_decay"] for group in optimizer["groups"]].count(0.7) == 2
    assert {tuple(group["betas"]) for group in optimizer["groups"]} == {(0.8, 0.95)}


def test_resume_by_path_inherits_the_options_of_the_run(call, tmp_path, capsys):
    assert call("--run_name", "whole", *SIX, "--use_halting", "1")[0] == 0
    cut = tmp_path / "runs" / "cut"
    shutil.copytree(tmp_path / "runs" / "whole", cut)
    for step in (4, 6):
        shutil.rmtree(cut / "checkpoints" / f"step-{step:08d}")
    assert train.main(["--resume", str(cut)]) == 0, capsys.readouterr().err
    assert_same_run(tmp_path / "runs" / "whole", cut, STEM)


def test_a_resolved_configuration_alone_reruns_the_run(call, tmp_path, capsys):
    assert call("--run_name", "done", "--use_halting", "1", "--hrm_gate_warmup_steps", "2")[0] == 0
    done, again = tmp_path / "runs" / "done", tmp_path / "again"
    assert train.main(["--config", str(done / "config.resolved.yaml"), "--save_dir", str(again)]) == 0
    assert_same_run(done, only_run(again), STEM)
    assert "model_name" not in (done / "config.resolved.yaml").read_text(encoding="utf-8")


# --- what a run leaves


def test_a_run_leaves_losses_answers_diagnostics_and_a_checkpoint_that_transformers_loads(call, tmp_path):
    status, out, err = call("--run_name", "mine", "--max_steps", "4", "--eval_every", "2", "--use_halting", "1",
                            "--deep_supervision", "1", "--hrm_gate_warmup_steps", "1", "--hrm_gate_ramp_steps", "2")
    assert status == 0, err
    run = tmp_path / "runs" / "mine"
    found = records(run)
    assert [(row["step"], row["task"], row["metric"]) for row in found["eval"]] == [
        (step, task, metric) for step in ("2", "4") for task, metric in (
            *(("validation", metric) for metric in ("loss", "perplexity", *DIAGNOSTICS)), ("synthetic", "solved"))]
    assert [(line["step"], line["id"]) for line in found["predictions"]] == [
        (step, f"synthetic/{index:05d}") for step in (2, 4) for index in range(6)]
    lines = metrics(run)
    always = {"loss", "token_loss", "grad_norm", "lr", "gate_scale", "tokens", "examples", "gate_mean", "gate_min",
              "gate_max", "gate_std", "teacher_forced_exact", "tokens_per_second", "elapsed_s"}
    open_gate = {"z_norm", "halt_sum_mean", "halt_sum_std", "halt_sum_min", "halt_sum_max", "halting_loss",
                 "halting_bce", "deep_supervision_loss"}
    assert always <= set(lines[0]) and not open_gate & set(lines[0])
    assert all(always | open_gate <= set(line) for line in lines[1:])
    assert [line["gate_scale"] for line in lines] == [0.0, 0.5, 1.0, 1.0]
    assert lines[0]["gate_max"] == 0 and all(0 < line["gate_min"] <= line["gate_max"] < 1 for line in lines[1:])
    for line in lines[1:]:
        summed = (line["token_loss"] + 0.1 * line["deep_supervision_loss"]) / 1.1
        summed += 0.01 * line["gate_mean"] * (line["halting_loss"] + line["halting_bce"])
        assert math.isclose(line["loss"], summed, rel_tol=1e-5)
    # the table, from the checkpoint alone and example by example
    model = AutoModelForSeq2SeqLM.from_pretrained(newest(run))
    assert type(model) is HybridModel and model.config.gate_scale == 1.0 and model.config.use_halting
    tokenizer, losses, seen, solved = Tokenizer.from_file(str(newest(run) / "tokenizer.json")), [], [], 0
    with torch.no_grad():
        for row in build_synthetic_dataset(6, 0, "val", SimpleTokenizer()):
            encoded = model.encoder(torch.tensor([row.encoder_ids]))
            logits = model(encoder_outputs=encoded, decoder_input_ids=torch.tensor([row.decoder_input_ids])).logits[0]
            losses += [-logits[i].log_softmax(dim=-1)[label].item() for i, label in enumerate(row.labels)]
            bank, used = model.encoder.think(encoded.last_hidden_state, torch.ones(1, len(row.encoder_ids)))[:2]
            assert used == encoded.cycles_used
            seen.append((used.item(), encoded.gate.item(), bank.mean(dim=1).norm().item()))
        for line, (prompt, gold) in zip(found["predictions"][-6:], synthetic_questions(6, 0, "val"), strict=True):
            ids = tokenizer.encode(prompt, add_special_tokens=False).ids
            answer = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0]
            assert tokenizer.decode(answer.tolist(), skip_special_tokens=True) == line["prediction"]
            solved += line["prediction"] == gold
    loss, perplexity, *diagnostics, rate = found["eval"][-9:]
    assert math.isclose(float(loss["value"]), sum(losses) / len(losses), rel_tol=1e-4)
    assert math.isclose(float(perplexity["value"]), math.exp(sum(losses) / len(losses)), rel_tol=1e-4)
    assert (int(loss["n"]), float(rate["value"])) == (len(losses), solved / 6)
    cycles, gates, norms = ([row[i] for row in seen] for i in range(3))
    assert float(loss["segments_used"]) == sum(cycles) / 6
    values = {row["metric"]: float(row["value"]) for row in diagnostics}
    for name, value in (("gate_mean", sum(gates) / 6), ("gate_min", min(gates)), ("gate_max", max(gates)),
                        ("z_norm", sum(norms) / 6)):
        assert math.isclose(values[name], value, rel_tol=1e-4), name
    assert f"evaluation: {run / 'eval.csv'}" in out and f"checkpoint: {newest(run)}" in out
    assert "hybrid" in (newest(run) / "README.md").read_text(encoding="utf-8")


def test_averaged_weights_are_those_validated_and_saved(call, tmp_path):
    assert call("--run_name", "mine", "--ema", "0.5", "--max_steps", "4")[0] == 0
    folder = newest(tmp_path / "runs" / "mine")
    kept, raw = tensors(folder, STEM), tensors(folder)
    assert "lm_head.weight" not in kept and "encoder.embed.weight" in kept
    for name in (name for name in kept if f"raw/{name}" in raw):
        assert torch.equal(kept[name], raw[f"ema/{name}"])
    assert not torch.equal(kept["encoder.embed.weight"], raw["raw/encoder.embed.weight"])


def test_samples_are_shown_while_it_trains(call):
    status, _, err = call("--max_steps", "2", "--log_samples_every", "1")
    assert status == 0
    shown = re.findall(r"\[step (\d)\] prompt: '(What is \d+ \+ \d+\?)'\n  target: '(\d+)'  prediction: '", err)
    assert [(step, prompt, target) for step, prompt, target in shown] == [
        (str(1 + index // 2), *pair) for index, pair in zip(range(4), [
            *synthetic_questions(6, 0, "val")[2:4], *synthetic_questions(6, 0, "val")[4:6]], strict=True)]


@pytest.mark.parametrize("flags", [(), ("--dry_run", "0")])
def test_without_a_dataset_it_exits_2_with_one_line(tmp_path, capsys, flags):
    assert train.main([*RUN, "--save_dir", str(tmp_path / "runs"), *flags]) == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert line.startswith("--arch hybrid needs --dataset") and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", [(), ("--dataset", "synthetic", "--hrm_gate_warmup_steps", "50")])
def test_a_dry_run_measures_prints_and_writes_nothing(call, tmp_path, monkeypatch, flags):
    taken = []
    monkeypatch.setattr(HybridTrainer, "step", lambda self, batches, step, lr, plain=HybridTrainer.step: (
        taken.append((step, lr, self, batches)), plain(self, batches, step, lr))[1])
    status, out, err = call("--dry_run", "1", "--run_name", "mine", *flags)
    assert status == 0 and os.listdir(tmp_path) == []
    assert "hybrid (transformer, prefix)" in err and "nothing was written" in err and "peak memory" in err
    for part in ("embeddings", "encoder", "HRM core", "bridge", "gate", "decoder"):
        assert re.search(rf"^  {part} +[\d,]+ parameters$", err, re.MULTILINE), part
    _, lr, trainer, batches = taken[-1]
    assert lr == 0 and trainer.model.config.gate_scale > 0, "a step of the warmup is not the step to be measured"
    if not flags:
        assert batches[0]["encoder_ids"].shape == batches[0]["labels"].shape == (4, 24)


# --- validation: patience, the best, rotation


def test_patience_counts_consecutive_rises_after_the_grace_steps_also_across_a_resume(call, tmp_path, monkeypatch):
    losses = dict(enumerate([5, 6, 7, 8, 7, 9, 10, 11, 12, 13], start=1))  # 2, 3, 4: grace; 6, 7, 8: counted
    flags = ("--max_steps", "10", "--eval_every", "1", "--eval_loss_patience", "3", "--patience_grace_steps", "4")
    losses_are(monkeypatch, losses)
    status, _, err = call("--run_name", "whole", *flags)
    whole = tmp_path / "runs" / "whole"
    assert status == 0 and state(whole)["step"] == 8
    assert "training ended at step 8: the validation loss rose 3 times in a row (--patience 3)" in err
    with monkeypatch.context() as patch:
        killed_at(patch, 7)
        with pytest.raises(Killed):
            call("--run_name", "killed", *flags)
    assert call("--run_name", "killed", *flags)[0] == 0
    assert_same_run(whole, tmp_path / "runs" / "killed", STEM)
    rows = records(whole)["eval"]
    status, _, err = call("--run_name", "whole", *flags)  # again: it has ended, and records nothing twice
    assert status == 0 and records(whole)["eval"] == rows and state(whole)["step"] == 8
    status, _, err = call("--run_name", "whole", *flags, "--eval_loss_patience", "4")
    assert status == 0 and state(whole)["step"] == 9


@pytest.mark.parametrize("flags,end", [
    (("--eval_loss_patience", "0"), 6), (("--eval_loss_patience", "2", "--patience_grace_steps", "0"), 3),
    (("--eval_loss_patience", "2", "--patience_grace_steps", "3"), 5),
    (("--eval_loss_patience", "3", "--patience_grace_steps", "3"), 6)])
def test_patience_and_grace(call, tmp_path, monkeypatch, flags, end):
    losses_are(monkeypatch, {step: float(step) for step in range(1, 7)})
    assert call("--run_name", "mine", "--max_steps", "6", "--eval_every", "1", *flags)[0] == 0
    assert state(tmp_path / "runs" / "mine")["step"] == end


def test_an_equal_loss_is_no_rise_and_a_fall_begins_the_count_anew(call, tmp_path, monkeypatch):
    losses_are(monkeypatch, dict(enumerate([1.0, 2, 2, 3, 1, 2], start=1)))
    assert call("--run_name", "mine", "--max_steps", "6", "--eval_every", "1", "--eval_loss_patience", "2")[0] == 0
    assert state(tmp_path / "runs" / "mine")["step"] == 6


def test_the_lowest_loss_is_the_best_and_outlives_the_limit_with_the_newest(call, tmp_path, monkeypatch):
    losses_are(monkeypatch, dict(enumerate([5.0, 3, 4, 3.5, 6, 7], start=1)))
    run = tmp_path / "runs" / "mine"
    assert call("--run_name", "mine", "--max_steps", "6", "--eval_every", "1", "--checkpoint_limit", "2",
                "--save_best_model", "--eval_loss_patience", "0")[0] == 0
    best = json.loads((run / "best.json").read_text(encoding="utf-8"))
    assert best == {"checkpoint": "step-00000002", "metric": "negative_validation_loss", "value": -3.0}
    assert checkpoints(run) == [2, 5, 6]


def test_a_loss_that_is_no_number_is_never_the_best_and_ends_nothing(call, tmp_path, monkeypatch):
    losses_are(monkeypatch, {1: math.nan, 2: 4.0, 3: math.nan})
    run = tmp_path / "runs" / "mine"
    assert call("--run_name", "mine", "--eval_every", "1", "--save_best_model")[0] == 0
    assert json.loads((run / "best.json").read_text(encoding="utf-8"))["checkpoint"] == "step-00000002"


def test_only_the_newest_stay_and_the_final_one_is_among_them(call, tmp_path):
    assert call("--run_name", "mine", "--max_steps", "5", "--save_every", "1", "--checkpoint_limit", "2")[0] == 0
    assert checkpoints(tmp_path / "runs" / "mine") == [4, 5]
    assert not (tmp_path / "runs" / "mine" / "best.json").exists()


# --- a new stage from the weights of another


def test_reset_progress_takes_the_weights_and_nothing_else(call, tmp_path, monkeypatch):
    first = tmp_path / "runs" / "A"
    assert call("--run_name", "A", "--max_steps", "4", "--ema", "0.5", "--optimizer", "muon")[0] == 0
    before, began = contents(first), {}
    plain = HybridTrainer.step

    def watch(self, batches, step, lr):
        if not began:
            began.update({"step": step, "state": [len(o.state) for o, _ in self.optimizers],
                          "weights": {name: p.detach().clone() for name, p in self.parameters.items()},
                          "batch": batches[0], "average": {n: t.clone() for n, t in self.ema.average.items()}})
        return plain(self, batches, step, lr)

    stage = ("--resume", str(first), "--reset_progress", "1", "--run_name", "B", "--dataset", "synthetic", "--seed",
             "5", "--use_halting", "1", "--deep_supervision", "1", "--h_cycles", "3", "--ema", "0.9", "--max_steps",
             "3", "--save_every", "1", "--checkpoint_limit", "0", "--hrm_gate_warmup_steps", "1")
    with monkeypatch.context() as patch:
        patch.setattr(HybridTrainer, "step", watch)
        status, _, err = call(*stage)
    assert status == 0, err
    assert "step, optimizer and training items begin anew" in err and ", from step" not in err
    assert contents(first) == before
    kept = tensors(newest(first), STEM)
    assert began["step"] == 0 and not any(began["state"])
    for name, weight in began["weights"].items():
        assert torch.equal(weight, kept[name]) and torch.equal(began["average"][name], kept[name]), name
    second = tmp_path / "runs" / "B"
    assert call("--run_name", "fresh", "--seed", "5", "--max_steps", "1")[0] == 0
    assert metrics(second)[0]["tokens"] == metrics(tmp_path / "runs" / "fresh")[0]["tokens"]
    assert metrics(second)[0]["gate_scale"] == 0 and "halting_loss" in metrics(second)[-1]
    assert state(second)["stream"]["given"] == 3 and checkpoints(second) == [1, 2, 3]
    for step in (2, 3):  # the same command again goes on with B, whatever A is
        shutil.rmtree(second / "checkpoints" / f"step-{step:08d}")
    status, _, err = call(*stage)
    assert status == 0 and ", from step 1" in err and contents(first) == before
    assert call(*stage[:5], "B2", *stage[6:])[0] == 0
    assert_same_run(tmp_path / "runs" / "B2", second, STEM)
    status, _, err = call(*stage)
    assert status == 0 and "nothing to do" in err


@pytest.mark.parametrize("reset", [(), ("--reset_progress", "1", "--run_name", "B")])
@pytest.mark.parametrize("typed,told", [
    ("--d_model 32", ["--d_model 32 (checkpoint: 16)"]),
    ("--encoder mamba2 --bridge cross_attn --h_len 3",
     ["--encoder mamba2 (checkpoint: transformer)", "--bridge cross_attn (checkpoint: prefix)", "--h_len 3"]),
    ("--tie_embeddings 0 --l_layers 2 --prefix_len 5",
     ["--tie_embeddings False (checkpoint: True)", "--l_layers 2", "--prefix_len 5"])])
def test_another_shape_is_refused_by_name(done, tmp_path, capsys, typed, told, reset):
    before = contents(done)
    argv = ["--resume", str(done), "--dataset", "synthetic", "--save_dir", str(tmp_path / "runs"), *typed.split()]
    assert train.main([*argv, *reset]) == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert "another shape" in line and all(part in line for part in told)
    assert contents(done) == before and not (tmp_path / "runs" / "B").exists()


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A finished run of three steps, for those who only look at it."""
    place = tmp_path_factory.mktemp("done")
    kept, hybrid_data.SYNTHETIC_TRAIN = hybrid_data.SYNTHETIC_TRAIN, 50
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.loop, "draw_curve", lambda *arguments: None)
            assert train.main([*RUN, "--dataset", "synthetic", "--save_dir", str(place), "--run_name", "done",
                               "--use_halting", "1"]) == 0
    finally:
        hybrid_data.SYNTHETIC_TRAIN = kept
    return place / "done"


@pytest.mark.parametrize("reset", [(), ("--reset_progress", "1", "--run_name", "B"), ("--eval_only",)])
def test_another_tokenizer_is_refused(done, tmp_path, capsys, reset):
    other, before = write_prepared(tmp_path / "other", characters="abc 0123456789"), contents(done)
    argv = ["--resume", str(done), "--save_dir", str(tmp_path / "runs"), "--dataset", str(other)]
    assert train.main([*argv, *reset]) == 2
    (line,) = error_lines(capsys.readouterr().err.splitlines()[-1])
    assert "was trained with another tokenizer than --dataset" in line and "tokenizer.json" in line
    assert contents(done) == before and not (tmp_path / "runs" / "B").exists()


def test_another_system_is_refused(done, tmp_path, capsys, tiny_host):
    assert train.main(["--resume", str(done), "--arch", "addon", "--model_name", str(tiny_host)]) == 2
    told = error_lines(capsys.readouterr().err)
    assert len(told) == 1 and "is a checkpoint of --arch hybrid, not of --arch addon" in told[0]


def test_evaluation_only_adds_its_rows_and_changes_nothing_else(done, tmp_path, capsys):
    run = tmp_path / "runs" / "done"
    shutil.copytree(done, run)
    before, rows = contents(run), records(run)["eval"]
    status = train.main(["--resume", str(run), "--eval_only", "--halt_threshold", "1e-9", "--h_cycles", "4"])
    out, err = capsys.readouterr()
    assert status == 0 and "evaluation only" in err and str(newest(run)) in out
    after = contents(run)
    added_to = {"eval.csv", "predictions.jsonl", "evaluations.jsonl", "run.json"}
    assert {name for name in after if after[name] != before.get(name)} <= added_to
    added = records(run)["eval"][len(rows):]
    assert [row["metric"] for row in added] == ["loss", "perplexity", *DIAGNOSTICS, "solved"]
    assert {row["step"] for row in added} == {"3"}
    assert {row["segments_used"] for row in added} == {"1"} and {row["segments_used"] for row in rows} == {"2"}


def test_evaluation_only_of_the_weights_alone(done, tmp_path, capsys):
    lone = tmp_path / "mail" / "step-00000003"
    shutil.copytree(newest(done), lone)
    for path in lone.glob("training_state.*"):
        path.unlink()
    assert train.main(["--resume", str(lone), "--eval_only", "--save_dir", str(tmp_path / "runs")]) == 0
    assert [row | {"elapsed_s": "", "run": ""} for row in records_of(only_run(tmp_path / "runs"))] == [
        row | {"elapsed_s": "", "run": ""} for row in records_of(done)]


def records_of(run: Path) -> list[dict[str, str]]:
    import csv

    with open(run / "eval.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- prepared data


def test_prepared_folders_are_trained_and_dev_sets_scored_by_name(call, tmp_path, folders):
    status, out, err = call("--run_name", "mine", "--dataset", str(folders["data"]), "--dev_sets",
                            f"math={folders['more']},again={folders['data']}", "--max_steps", "2")
    assert status == 0, err
    run = tmp_path / "runs" / "mine"
    rows = records(run)["eval"]
    assert [(row["task"], row["metric"]) for row in rows] == [
        (name, metric) for name in ("validation", "math", "again") for metric in ("loss", "perplexity", *DIAGNOSTICS)]
    model = HybridModel.from_pretrained(newest(run))
    for name, folder, row in (("math", folders["more"], rows[8]), ("again", folders["data"], rows[16])):
        terms = []
        with torch.no_grad():
            for triple in rows_of(folder, "val"):
                logits = model(torch.tensor([triple.encoder_ids]),
                               decoder_input_ids=torch.tensor([triple.decoder_input_ids])).logits[0]
                terms += [-logits[i].log_softmax(dim=-1)[label].item() for i, label in enumerate(triple.labels)]
        assert int(row["n"]) == len(terms) and math.isclose(float(row["value"]), sum(terms) / len(terms), rel_tol=1e-4)
        assert re.search(rf"^{name} ", out, re.MULTILINE)
    assert rows[0]["value"] == rows[16]["value"] and "next: " not in out
    assert (newest(run) / "tokenizer.json").read_bytes() == (folders["data"] / "tokenizer.json").read_bytes()


def test_all_that_is_wrong_with_the_data_is_told_at_once(call, tmp_path, folders):
    other = write_prepared(tmp_path / "other", characters="abc ")
    status, _, err = call("--dataset", str(folders["data"]), "--dev_sets", f"a={other},b={tmp_path / 'missing'}")
    found = error_lines(err)
    assert status == 2 and len(found) == 2 and not (tmp_path / "runs").exists()
    assert "missing has no meta.json" in found[0] and "different tokenizers" in found[1]
    status, _, err = call("--dataset", "synthetic", "--dev_sets", f"a={folders['more']}")
    (line,) = error_lines(err)
    assert status == 2 and "--dev_sets cannot join --dataset synthetic" in line
    (other / "tokenizer.json").unlink()
    status, _, err = call("--dataset", str(other))
    (line,) = error_lines(err)
    assert status == 2 and "has no tokenizer.json" in line


def test_epochs_and_accumulation_count_the_samples(call, tmp_path, folders, monkeypatch):
    read = []
    monkeypatch.setattr(HybridTrainer, "step", lambda self, batches, step, lr, plain=HybridTrainer.step: (
        read.append(batches), plain(self, batches, step, lr))[1])
    status, _, err = call("--dataset", str(folders["data"]), "--epochs", "2", "--batch_size", "3", "--grad_accum_steps",
                          "2", "--max_steps", "0")
    assert status == 0 and "; 4 steps of 3 examples" in err and [len(batches) for batches in read] == [2] * 4
    seen = [tuple(ids[mask.bool()].tolist()) for batches in read for batch in batches
            for ids, mask in zip(batch["encoder_ids"], batch["encoder_mask"], strict=True)]
    held = [tuple(row.encoder_ids) for row in rows_of(folders["data"], "train")]
    assert sorted(seen[:12]) == sorted(seen[12:]) == sorted(held) and seen[:12] != seen[12:]


def test_long_samples_are_cut(call, tmp_path, monkeypatch):
    long, read = write_prepared(tmp_path / "long", length=40, train=8), []
    monkeypatch.setattr(HybridTrainer, "step", lambda self, batches, step, lr, plain=HybridTrainer.step: (
        read.extend(batches), plain(self, batches, step, lr))[1])
    assert call("--dataset", str(long), "--max_seq_len", "8", "--max_steps", "2")[0] == 0
    assert max(batch["encoder_ids"].shape[1] for batch in read) == max(batch["labels"].shape[1] for batch in read) == 8
    kept = {(tuple(row.encoder_ids[-8:]), tuple(row.labels[:8])) for row in rows_of(long, "train")}
    for batch in read:
        for ids, mask, said in zip(batch["encoder_ids"], batch["encoder_mask"], batch["labels"], strict=True):
            assert (tuple(ids[mask.bool()].tolist()), tuple(said[said != -100].tolist())) in kept


def test_a_bad_line_ends_the_run_or_is_passed_over(call, tmp_path):
    bad = write_prepared(tmp_path / "bad", train=6)
    lines = (bad / "train.jsonl").read_text(encoding="utf-8").splitlines()
    lines[2] = '{"encoder_ids": [1, 2'
    (bad / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    status, _, err = call("--dataset", str(bad), "--on_bad_line", "error")
    assert status == 2 and "train.jsonl line 3: not JSON" in error_lines(err.splitlines()[-1])[0]
    status, _, err = call("--dataset", str(bad), "--on_bad_line", "skip", "--run_name", "mine")
    assert status == 0, err
    (bad / "val.jsonl").write_text("{}\n{}\n", encoding="utf-8")
    status, _, err = call("--dataset", str(bad), "--on_bad_line", "skip")
    assert status == 2 and "val.jsonl has no good line" in error_lines(err.splitlines()[-1])[0]


def test_a_bad_validation_line_is_passed_over_and_no_other_counts_twice(call, tmp_path):
    bad = write_prepared(tmp_path / "bad", val=4)
    lines = (bad / "val.jsonl").read_text(encoding="utf-8").splitlines()
    lines[1] = "{}"
    (bad / "val.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    status, _, err = call("--dataset", str(bad), "--on_bad_line", "skip", "--run_name", "mine")
    assert status == 0, err
    good = [json.loads(line) for index, line in enumerate(lines) if index != 1]
    assert int(records(tmp_path / "runs" / "mine")["eval"][0]["n"]) == sum(len(row["labels"]) for row in good)


def test_more_workers_than_cores_are_capped_with_a_warning(call, monkeypatch):
    monkeypatch.setattr(hybrid_data.os, "sched_getaffinity", lambda _: {0, 1})
    status, _, err = call("--dataset_workers", "64", "--max_steps", "1")
    assert status == 0 and "WARNING: --dataset_workers 64: this machine has 2 cores, using 2" in err


def test_a_loss_that_is_no_number_exits_3_with_the_weights_and_the_batch(call, tmp_path):
    status, _, err = call("--run_name", "bad", "--lr", "1e30", "--warmup_steps", "0", "--max_steps", "6")
    assert status == 3 and "Traceback" not in err
    run = tmp_path / "runs" / "bad"
    bad = json.loads((run / "bad_batch.json").read_text(encoding="utf-8"))
    assert bad["step"] == state(run)["step"] >= 1 and len(bad["examples"]) == 4
    assert set(bad["examples"][0]) == {"encoder_ids", "encoder_mask", "decoder_input_ids", "decoder_mask", "labels"}


def test_two_runs_of_one_command_are_equal_and_of_another_seed_are_not(call, tmp_path):
    for name, seed in itertools.chain(zip("ab", "00", strict=True), [("c", "1")]):
        assert call("--run_name", name, "--seed", seed, "--max_steps", "2")[0] == 0
    assert_same_run(tmp_path / "runs" / "a", tmp_path / "runs" / "b", STEM)
    assert metrics(tmp_path / "runs" / "a")[0]["loss"] != metrics(tmp_path / "runs" / "c")[0]["loss"]


def test_a_trained_gate_can_be_shut_at_evaluation(done, tmp_path, capsys):
    run = tmp_path / "runs" / "done"
    shutil.copytree(done, run)
    tables = []
    for flags in ([], ["--hrm_gate_scale", "0"]):
        assert train.main(["--resume", str(run), "--eval_only", *flags]) == 0
        tables.append(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("validation")))
    assert tables[0] != tables[1] and tables[1].split()[-1] == "-"


def test_a_dev_set_must_not_hide_the_validation_split(tmp_path, capsys):
    write_prepared(tmp_path / "data")
    argv = ["--arch", "hybrid", "--dataset", str(tmp_path / "data"), "--dev_sets", f"validation={tmp_path / 'data'}"]
    assert train.main([*argv, "--save_dir", str(tmp_path / "runs")]) == 2
    assert error_lines(capsys.readouterr().err) == [
        "--dev_sets validation=... would hide the run's own validation rows: choose another name"]


def test_the_next_stage_can_take_the_best_checkpoint(done, tmp_path, capsys):
    run = tmp_path / "runs" / "A"
    shutil.copytree(done, run)
    stage = ["--arch", "hybrid", "--resume", f"{run}@best", "--reset_progress", "--run_name", "B",
             "--save_dir", str(tmp_path / "runs"),
             "--dataset", "synthetic", "--eval_n", "4", "--steps", "1", "--num_threads", "1"]
    (run / "best.json").unlink(missing_ok=True)
    assert train.main(stage) == 2
    assert "no best checkpoint is marked" in error_lines(capsys.readouterr().err)[0]
    checkpointing.mark_best(run, newest(run), "negative_validation_loss", -1.0)
    assert train.main(stage) == 0


def test_the_suite_leaves_out_what_the_hybrid_was_trained_on(call, tmp_path):
    from text_data.trained import TrainedOn

    rows = [{"prompt": f"Say {word}.", "answer": word} for word in ("one", "two", "three", "four")]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = write_prepared(tmp_path / "data")
    words = ["--dataset", str(data), "--max_steps", "1", "--eval_suite", f"synthetic={tmp_path / 'qa.jsonl'}"]
    status, out, err = call(*words, "--run_name", "old", "--max_new_tokens", "2")
    assert status == 0 and "does not record which documents it trains on" in out + err and " exact " in out

    meta = json.loads((data / "meta.json").read_text(encoding="utf-8"))
    for count in (1, 4):
        meta["train_keys"] = TrainedOn([key_of(row["prompt"].upper()) for row in rows[:count]]).record()
        (data / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        status, out, err = call(*words, "--run_name", f"known{count}", "--max_new_tokens", "2")
        if count == 1:
            assert status == 0 and "note: 1 items of suite/synthetic were left out" in out
        else:
            assert status == 2 and "all 4 questions of" in err and "were trained on" in err


def test_the_suite_leaves_out_what_an_earlier_stage_was_trained_on(call, tmp_path):
    from text_data.trained import TrainedOn

    rows = [{"prompt": f"Say {word}.", "answer": word} for word in ("one", "two", "three", "four")]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folders = []
    for place, row in enumerate(rows[:2]):
        folders.append(write_prepared(tmp_path / f"data{place}"))
        meta = json.loads((folders[-1] / "meta.json").read_text(encoding="utf-8"))
        meta["train_keys"] = TrainedOn([key_of(row["prompt"])]).record()
        (folders[-1] / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

    words = ["--max_steps", "1", "--eval_suite", f"synthetic={tmp_path / 'qa.jsonl'}", "--max_new_tokens", "2"]
    status, out, _ = call("--dataset", str(folders[0]), "--run_name", "A", *words)
    assert status == 0 and "note: 1 items of suite/synthetic were left out" in out
    stage = ["--resume", str(tmp_path / "runs" / "A"), "--reset_progress"]
    status, out, err = call(*stage, "--dataset", str(folders[1]), "--run_name", "B", *words)
    assert status == 0 and "note: 2 items of suite/synthetic were left out" in out, out + err
    status, out, _ = call("--resume", str(tmp_path / "runs" / "B"), "--eval_only", *words[2:])
    assert status == 0 and "note: 2 items of suite/synthetic were left out" in out
