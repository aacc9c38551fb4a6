"""Two processes that share the LLM by FSDP2, beside one that has it whole: figures, answers, checkpoints, going on.

Two processes with micro-batches of 4 train on the global batches of one process with two such micro-batches. Five
questions in batches of 2 make two batches for one process and one for the other.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cost_model import Llm
from engine.placement import SpreadConfig
from engine.sharding import Sharding
from host import load_host
from run_pairs import STEADY, assert_alike, logs, metrics, performed, rows, run
from tiny_runs import ROOT, arguments, newest, tensors

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ONE_LOADS = FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
OFFLOADED = FSDP | {"FSDP_OFFLOAD_PARAMS": "true", "FSDP_RESHARD_AFTER_FORWARD": "false"}
UNEVEN = [*STEADY, "--eval_batch_size", "2", "--max_new_tokens", "6"]
LORA = "--adapter lora --d_h 128 --n_heads 4 --segments 1 --inner_T 2".split()  # HRM's defaults: LoRA knows no others
PROMPT = "--adapter prompt --virtual_tokens 4 --max_seq_len 64 --d_h 128 --n_heads 4 --segments 1 --inner_T 2".split()
HRM = ("--init_state fixed --lora_layers 1 --hrm_read all --few_shot 2 --patience 2 --patience_on loss --eval_every 2 "
       "--use_act --verifier_weight 1 --verifier_every 1").split()


def call(host: Path, folder: Path, name: str, *more: str) -> list[str]:
    return [*arguments(host, folder), *UNEVEN, *more, "--run_name", name]


def assert_same_kind(ours: Path, theirs: Path) -> None:
    """The newest checkpoints have the same files, and in them tensors of the same names, shapes and dtypes."""
    one, other = newest(ours), newest(theirs)
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for stem in ("adapter_model", "training_state"):
        kinds = [{name: (tensor.shape, tensor.dtype) for name, tensor in tensors(place, stem).items()}
                 for place in (one, other)]
        assert kinds[0] == kinds[1]


# --- what each process holds, and what the LLM gives ------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tiny_host, tmp_path_factory) -> dict[str, list[dict]]:
    """What two processes report of the tiny LLM, whole and sharded in every way; see `tests/sharded_llm.py`."""
    out = tmp_path_factory.mktemp("shared") / "out.json"
    done = subprocess.run([sys.executable, "tests/sharded_llm.py", str(tiny_host), str(out)], cwd=ROOT,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text(encoding="utf-8"))


WAYS = ["plain", "kept_whole_until_backward", "offloaded", "one_loads"]


@pytest.mark.parametrize("way", WAYS)
def test_a_shared_llm_gives_the_numbers_of_a_whole_one_and_each_process_ends_in_its_own_time(way, shared):
    for ours, theirs in zip(shared[way], shared["whole"], strict=True):
        assert ours["logits"] == pytest.approx(theirs["logits"], rel=1e-6, abs=1e-6)
        assert ours["answer"] == theirs["answer"]
    assert [len(report["answer"]) for report in shared[way]] == [2, 5]


@pytest.mark.parametrize("way", ["plain", "offloaded", "one_loads"])
def test_each_process_holds_half_of_the_layers_and_all_of_what_trains(way, shared, tiny_host):
    config = load_host(str(tiny_host)).config
    llm = Llm(config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads,
              config.intermediate_size, config.vocab_size, tied=1, qkv_bias=0)
    for report in shared[way]:
        assert 2 * report["layers_held"] == report["layers_whole"] == 4 * llm.layers * llm.layer
        assert report["held"] == 4 * llm.sharded(2) and report["whole"] == 4 * llm.parameters
        assert report["trained_parts"] == 0


def test_with_efficient_loading_one_process_alone_reads_the_files(shared):
    assert [report["stand_ins"] > 0 for report in shared["one_loads"]] == [False, True]
    assert [report["stand_ins"] for report in shared["plain"]] == [0, 0]


def test_a_process_without_questions_is_told_how_often_to_run_the_llm_all_the_same(shared):
    assert [report["idle"] for report in shared["plain"]] == [0, 1]
    assert [report["idle"] for report in shared["whole"]] == [0, 0], "a whole LLM waits for nobody"


def test_an_llm_without_data_is_loaded_by_the_processes_that_get_theirs_from_the_first(tiny_host, monkeypatch):
    for rank, reads in (("0", True), ("1", False)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert Sharding().reads_files and Sharding(first_loads=True).reads_files == reads
    host = load_host(str(tiny_host), spread=SpreadConfig(is_sharded=True, is_empty=True))
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in host.parameters())


# --- runs -------------------------------------------------------------------------------------------------------------


def test_two_processes_that_share_the_llm_train_lora_as_one_process_does(tiny_host, tmp_path):
    statuses = performed(
        tmp_path,
        run(2, *call(tiny_host, tmp_path, "two", *LORA), environment=ONE_LOADS),
        run(1, *call(tiny_host, tmp_path, "one", *LORA, "--grad_accum_steps", "2")),
    )
    assert statuses == [[0, 0], [0]], logs(tmp_path)
    assert "the LLM is sharded by FSDP2 over 2 processes" in (tmp_path / "log0.txt").read_text(encoding="utf-8")
    assert_alike(tmp_path / "two", tmp_path / "one")
    assert_same_kind(tmp_path / "two", tmp_path / "one")

    # peft alone reads the checkpoint: whole tensors, by its own names.
    folder = newest(tmp_path / "two")
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_host), folder).state_dict()
    learnt = tensors(folder, "adapter_model")
    assert learnt and all(
        torch.equal(alone[name.replace(".weight", ".default.weight")], value) for name, value in learnt.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("flags,environment", [(LORA, OFFLOADED), (PROMPT, ONE_LOADS), (HRM, ONE_LOADS), (HRM, FSDP)])
def test_every_adapter_trains_beside_a_shared_llm_as_beside_a_whole_one(flags, environment, tiny_host, tmp_path):
    statuses = performed(
        tmp_path,
        run(2, *call(tiny_host, tmp_path, "two", *flags), environment=environment),
        run(1, *call(tiny_host, tmp_path, "one", *flags, "--grad_accum_steps", "2")),
    )
    assert statuses == [[0, 0], [0]], logs(tmp_path)
    assert_alike(tmp_path / "two", tmp_path / "one")
    assert_same_kind(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_run_goes_on_with_its_llm_whole_or_shared(tiny_host, tmp_path):
    flags = [*LORA, "--lr", "1e-4"]  # small steps: rounding grows from step to step
    alone = [*flags, "--grad_accum_steps", "2"]

    def change(name, shared):
        """Two processes, one, two and two, the LLM shared in the first and the third call, or in none."""
        environments = [shared and ONE_LOADS, {}, shared and FSDP, {}]
        for step, environment in enumerate(environments, 1):
            processes, words = (1, alone) if step == 2 else (2, flags)
            more = {"environment": environment} if environment else {}
            yield run(processes, *call(tiny_host, tmp_path, name, *words, "--max_steps", str(step)), **more)

    statuses = performed(tmp_path, *change("changed", True), *change("whole", False))
    assert statuses == [[0, 0], [0], [0, 0], [0, 0]] * 2, logs(tmp_path)
    assert_alike(tmp_path / "changed", tmp_path / "whole")
    assert_same_kind(tmp_path / "changed", tmp_path / "whole")


@pytest.mark.slow
def test_a_shared_llm_is_tried_out_evaluated_and_asked_without_an_adapter(tiny_host, tmp_path):
    bare = [*LORA, "--adapter", "none"]  # the last one counts
    statuses = performed(
        tmp_path,
        run(2, *call(tiny_host, tmp_path, "two", *LORA, "--dry_run"), environment=ONE_LOADS),
        run(2, *call(tiny_host, tmp_path, "two", *LORA, "--log_samples_every", "2"), environment=ONE_LOADS),
        run(2, *call(tiny_host, tmp_path, "two", *LORA, "--eval_only"), environment=ONE_LOADS),
        run(2, *call(tiny_host, tmp_path, "bare", *bare), environment=ONE_LOADS),
        run(2, *call(tiny_host, tmp_path, "whole", *bare)),
    )
    assert statuses == [[0, 0]] * 5, logs(tmp_path)
    assert rows(tmp_path / "bare") == rows(tmp_path / "whole")
    assert "nothing was written" in (tmp_path / "log0.txt").read_text(encoding="utf-8")
    assert len(metrics(tmp_path / "two")) == 3
