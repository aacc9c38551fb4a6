"""What the environment asks of FSDP that no run can do is one line before a model loads; what is asked is read."""

from __future__ import annotations

import pytest

from engine.sharding import ShardConfig, Sharding, check_sharding, sharding_asked
from tiny_runs import error_lines

LORA = "--adapter lora --d_h 128 --n_heads 4 --segments 1 --inner_T 2".split()
# What `accelerate launch --use_fsdp --fsdp_version 2` sets (accelerate 1.15).
AS_LAUNCHED = {
    "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_FORWARD_PREFETCH": "false", "FSDP_USE_ORIG_PARAMS": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true", "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}


@pytest.fixture
def fsdp(monkeypatch):
    """The environment of one of two processes that accelerate starts for FSDP2."""
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize("variables,expected", [
    ({}, Sharding()),
    ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, Sharding(reshard=False)),
    ({"FSDP_OFFLOAD_PARAMS": "true"}, Sharding(offload=True)),
    ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, Sharding(first_loads=True)),
    ({"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}, None),
    (AS_LAUNCHED, Sharding(first_loads=True)),
])
def test_accelerate_s_variables_say_how_an_llm_is_sharded(fsdp, variables, expected):
    for name, value in variables.items():
        fsdp.setenv(name, value)
    assert sharding_asked() == expected
    check_sharding(ShardConfig(), "cpu")


@pytest.mark.parametrize("variables,told", [
    ({"FSDP_VERSION": "1"}, "with FSDP_VERSION=1: the frozen LLM is sharded by FSDP version 2 alone"),
    ({"FSDP_VERSION": ""}, "with FSDP_VERSION=: the frozen LLM"),
    ({"WORLD_SIZE": "1"}, "with one process"),
    ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "FSDP_ACTIVATION_CHECKPOINTING=true is not supported"),
    ({"FSDP_IGNORED_MODULES": "model.norm"}, "FSDP_IGNORED_MODULES=model.norm is not supported"),
    ({"FSDP_TRANSFORMER_CLS_TO_WRAP": "Mlp"}, "FSDP_TRANSFORMER_CLS_TO_WRAP=Mlp is not supported"),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "ACCELERATE_MIXED_PRECISION=bf16 is not supported: --mixed_precision"),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "ACCELERATE_DYNAMO_BACKEND=INDUCTOR is not supported"),
    ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "FSDP_AUTO_WRAP_POLICY=SIZE_BASED_WRAP is not supported"),
    ({"FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "accelerate cannot read its FSDP_ variables"),
])
def test_what_accelerate_is_asked_and_no_run_does_is_one_line(call, fsdp, tmp_path, variables, told):
    for name, value in variables.items():
        fsdp.setenv(name, value)
    fsdp.setattr("model.load_host", lambda *a: pytest.fail("a model was loaded"))
    fsdp.setattr("addon.baselines.load_host", lambda *a: pytest.fail("a model was loaded"))
    status, _, err = call(*LORA)
    (line,) = error_lines(err)
    assert status == 2 and told in line
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize("flags,told", [
    (["--load_in", "4bit"], "--load_in 4bit: packed weights"),
    (["--device_map", "auto"], "--device_map auto: one process spreads"),
    (["--cache_hidden", "ram", "--train_n", "8"], "--cache_hidden ram: each process"),
    (["--eval_suite", "synthetic"], "--eval_suite synthetic: one process"),
])
def test_a_flag_that_a_shared_llm_cannot_serve_is_one_line(call, fsdp, flags, told):
    status, _, err = call(*flags)
    (line,) = error_lines(err)
    assert status == 2 and "ACCELERATE_USE_FSDP and " + told in line


def test_an_evaluation_needs_no_cache(fsdp):
    check_sharding(ShardConfig(cache_hidden="ram", eval_only=True), "cuda")
    with pytest.raises(ValueError, match="--objective grpo: TRL"):
        check_sharding(ShardConfig(objective="grpo"), "cuda")
    with pytest.raises(ValueError, match="with --device mps: FSDP is for cuda"):
        check_sharding(ShardConfig(), "mps")
