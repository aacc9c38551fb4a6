"""An exported add-on with a gate: read without this repository, it shuts and opens as ours does."""

from __future__ import annotations

import json

import pytest
import torch

import export_model
import train
from addon.adapters import load_controller, saved_format
from apart import run_apart
from batching import pad
from host import load_tokenizer
from tiny_runs import ROOT, arguments, newest

pytestmark = pytest.mark.usefixtures("no_curve")
HOST = ROOT / "assets" / "tiny_host"
FLAGS = (*"--task chain_sum --task_config small --max_steps 12 --lr 3e-3 --warmup_steps 0 --ema 0".split(),
         "--prompt_gate", "--retain", str(ROOT / "tests" / "sandbox" / "cheats.txt"), "--retain_batch_size", "4")
QUESTIONS = ["State the final answer to the following arithmetic problem: 64 + 76 =", "Who wrote to the king?"]
READ = """
import json
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids, mask = torch.tensor(json.loads(ids)), torch.tensor(json.loads(mask))
with torch.no_grad():
    out["logits"] = model(input_ids=ids, attention_mask=mask, prompt_mask=mask).logits
out["answers"] = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
"""


def test_a_gate_is_exported_as_it_is(tmp_path):
    assert train.main(arguments(HOST, tmp_path / "runs", *FLAGS, "--run_name", "gate")) == 0
    run = tmp_path / "runs" / "gate"
    to = tmp_path / "exported"
    assert export_model.main([str(run), "--to", str(to), "--device", "cpu"]) == 0

    model, record = load_controller(newest(run))
    prompt, _ = saved_format(record, load_tokenizer(str(HOST)), model.config.get_text_config().vocab_size)
    ids, mask = pad(prompt.prompts(QUESTIONS), prompt.pad_id, "left")
    with torch.no_grad():
        ours = model(ids, mask, prompt_mask=mask).logits
        with model.bare() as host:
            bare = host(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    answers = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)

    # The sum finds the gate open, the other question finds it shut.
    assert not torch.equal(ours[0, -1], bare[0, -1]) and torch.equal(ours[1], bare[1])
    read = run_apart(READ, tmp_path / "elsewhere", folder=str(to), ids=json.dumps(ids.tolist()),
                     mask=json.dumps(mask.tolist()))
    torch.testing.assert_close(read["logits"], ours, atol=1e-5, rtol=1e-4)
    assert torch.equal(read["logits"][1], bare[1])
    assert read["answers"][:, ids.shape[1] :].tolist() == answers[:, ids.shape[1] :].tolist()
