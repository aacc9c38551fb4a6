"""cache on disk: the same numbers, shared, interrupted, damaged, filled by two at once, refused; int8."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from addon import cache_plan, cache_shards
from addon.cache_plan import pack, unpack
from addon.hidden_cache import HiddenCache
from patience import HANG_S
from soak_child import obey_permissions
from tiny_cache import ITEMS, Parts, flip, in_small_shards, shards
from tiny_rows import sums, write
from tiny_runs import ROOT, assert_same_run, error_lines, newest

pytestmark = pytest.mark.usefixtures("no_curve")  # conftest.py

MLP = ["--adapter", "mlp", "--segments", "1", "--inner_T", "2"]  # HRM's flags as they are by default
DISK = "--cache_hidden disk --train_n 11 --eval_every 0".split()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Batches of 3 items, and a shard for every two of them."""
    monkeypatch.setattr(cache_plan, "FILL_BATCH", 3)
    monkeypatch.setattr(cache_shards, "SHARD_BYTES", 9000)


@pytest.fixture(scope="module")
def parts(tiny_host) -> Parts:
    return Parts(tiny_host)


def nobody_asks(monkeypatch, parts: Parts) -> None:
    monkeypatch.setattr(type(parts.model.model), "run_host", lambda *rest: pytest.fail("the LLM was asked"))


# --- the same numbers, once


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.parametrize("read", ["embed+last", "all"])
def test_a_cache_on_disk_gives_what_one_in_ram_gives(tiny_host, tmp_path, dtype, read):
    parts = Parts(tiny_host, "--cache_dtype", dtype, "--hrm_read", read)
    ram, disk = parts.cache(None), parts.cache(tmp_path)
    assert torch.equal(parts.features(ram), parts.features(disk))
    assert len(shards(tmp_path)) > 2 and disk.plan.bytes - disk.plan.bytes_of(1) == disk.store.nbytes
    assert disk.plan.bytes == ram.plan.bytes == ram.store.nbytes


def test_a_second_cache_asks_nobody(parts, tmp_path, monkeypatch):
    before = parts.features(parts.cache(tmp_path))
    nobody_asks(monkeypatch, parts)
    told = []
    assert torch.equal(parts.features(parts.cache(tmp_path, say=told.append)), before)
    assert len(told) == 1 and ", 0 read now, of 30 items in" in told[0] and str(tmp_path) in told[0]


def test_the_pages_of_a_shard_are_mapped_and_not_copied(parts, tmp_path):
    cache = parts.cache(tmp_path)
    parts.features(cache)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert all(str(path) in maps for path in shards(tmp_path))


def test_an_interrupted_fill_goes_on_and_ends_with_the_same_numbers(parts, tmp_path, monkeypatch):
    whole = parts.features(parts.cache(tmp_path / "whole"))
    plain, asked = HiddenCache._states, []

    def killed(self, controller, items):
        asked.append(items.start)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return plain(self, controller, items)

    with monkeypatch.context() as patch:
        patch.setattr(HiddenCache, "_states", killed)
        with pytest.raises(KeyboardInterrupt):
            parts.cache(tmp_path / "cut").fill(parts.model)
    there = shards(tmp_path / "cut")
    assert there and not [path for path in (tmp_path / "cut").rglob("*") if "tmp" in path.name or "lock" in path.name]

    told = []
    cache = parts.cache(tmp_path / "cut", say=told.append)
    assert torch.equal(parts.features(cache), whole)
    assert f"holds {len(there)} of {len(cache.store.shards)} shards: the others are filled" in told[0]
    assert 0 < cache._done < ITEMS


# --- damage


DAMAGE = {
    "a flipped bit": flip,
    "a torn end": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "nothing in it": lambda path: path.write_bytes(b""),
    "another text": lambda path: path.write_text("no shard", encoding="utf-8"),
    "another shard": lambda path: path.write_bytes(path.with_name("shard-00002.safetensors").read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_shard_is_named_and_filled_again(parts, tmp_path, damage):
    before = parts.features(parts.cache(tmp_path))
    path = shards(tmp_path)[1]
    damage(path)
    told = []
    cache = parts.cache(tmp_path, say=told.append)
    assert torch.equal(parts.features(cache), before)
    assert re.match(re.escape(str(path)) + r" is damaged \(.+\): it is filled again", told[0])
    lost = cache.store.shards[1].batches
    assert cache._done == sum(len(cache.plan.rows[batch]) for batch in lost)
    nobody = parts.cache(tmp_path, say=told.append)
    assert torch.equal(parts.features(nobody), before) and nobody._done == 0


def test_a_shard_that_cannot_be_read_is_named_and_filled_again(parts, tmp_path):
    before = parts.features(parts.cache(tmp_path))
    path = shards(tmp_path)[1]
    path.chmod(0)
    child = os.fork()
    if not child:
        held = False
        try:
            obey_permissions()
            torch.set_num_threads(1)
            told = []
            same = torch.equal(parts.features(parts.cache(tmp_path, say=told.append)), before)
            held = same and told[0].startswith(f"{path} is damaged (it cannot be read")
        finally:
            os._exit(int(not held))
    assert os.waitpid(child, 0)[1] == 0
    assert os.access(path, os.R_OK) and path.stat().st_mode & 0o400


# --- two at once


OTHER = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from tiny_cache import Parts, in_small_shards
parts = Parts(Path({host!r}))
with in_small_shards():
    cache = parts.cache(Path({folder!r}))
    print("ready", flush=True)
    sys.stdin.readline()
    print(float(parts.features(cache).double().sum()), cache._done, flush=True)
"""


def test_two_processes_fill_a_cache_together(parts, tiny_host, tmp_path):
    folder = tmp_path / "cache"
    code = OTHER.format(paths=[str(ROOT), str(ROOT / "tests")], host=str(tiny_host), folder=str(folder))
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, encoding="utf-8", stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    assert other.stdout.readline() == "ready\n"
    other.stdin.write("go\n")
    other.stdin.flush()

    ours = parts.cache(folder)
    with in_small_shards():
        total = float(parts.features(ours).double().sum())
    theirs, read = other.communicate(timeout=HANG_S)[0].split()
    assert total == float(theirs) == float(parts.features(parts.cache(None)).double().sum())
    assert ours._done + int(read) == ITEMS and ours._done and int(read)
    assert not list(folder.rglob("*.lock"))


def test_the_lock_of_a_dead_process_is_no_hindrance(parts, tmp_path):
    cache = parts.cache(tmp_path)
    cache.store.folder.mkdir(parents=True)
    (cache.store.folder / f"{cache.store.shards[0].name}.lock").write_bytes(b"")
    parts.features(cache)
    assert cache._done == ITEMS


# --- runs


def test_runs_that_read_the_same_share_it_and_others_do_not(call, tmp_path):
    """Rows of own data are the same for every seed; an arm may change all but what the LLM reads."""
    flags = ["--data", write(tmp_path / "rows.jsonl", sums(40)), "--task", "none", "--cache_hidden", "disk",
             "--eval_every", "0", "--cache_dir", str(tmp_path / "cache"), "--max_steps", "1"]
    told = []
    for more in (["--seed", "1"], ["--seed", "2"], ["--inner_T", "2"], MLP,
                 ["--hrm_read", "all"]):
        status, _, err = call(*flags, *more)
        assert status == 0, err
        told.append(int(re.search(r", (\d+) read now,", err)[1]))
    assert told == [36, 0, 0, 0, 36]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_run_from_disk_is_the_one_from_ram_and_its_resumed_one(call, tmp_path):
    cached = [*DISK, "--cache_dir", str(tmp_path / "cache"), "--save_every", "2", "--checkpoint_limit", "0"]
    runs = tmp_path / "runs"
    assert call("--run_name", "ram", *cached, "--cache_hidden", "ram", "--cache_dir", "none")[0] == 0
    assert call("--run_name", "disk", *cached)[0] == 0
    shutil.copytree(runs / "disk", runs / "cut")
    shutil.rmtree(newest(runs / "cut"))
    assert call("--run_name", "cut", *cached)[0] == 0
    assert_same_run(runs / "ram", runs / "disk")
    assert_same_run(runs / "disk", runs / "cut")


def test_ctrl_c_ends_a_fill_between_two_batches_and_keeps_what_is_there(call, tmp_path, monkeypatch):
    plain, asked = HiddenCache._states, []

    def pressed(self, controller, items):
        asked.append(items.start)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, controller, items)

    monkeypatch.setattr(HiddenCache, "_states", pressed)
    flags = [*DISK, "--cache_dir", str(tmp_path / "cache")]
    status, _, err = call(*flags)
    assert status == 130 and "stopped before the first step" in err and len(asked) == 3
    status, _, err = call(*flags)
    assert status == 0 and "shards: the others are filled" in err


# --- refused before the model loads


def loads_nothing(monkeypatch) -> None:
    monkeypatch.setattr("addon_run.build_controller", lambda *arguments: pytest.fail("the model was loaded"))


def test_a_folder_that_is_none_is_refused(call, tmp_path, monkeypatch):
    loads_nothing(monkeypatch)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for place in ("file", "file/below"):
        status, _, err = call(*DISK, "--cache_dir", str(tmp_path / place))
        line = error_lines(err.splitlines()[-1])[0]
        assert status == 2 and "cannot write" in line and "choose a --cache_dir that can be written" in line
    assert not (tmp_path / "runs").exists()


def test_too_little_room_is_told_before_the_model_loads(call, tmp_path, monkeypatch):
    usage = types.SimpleNamespace(free=5000)
    with monkeypatch.context() as patch:
        loads_nothing(patch)
        patch.setattr(cache_shards.shutil, "disk_usage", lambda place: usage)
        status, _, err = call(*DISK, "--cache_dir", str(tmp_path / "cache"))
    line = error_lines(err.splitlines()[-1])[0]
    assert status == 2 and line.startswith("--cache_hidden disk needs 0.000 GB more in --cache_dir ")
    assert "free some space, choose another folder, or lower --train_n" in line
    assert not (tmp_path / "cache").exists() and not (tmp_path / "runs").exists()


def test_a_whole_cache_may_lie_where_nobody_writes(call, tmp_path, monkeypatch):
    flags = [*DISK, "--cache_dir", str(tmp_path / "cache")]
    assert call(*flags)[0] == 0
    monkeypatch.setattr(cache_shards, "disk_check", lambda *arguments: pytest.fail("the folder was written"))
    monkeypatch.setattr(cache_shards, "write_bytes_aside", lambda *arguments: pytest.fail("the folder was written"))
    monkeypatch.setattr(cache_shards.shutil, "disk_usage", lambda place: types.SimpleNamespace(free=0))
    status, _, err = call(*flags)
    assert status == 0, err


def test_a_disk_that_fills_up_is_one_line_and_leaves_whole_shards_only(call, tmp_path, monkeypatch):
    plain, written = cache_shards.write_bytes_aside, []

    def fills(path, content, flag):
        written.append(path)
        if len(written) == 2:
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
                return plain(path, content, flag)
        return plain(path, content, flag)

    monkeypatch.setattr(cache_shards, "write_bytes_aside", fills)
    status, _, err = call(*DISK, "--cache_dir", str(tmp_path / "cache"))
    line = error_lines(err.splitlines()[-1])[0]
    assert status == 2 and "the disk is full" in line and "choose another --cache_dir" in line
    assert [path.suffix for path in (tmp_path / "cache").rglob("*.*")].count(".safetensors") == 1
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name.startswith(".tmp")]


def test_the_limit_holds_on_disk_too(call, tmp_path):
    status, _, err = call(*DISK, "--cache_dir", str(tmp_path / "cache"), "--cache_max_gb", "1e-6")
    (line,) = error_lines(err)
    assert status == 2 and line.startswith("--cache_hidden disk needs 0.000 GB for 11 items (")
    assert "more than --cache_max_gb 1e-06" in line and not (tmp_path / "cache").exists()


# --- int8


def test_int8_keeps_each_number_to_half_a_step_of_its_token(parts):
    torch.manual_seed(0)
    states = torch.randn(50, 2, 32) * torch.logspace(-3, 3, 100).reshape(50, 2, 1)
    states[7] = 0
    kept = pack(states, "int8")
    assert kept["states"].dtype == torch.int8 and kept["scales"].shape == (50, 2)
    off = (unpack(kept) - states).abs()
    assert (off <= kept["scales"][..., None] * 0.5001).all() and (off[7] == 0).all()


def test_int8_takes_about_half_of_bf16(tiny_host):
    one, other = (Parts(tiny_host, "--cache_dtype", dtype).cache(None).plan for dtype in ("bf16", "int8"))
    assert other.bytes == one.bytes * (32 + 4) / 64 and "numbers in int8" in other.size_text()
