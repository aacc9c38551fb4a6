"""Folders that say peft: plain peft reads LoRA and virtual tokens as this program does; the others do not say it."""

from __future__ import annotations

import json
import tempfile

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from addon.adapters import ADAPTER_CONFIG, ADAPTER_RECORD, load_controller
from addon.baselines import BaselineConfig, BaselineController
from addon.peft_files import own_names, peft_files
from apart import run_apart
from engine.checkpoints import CheckpointError, read_checkpoint
from tiny_families import FAMILIES, SCALED, random_ids, randomise
from tiny_families import tiny_host as tiny_llm
from tiny_runs import newest

pytestmark = pytest.mark.usefixtures("no_curve")  # conftest.py

TRAINED = ("--lr", "0.05", "--warmup_steps", "0", "--ema", "0", "--run_name", "mine")
SMALL = {"lora": ("--lora_rank", "2"), "prompt": ("--virtual_tokens", "3", "--max_seq_len", "128")}
WITH_PEFT = """
from peft import PeftModel
from transformers import AutoModelForCausalLM
ids = torch.tensor([[int(part) for part in ids.split()]])
llm = AutoModelForCausalLM.from_pretrained(base)
out["bare"] = llm(ids).logits
model = PeftModel.from_pretrained(llm, folder).eval()
out["logits"] = model(ids).logits[:, -ids.shape[1]:]
out["answer"] = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, -5:]
if kind == "lora":
    merged = model.merge_and_unload()
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    out["merged"] = merged(ids).logits
"""


@pytest.fixture
def trained(call, tmp_path):
    """Trains an adapter for three steps: adapter -> its checkpoint."""
    def train_it(adapter: str):
        # Flags of HRM among the tiny run's are refused with LoRA and virtual tokens unless they have their defaults.
        defaults = ("--d_h", "128", "--n_heads", "4", "--segments", "1", "--inner_T", "2")
        shape = () if adapter in ("hrm", "mlp") else defaults
        if adapter == "mlp":
            shape = ("--segments", "1", "--inner_T", "2")
        status, _, err = call("--adapter", adapter, *shape, *SMALL.get(adapter, ()), *TRAINED)
        assert status == 0, err
        return newest(tmp_path / "runs" / "mine")
    return train_it


@pytest.mark.parametrize("adapter", ["lora", "prompt"])
def test_plain_peft_reads_a_checkpoint_as_we_do(trained, tiny_host, tmp_path, adapter):
    folder = trained(adapter)
    ids = random_ids(1, 7)
    text = " ".join(map(str, ids[0].tolist()))
    names = {"base": str(tiny_host), "folder": str(folder), "ids": text, "kind": adapter}
    theirs = run_apart(WITH_PEFT, tmp_path / "elsewhere", **names)

    model, _ = load_controller(folder)
    with torch.no_grad():
        ours = model(ids).logits
        answer = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, -5:]
    torch.testing.assert_close(theirs["logits"], ours, atol=1e-4, rtol=1e-4)
    assert torch.equal(theirs["answer"], answer)
    assert not torch.allclose(theirs["logits"], theirs["bare"], atol=1e-2)
    if adapter == "lora":
        torch.testing.assert_close(theirs["merged"], ours, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("adapter", ["lora", "prompt"])
def test_a_folder_of_pefts_kinds_says_what_it_is(trained, tiny_host, adapter):
    documents = read_checkpoint(trained(adapter)).documents
    config = json.loads(documents[ADAPTER_CONFIG])
    assert config["base_model_name_or_path"] == str(tiny_host) and config["task_type"] == "CAUSAL_LM"
    if adapter == "lora":
        assert (config["r"], config["lora_alpha"]) == (2, 4) and config["target_modules"]
    else:
        assert config["num_virtual_tokens"] == 3
    assert "library_name: peft" in documents["README.md"]
    assert json.loads(documents[ADAPTER_RECORD])["baseline"]["adapter"] == adapter


@pytest.mark.parametrize("adapter", ["hrm", "mlp", "none"])
def test_other_adapters_do_not_claim_peft_which_refuses_them(trained, tiny_host, adapter):
    folder = trained(adapter)
    documents = read_checkpoint(folder).documents
    assert "peft" not in documents["README.md"] and "peft" not in documents[ADAPTER_CONFIG]
    assert ADAPTER_RECORD not in documents
    llm = AutoModelForCausalLM.from_pretrained(tiny_host)
    with pytest.raises(KeyError, match="peft_type"):
        PeftModel.from_pretrained(llm, folder)
    with pytest.raises(TypeError, match="peft_type"):
        AutoModelForCausalLM.from_pretrained(folder)


def baseline(adapter: str, family: str) -> BaselineController:
    """A baseline on a tiny LLM, its zero factors random as after training."""
    host = tiny_llm(family)
    torch.manual_seed(1)
    config = BaselineConfig(base_config=host.config, adapter=adapter, virtual_tokens=3, lora_rank=2)
    return randomise(BaselineController(config, host).eval())


@pytest.mark.parametrize("adapter", ["lora", "prompt"])
@pytest.mark.parametrize("family", FAMILIES + SCALED)
def test_plain_peft_reads_every_family(family, adapter, tmp_path):
    model = baseline(adapter, family)
    before = torch.get_rng_state()
    model.peft_model().save_pretrained(tmp_path, save_embedding_layers=False)
    assert torch.equal(torch.get_rng_state(), before), "writing must not move the random numbers of a run"
    ids = random_ids(1, 7)
    theirs = PeftModel.from_pretrained(tiny_llm(family), tmp_path).eval()
    with torch.no_grad():
        read = theirs(input_ids=ids).logits[:, -7:].float()
        torch.testing.assert_close(read, model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("adapter", ["lora", "prompt"])
def test_pefts_names_and_ours_are_the_same_tensors(adapter):
    model = baseline(adapter, "llama")
    written, _ = peft_files(model)
    again = own_names(written)
    state = model.addon_state()
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    assert not written.keys() & state.keys()
    assert own_names(state).keys() == state.keys()


def test_a_full_folder_of_temporary_files_is_one_line(monkeypatch, tmp_path):
    model = baseline("lora", "llama")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match="TMPDIR"):
        peft_files(model)
