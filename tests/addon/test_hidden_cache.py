"""hidden_cache: cached = uncached training, keys, sizes told and refused, resume, epochs, buckets, two processes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

import options
from addon import cache_plan, hidden_cache
from addon.cache_plan import CacheConfig, plan_cache
from addon.hidden_cache import HiddenCache, cache_key, weights_digest
from addon.streams import EpochStream, training_examples
from addon.train_batches import TrainBatches
from batching import PromptConfig, PromptFormat
from host import load_tokenizer
from patience import HANG_S
from reasoning_gym_wrapper import Reserve, make_tasks
from tiny_families import randomise
from tiny_runs import ROOT, arguments, assert_same_run, controller_of, error_lines, newest, records, tiny_trainer

pytestmark = pytest.mark.usefixtures("no_curve")  # conftest.py

CACHED = "--cache_hidden ram --train_n 11 --max_steps 6 --eval_every 3 --save_every 2 --checkpoint_limit 0".split()


@pytest.fixture(scope="module")
def bf16_host(tiny_host, tmp_path_factory):
    """The tiny host in bfloat16, as the embedded one is."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("bf16") / "host"
    shutil.copytree(tiny_host, folder)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def opts_for(host, *more: str) -> options.Options:
    opts = options.parse([*arguments(host, ROOT), "--cache_hidden", "ram", "--train_n", "12", "--ema", "0", *more])
    return options.replace(opts, task_config="default")


def setting(host, *more: str):
    """(options, controller as after training, format, items, batches of two epochs in buckets)."""
    opts = opts_for(host, *more)
    torch.manual_seed(0)
    model = randomise(controller_of(opts), size=0.05)
    prompt_format = PromptFormat(load_tokenizer(str(host)), options.part(PromptConfig, opts))
    tasks = make_tasks(["toy_add", "chain_sum"], "small" if "small" in more else "default")
    stream = training_examples(tasks, Reserve(tasks, 4), 0, 12)
    assert isinstance(stream, EpochStream)
    batches = TrainBatches(stream, prompt_format, 4, window=2)
    return opts, model, prompt_format, stream.examples, [next(batches) for _ in range(6)]


def made_cache(opts, model, prompt_format, examples, **more) -> HiddenCache:
    plan = plan_of(opts, model, prompt_format, examples)
    return HiddenCache(cache_key(model, prompt_format.tokenizer, plan), plan, prompt_format, **more)


def plan_of(opts, model, prompt_format, examples):
    return plan_cache(options.part(CacheConfig, opts), model.host.config, prompt_format, examples)


def key_of(model, prompt_format, examples, *more: str) -> str:
    opts = opts_for(model.host.name_or_path, *more)
    return cache_key(model, prompt_format.tokenizer, plan_of(opts, model, prompt_format, examples))


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative distance of two tensors in the 2-norm."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


# --- the same training


@pytest.mark.parametrize("more", ["", "--hrm_read all", "--hrm_read last", "--hrm_input pooled", "--injector grb",
                                  "--segments 1 --adapter mlp --inner_T 2"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_cached_and_uncached_states_are_equal_to_bf16_rounding(tiny_host, bf16_host, kind, more):
    host = tiny_host if kind == "float32" else bf16_host
    opts, model, prompt_format, examples, batches = setting(host, *more.split())
    cache = made_cache(opts, model, prompt_format, examples)
    encode = cache.encoder(model, cache.key)
    for batch in batches:
        plain, cached = model.encode(batch), encode(batch)
        prompt, answer = batch.prompt_mask.bool(), batch.labels != -100
        if opts.hrm_input == "tokens":
            assert apart(cached.features[prompt], plain.features[prompt]) < 0.01
        for ours, theirs in zip(vars(cached.slots).values(), vars(plain.slots).values(), strict=True):
            if ours is not None:
                assert ours.dtype == theirs.dtype and apart(ours[answer], theirs[answer]) < 0.01
        one, other = (model.segment(s, batch.labels, None, None).loss.item() for s in (plain, cached))
        assert one == pytest.approx(other, rel=5e-3)


@pytest.mark.parametrize("read", ["embed", "embed+last", "last", "all"])
def test_a_host_in_bf16_is_kept_bit_for_bit(bf16_host, read):
    """Batches of other make-up differ by what padding does to the LLM itself, so this one is the cache's own."""
    opts, model, prompt_format, examples, _ = setting(bf16_host, "--hrm_read", read, "--host_dtype", "stored")
    cache = made_cache(opts, model, prompt_format, examples)
    batch = prompt_format.batch(cache.plan.examples)
    plain, cached = model.encode(batch), cache.encoder(model, cache.key)(batch)
    prompt, answer = batch.prompt_mask.bool(), batch.labels != -100
    assert torch.equal(cached.features[prompt], plain.features[prompt])
    assert torch.equal(cached.slots.hidden[answer], plain.slots.hidden[answer])
    assert torch.equal(cached.slots.embedded, plain.slots.embedded)


@pytest.mark.parametrize("more", ["", "--adapter mlp --segments 1 --inner_T 2", "--grad_accum_steps 2 --segments 1"])
def test_cached_and_uncached_training_give_the_same_losses(tiny_host, monkeypatch, more):
    losses = []
    for cached in (False, True):
        opts, model, prompt_format, examples, batches = setting(tiny_host, *more.split())
        trainer = tiny_trainer(opts, model)
        if cached:
            cache = made_cache(opts, model, prompt_format, examples)
            trainer.encode = cache.encoder(model, cache.key)
            trainer.encode(batches[0])
            monkeypatch.setattr(model.model, "run_host", None)  # from here on nobody asks the LLM
        losses.append([trainer.step([batch], step, 3e-3)["loss"] for step, batch in enumerate(batches)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[0] != losses[1]  # bf16 rounding is seen: the cache was really used


def test_every_item_is_asked_once(tiny_host, monkeypatch):
    opts, model, prompt_format, examples, batches = setting(tiny_host)
    asked, plain = [], type(model.model).run_host
    monkeypatch.setattr(type(model.model), "run_host",
                        lambda self, ids, *rest: (asked.append(len(ids)), plain(self, ids, *rest))[1])
    monkeypatch.setattr(cache_plan, "FILL_BATCH", 5)
    told = []
    cache = made_cache(opts, model, prompt_format, [*examples, examples[0]], say=told.append)  # an item met twice
    encode = cache.encoder(model, cache.key)
    for batch in batches:
        encode(batch)
    assert asked == [5, 5, 2] and len(told) == 1 and "of 12 items in" in told[0]
    assert cache.store.states.dtype == torch.bfloat16 and cache.store.nbytes == cache.plan.bytes
    assert len(cache.store.states) == 1 + sum(n - 1 for n in prompt_format.lengths(examples))


def test_a_refilled_cache_holds_the_same_bits_whatever_batch_comes_first(bf16_host):
    opts, model, prompt_format, examples, batches = setting(bf16_host)
    caches = [made_cache(opts, model, prompt_format, items) for items in (examples, examples[::-1])]
    for cache, batch in zip(caches, (batches[0], batches[3]), strict=True):
        cache.encoder(model, cache.key)(batch)
    assert torch.equal(caches[0].store.states, caches[1].store.states)


# --- keys


def test_the_key_changes_with_all_that_the_states_depend_on(tiny_host, bf16_host):
    _, model, prompt_format, examples, _ = setting(tiny_host)
    keys = {key_of(model, prompt_format, examples)}
    assert keys == {key_of(model, prompt_format, examples[::-1], "--lr", "1", "--batch_size", "3", "--seed", "1")}
    for config in (PromptConfig(sentinel="##"), PromptConfig(system_header="hm"), PromptConfig(prompt_style="plain")):
        keys.add(key_of(model, PromptFormat(prompt_format.tokenizer, config), examples))
    keys.add(key_of(model, prompt_format, examples[:-1]))
    keys.add(key_of(model, prompt_format, examples, "--cache_dtype", "int8"))
    keys.add(key_of(setting(tiny_host, "--hrm_read", "all")[1], prompt_format, examples))
    keys.add(key_of(setting(bf16_host, "--host_dtype", "stored")[1], prompt_format, examples))
    other = load_tokenizer(str(tiny_host))
    other.add_tokens(["new"])
    keys.add(key_of(model, PromptFormat(other), examples))
    with torch.no_grad():
        model.host.model.layers[0].mlp.down_proj.weight.mul_(1.01)
    keys.add(key_of(model, prompt_format, examples))
    model.host.config.rope_parameters["rope_theta"] *= 2
    keys.add(key_of(model, prompt_format, examples))
    assert len(keys) == 11 and len(weights_digest(model.host)) == 64


def test_one_changed_number_of_the_llm_makes_another_cache_on_disk(tiny_host):
    model = setting(tiny_host)[1]
    digests = {weights_digest(model.host, whole=True)}
    with torch.no_grad():
        model.host.model.layers[1].mlp.down_proj.weight[3, 5] += 1
    digests.add(weights_digest(model.host, whole=True))
    assert len(digests) == 2


def test_a_cache_is_never_read_across_keys(tiny_host, bf16_host):
    opts, model, prompt_format, examples, batches = setting(tiny_host)
    cache = made_cache(opts, model, prompt_format, examples)
    cache.encoder(model, cache.key)(batches[0])
    other = setting(bf16_host)[1]
    with pytest.raises(ValueError, match="belongs to another LLM, prompt format or data"):
        cache.encoder(other, cache_key(other, prompt_format.tokenizer, cache.plan))
    foreign = prompt_format.batch(Reserve(make_tasks(["chain_sum"], "default"), 2).examples)
    with pytest.raises(ValueError, match="2 items of a batch are not in the cache"):
        cache.encoder(model, cache.key)(foreign)


# --- runs


def test_size_is_told_first_and_refused_above_the_limit(call, tmp_path, monkeypatch):
    status, _, err = call(*CACHED, "--cache_max_gb", "1e-6")
    (line,) = error_lines(err)
    assert status == 2 and re.match(r"--cache_hidden ram needs 0\.000 GB for 11 items \(\d+ tokens of 32 numbers", line)
    assert "more than --cache_max_gb 1e-06; raise it, lower --train_n" in line and not (tmp_path / "runs").exists()
    monkeypatch.setattr(hidden_cache.psutil, "virtual_memory", lambda: type("M", (), {"available": 100})())
    status, _, err = call(*CACHED)
    assert status == 2 and "of memory that are free" in error_lines(err)[0]


def test_the_told_size_is_the_measured_one(call):
    status, _, err = call(*CACHED)
    assert status == 0
    planned = re.search(r"--cache_hidden ram: ([\d.]+) GB for 11 items \((\d+) tokens of 32", err)
    filled = re.search(r"hidden states cached: ([\d.]+) GB of 11 items in [\d.]+ s; the process grew by", err)
    assert planned[1] == filled[1] and int(planned[2]) > 100
    assert err.index(planned[0]) < err.index(filled[0])


def test_a_cached_run_resumed_equals_an_uninterrupted_one(call, tmp_path):
    """Six batches of four are more than two epochs of eleven items."""
    flags = [*CACHED, "--bucket_batches", "2"]
    assert call("--run_name", "whole", *flags)[0] == 0
    runs = tmp_path / "runs"
    shutil.copytree(runs / "whole", runs / "cut")
    shutil.rmtree(newest(runs / "cut"))
    status, _, err = call("--run_name", "cut", *flags)
    assert status == 0 and ", from step 4" in err
    assert_same_run(runs / "whole", runs / "cut")


def test_a_cached_run_is_the_uncached_one_to_rounding_and_evaluation_is_untouched(call, tmp_path):
    for name, more in (("with", []), ("without", ["--cache_hidden", "off"])):
        assert call("--run_name", name, *CACHED, *more)[0] == 0
    one, other = (records(tmp_path / "runs" / name) for name in ("with", "without"))
    for ours, theirs in zip(one["metrics"], other["metrics"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2) and ours["tokens"] == theirs["tokens"]
    assert [line["bare_score"] for line in one["predictions"]] == [line["bare_score"] for line in other["predictions"]]


def test_evaluation_only_makes_no_cache(call, tmp_path):
    assert call("--run_name", "mine", *CACHED)[0] == 0
    status, _, err = call("--run_name", "mine", "--eval_only")
    assert status == 0 and "cache" not in err


TWO = """
import os, sys
os.environ["ACCELERATE_USE_CPU"] = "true"
import engine.loop, train
engine.loop.draw_curve = lambda *arguments: None
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_dry_run_asks_the_llm_for_its_own_batches_alone(call, monkeypatch):
    monkeypatch.setattr(HiddenCache, "fill", lambda *arguments: pytest.fail("the cache was filled"))
    status, out, err = call("--cache_hidden", "ram", "--train_n", "11", "--dry_run")
    assert status == 0 and "leaves the cache of hidden states empty" in out + err


def test_filling_says_how_far_it_is(call, monkeypatch):
    monkeypatch.setattr(hidden_cache, "PROGRESS_S", 0.0)
    monkeypatch.setattr(cache_plan, "FILL_BATCH", 4)
    status, out, err = call(*CACHED)
    assert status == 0 and re.search(r"caching hidden states: 4 of \d+ items, \d+ s left", out + err)



def test_two_processes_each_hold_all_of_it(tiny_host, tmp_path):
    """Every epoch deals the items anew, so each rank meets all of them."""
    script = tmp_path / "two.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{TWO}", encoding="utf-8")
    losses = {}
    for name, more in (("with", []), ("without", ["--cache_hidden", "off"])):
        argv = arguments(tiny_host, tmp_path / "runs", "--run_name", name, *CACHED, *more, "--batch_size", "2")
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                               "2", str(script), *argv], capture_output=True, text=True, cwd=ROOT, timeout=HANG_S)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
        assert ("in each of 2 processes" in done.stderr) == (name == "with")
    assert losses["with"] == pytest.approx(losses["without"], rel=1e-2)
