"""--cache_mode: a fill shared by processes, training from a full cache without the LLM, what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import options
from addon import cache_plan, cache_shards, kept_head
from addon.cache_use import CacheUseConfig, mode_problems
from addon.hidden_cache import HiddenCache
from patience import HANG_S
from tiny_cache import ITEMS, Parts, flip
from tiny_families import _OWN
from tiny_runs import ROOT, arguments, assert_same_run, error_lines, newest, records, tensors

pytestmark = pytest.mark.usefixtures("no_curve")  # conftest.py

DISK = "--cache_hidden disk --train_n 11 --max_steps 4".split()
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Batches of 3 items, and a shard for every two of them."""
    monkeypatch.setattr(cache_plan, "FILL_BATCH", 3)
    monkeypatch.setattr(cache_shards, "SHARD_BYTES", 9000)


@pytest.fixture
def cached(call, tmp_path):
    """Runs train.py with the cache of `tmp_path/cache`, in a mode: (exit status, stdout, stderr)."""

    def run(mode: str, *more: str) -> tuple[int, str, str]:
        return call(*DISK, "--cache_dir", str(tmp_path / "cache"), "--cache_mode", mode, *more)

    return run


def no_llm(patch) -> None:
    """From now on the LLM cannot be loaded."""
    patch.setattr("model.load_host", lambda *arguments: pytest.fail("the LLM was loaded"))


def refusal(result: tuple[int, str, str]) -> str:
    """The one line of a refused run, which stands behind the run's own lines."""
    status, _, err = result
    assert status == 2, err
    return error_lines(err.splitlines()[-1])[0]


def assert_same_training(one: Path, other: Path) -> None:
    """Bit for bit: weights, optimizer, averages, random state, losses."""
    for stem in ("adapter_model", "training_state"):
        ours, theirs = tensors(newest(one), stem), tensors(newest(other), stem)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [[line["loss"] for line in records(run)["metrics"]] for run in (one, other)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert records(one)["metrics"] == records(other)["metrics"]


# --- a fill shared by processes


def launched(script: str, *words: str, status: int = 0) -> str:
    """stderr of a command in two processes, which ends with the status."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*LAUNCH, script, *words], cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=HANG_S)
    assert done.returncode == status, done.stderr[-3000:]
    return done.stderr


def test_each_of_two_processes_fills_its_share_and_none_of_the_other_s(tiny_host, tmp_path):
    launched("tests/fill_shares.py", str(tiny_host), str(tmp_path / "cache"), str(tmp_path))
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    assert one["of"] > 3
    assert one["shards"] == list(range(0, one["of"], 2)) and other["shards"] == list(range(1, one["of"], 2))
    assert sorted(one["items"] + other["items"]) == list(range(ITEMS))
    parts = Parts(tiny_host)
    alone = float(parts.features(parts.cache(None)).double().sum())
    assert one["total"] == other["total"] == alone
    assert not list((tmp_path / "cache").rglob("*.lock"))


def test_a_damaged_shard_is_filled_again_by_its_owner_alone(tiny_host, tmp_path):
    parts = Parts(tiny_host)
    parts.features(parts.cache(tmp_path))
    path = sorted(tmp_path.rglob("shard-*"))[1]
    flip(path)
    told = []
    first = parts.cache(tmp_path, share=(0, 2), say=told.append)
    missing = first.store._missing()
    assert [shard.number for shard in missing] == [1] and path.exists() and "is damaged" in told[0]
    second = parts.cache(tmp_path, share=(1, 2))
    parts.features(second)
    assert 0 < second._done == second.store.to_read < ITEMS
    assert first.store._missing() == [] and len(told) == 1


def test_processes_that_do_not_see_one_folder_are_refused_before_any_model_loads(tiny_host, tmp_path):
    """Each begins in a folder of its own, and --cache_dir is a path in it."""
    words = [*arguments(tiny_host, tmp_path / "runs"), *DISK, "--cache_dir", "cache", "--cache_mode", "fill"]
    apart = f'mkdir -p "{tmp_path}/$RANK"; cd "{tmp_path}/$RANK"; exec "{sys.executable}" "{ROOT}/train.py" "$@"'
    err = launched("--no-python", "bash", "-c", apart, "train", *words, status=1)
    for rank in (0, 1):
        assert (f"--cache_dir {tmp_path / str(rank) / 'cache'} is not the same folder for all 2 processes, which share "
                "the work: name one that every machine sees, or begin with one process") in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_shard_that_its_owner_removes_meanwhile_is_missing_and_not_damaged(tiny_host, tmp_path, monkeypatch):
    told = []
    store = Parts(tiny_host).cache(tmp_path, share=(0, 2), say=told.append).store
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert not store._open(store.shards[1]) and not told


def test_two_processes_train_from_what_one_filled_and_one_from_what_two_filled(call, tiny_host, tmp_path, monkeypatch):
    """The same global batch: two processes of 2 items or one of 4; the losses differ in their last digits."""
    monkeypatch.undo()  # processes of their own know nothing of small shards
    monkeypatch.setattr("engine.loop.draw_curve", lambda *arguments: None)

    def one(*more: str) -> None:
        assert call("--batch_size", "4", *more)[0] == 0

    def two(*more: str) -> None:
        launched("train.py", *arguments(tiny_host, tmp_path / "runs", "--batch_size", "2", *more))

    losses = []
    for number, (fills, trains) in enumerate([(one, two), (two, one)]):
        place = tmp_path / f"cache-{number}"
        flags = [*DISK, "--cache_dir", str(place), "--cache_mode"]
        fills(*flags, "fill")
        before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        trains(*flags, "train", "--run_name", str(number))
        assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        losses.append([line["loss"] for line in records(tmp_path / "runs" / str(number))["metrics"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 4


# --- without the LLM


@pytest.mark.parametrize("more", ["", "--hrm_read all", "--hrm_read last --cache_dtype int8", "--logit_bias_head",
                                  "--adapter mlp --segments 1 --inner_T 2", "--use_act --optimizer adamw --ema 0.9"])
def test_training_without_the_llm_is_training_with_it_bit_for_bit(cached, tmp_path, monkeypatch, more):
    status, out, err = cached("fill", *more.split())
    assert status == 0 and not out and not (tmp_path / "runs").exists(), err
    assert cached("both", "--eval_every", "0", "--run_name", "with", *more.split())[0] == 0
    no_llm(monkeypatch)
    status, out, err = cached("train", "--run_name", "without", *more.split())
    assert status == 0 and out.startswith("not evaluated: the LLM is not in memory."), err
    assert re.search(r"the LLM \(0\.0 M parameters\) is not loaded: its head and .* come from .*head\.safetensors", err)
    assert_same_training(tmp_path / "runs" / "with", tmp_path / "runs" / "without")


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "granite"])
def test_a_family_that_scales_or_caps_or_ties_nothing_trains_alike(cached, tokenizer, tmp_path, monkeypatch, family):
    sizes = {"vocab_size": len(tokenizer) + 3, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.3}
    host = tmp_path / family
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | _OWN[family])).float().save_pretrained(host)
    tokenizer.save_pretrained(host)
    llm = ["--model_name", str(host)]
    assert cached("fill", *llm)[0] == 0
    assert cached("both", "--eval_every", "0", "--run_name", "with", *llm)[0] == 0
    no_llm(monkeypatch)
    assert cached("train", "--run_name", "without", *llm)[0] == 0
    assert_same_training(tmp_path / "runs" / "with", tmp_path / "runs" / "without")


def test_a_run_without_the_llm_is_resumed_and_evaluated_later(cached, call, tmp_path, monkeypatch):
    assert cached("fill")[0] == 0
    assert cached("both", "--eval_every", "0", "--run_name", "with")[0] == 0
    runs = tmp_path / "runs"
    with monkeypatch.context() as patch:
        no_llm(patch)
        more = ["--save_every", "2", "--checkpoint_limit", "0"]
        assert cached("train", "--run_name", "whole", *more)[0] == 0
        shutil.copytree(runs / "whole", runs / "cut")
        shutil.rmtree(newest(runs / "cut"))
        assert cached("train", "--run_name", "cut")[0] == 0
    assert_same_run(runs / "whole", runs / "cut")

    status, out, _ = call("--resume", str(runs / "whole"), "--eval_only")
    assert status == 0 and out.startswith("task")
    theirs = [line["prediction"] for line in records(runs / "with")["predictions"]]
    assert [line["prediction"] for line in records(runs / "whole")["predictions"]] == theirs


def test_weights_need_not_be_where_the_cache_is_read(cached, tiny_host, tmp_path, monkeypatch):
    """Another machine has the cache, the LLM's config and its tokenizer."""
    assert cached("fill")[0] == 0
    bare = tmp_path / "elsewhere" / tiny_host.name
    shutil.copytree(tiny_host, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.move(tmp_path / "cache", tmp_path / "moved")
    no_llm(monkeypatch)
    status, _, err = cached("train", "--model_name", str(bare), "--cache_dir", str(tmp_path / "moved"))
    assert status == 0, err


def test_training_writes_nothing_into_the_cache(cached, tmp_path):
    assert cached("fill")[0] == 0
    places = [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in places}
    assert cached("train")[0] == 0
    assert before == {path: path.stat().st_mtime_ns for path in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]}


def test_a_dry_run_without_the_llm_reads_the_cache(cached, tmp_path, monkeypatch):
    assert cached("fill")[0] == 0
    no_llm(monkeypatch)
    status, _, err = cached("train", "--dry_run")
    assert status == 0 and "nothing was written" in err and "leaves the cache" not in err
    assert not (tmp_path / "runs").exists()


# --- filling alone


def test_a_fill_after_a_run_only_adds_the_head(cached, monkeypatch):
    assert cached("both", "--eval_every", "0")[0] == 0
    monkeypatch.setattr(HiddenCache, "_states", lambda *rest: pytest.fail("the LLM was asked"))
    status, _, err = cached("fill")
    assert status == 0 and ", 0 read now, of 11 items" in err and "are in head.safetensors beside it" in err


def test_a_fill_that_is_stopped_says_so_and_goes_on(cached, tmp_path, monkeypatch):
    plain, asked = HiddenCache._states, []

    def pressed(self, controller, items):
        asked.append(items.start)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, controller, items)

    with monkeypatch.context() as patch:
        patch.setattr(HiddenCache, "_states", pressed)
        status, _, err = cached("fill")
    assert status == 143 and "what is filled stays, and the same command goes on from it" in err
    assert not list(tmp_path.rglob("head.safetensors")) and len(list(tmp_path.rglob("shard-*.safetensors"))) == 1
    status, _, err = cached("fill")
    assert status == 0 and "shards: the others are filled" in err


# --- refused


def test_without_a_cache_that_is_full_and_whole_nothing_is_trained(cached, tmp_path, monkeypatch):
    no_cache = refusal(cached("train"))
    assert no_cache.startswith("--cache_mode train finds no cache of these 11 items in --cache_dir ")
    assert no_cache.endswith("fill one with --cache_mode fill and otherwise the same flags")
    assert cached("both", "--eval_every", "0")[0] == 0  # it keeps no head
    shutil.rmtree(tmp_path / "runs")
    assert refusal(cached("train")) == no_cache
    assert cached("fill")[0] == 0
    no_llm(monkeypatch)

    for more in (["--hrm_read", "all"], ["--cache_dtype", "int8"]):
        assert refusal(cached("train", *more)) == no_cache
    (folder,) = (tmp_path / "cache").iterdir()
    shard, head = folder / "shard-00001.safetensors", folder / "head.safetensors"
    for path, words in ((shard, "fill it again with --cache_mode fill"),
                        (head, "delete it, and write it again with --cache_mode fill")):
        whole = path.read_bytes()
        flip(path)
        assert refusal(cached("train")) == f"{path} is damaged (its content does not have its checksum): {words}"
        path.write_bytes(whole)
    shard.unlink()
    line = refusal(cached("train"))
    assert line == f"{folder} lacks 1 of 2 shards, {shard.name} first: fill them with --cache_mode fill"
    assert not (tmp_path / "runs").exists()


def test_the_cache_of_another_llm_is_refused(cached, tiny_host, tmp_path, monkeypatch):
    assert cached("fill")[0] == 0
    other = tmp_path / "other" / tiny_host.name
    shutil.copytree(tiny_host, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1  # head and embeddings stay
    model.save_pretrained(other)
    no_llm(monkeypatch)
    line = refusal(cached("train", "--model_name", str(other)))
    assert line.startswith(f"--model_name {other} is not the LLM that filled ") and str(tiny_host) in line
    (other / "model.safetensors").unlink()
    other.rename(tmp_path / "other" / "unlike")
    assert "is not the LLM that filled" in refusal(cached("train", "--model_name", str(tmp_path / "other" / "unlike")))


def test_a_head_whose_record_is_damaged_is_named(cached, tmp_path):
    assert cached("fill")[0] == 0
    (head,) = tmp_path.rglob("head.safetensors")
    whole = head.read_bytes()
    parameters = json.loads(json.loads(whole[8:whole.index(b"}}") + 2])["__metadata__"]["facts"])["parameters"]
    for content in (b"", whole[:len(whole) // 2], whole[:40] + whole[41:],
                    whole.replace(str(parameters).encode(), str(parameters + 1).encode(), 1)):
        head.write_bytes(content)
        line = refusal(cached("train"))
        assert line.startswith(f"{head} is damaged (")
        assert line.endswith("): delete it, and write it again with --cache_mode fill")
    assert cached("fill")[0] == cached("train")[0] == 0


def test_another_setting_of_the_llm_is_another_cache(cached, tiny_host, tmp_path, monkeypatch):
    """The weights are the same, and what the LLM computes with them is not."""
    assert cached("fill")[0] == 0
    no_llm(monkeypatch)
    other = tmp_path / "other" / tiny_host.name
    shutil.copytree(tiny_host, other)
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    config["rms_norm_eps"] = 0.1
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert refusal(cached("train", "--model_name", str(other))).startswith("--cache_mode train finds no cache of these")


def test_a_name_that_may_mean_several_llms_is_refused(cached, tiny_host, tmp_path):
    other = tmp_path / "other" / tiny_host.name
    shutil.copytree(tiny_host, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(other)
    assert cached("fill")[0] == cached("fill", "--model_name", str(other))[0] == 0
    assert cached("train", "--run_name", "own", "--model_name", str(other))[0] == 0
    (other / "model.safetensors").unlink()
    line = refusal(cached("train", "--model_name", str(other)))
    assert line.startswith(f"several LLMs that --model_name {other} may mean filled {tmp_path / 'cache'}")
    assert line.endswith(": delete what you do not want, or fill another --cache_dir")


def test_the_head_is_held_as_the_llm_was_that_filled(cached, tmp_path):
    assert cached("fill", "--host_dtype", "bf16")[0] == 0
    line = refusal(cached("train", "--host_dtype", "fp32"))
    assert line.startswith("--host_dtype fp32: ") and line.endswith("filled by an LLM held in bf16: leave the flag out")
    assert cached("train", "--run_name", "one")[0] == 0
    saved = options.read_resolved((newest(tmp_path / "runs" / "one") / "config.resolved.yaml").read_text("utf-8"))
    assert saved["host_dtype"] == "bf16"
    assert cached("fill", "--host_dtype", "fp32")[0] == 0
    line = refusal(cached("train", "--run_name", "two"))
    assert line.endswith("by the LLM held in bf16 and fp32: choose one with --host_dtype")
    assert cached("train", "--run_name", "two", "--host_dtype", "fp32")[0] == 0


def test_a_head_that_is_no_linear_map_cannot_be_kept(cached, tmp_path, monkeypatch):
    class Head(torch.nn.Linear):
        pass

    plain = kept_head.check_keepable

    def other(host):
        host.get_output_embeddings().__class__ = Head
        plain(host)

    monkeypatch.setattr("addon.cache_use.check_keepable", other)
    line = refusal(cached("fill"))
    assert line == ("--cache_mode fill keeps a head that is a linear map, and that of llama is a Head: use "
                    "--cache_mode both")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("more,flag", [
    ("--eval_every 2", "--eval_every 2"), ("--log_samples_every 1", "--log_samples_every 1"),
    ("--patience 2", "--patience 2"), ("--save_best_model", "--save_best_model"),
    ("--verifier_weight 0.5", "--verifier_weight 0.5"), ("--eval_suite synthetic", "--eval_suite synthetic"),
])
def test_what_asks_the_llm_is_refused_where_it_is_never_loaded(cached, tmp_path, more, flag):
    line = refusal(cached("train", *more.split()))
    assert line == f"{flag} asks the LLM, and --cache_mode train never loads it: leave one out"
    assert not (tmp_path / "cache").exists()


def test_other_text_to_retain_asks_the_llm(cached, tmp_path):
    (tmp_path / "text.txt").write_text("Some text to stay as it is.\n", encoding="utf-8")
    line = refusal(cached("train", "--retain", str(tmp_path / "text.txt")))
    assert line.startswith("--retain ") and line.endswith("--cache_mode train never loads it: leave one out")


@pytest.mark.parametrize("values,line", [
    ({"cache_mode": "train", "device_map": "auto"}, "--device_map auto does nothing with --cache_mode train, which "
                                                    "never loads the LLM: leave it out"),
    ({"cache_mode": "train", "curriculum": True}, "--curriculum asks the LLM, and --cache_mode train never loads it: "
                                                  "leave one out"),
    ({"cache_mode": "fill", "load_in": "4bit"}, "--cache_mode fill does not keep the head of an LLM of --load_in 4bit: "
                                                "leave that out, or use --cache_mode both"),
    ({"cache_mode": "fill", "dry_run": True}, "--cache_mode fill fills a cache and does nothing else: leave out "
                                              "--dry_run, or use --cache_mode both"),
    ({"cache_mode": "fill", "eval_only": True}, "--cache_mode fill fills a cache and does nothing else: leave out "
                                                "--eval_only, or use --cache_mode both"),
])
def test_what_contradicts_a_mode_is_one_line(values, line):
    assert mode_problems(CacheUseConfig(**values), values) == [line]


def test_an_evaluation_alone_loads_the_llm_whatever_the_mode():
    assert mode_problems(CacheUseConfig(cache_mode="train", eval_only=True, eval_suite="synthetic"), ()) == []
