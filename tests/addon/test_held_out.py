"""held_out: the loss on held-out items is that of each item alone, and ends training where it is watched."""

from __future__ import annotations

import contextlib
import csv

import pytest
import torch
from torch.nn import functional

import options
from addon.held_out import held_out_loss
from batching import PromptFormat
from reasoning_gym_wrapper import Reserve, make_tasks
from tiny_runs import TINY, controller_of, only_run, tiny_model

pytestmark = pytest.mark.usefixtures("no_curve")
NO_HRM = ("--d_h", "128", "--n_heads", "4", "--segments", "1", "--inner_T", "2")


@pytest.mark.parametrize("adapter", ["hrm", "lora"])
def test_the_loss_is_that_of_each_item_alone_after_all_segments(adapter, tiny_host, tokenizer):
    if adapter == "hrm":
        model = tiny_model(tiny_host, segments=3)
    else:
        opts = options.parse([*TINY, "--adapter", "lora", *NO_HRM])
        model = controller_of(options.replace(opts, model_name=str(tiny_host)))
    shown = PromptFormat(tokenizer)
    examples = Reserve(make_tasks(["toy_add"], "default"), 5).examples
    nats, tokens = held_out_loss(model.train(), shown, examples, 3, contextlib.nullcontext)
    assert model.training

    model.eval()
    expected, count = 0.0, 0
    for example in examples:
        batch = shown.batch([example])
        prompt_mask = torch.cat([batch.prompt_mask, torch.zeros_like(batch.target_ids)], dim=1)
        with torch.no_grad():
            out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, prompt_mask=prompt_mask)
        logits = out.logits[0, batch.prompt_ids.shape[1] - 1 : -1]
        expected += float(functional.cross_entropy(logits, batch.target_ids[0], reduction="sum"))
        count += batch.target_ids.shape[1]
    assert tokens == count and nats == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("on,metric", [("solved", "solved"), ("loss", "held_out_loss")])
def test_a_run_that_gets_no_better_ends(call, tmp_path, on, metric):
    """Without a learning rate to speak of neither figure moves."""
    status, _, err = call("--patience", "2", "--patience_on", on, "--eval_every", "1", "--max_steps", "9",
                          "--lr", "1e-30", "--warmup_steps", "0", "--ema", "0")
    assert status == 0 and "training ended at step 3: the " in err and "2 times in a row (--patience 2)" in err
    with open(only_run(tmp_path / "runs") / "eval.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    steps = [row["step"] for row in rows if row["metric"] == metric]
    assert steps == ["1", "2", "3"] and (on == "loss") == any(row["metric"] == "held_out_loss" for row in rows)
