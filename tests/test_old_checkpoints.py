"""Checkpoints that an earlier version wrote: each still loads with its own values, answers, and can be trained on.

`fixtures/old_checkpoints` was written by the version in which every module lay at the root.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import train
from tiny_runs import ROOT, newest, tensors

OLD = Path(__file__).parent / "fixtures" / "old_checkpoints"
SYSTEMS = ("addon", "hybrid", "enhanced")
STEMS = {"addon": "adapter_model", "hybrid": "model", "enhanced": "model"}


@pytest.fixture(params=SYSTEMS)
def old_run(request, tmp_path) -> Path:
    """A copy of the old run's folder, named after its system."""
    return shutil.copytree(OLD / request.param, tmp_path / request.param)


def test_an_old_checkpoint_is_evaluated_with_its_own_weights(old_run, capsys):
    assert train.main(["--resume", str(old_run), "--eval_only", "--device", "cpu"]) == 0
    assert str(old_run) in capsys.readouterr().out


def test_an_old_run_goes_on_where_it_stopped(old_run):
    steps = int(newest(old_run).name.removeprefix("step-"))
    before = tensors(newest(old_run))
    shape = json.loads((newest(old_run) / "training_state.json").read_text(encoding="utf-8"))["optimizers"]
    assert train.main(["--resume", str(old_run), "--max_steps", str(steps + 1), "--warmup_steps", "0",
                       "--device", "cpu"]) == 0
    assert newest(old_run).name == f"step-{steps + 1:08d}"
    after = tensors(newest(old_run))
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in before if name.startswith("raw/"))
    again = json.loads((newest(old_run) / "training_state.json").read_text(encoding="utf-8"))["optimizers"]
    assert [each["class"] for each in again] == [each["class"] for each in shape]
    ours = safetensors.torch.load_file(newest(old_run) / f"{STEMS[old_run.name]}.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in ours.values())


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_old_run_keeps_the_course_of_its_learning_rate_and_a_new_one_on_its_weights_does_not(system):
    """Before `lr_fall` was a flag, the rate fell over the whole run and dropped where the warmup ended."""
    assert train.saved_options(newest(OLD / system))["lr_fall"] == "whole_run"
    assert "lr_fall" not in train.saved_options(newest(OLD / system), anew=True)


def test_an_old_hybrid_keeps_the_sizes_it_was_saved_with():
    from transformers import AutoConfig

    import hybrid  # noqa: F401 registers the architecture

    config = AutoConfig.from_pretrained(newest(OLD / "hybrid"))
    assert (config.d_model, config.n_heads, config.encoder_layers, config.decoder_layers) == (16, 4, 2, 2)
    assert (config.state_size, config.d_h, config.h_len, config.l_len) == (32, 16, 8, 16)


def test_an_old_add_on_keeps_its_recurrence():
    from addon.adapters import load_controller

    controller, document = load_controller(newest(OLD / "addon"))
    config = controller.config
    assert (config.segments, config.inner_T, config.injector, config.d_h) == (2, 1, "grb", 8)
    assert (config.init_state, config.state_mix, config.grad_horizon) == ("zero", "gated", "full")
    assert document["base_model_name_or_path"] == "assets/tiny_host"


@pytest.mark.parametrize("adapter", ["lora", "prompt"])
def test_a_baseline_from_before_peft_wrote_its_folder_answers_and_is_trained_on(adapter, tmp_path):
    """Its tensors have the controller's names, and `adapter_config.json` is the record."""
    from addon.adapters import load_controller
    from engine.checkpoints import read_checkpoint

    run = shutil.copytree(OLD / adapter, tmp_path / adapter)
    model, document = load_controller(newest(run))
    saved = tensors(newest(run), "adapter_model")
    state = model.addon_state()
    assert state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in saved)
    assert document["load_in"] == "none"
    assert train.main(["--resume", str(run), "--eval_only", "--device", "cpu"]) == 0
    assert train.main(["--resume", str(run), "--max_steps", "3", "--device", "cpu"]) == 0
    assert newest(run).name == "step-00000003"
    documents = read_checkpoint(newest(run)).documents
    assert {"adapter_config.json", "adapter_record.json"} <= documents.keys()
    kind = {"lora": "LORA", "prompt": "PROMPT_TUNING"}[adapter]
    assert json.loads(documents["adapter_config.json"])["peft_type"] == kind


def addon_record(folder: Path, without: tuple[str, ...], **settings) -> Path:
    """A checkpoint of the add-on in `folder` whose record of its shape lacks some settings."""
    from engine.checkpoints import read_checkpoint, step_folder, write_checkpoint
    from tiny_runs import tiny_model

    saved = read_checkpoint(newest(OLD / "addon"))
    document = json.loads(saved.documents["adapter_config.json"])
    kept = {name: value for name, value in document["hrm"].items() if name not in without}
    model = tiny_model(ROOT / "assets" / "tiny_host", d_h=8, injector="grb", **settings)
    text = json.dumps(document | {"hrm": kept})
    return write_checkpoint(step_folder(folder, 4), {"adapter_model": model.addon_state()},
                            {"adapter_config.json": text})


def test_a_record_from_before_a_setting_existed_has_what_was_then_the_only_choice(tmp_path):
    """Before `state_mix` and `init_state` were flags, states were summed and began as fixed vectors."""
    from addon.adapters import load_controller

    folder = addon_record(tmp_path, ("state_mix", "init_state"), state_mix="sum", init_state="fixed")
    again, _ = load_controller(folder)
    assert (again.config.state_mix, again.config.init_state) == ("sum", "fixed")


def test_a_record_without_a_setting_has_the_default_of_its_time(tmp_path):
    """Every default of `HRMAddonConfig` that has changed; both ways in, of which one loads baselines as well."""
    from addon.adapters import load_adapter, load_controller
    from model import OLD_DEFAULTS

    folder = addon_record(tmp_path, tuple(OLD_DEFAULTS), state_mix="sum", init_state="fixed", segments=4)
    for load in (load_controller, load_adapter):
        config = load(folder)[0].config
        assert {name: getattr(config, name) for name in OLD_DEFAULTS} == OLD_DEFAULTS


@pytest.mark.parametrize("system", ["addon", "hybrid"])
def test_an_old_folder_of_transformers_has_the_defaults_of_its_time(system, tmp_path):
    """`from_pretrained` on a config.json that lacks each setting whose default has changed."""
    from transformers import AutoConfig

    import hybrid.config
    import model

    old, made = {"addon": (model.OLD_DEFAULTS, model.HRMAddonConfig()),
                 "hybrid": (hybrid.config.OLD_DEFAULTS, hybrid.config.HybridConfig())}[system]
    made.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert old.keys() <= record.keys()
    whole = AutoConfig.from_pretrained(tmp_path)
    assert all(getattr(whole, name) == getattr(made, name) != old[name] for name in old)
    path.write_text(json.dumps({name: value for name, value in record.items() if name not in old}), encoding="utf-8")
    again = AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in old} == old
