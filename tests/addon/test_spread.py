"""An LLM that accelerate spreads over memory and disk: the same numbers as on one device; what it cannot do is told."""

from __future__ import annotations

import gc
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload

import generate
import train
from addon.adapters import adapter_document, build_controller, load_controller
from addon.answering import AddonAnswerer
from addon.hidden_cache import weights_digest
from addon.host_dtype import host_parameters
from batching import PromptConfig
from engine.placement import SpreadConfig, check_spread, device_of, real_tensor, spread_text
from evaluation import AnswerConfig, Decoding
from host import HostConfig, HostError, freeze, host_logits, load_host
from hybrid.answering import HybridAnswerer
from model import HRMAddonConfig, HRMController
from tiny_families import random_ids, randomise
from tiny_families import tiny_host as family_host
from tiny_runs import arguments, assert_same_run, error_lines, newest, only_run

pytestmark = pytest.mark.usefixtures("no_curve")  # conftest.py

# The embeddings of the tiny host fit the one, nothing fits the other.
IN_PART = '{"cpu": "100KB"}'
ALL_ON_DISK = '{"cpu": 1}'
PLAIN = "--d_h 128 --n_heads 4 --segments 1 --inner_T 2".split()  # defaults, which adapters without HRM do not know
SPREAD = ["--device_map", "auto", "--max_memory", ALL_ON_DISK]


def on_meta(host) -> int:
    """How many of its weights a host does not hold."""
    return sum(parameter.is_meta for parameter in host.parameters())


def controllers(folder: Path, most: str, **settings) -> tuple[HRMController, HRMController]:
    """The same add-on, as after training, on the LLM of a folder: whole, and spread."""
    pair = []
    for spread in ({}, {"device_map": "auto", "max_memory": most}):
        torch.manual_seed(0)
        config = HRMAddonConfig(d_h=16, n_heads=2, **settings)
        pair.append(randomise(build_controller(HostConfig(str(folder), **spread), config, "cpu")).eval())
    return pair[0], pair[1]


def assert_same_numbers(whole: HRMController, spread: HRMController) -> None:
    """States, logits, gradients and generated answers are the same, bit for bit."""
    ids = random_ids(3, 9)
    mask = torch.ones_like(ids)
    positions = torch.arange(9).expand(3, -1)
    for one, other in zip(whole.model.run_host(ids, mask, positions)[1], spread.model.run_host(ids, mask, positions)[1],
                          strict=True):
        assert torch.equal(one, other) and other.device.type == "cpu"
    assert torch.equal(whole.embed(ids), spread.embed(ids))

    hidden = torch.randn(2, 4, whole.host.config.get_text_config().hidden_size)
    assert torch.equal(host_logits(whole.host, hidden), host_logits(spread.host, hidden))

    losses = []
    for model in (whole, spread):
        model.zero_grad()
        out = model(input_ids=ids, labels=ids.masked_fill(positions < 5, -100))
        out.loss.backward()
        grads = [parameter.grad for parameter in model.addon_parameters().values() if parameter.grad is not None]
        losses.append((out.loss, torch.cat([grad.flatten() for grad in grads])))
    assert torch.equal(losses[0][0], losses[1][0]) and torch.equal(losses[0][1], losses[1][1])
    assert not any(parameter.requires_grad for parameter in spread.host.parameters())

    answers = [model.generate(input_ids=ids, max_new_tokens=6, do_sample=False) for model in (whole, spread)]
    assert torch.equal(*answers)
    bare = [model.host.generate(input_ids=ids, max_new_tokens=6, do_sample=False) for model in (whole, spread)]
    assert torch.equal(*bare)


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["embed+last", "all"])
@pytest.mark.parametrize("most", [IN_PART, ALL_ON_DISK])
def test_an_llm_on_the_disk_gives_the_numbers_of_one_in_memory(tiny_host, most, read):
    whole, spread = controllers(tiny_host, most, hrm_read=read)
    held = on_meta(spread.host)
    assert not on_meta(whole.host) and 0 < held and (held < 20) == (most == IN_PART)
    assert_same_numbers(whole, spread)
    assert on_meta(spread.host) == held, "after each call the weights are let go"


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "cohere", "mamba2"])
def test_every_kind_of_family_can_lie_on_the_disk(family, tmp_path):
    family_host(family).save_pretrained(tmp_path)
    whole, spread = controllers(tmp_path, ALL_ON_DISK)
    assert on_meta(spread.host)
    assert_same_numbers(whole, spread)


def test_an_llm_that_is_fetched_from_memory_layer_by_layer_gives_the_same_numbers(tiny_host):
    whole, _ = controllers(tiny_host, ALL_ON_DISK)
    host = load_host(str(tiny_host))
    cpu_offload(host, torch.device("cpu"))  # as accelerate keeps in memory what a GPU has no room for
    freeze(host)
    offloaded = HRMController(whole.config, host).eval()
    offloaded.load_addon_state(whole.addon_state())
    assert on_meta(host)
    assert_same_numbers(whole, offloaded)


def test_weights_that_are_read_directly_are_real(tiny_host):
    whole, spread = (model.host for model in controllers(tiny_host, ALL_ON_DISK))
    head = spread.get_output_embeddings()
    assert head.weight.is_meta and torch.equal(real_tensor(head), whole.get_output_embeddings().weight)
    for thorough in (True, False):
        assert weights_digest(whole, thorough) == weights_digest(spread, thorough)
    assert host_parameters(whole) == host_parameters(spread)
    assert device_of(spread) == torch.device("cpu")
    assert spread_text(whole) == "" and spread_text(spread) == "the LLM is spread: 0.00 GB on the disk"


def test_the_record_of_an_adapter_says_nothing_of_where_its_llm_lay(tiny_host):
    one, other = (adapter_document(model, PromptConfig()) for model in controllers(tiny_host, ALL_ON_DISK))
    assert one == other and "device_map" not in one


@pytest.mark.parametrize("more", ["", "--cache_hidden ram --train_n 8 --hrm_read all --patience 2 --patience_on loss "
                                      "--eval_every 2 --save_every 2 --use_act 1 --verifier_weight 1"])
def test_a_run_on_a_spread_llm_is_the_run_on_one_in_memory(call, tmp_path, more):
    for name, flags in (("whole", []), ("spread", SPREAD)):
        status, _, err = call("--run_name", name, *more.split(), *flags)
        assert status == 0 and ("the LLM is spread" in err) == (name == "spread"), err
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "spread")


def test_a_run_goes_on_where_its_llm_lies_elsewhere(call, tmp_path):
    runs = tmp_path / "runs"
    for name, first in (("whole", []), ("spread", SPREAD)):
        assert call("--run_name", name, *first)[0] == 0

    # As --device it is kept with the run, and another may be named.
    status, _, err = call("--run_name", "spread", "--max_steps", "4")
    assert status == 0 and "the LLM is spread" in err
    status, _, err = call("--run_name", "spread", "--max_steps", "5", "--device_map", "none", "--max_memory", "none")
    assert status == 0 and "the LLM is spread" not in err
    for steps in ("4", "5"):
        assert call("--run_name", "whole", "--max_steps", steps)[0] == 0
    assert_same_run(runs / "whole", runs / "spread")


def test_questions_are_answered_by_a_spread_llm_as_by_one_in_memory(call, tmp_path):
    assert call()[0] == 0
    folder = newest(only_run(tmp_path / "runs"))
    texts = []
    for spread in (SpreadConfig(), SpreadConfig("auto", IN_PART)):
        config = AnswerConfig(Decoding(max_new_tokens=6), compare=True, spread=spread)
        answerer = AddonAnswerer(config, folder, "cpu")
        texts.append(answerer.answers("What is 1 + 2?"))
        assert ("the LLM is spread" in answerer.title) == (spread.device_map == "auto")
    assert texts[0] == texts[1]


@pytest.mark.parametrize("spread", [SpreadConfig(), SpreadConfig("auto", ALL_ON_DISK)])
def test_loading_an_llm_leaves_the_random_state_as_it_was(tmp_path, spread):
    family_host("mamba2").save_pretrained(tmp_path)  # draws numbers while it loads
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_host(str(tmp_path), spread=spread)
    assert torch.equal(torch.get_rng_state(), before)


# --- what is written to the disk --------------------------------------------------------------------------------------


def test_only_what_is_not_in_safetensors_is_written_and_goes_with_the_llm(tiny_host, tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(home))
    spread = SpreadConfig("auto", ALL_ON_DISK)
    load_host(str(tiny_host), spread=spread)
    assert list(home.iterdir()) == []

    # transformers reads a .bin file as a whole, and so writes the share of the disk anew.
    packed = tmp_path / "packed"
    shutil.copytree(tiny_host, packed)
    torch.save(load_host(str(tiny_host)).state_dict(), packed / "pytorch_model.bin")
    (packed / "model.safetensors").unlink()
    host = load_host(str(packed), spread=spread)
    assert len(list(home.glob("offload-*/*"))) > 5
    assert torch.equal(host(random_ids(1, 5)).logits, load_host(str(tiny_host))(random_ids(1, 5)).logits)
    del host
    gc.collect()
    assert list(home.iterdir()) == []


def test_a_model_that_cannot_be_loaded_leaves_nothing_behind(tiny_host, tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(home))
    torn = tmp_path / "torn"
    shutil.copytree(tiny_host, torn)
    (torn / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(HostError, match="cannot be loaded"):
        load_host(str(torn), spread=SpreadConfig("auto", ALL_ON_DISK))
    assert list(home.iterdir()) == []


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags,told", [
    (["--load_in", "4bit"], "--device_map auto and --load_in 4bit: an LLM"),
    (["--adapter", "lora", *PLAIN], "--adapter lora: an LLM that is spread can only be read"),
    (["--adapter", "prompt", *PLAIN], "--adapter prompt: an LLM that is spread can only be read"),
    (["--lora_layers", "1"], "--lora_layers 1: an LLM that is spread can only be read"),
    (["--objective", "grpo"], "--objective grpo"),
    (["--device_map", "none"], "does nothing without --device_map auto"),
    (["--device_map", "balanced"], "--device_map balanced is not legal"),
    (["--max_memory", "10GiB"], "--max_memory 10GiB is not legal"),
    (["--max_memory", '{"cpu": "ten"}'], "expected JSON of places and sizes"),
    (["--max_memory", '{"cpu": 1.5}'], "expected JSON of places and sizes"),
    (["--max_memory", "{}"], "expected JSON of places and sizes"),
    (["--max_memory", '{"0": "1GiB"}'], "names 0: with --device cpu the places here are cpu"),
])
def test_what_a_spread_llm_cannot_do_is_one_line_before_it_is_loaded(call, tmp_path, monkeypatch, flags, told):
    monkeypatch.setattr("model.load_host", lambda *a: pytest.fail("a model was loaded"))
    status, _, err = call(*SPREAD, *flags)
    (line,) = error_lines(err)
    assert status == 2 and told in line
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize("arch", ["hybrid", "enhanced"])
def test_systems_without_a_frozen_llm_refuse_the_flag(arch, capsys):
    assert train.main(["--arch", arch, "--device_map", "auto"]) == 2
    assert "--device_map does nothing with --arch" in capsys.readouterr().err


def test_generate_refuses_what_would_do_nothing(call, tmp_path, monkeypatch, capsys):
    asked = ["--save_dir", str(tmp_path / "runs"), "--device", "cpu", "--prompt", "What is 1 + 2?"]
    assert call()[0] == 0
    assert generate.main([*asked, "--max_memory", IN_PART]) == 2
    assert "does nothing without --device_map auto" in capsys.readouterr().err

    monkeypatch.setattr(generate, "answerer_of", lambda folder: HybridAnswerer)
    assert generate.main([*asked, "--device_map", "auto"]) == 2
    assert "holds another system: leave it out" in capsys.readouterr().err


def test_several_processes_are_told_that_one_uses_all_devices(call, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = call(*SPREAD)
    (line,) = error_lines(err)
    assert status == 2 and "2 were started" in line


def test_the_device_of_the_add_on_must_have_its_share(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_spread(SpreadConfig("auto", '{"0": "1GiB", "cpu": "2GiB"}'), "cuda")
    with pytest.raises(ValueError, match="leaves out 0, which trains the add-on"):
        check_spread(SpreadConfig("auto", '{"1": "1GiB"}'), "cuda")
    with pytest.raises(ValueError, match="names 2: with --device cuda the places here are 0, 1, cpu"):
        check_spread(SpreadConfig("auto", '{"2": "1GiB"}'), "cuda")


def test_a_checkpoint_that_trained_inside_its_llm_is_not_loaded_on_a_spread_one(call, tmp_path):
    assert call("--adapter", "lora", *PLAIN)[0] == 0
    folder = newest(only_run(tmp_path / "runs"))
    with pytest.raises(ValueError, match="what was trained lies inside the LLM"):
        load_controller(folder, spread=SpreadConfig("auto", ALL_ON_DISK))


@pytest.mark.parametrize("arch,engine", [
    *itertools.product(["addon", "hybrid", "enhanced"], ["DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"]),
    ("hybrid", "FSDP"), ("enhanced", "FSDP"),
])
def test_an_engine_that_no_run_trains_with_is_refused(tiny_host, tmp_path, capsys, monkeypatch, engine, arch):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    argv = arguments(tiny_host, tmp_path / "runs")
    if arch != "addon":
        argv = ["--arch", arch, "--save_dir", str(tmp_path / "runs"), "--device", "cpu", "--dataset", "synthetic"]
    if arch == "enhanced":
        argv = argv[:-2]
    status = train.main([*argv, "--dry_run"])
    assert status == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert line.startswith(f"ACCELERATE_USE_{engine}=true asks for ") and "DDP" in line


def test_an_engine_that_is_switched_off_is_no_mistake(call, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert call("--dry_run")[0] == 0
