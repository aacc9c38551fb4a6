"""--host_dtype: what the frozen LLM is held in follows the processor, and stays with what was trained on it."""

from __future__ import annotations

import json

import pytest
import torch

import options
from addon import host_dtype as host
from addon.adapters import ADAPTER_CONFIG, load_controller
from addon.host_dtype import host_parameters, load_in, pick_dtype
from engine.checkpoints import read_checkpoint, step_folder, write_checkpoint
from host import HostConfig, add_lora, load_host
from tiny_runs import ROOT, error_lines, newest, only_run

SHIPPED = str(ROOT / "assets" / "tiny_host")  # 4 bits need a width of 64
NUMBER_SHIPPED = "3.6"  # millions of parameters


@pytest.fixture
def saved_in(tiny_host, tmp_path):
    """Saves the tiny LLM in another dtype: dtype -> its folder."""
    def save(dtype: torch.dtype):
        folder = tmp_path / f"host_{dtype}".replace("torch.", "")
        load_host(str(tiny_host)).to(dtype).save_pretrained(folder)
        for path in tiny_host.glob("*token*"):
            (folder / path.name).write_bytes(path.read_bytes())
        template = tiny_host / "chat_template.jinja"
        if template.exists():
            (folder / template.name).write_bytes(template.read_bytes())
        return folder
    return save


@pytest.fixture
def slow_bf16(monkeypatch):
    """A processor without bf16 instructions."""
    monkeypatch.setattr(host, "multiplies_bf16", lambda device: False)


@pytest.fixture
def fast_bf16(monkeypatch):
    monkeypatch.setattr(host, "multiplies_bf16", lambda device: True)


def test_auto_keeps_what_is_multiplied_natively(saved_in, tiny_host, fast_bf16):
    assert pick_dtype(HostConfig(str(saved_in(torch.bfloat16))), "cpu") == ("bf16", "")
    assert pick_dtype(HostConfig(str(tiny_host)), "cpu") == ("fp32", "")


def test_auto_is_fp32_where_bf16_is_slow_and_says_so_in_one_line(saved_in, tiny_host, slow_bf16):
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        folder = saved_in(dtype)
        picked, line = pick_dtype(HostConfig(str(folder)), "cpu")
        assert picked == "fp32" and "\n" not in line
        assert f"{folder} is held in fp32 (0.00 GB" in line and f"multiplies {name} several times more slowly" in line
    assert pick_dtype(HostConfig(str(tiny_host)), "cpu") == ("fp32", "")


def test_a_gpu_without_bf16_is_no_reason_to_give_up_fp16(saved_in, slow_bf16, monkeypatch):
    monkeypatch.setattr(host, "free_memory", lambda device: 10**9)
    assert pick_dtype(HostConfig(str(saved_in(torch.float16))), "cuda") == ("fp16", "")
    assert pick_dtype(HostConfig(str(saved_in(torch.bfloat16))), "cuda")[0] == "fp32"
    assert pick_dtype(HostConfig(str(saved_in(torch.bfloat16))), "mps") == ("bf16", "")


def test_auto_keeps_an_llm_that_would_not_fit_and_says_what_it_costs(saved_in, slow_bf16, monkeypatch):
    monkeypatch.setattr(host, "free_memory", lambda device: 1000)
    picked, line = pick_dtype(HostConfig(str(saved_in(torch.bfloat16))), "cpu")
    assert picked == "bf16" and line.startswith("WARNING: ") and "stays in bf16" in line and "GB are free" in line


def test_a_typed_dtype_and_a_quantised_llm_are_left_alone(saved_in, slow_bf16):
    folder = str(saved_in(torch.bfloat16))
    for name in ("stored", "bf16", "fp16", "fp32"):
        assert pick_dtype(HostConfig(folder, host_dtype=name), "cpu") == (name, "")
    assert pick_dtype(HostConfig(folder, load_in="8bit"), "cpu") == ("stored", "")


def test_a_host_upcast_is_the_same_host(saved_in):
    folder = str(saved_in(torch.bfloat16))
    own, upcast = load_host(folder), load_host(folder, host_dtype="fp32")
    assert {p.dtype for p in own.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in upcast.parameters()} == {torch.float32}
    for one, other in zip(own.parameters(), upcast.parameters(), strict=True):
        assert torch.equal(one.float(), other) and not other.requires_grad


def test_what_was_trained_on_one_dtype_is_used_on_it_wherever_it_goes(call, saved_in, tmp_path, monkeypatch):
    """Trained where bf16 is slow; evaluated, gone on with and asked where it is fast."""
    folder = saved_in(torch.bfloat16)
    monkeypatch.setattr(host, "multiplies_bf16", lambda device: False)
    same = ("--model_name", str(folder), "--run_name", "A")
    status, _, err = call(*same)
    assert status == 0 and err.count("is held in fp32") == 1
    run = only_run(tmp_path / "runs")
    saved = options.read_resolved((run / "config.resolved.yaml").read_text(encoding="utf-8"))
    assert saved["host_dtype"] == "fp32"
    assert json.loads(read_checkpoint(newest(run)).documents[ADAPTER_CONFIG])["host_dtype"] == "fp32"

    monkeypatch.setattr(host, "multiplies_bf16", lambda device: True)
    assert load_controller(newest(run))[0].host.dtype == torch.float32
    assert call(*same, "--eval_only")[0] == 0
    assert call(*same, "--max_steps", "4")[0] == 0
    saved = options.read_resolved((run / "config.resolved.yaml").read_text(encoding="utf-8"))
    assert saved["host_dtype"] == "fp32"

    # Typed, another one may be tried.
    assert call(*same, "--eval_only", "--host_dtype", "bf16")[0] == 0


def test_an_adapter_on_a_rounded_llm_is_loaded_on_the_same(call, tiny_host, tmp_path):
    """The tiny LLM is saved in fp32: rounded to bf16, its weights have another digest."""
    assert call("--host_dtype", "bf16", "--run_name", "A")[0] == 0
    controller, document = load_controller(newest(only_run(tmp_path / "runs")))
    assert controller.host.dtype == torch.bfloat16 and document["host_dtype"] == "bf16"
    assert call("--run_name", "A", "--eval_only")[0] == 0
    assert call("--run_name", "A", "--eval_only", "--host_dtype", "fp32")[0] == 0


def test_an_older_run_keeps_what_its_llm_is_saved_in():
    assert options.read_resolved("model:\n  arch: addon\n")["host_dtype"] == "stored"


def test_a_quantised_llm_has_no_other_dtype(call):
    status, _, err = call("--load_in", "8bit", "--host_dtype", "fp32")
    (line,) = error_lines(err)
    assert status == 2 and "--host_dtype fp32 and --load_in 8bit are both set" in line


@pytest.mark.parametrize("how", ["8bit", "4bit"])
def test_what_was_trained_on_a_packed_llm_is_answered_by_a_packed_one(call, tmp_path, how):
    """In evaluation, in `generate.py`, and with a checkpoint whose record does not tell, as those of before."""
    flags = ("--model_name", SHIPPED, "--load_in", how, "--run_name", "A", "--max_steps", "1")
    status, _, err = call(*flags)
    assert status == 0 and f"({NUMBER_SHIPPED} M frozen)" in err, err
    folder = newest(only_run(tmp_path / "runs"))
    saved = read_checkpoint(folder)
    record = json.loads(saved.documents[ADAPTER_CONFIG])
    assert record["load_in"] == how

    del record["load_in"]
    older = step_folder(tmp_path / "older", 1)
    write_checkpoint(older, saved.tensors, saved.documents | {ADAPTER_CONFIG: json.dumps(record)})
    for place in (folder, older):
        packed = load_controller(place)[0].host
        assert packed.is_quantized and load_in(packed) == how


def test_an_llm_that_is_not_packed_says_so(tiny_host):
    plain = load_host(str(tiny_host))
    assert load_in(plain) == "none"
    assert host_parameters(plain) == sum(parameter.numel() for parameter in plain.parameters())


@pytest.mark.parametrize("how", ["none", "8bit", "4bit"])
def test_an_llm_has_as_many_parameters_packed_or_not(how):
    plain = load_host(SHIPPED)
    whole = sum(parameter.numel() for parameter in plain.parameters())
    packed = load_host(SHIPPED, load_in=how)
    assert host_parameters(packed) == whole
    add_lora(packed, 1, 2)
    assert host_parameters(packed) == whole
