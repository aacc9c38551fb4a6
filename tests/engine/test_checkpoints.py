"""checkpointing: whole or not at all, verified, rotated, resumed bit for bit."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import checkpoints as ck
from engine.checkpoints import CheckpointError
from engine.optimizer_state import pack_optimizer, pack_rng, unpack_optimizer, unpack_rng
from engine.resume import passed_over, resolve_resume

TENSORS = {"adapter_model": {"w": torch.arange(6.0).reshape(2, 3), "scale": torch.tensor(2.0)},
           "training_state": {"ema/w": torch.ones(2, 3), "step": torch.tensor(7)}}
DOCUMENTS = {"adapter_config.json": '{"d": 3}', "training_state.json": '{"step": 7}', "README.md": "# card\n",
             "config.resolved.yaml": "lr: 0.001\n"}


def write(run: Path, step: int, value: float = 1.0) -> Path:
    tensors = {"adapter_model": {"w": torch.full((3,), value)}, "training_state": {"w": torch.full((3,), value)}}
    return ck.write_checkpoint(ck.step_folder(run, step), tensors, DOCUMENTS)


def fails(call, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and isinstance(caught.value, ValueError)
    for word in words:
        assert word in message, message
    return message


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    bits = [t.detach().cpu().contiguous().flatten().view(torch.uint8) if t.numel() else None for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and (bits[0] is None or torch.equal(*bits))


def test_the_module_never_touches_pickle():
    source = Path(ck.__file__).read_text(encoding="utf-8")
    assert "torch.load(" not in source.replace("safetensors.torch.load(", "") and "import pickle" not in source
    assert "torch.save(" not in source.replace("safetensors.torch.save(", "")


def test_a_checkpoint_reads_back_as_written(tmp_path):
    folder = ck.write_checkpoint(ck.step_folder(tmp_path, 1234), TENSORS, DOCUMENTS)
    assert folder == tmp_path / "checkpoints" / "step-00001234" and names(folder.parent) == ["step-00001234"]
    assert names(folder) == sorted([*DOCUMENTS, *(f"{stem}.safetensors" for stem in TENSORS), "manifest.json"])
    read = ck.read_checkpoint(folder)
    assert read.documents == DOCUMENTS and read.folder == folder and set(read.tensors) == set(TENSORS)
    for stem, group in TENSORS.items():
        assert all(same(group[name], read.tensors[stem][name]) for name in group)
    from safetensors import safe_open
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8,
                          torch.bool])
keys = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=9).filter(lambda n: n != "__metadata__")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(keys, st.tuples(st.lists(st.integers(0, 3), max_size=3), dtypes), max_size=4), st.integers(0, 9))
def test_any_names_shapes_and_dtypes_round_trip(tmp_path_factory, shapes, seed):
    torch.manual_seed(seed)
    group = {name: (torch.randn(shape) * 3).to(dtype) for name, (shape, dtype) in shapes.items()}
    folder = ck.write_checkpoint(tmp_path_factory.mktemp("c") / "step-1", {"adapter_model": group}, {})
    read = ck.read_checkpoint(folder).tensors["adapter_model"]
    assert set(read) == set(group) and all(same(group[name], read[name]) for name in group)


def test_shared_sliced_and_trainable_tensors_are_written(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    group = {"a": base, "b": base, "column": base[:, 1], "t": base.T, "wide": base[:1].expand(5, 4),
             "p": torch.nn.Parameter(base.clone())}
    read = ck.read_checkpoint(ck.write_checkpoint(tmp_path / "step-1", {"m": group}, {})).tensors["m"]
    assert all(same(group[name], read[name]) for name in group)


# ---- damage

@pytest.fixture
def folder(tmp_path) -> Path:
    return ck.write_checkpoint(ck.step_folder(tmp_path / "run", 5), TENSORS, DOCUMENTS)


FILES = ["adapter_model.safetensors", "training_state.safetensors", "training_state.json", "config.resolved.yaml"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    fails(lambda: ck.read_checkpoint(folder), name, "sha256", "resume from an earlier checkpoint")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_found(folder, name):
    path = folder / name
    os.truncate(path, path.stat().st_size - 1)
    fails(lambda: ck.read_checkpoint(folder), name, "truncated", "bytes, expected")
    path.unlink()
    fails(lambda: ck.read_checkpoint(folder), name, "missing")


def test_missing_foreign_and_future_folders_are_told_apart(folder, tmp_path):
    fails(lambda: ck.read_checkpoint(tmp_path / "nowhere"), "is no checkpoint folder", "nowhere")
    fails(lambda: ck.read_checkpoint(folder / "README.md"), "README.md")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for change in ({"version": 99}, {"format": "other"}):
        (folder / "manifest.json").write_text(json.dumps(manifest | change), encoding="utf-8")
        fails(lambda: ck.read_checkpoint(folder), "version", "hrm-checkpoint")
    for text in ("", "{", "[]", "{}", '{"format": "hrm-checkpoint", "version": 1, "files": {"a": 3}}', "\x00"):
        (folder / "manifest.json").write_text(text, encoding="utf-8")
        fails(lambda: ck.read_checkpoint(folder), "manifest.json", "damaged")
    (folder / "manifest.json").unlink()
    fails(lambda: ck.read_checkpoint(folder), "no manifest.json", "train.py")


def test_a_manifest_cannot_reach_outside_its_folder(folder, tmp_path):
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"] = {"../../../secret.txt": {"sha256": "0", "bytes": 6}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    fails(lambda: ck.read_checkpoint(folder), "secret.txt is missing")


def test_the_card_may_be_edited_and_files_added(folder):
    (folder / "README.md").write_text("# my own words", encoding="utf-8")
    (folder / ".gitattributes").write_text("x", encoding="utf-8")
    assert ck.read_checkpoint(folder).documents["README.md"] == "# my own words"


def test_inference_reads_and_needs_only_the_files_it_asks_for(folder):
    os.truncate(folder / "training_state.safetensors", 3)
    read = ck.read_checkpoint(folder, ["adapter_model"])
    assert set(read.tensors) == {"adapter_model"} and read.documents["training_state.json"] == '{"step": 7}'
    (folder / "training_state.safetensors").unlink()
    (folder / "training_state.json").unlink()
    assert "training_state.json" not in ck.read_checkpoint(folder, ["adapter_model"]).documents
    fails(lambda: ck.read_checkpoint(folder), "training_state")
    fails(lambda: ck.read_checkpoint(folder, ["ema"]), "no ema.safetensors", "adapter_model.safetensors")


# ---- crashes and full disks

@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_failing_rename_keeps_the_old_checkpoint(tmp_path, monkeypatch, replacing, nth, error):
    old = write(tmp_path, 1, value=1.0)
    rename, calls = os.rename, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == nth:
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    step = 1 if replacing else 2
    if nth == 2 and not replacing:
        write(tmp_path, step)  # a new folder takes one rename
        return
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        write(tmp_path, step, value=2.0)
    assert names(tmp_path / "checkpoints") == [old.name]
    assert ck.read_checkpoint(old).tensors["adapter_model"]["w"].tolist() == [1.0] * 3


CRASH = """
import os, sys, torch
from engine import checkpoints as ck
at, run, step, calls = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), []
def dying(function):
    def call(*arguments):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), 9)
        return function(*arguments)
    return call
os.rename, os.fsync = dying(os.rename), dying(os.fsync)
ck.write_checkpoint(ck.step_folder(run, step), {"adapter_model": {"w": torch.full((3,), 2.0)}}, {"a.json": "{}"})
"""


@pytest.mark.parametrize("at, step", [(1, 2), (3, 2), (5, 2), (5, 1), (6, 1), (7, 1)])
def test_a_kill_at_any_moment_leaves_a_usable_checkpoint(tmp_path, at, step):
    """fsync of two files, manifest and folder are calls 1 to 4, renames follow; step 1 replaces an existing folder."""
    write(tmp_path, 1, value=1.0)
    done = subprocess.run([sys.executable, "-c", CRASH, str(at), str(tmp_path), str(step)],
                          cwd=Path(ck.__file__).parent.parent, capture_output=True)
    assert done.returncode == -9, done.stderr
    newest = ck.newest_checkpoint(tmp_path)
    assert newest is not None
    expected = 2.0 if (at, step) == (7, 1) else 1.0  # the last one died after the second rename
    assert ck.read_checkpoint(newest).tensors["adapter_model"]["w"].tolist() == [expected] * 3
    ck.rotate(tmp_path, 0)
    assert names(tmp_path / "checkpoints") == ["step-00000001"]


def test_a_full_disk_says_what_was_needed_and_leaves_nothing(tmp_path, monkeypatch):
    old, real, calls = write(tmp_path, 1), os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    big = {"adapter_model": {"w": torch.zeros(500_000)}}
    fails(lambda: ck.write_checkpoint(ck.step_folder(tmp_path, 2), big, DOCUMENTS), "disk is full", "2.000 MB needed",
          "MB free", "step-00000002")
    assert names(tmp_path / "checkpoints") == [old.name] and ck.newest_checkpoint(tmp_path) == old


def test_a_file_in_the_way_is_one_line(tmp_path):
    (tmp_path / "run").write_text("", encoding="utf-8")
    fails(lambda: write(tmp_path / "run", 1), "cannot write", "--save_dir")


def test_disk_check_leaves_nothing_behind(tmp_path, monkeypatch):
    ck.disk_check(tmp_path / "a" / "b")
    assert names(tmp_path) == []
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").write_text("", encoding="utf-8")
    ck.disk_check(tmp_path / "runs")
    assert names(tmp_path / "runs") == ["mine"]
    fails(lambda: ck.disk_check(tmp_path / "runs" / "mine" / "x"), "cannot write", "mine", "--save_dir")

    def refused(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(ck, "write_synced", refused)
    fails(lambda: ck.disk_check(tmp_path / "new" / "deep"), "Read-only")
    assert names(tmp_path) == ["runs"] and names(tmp_path / "runs") == ["mine"]


# ---- which checkpoint

def test_folders_are_sorted_by_step_and_the_newest_is_complete(tmp_path):
    assert ck.checkpoint_folders(tmp_path) == [] and ck.newest_checkpoint(tmp_path) is None
    for step in (5, 123456789, 40):
        write(tmp_path, step)
    place = tmp_path / "checkpoints"
    for junk in (".tmp-step-999999999999-1", "step-abc", "step-99999999999"):
        (place / junk).mkdir()
    (place / "step-77777777777").write_text("a file", encoding="utf-8")
    found = [int(f.name[5:]) for f in ck.checkpoint_folders(tmp_path)]
    assert found == [5, 40, 123456789, 99999999999]
    assert ck.newest_checkpoint(tmp_path) == place / "step-123456789"
    os.truncate(place / "step-123456789" / "training_state.safetensors", 4)
    assert ck.newest_checkpoint(tmp_path) == place / "step-00000040"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 7), st.sets(st.integers(1, 9)))
def test_rotation_keeps_the_newest_and_whatever_is_to_be_kept(tmp_path_factory, steps, limit, keep):
    run = tmp_path_factory.mktemp("run")
    for step in steps:
        write(run, step)
    removed = ck.rotate(run, limit, [ck.step_folder(run, step) for step in keep])
    newest = set(sorted(steps)[-limit:]) if limit else steps
    assert {int(f.name[5:]) for f in ck.checkpoint_folders(run)} == newest | (keep & steps)
    assert len(removed) == len(steps - newest - keep) and not any(f.exists() for f in removed)


def test_rotation_spares_the_best_live_writers_and_what_is_not_ours(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    ck.mark_best(tmp_path, ck.step_folder(tmp_path, 2), "solved", 0.5)
    place = tmp_path / "checkpoints"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for junk in (f".tmp-step-00000009-{os.getpid()}", f".tmp-step-00000009-{dead.pid}",
                 f".tmp-step-00000008-{os.getppid()}", "step-00000000", "notes"):
        (place / junk).mkdir()
    ck.newest_checkpoint(tmp_path)
    assert len(names(place)) == 9, "looking must not delete: the writer may live on another machine"
    ck.rotate(tmp_path, 1, [place / "step-00000001"])
    assert names(place) == sorted([f".tmp-step-00000008-{os.getppid()}", "notes", "step-00000000", "step-00000001",
                                   "step-00000002", "step-00000004"])
    fails(lambda: ck.rotate(tmp_path, -1), "-1", "--checkpoint_limit")


def test_the_best_is_remembered_until_it_is_gone(tmp_path):
    assert ck.best_checkpoint(tmp_path) is None
    folder = write(tmp_path / "run", 3)
    ck.mark_best(tmp_path / "run", folder, "solved", 0.711)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    moved = ck.step_folder(tmp_path / "moved", 3)
    assert ck.best_checkpoint(tmp_path / "moved") == (moved, "solved", 0.711)
    fails(lambda: ck.mark_best(tmp_path / "moved", moved, "loss", float("nan")), "nan")
    shutil.rmtree(moved)
    assert ck.best_checkpoint(tmp_path / "moved") is None
    (tmp_path / "moved" / "best.json").write_text("{", encoding="utf-8")
    fails(lambda: ck.best_checkpoint(tmp_path / "moved"), "best.json", "damaged")


def test_resume_finds_checkpoints_runs_folders_and_the_latest_of_all(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    first, second = write(runs / "first", 900), write(runs / "second", 10)
    write(runs / "second", 5)
    for age, folder in enumerate((second, first)):
        os.utime(folder / "manifest.json", (2e9 - age, 2e9 - age))
    assert resolve_resume("auto", runs) == second
    for text in (second, runs / "second", runs / "second" / "checkpoints", "second"):
        assert resolve_resume(str(text), runs) == second
    monkeypatch.chdir(runs / "second" / "checkpoints")
    assert resolve_resume(".", runs).resolve() == second and resolve_resume("../", runs).resolve() == second
    fails(lambda: resolve_resume("secnod", runs), "does not exist", "runs/second", "'auto'")
    fails(lambda: resolve_resume("", runs), "does not exist")
    fails(lambda: resolve_resume(str(second / "README.md"), runs), "neither")
    fails(lambda: resolve_resume("x", tmp_path / "none"), "none here")
    fails(lambda: resolve_resume("auto", tmp_path / "none"), "no whole checkpoint")
    (first / "training_state.safetensors").unlink()
    fails(lambda: resolve_resume("first", runs), "no whole checkpoint", "step-00000900", "training_state")


# ---- optimizer and random numbers

def model_and_optimizer(kind: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.Tanh(), torch.nn.Linear(80, 2)).to(dtype)
    unused = torch.nn.Parameter(torch.zeros(2))
    groups = [{"params": [model[0].weight, model[2].weight], "weight_decay": 0.1},
              {"params": [model[0].bias, model[2].bias, unused], "weight_decay": 0.0}]
    if kind == "adamw_8bit":
        optimizer = pytest.importorskip("bitsandbytes").optim.AdamW8bit(groups, lr=1e-2)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), amsgrad=kind == "amsgrad")
    return model, optimizer, ["0.weight", "2.weight", "0.bias", "2.bias", "unused"]


def train(model, optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.param_groups[0]["lr"] *= 0.9
        model(torch.randn(8, 64).to(model[0].weight.dtype)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "amsgrad", "adamw_8bit"])
def test_a_resumed_optimizer_steps_as_the_uninterrupted_one(tmp_path, kind, dtype):
    model, optimizer, order = model_and_optimizer(kind, dtype)
    train(model, optimizer, 3)
    moments, document = pack_optimizer(optimizer, order)
    states, rng = pack_rng()
    folder = ck.write_checkpoint(tmp_path / "step-3",
                                 {"training_state": {**moments, **states}, "m": model.state_dict()},
                                 {"training_state.json": json.dumps({"optimizer": document, "rng": rng})})
    train(model, optimizer, 3)

    resumed, other, order = model_and_optimizer(kind, dtype)
    for group in other.param_groups:
        group["lr"] = 123.0
    read = ck.read_checkpoint(folder)
    saved = json.loads(read.documents["training_state.json"])
    resumed.load_state_dict(read.tensors["m"])
    unpack_optimizer(other, order, read.tensors["training_state"], saved["optimizer"])
    assert unpack_rng(read.tensors["training_state"], saved["rng"]) == []
    train(resumed, other, 3)

    assert all(same(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    left, right = (pack_optimizer(o, order) for o in (optimizer, other))
    assert left[1] == right[1] and set(left[0]) == set(right[0])
    assert all(same(left[0][key], right[0][key]) for key in left[0])
    assert [type(o.param_groups[0]["betas"]) for o in (optimizer, other)] == [tuple, tuple]
    if kind == "adamw_8bit":
        assert left[0]["optimizer/0.weight/state1"].dtype == torch.uint8
        assert left[1]["parameters"][0]["scalars"]["step"] == 6


def test_restored_moments_share_no_memory_with_what_was_read():
    model, optimizer, order = model_and_optimizer("adamw")
    train(model, optimizer, 1)
    tensors, document = pack_optimizer(optimizer, order)
    copy = {key: value.clone() for key, value in tensors.items()}
    other_model, other, _ = model_and_optimizer("adamw")
    unpack_optimizer(other, order, copy, document)
    before = {key: value.clone() for key, value in copy.items()}
    train(other_model, other, 1)
    assert all(same(before[key], copy[key]) for key in copy)


def test_a_different_optimizer_or_model_is_named_and_changes_nothing():
    model, optimizer, order = model_and_optimizer("adamw")
    train(model, optimizer, 2)
    tensors, document = pack_optimizer(optimizer, order)
    _, fresh, _ = model_and_optimizer("adamw")
    renamed = [order[0], "gate", *order[2:]]
    fails(lambda: unpack_optimizer(fresh, renamed, tensors, document), "2.weight", "gate", "parameter 1")
    wide = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(80, 65))])
    fails(lambda: unpack_optimizer(wide, order[:1], tensors, document), "[80, 64]", "[80, 65]")
    one = torch.optim.AdamW([{"params": group["params"]} for group in fresh.param_groups[:1]])
    fails(lambda: unpack_optimizer(one, order[:2], tensors, document), "0.bias", "no parameter")
    flat = torch.optim.AdamW([p for group in fresh.param_groups for p in group["params"]])
    fails(lambda: unpack_optimizer(flat, order, tensors, document), "0.bias [80] of group 1", "of group 0")
    sgd = torch.optim.SGD(fresh.param_groups[0]["params"])
    fails(lambda: unpack_optimizer(sgd, order[:2], tensors, document), "AdamW", "SGD", "--optimizer")
    short = {key: value for key, value in tensors.items() if key != "optimizer/0.bias/exp_avg"}
    fails(lambda: unpack_optimizer(fresh, order, short, document), "optimizer/0.bias/exp_avg", "missing")
    extra = tensors | {"optimizer/x/exp_avg": torch.zeros(1)}
    fails(lambda: unpack_optimizer(fresh, order, extra, document), "optimizer/x/exp_avg", "does not belong")
    assert not fresh.state


def test_random_numbers_continue_where_they_stopped():
    random.gauss(0, 1)
    np.random.standard_normal(3)

    def draw() -> tuple:
        return torch.rand(5).tolist(), random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist()

    tensors, document = pack_rng()
    document = json.loads(json.dumps(document))
    expected = draw()
    assert draw() != expected
    unpack_rng(tensors, document)
    assert draw() == expected
    notes = unpack_rng({**tensors, "rng/cuda/0": torch.get_rng_state()}, document)
    assert torch.cuda.is_available() or "1 CUDA devices, this machine 0" in notes[0]


# ---- the newest whole checkpoint

def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_the_newest_checkpoint_is_found_by_hash_and_the_one_before_is_taken(tmp_path):
    older, newer = write(tmp_path / "runs" / "a", 2), write(tmp_path / "runs" / "a", 4)
    for folder, age in ((older, 100), (newer, 50)):
        os.utime(folder / "manifest.json", (2e9 - age, 2e9 - age))
        os.utime(folder, (2e9 - age, 2e9 - age))
    assert ck.newest_checkpoint(tmp_path / "runs" / "a") == newer and ck.damage_of(newer) is None
    flip(newer / "training_state.safetensors")
    assert ck.newest_checkpoint(tmp_path / "runs" / "a") == older
    assert resolve_resume("auto", tmp_path / "runs") == resolve_resume("a", tmp_path / "runs") == older
    for save_dir in (None, tmp_path / "runs"):
        (line,) = passed_over(older, save_dir)
        assert "training_state.safetensors is damaged" in line and f"{newer} is passed over, {older} is the" in line
    assert passed_over(newer, None) == []
    flip(older / "training_state.safetensors")
    fails(lambda: resolve_resume("a", tmp_path / "runs"), "no whole checkpoint", "step-00000004", "is damaged")
    fails(lambda: resolve_resume("auto", tmp_path / "runs"), "no whole checkpoint")


def test_a_finished_run_is_rid_of_what_its_last_save_left(tmp_path):
    folder = write(tmp_path, 4)
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True).stdout.strip()
    for name in (f".tmp-step-00000004-{dead}", f".old-step-00000004-{dead}"):
        shutil.copytree(folder, folder.with_name(name))
    ck.remove_leftovers(tmp_path)
    assert names(tmp_path / "checkpoints") == [folder.name]
