"""baselines: LoRA, virtual tokens, single pass and bare LLM train, answer, save and resume as HRM does; matching."""

from __future__ import annotations

import argparse
import csv
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import generate
import options
import train
from addon.adapters import load_controller
from addon.baselines import BaselineConfig, BaselineController
from addon.param_matching import Match, Size, match
from addon.peft_files import own_names
from addon_run import adapter_config
from batching import PromptFormat
from engine.batches import IGNORE
from engine.files import json_lines
from evaluation import Decoding, answer
from host import HostConfig
from model import HRMAddonConfig, HRMController
from reasoning_gym_wrapper import Reserve, make_tasks
from tiny_families import FAMILIES, PAD, SCALED, left_padded, random_ids, randomise
from tiny_families import tiny_host as tiny_llm
from tiny_runs import assert_same_run, controller_of, error_lines, newest, tensors, tiny_trainer

pytestmark = pytest.mark.usefixtures("no_curve")  # conftest.py

ADAPTERS = ("lora", "prompt", "mlp", "none")
LEARNING = ("lora", "prompt", "mlp")
PLAIN = (
    "--task toy_add --batch_size 4 --max_steps 4 --eval_n 4 --eval_batch_size 4 --max_new_tokens 4 --train_n 10 "
    "--mixed_precision none --log_steps 1 --num_threads 1 --device cpu --eval_every 2 --save_every 2 "
    "--max_seq_len 128"
).split()
SMALL = {"mlp": ["--d_h", "16", "--n_heads", "2"], "lora": ["--lora_rank", "2"], "prompt": ["--virtual_tokens", "3"]}
every_adapter = pytest.mark.parametrize("adapter", ADAPTERS)
learning = pytest.mark.parametrize("adapter", LEARNING)


def controller(adapter: str, family: str = "llama", trained: bool = True):
    """A controller of any adapter on a tiny random LLM; `trained` makes its zero factors random."""
    host = tiny_llm(family)
    torch.manual_seed(1)
    if adapter == "mlp":
        config = HRMAddonConfig(base_config=host.config, adapter="mlp", d_h=16, n_heads=2, segments=3)
        made = HRMController(config, host).eval()
    else:
        config = BaselineConfig(base_config=host.config, adapter=adapter, virtual_tokens=3, lora_rank=4)
        made = BaselineController(config, host)
    return randomise(made.eval()) if trained else made.eval()


@pytest.fixture
def call(tiny_host, tmp_path, capsys):
    """Runs train.py in this process on the tiny host, in `tmp_path/runs`: (exit status, stdout, stderr)."""
    def run_here(*more: str) -> tuple[int, str, str]:
        status = train.main(["--model_name", str(tiny_host), "--save_dir", str(tmp_path / "runs"), *PLAIN, *more])
        return status, *capsys.readouterr()
    return run_here


def opts_for(tiny_host, adapter: str, *more: str, **changes) -> options.Options:
    opts = options.parse([*PLAIN, "--adapter", adapter, *SMALL.get(adapter, []), *more])
    vars(opts).update({"model_name": str(tiny_host), **changes})
    return opts


@pytest.fixture(scope="module")
def batch(tokenizer):
    """Eight examples; prompts and targets of several lengths."""
    return PromptFormat(tokenizer).batch(Reserve(make_tasks(["toy_add"], "default"), 8).examples)


# --- the bare LLM at step 0, and never changed


@pytest.mark.parametrize("family", FAMILIES + SCALED)
@pytest.mark.parametrize("adapter", ["lora", "mlp", "none"])
def test_step_0_is_the_bare_llm(adapter, family):
    model = controller(adapter, family, trained=False)
    ids, mask = left_padded([random_ids(1, n, n)[0] for n in (7, 4)])
    plain = tiny_llm(family)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    expected = plain(ids, attention_mask=mask, position_ids=positions).logits
    given = {"prompt_mask": mask} if adapter == "mlp" else {}
    found = model(ids, attention_mask=mask, **given).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES + SCALED)
def test_prompt_tuning_is_the_llm_with_embeddings_in_front(family):
    model, ids = controller("prompt", family), random_ids(1, 6)
    table = model.get_input_embeddings()
    inputs = torch.cat([model.prompt.embedding.weight[None], table(ids)], dim=1)
    expected = tiny_llm(family)(inputs_embeds=inputs).logits[:, 3:]
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, tiny_llm(family)(ids).logits, atol=1e-3)


def test_virtual_tokens_start_as_embeddings_of_the_vocabulary():
    model = controller("prompt")
    table = model.get_input_embeddings().weight
    assert all((table == row).all(dim=1).any() for row in model.prompt.embedding.weight)


@every_adapter
def test_only_the_adapter_learns_and_the_llm_never_changes(tiny_host, batch, adapter):
    opts = opts_for(tiny_host, adapter, "--lr", "0.05")
    torch.manual_seed(0)
    model = controller_of(opts)
    trainer = tiny_trainer(opts, model)
    trained = set(model.addon_parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = [trainer.step([batch], step, 0.05)["loss"] for step in range(4)] if trained else []
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == trained and bool(trained) == (adapter != "none")
    assert not trained or losses[-1] < losses[0]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    plain = AutoModelForCausalLM.from_pretrained(tiny_host)
    ids = batch.prompt_ids[:1, -5:]
    with model.bare() as bare:
        assert torch.equal(bare(ids).logits, plain(ids).logits)


def test_lora_is_on_every_linear_map_of_every_layer_and_nowhere_else():
    model = controller("lora")
    linear = [name for name, module in tiny_llm().model.layers.named_modules() if isinstance(module, torch.nn.Linear)]
    found = {name.split(".layers.")[1].split(".lora_")[0] for name in model.addon_parameters()}
    assert found == set(linear) and len(linear) == 14
    assert all(p.dtype == torch.float32 for p in model.addon_parameters().values())


# --- the single pass


def test_the_single_pass_is_l_then_h_once_with_hrms_parameters():
    config = {"base_config": tiny_llm().config, "d_h": 16, "n_heads": 2, "h_layers": 2, "segments": 3,
              "init_state": "fixed", "state_mix": "sum"}
    mlp, hrm = (HRMController(HRMAddonConfig(adapter=a, **config), tiny_llm()) for a in ("mlp", "hrm"))
    sizes = [{name: tuple(p.shape) for name, p in model.addon_parameters().items()} for model in (mlp, hrm)]
    assert sizes[0] == sizes[1]
    core, x = mlp.model.addon.core, torch.randn(2, 5, 16)
    context = core.context(torch.ones(2, 5, dtype=torch.bool), torch.arange(5).expand(2, 5))
    first = core(x, context, core.initial_carry(context.mask))
    assert torch.equal(first.z_high, core.h_block(core.l_block(x, context), context))
    assert torch.equal(core(x, context, first).z_high, first.z_high)  # no state: a second pass is the first
    assert mlp.config.segments == 1 and not mlp.recurrent and hrm.recurrent
    assert not [name for name in mlp.addon_state() if "init" in name]


# --- one training step


@learning
def test_a_step_equals_a_plain_loop(tiny_host, batch, adapter):
    """Loss and gradients: mean cross-entropy of answer tokens, position t predicting target t, one row at a time."""
    opts = opts_for(tiny_host, adapter, "--lr", "0.05", optimizer="adamw", ema=0.0)
    torch.manual_seed(0)
    model = randomise(controller_of(opts))
    losses = []
    for prompt, seen, labels in zip(batch.prompt_ids, batch.prompt_mask, batch.labels, strict=True):
        target = labels[labels != IGNORE]
        row = torch.cat([prompt[seen.bool()], target])[None]
        marked = (torch.arange(row.shape[1]) < row.shape[1] - len(target))[None]
        given = {"prompt_mask": marked} if adapter == "mlp" else {}
        logits = model.train()(row, **given).logits[0, -len(target) - 1 : -1]
        losses.append(F.cross_entropy(logits, target, reduction="sum"))
    loss = torch.stack(losses).sum() / (batch.labels != IGNORE).sum()
    parameters = model.addon_parameters()
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    trainer, taken = tiny_trainer(opts, model), {}
    trainer._update = lambda step, loss: taken.update({n: p.grad.clone() for n, p in parameters.items()}) or 0.0
    told = trainer.step([batch], 0, 0.05)
    assert told["loss"] == pytest.approx(loss.item(), rel=1e-5) and told["segments"] == 1
    for name, grad in expected.items():
        torch.testing.assert_close(taken[name], grad, rtol=1e-3, atol=1e-5, msg=name)


def test_muon_takes_matrices_but_no_table_of_virtual_tokens(tiny_host):
    for adapter in LEARNING:
        opts = opts_for(tiny_host, adapter)
        trainer = tiny_trainer(opts, controller_of(opts))
        assert opts.optimizer == "muon"
        kinds = [type(optimizer).__name__ for optimizer, _ in trainer.optimizers]
        assert kinds == {"mlp": ["AdamW", "Muon"], "lora": ["Muon"], "prompt": ["AdamW"]}[adapter]
        assert sorted(name for _, names in trainer.optimizers for name in names) == sorted(trainer.parameters)


# --- generation


@pytest.mark.parametrize("family", FAMILIES + SCALED)
@every_adapter
def test_cached_equals_uncached_generation(adapter, family):
    model, (ids, mask) = controller(adapter, family), left_padded([random_ids(1, n, n)[0] for n in (8, 5, 3)])
    asked = {"attention_mask": mask, "max_new_tokens": 5, "pad_token_id": PAD, "eos_token_id": None, "do_sample": False,
             "return_dict_in_generate": True, "output_logits": True}
    cached, uncached = (model.generate(ids, use_cache=use, **asked) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    for one, other in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@every_adapter
def test_batched_equals_alone(adapter, family):
    """Padding changes nothing, virtual tokens in front of it included."""
    model, rows = controller(adapter, family), [random_ids(1, n, n)[0] for n in (8, 5, 3)]
    ids, mask = left_padded(rows)
    asked = {"max_new_tokens": 4, "pad_token_id": PAD, "eos_token_id": None, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, **asked)[:, ids.shape[1] :]
    for row, found in zip(rows, together, strict=True):
        assert torch.equal(model.generate(row[None], **asked)[0, len(row) :], found)


@pytest.mark.parametrize("decoding", [{"num_beams": 3}, {"do_sample": True, "top_k": 0}], ids=["beam", "sample"])
@pytest.mark.parametrize("adapter", ["lora", "prompt"])
def test_other_ways_to_decode_work_too(adapter, decoding):
    model, (ids, mask) = controller(adapter), left_padded([random_ids(1, n, n)[0] for n in (6, 3)])
    found = []
    for use in (True, False):
        torch.manual_seed(0)
        found.append(model.generate(ids, attention_mask=mask, max_new_tokens=4, pad_token_id=PAD, use_cache=use,
                                    eos_token_id=None, **decoding))
    assert torch.equal(*found)


def test_a_static_cache_is_refused():
    with pytest.raises(ValueError, match="static caches are refused"):
        controller("prompt").generate(random_ids(1, 4), max_new_tokens=2, pad_token_id=PAD,
                                      cache_implementation="static")


def test_lora_is_off_inside_bare_and_on_again_after():
    model, ids = controller("lora"), random_ids(1, 6)
    with model.bare() as bare:
        off = bare(ids).logits
    assert torch.equal(off, tiny_llm()(ids).logits) and not torch.allclose(model(ids).logits, off, atol=1e-3)


# --- runs


@every_adapter
def test_a_run_resumed_equals_an_uninterrupted_one_and_keeps_the_adapter_alone(call, tmp_path, adapter):
    flags = ["--adapter", adapter, *SMALL.get(adapter, []), "--checkpoint_limit", "0"]
    status, out, err = call("--run_name", "whole", *flags)
    assert status == 0, err
    whole = tmp_path / "runs" / "whole"
    saved = tensors(newest(whole), "adapter_model")
    with open(whole / "eval.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert bool(saved) == (adapter != "none") and all("lora_" in n or "prompt" in n or "addon" in n for n in saved)
    assert all(row["bare"] != "" for row in rows)
    if adapter == "none":
        assert newest(whole).name == "step-00000000" and all(row["value"] == row["bare"] for row in rows)
        assert "the bare LLM has nothing to train" in err
        return
    assert newest(whole).name == "step-00000004"
    shutil.copytree(whole, tmp_path / "runs" / "cut")
    shutil.rmtree(newest(tmp_path / "runs" / "cut"))
    status, _, err = call("--run_name", "cut", *flags)
    assert status == 0 and ", from step 2" in err
    assert_same_run(whole, tmp_path / "runs" / "cut")


@every_adapter
def test_generate_py_answers_as_evaluation_did(call, tmp_path, capsys, adapter):
    flags = ["--adapter", adapter, *SMALL.get(adapter, []), "--lr", "0.05", "--warmup_steps", "0", "--ema", "0"]
    assert call("--run_name", "mine", *flags)[0] == 0
    last = [line for _, line in json_lines(tmp_path / "runs" / "mine" / "predictions.jsonl")][-4]
    argv = ["--save_dir", str(tmp_path / "runs"), "--device", "cpu", "--max_new_tokens", "4", "--compare"]
    assert generate.main([*argv, "--prompt", "What is 64 + 76?"]) == 0
    shown = capsys.readouterr().out  # an untrained model may answer with any sign, line breaks included
    assert last["id"] == "toy_add/00000"
    title = {"lora": "LoRA rank 2", "prompt": "3 virtual tokens", "mlp": "single pass", "none": "no adapter"}[adapter]
    bare, ours = shown.removesuffix("\n").split(f"\nLLM + {title}  ")
    assert bare.startswith("> What is 64 + 76?\nbare LLM   ")
    assert ours.rstrip() == last["prediction"].replace("\n", "\n" + " " * 11).rstrip()
    if adapter == "none":
        assert bare.removeprefix("> What is 64 + 76?\nbare LLM").strip() == ours.strip()


def test_a_checkpoint_of_another_adapter_is_one_line(call, tmp_path):
    assert call("--run_name", "mine", "--adapter", "lora", "--lora_rank", "2")[0] == 0
    status, _, err = call("--run_name", "mine", "--adapter", "prompt", "--virtual_tokens", "3")
    assert status == 2
    (line,) = error_lines(err)
    assert "holds --adapter lora, not prompt" in line


def test_a_foreign_adapter_document_is_refused_when_its_configuration_names_none(tiny_host, call, tmp_path):
    assert call("--run_name", "mine", "--adapter", "lora", "--lora_rank", "2")[0] == 0
    saved = train.saved_options(newest(tmp_path / "runs" / "mine"))
    from engine.checkpoints import read_checkpoint

    found = read_checkpoint(newest(tmp_path / "runs" / "mine"))
    opts = opts_for(tiny_host, "prompt")
    trainer = tiny_trainer(opts, controller_of(opts))
    with pytest.raises(ValueError, match="holds an adapter of kind lora, not prompt"):
        trainer.load(found, tmp_path)
    assert saved["adapter"] == "lora"


@every_adapter
def test_a_checkpoint_loads_as_it_was(call, tmp_path, adapter, tokenizer):
    assert call("--run_name", "mine", "--adapter", adapter, *SMALL.get(adapter, []), "--ema", "0")[0] == 0
    model, document = load_controller(newest(tmp_path / "runs" / "mine"))
    assert model.config.adapter == adapter and not model.training
    saved = own_names(tensors(newest(tmp_path / "runs" / "mine"), "adapter_model"))
    state = model.addon_state()
    assert state.keys() == saved.keys() and all(torch.equal(saved[name], state[name]) for name in state)
    assert json.loads(json.dumps(document))["base_fingerprint"]["hidden_size"] == 32
    examples = Reserve(make_tasks(["toy_add"], "default"), 2).examples
    assert len(answer(model, PromptFormat(tokenizer), examples, Decoding(max_new_tokens=2))) == 2


# --- equal parameters


def match_of(opts: options.Options) -> Match:
    """The size that `--match_params` gives the adapter of the flags."""
    return match(options.part(HostConfig, opts), adapter_config(opts), opts.match_params, opts.max_seq_len)


@pytest.mark.parametrize("more", ["", "--lora_layers 1", "--use_act", "--injector grb --logit_bias_head --h_layers 2",
                                  "--hrm_read all --cab_mem 2 --n_heads 2"])
def test_hrm_is_sized_to_what_a_built_model_really_has(tiny_host, more):
    opts = opts_for(tiny_host, "hrm", "--match_params", "2000000", *more.split())
    size = match_of(opts)
    opts = options.replace(opts, **{size.flag: size.value})
    found = sum(p.numel() for p in controller_of(opts).addon_parameters().values())
    assert abs(found - 2_000_000) <= 100_000 and f"--d_h {opts.d_h} gives {found:,} trainable parameters" in size.line


@pytest.mark.parametrize("adapter,wanted", [("lora", 20000), ("prompt", 1000), ("mlp", 2_000_000)])
def test_each_baseline_is_sized_to_what_a_built_model_really_has(tiny_host, adapter, wanted):
    opts = options.parse([*PLAIN, "--adapter", adapter])
    opts = options.replace(opts, model_name=str(tiny_host), match_params=wanted, max_seq_len=128)
    size = match_of(opts)
    opts = options.replace(opts, **{size.flag: size.value})
    found = sum(p.numel() for p in controller_of(opts).addon_parameters().values())
    assert abs(found - wanted) <= 0.05 * wanted and f"{found:,}" in size.line


@pytest.mark.parametrize("adapter,wanted,nearest", [
    ("prompt", "50", "32 (--virtual_tokens 1) and 64 (--virtual_tokens 2)"),
    ("prompt", "100000", "(--virtual_tokens 384), no more tokens fit the 512 positions beside --max_seq_len 128"),
    ("lora", "10", "(--lora_rank 1)"), ("hrm", "10", "(--d_h 8)"),
])
def test_a_size_out_of_reach_names_the_nearest_in_one_line(call, adapter, wanted, nearest):
    status, _, err = call("--adapter", adapter, "--match_params", wanted, "--max_seq_len", "128")
    (line,) = error_lines(err)
    assert status == 2 and line.startswith(f"--match_params {wanted}: adapter {adapter} cannot come within 5 %")
    assert nearest in line


def test_a_size_and_its_flag_are_not_both_set(call):
    status, _, err = call("--adapter", "lora", "--match_params", "9000", "--lora_rank", "3")
    assert status == 2 and error_lines(err) == ["--match_params 9000 and --lora_rank are both set: keep one"]


def test_a_matched_run_records_its_size_and_goes_on_with_or_without_the_flag(call, tmp_path):
    flags = ["--run_name", "mine", "--adapter", "lora", "--match_params", "11000"]
    status, _, err = call(*flags)
    assert status == 0 and "--lora_rank 10 gives 10,880 trainable parameters (-1.1 %)" in err
    saved = options.read_resolved((tmp_path / "runs" / "mine" / "config.resolved.yaml").read_text(encoding="utf-8"))
    assert saved["lora_rank"] == 10 and saved["match_params"] == 0
    for again in (flags, flags[:2]):
        assert call(*again, "--max_steps", "5")[0] == 0
    status, _, err = call(*flags[:4], "--match_params", "20000")
    assert status == 2 and "--lora_rank 18 (checkpoint: 10)" in err


def test_nearest_finds_both_sides_by_halving():
    size = Size("x", 8, 8, lambda value: value * value)
    assert size.nearest(10_000) == [(96, 9216), (104, 10816)]
    assert size.nearest(10_816) == [(104, 10816)] and size.nearest(1) == [(8, 64)]
    assert Size("x", 1, 1, lambda value: value, high=9).nearest(100) == [(8, 8), (9, 9)]
    assert isinstance(options.parse([]), argparse.Namespace)
