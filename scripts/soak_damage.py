"""Damage and full disks of scripts/soak.py: each file of what a run goes on from, and each kind of write."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.checkpoints import UNVERIFIED, damage_of
from soak_child import FILLER
from soak_runs import RUN, Ended, Place

DISK = "48m"
NEVER = "not written so often"
Damage = Callable[[Path], None]
Case = dict[str, Any]


# --- damage -----------------------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    """Half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    """A file of no bytes."""
    os.truncate(path, 0)


def flipped(path: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def deleted(path: Path) -> None:
    """No file."""
    path.unlink()


def a_folder(path: Path) -> None:
    """A folder in its place."""
    path.unlink()
    path.mkdir()


def unreadable(path: Path) -> None:
    """A file that the command may not read."""
    path.chmod(0)


KINDS: dict[str, Damage] = {
    "truncated": truncated, "emptied": emptied, "one bit flipped": flipped, "deleted": deleted,
    "a folder in its place": a_folder, "unreadable": unreadable,
}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        found[str(path.relative_to(folder))] = (state.st_size, state.st_mtime_ns)

    return found


def refused(done: Ended, path: Path) -> str:
    """What is wrong with how damage was refused: one line, exit status 2, and the file's name; "" = nothing."""
    lines = [line for line in done.text.splitlines() if ": error: " in line]
    if "Traceback" in done.text:
        return f"a traceback: {done.last_line}"
    if done.status != 2 or len(lines) != 1:
        return f"exit status {done.status} and {len(lines)} errors: {done.last_line}"

    return "" if str(path) in lines[0] or str(path.parent) in lines[0] and path.name in lines[0] else lines[0]


def gone_on(done: Ended, path: Path, place: Place, newest_only: bool = False) -> str:
    """What is wrong with how a run passed over damage; "" = nothing."""
    if "Traceback" in done.text or done.status != 0:
        return f"exit status {done.status}: {done.last_line}"
    if path.name not in done.text or "WARNING" not in done.text and "is damaged" not in done.text:
        return f"nothing names {path.name}"

    return "; ".join(place.differences(newest_only))


def without_name(argv: list[str]) -> list[str]:
    """A command line that does not name its run."""
    at = argv.index("--run_name")

    return argv[:at] + argv[at + 2 :]


def checkpoint_cases(place: Place) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Each file of the newest checkpoint, damaged in each way: its path is refused, `auto` takes the one before."""
    place.reference()
    newest = sorted((place.kept / "runs" / RUN / "checkpoints").glob("step-*"))[-1]
    names = sorted(path.name for path in newest.iterdir() if path.name not in UNVERIFIED)
    for name in names:
        for kind in KINDS:
            yield f"checkpoint: {name}, {kind}", lambda name=name, kind=kind: damaged_checkpoint(place, name, kind)


def damaged_checkpoint(place: Place, name: str, kind: str) -> Case:
    """One file of the newest checkpoint is damaged."""
    place.restore()
    newest = sorted((place.run_folder / "checkpoints").glob("step-*"))[-1]
    path = newest / name
    KINDS[kind](path)

    before = snapshot(place.run_folder)
    by_path = place.bench.run([*place.argv, "--resume", str(newest)], place.strike(), plain=kind == "unreadable")
    why = refused(by_path, path)
    if not why and snapshot(place.run_folder) != before:
        why = "what was refused has changed files"
    if why:
        return {"moment": "--resume PATH", "why": why, "status": by_path.status}
    auto = place.bench.run([*without_name(place.argv), "--resume", "auto"], place.strike(), plain=kind == "unreadable")

    return {"moment": "--resume PATH, auto", "why": gone_on(auto, path, place), "status": auto.status,
            "cpu_s": round(by_path.cpu_s + auto.cpu_s, 2)}


def cache_cases(place: Place) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Each file of the cache on disk, damaged in each way: what cannot be used is filled again."""
    if not place.system.cache:
        return
    place.reference()
    (folder,) = [path for path in (place.kept / "cache").iterdir() if path.is_dir()]
    for name in sorted(path.name for path in folder.iterdir()):
        for kind in KINDS:
            yield f"cache: {name}, {kind}", lambda name=name, kind=kind: damaged_cache(place, folder.name, name, kind)


def damaged_cache(place: Place, key: str, name: str, kind: str) -> Case:
    """One file of the cache is damaged before a run begins."""
    place.restore()
    shutil.rmtree(place.live / "runs")
    (place.live / "runs").mkdir()
    path = place.cache / key / name
    KINDS[kind](path)

    done = place.bench.run(place.argv, place.strike(), plain=kind == "unreadable")
    why = ""
    if done.status != 0 and kind == "a folder in its place":  # which the program did not make, and does not remove
        why = refused(done, path)
    elif done.status != 0 or "Traceback" in done.text:
        why = f"exit status {done.status}: {done.last_line}"
    elif kind != "deleted" and name.startswith("shard") and f"{path} is damaged" not in done.text:
        why = f"nothing names {name}"
    else:
        why = "; ".join(place.differences())

    return {"moment": "a run begins", "why": why, "status": done.status, "cpu_s": done.cpu_s}


def state_cases(place: Place) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Each file of the newest state of an interrupted stage of GRPO, damaged in each way: the one before is taken."""
    if place.system.name != "grpo":
        return
    kept = place.folder / "interrupted"
    if not kept.exists():
        place.reference()
        place.clear()
        done = place.bench.run(place.argv, place.strike(
            kind="signal", signal=signal.SIGTERM, phase="sampling", index=11))
        if done.status != 143:
            raise ValueError(f"GRPO was not interrupted in its second stage: {done.text}")
        place.live.rename(kept)
    state = sorted(kept.glob("runs/*/stages/math/state-*"))[-1]
    for name in sorted(path.name for path in state.iterdir()):
        for kind in KINDS:
            where = state.relative_to(kept) / name
            yield f"stage: {name}, {kind}", lambda where=where, kind=kind: damaged_state(place, kept, where, kind)


def damaged_state(place: Place, kept: Path, where: Path, kind: str) -> Case:
    """One file of the newest state is damaged."""
    shutil.rmtree(place.live, ignore_errors=True)
    shutil.copytree(kept, place.live)
    path = place.live / where
    KINDS[kind](path)

    done = place.bench.run(place.argv, place.strike(), plain=kind == "unreadable")

    return {"moment": "the run goes on", "why": gone_on(done, path, place, newest_only=True), "status": done.status,
            "cpu_s": done.cpu_s}


def damage_cases(place: Place) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Every case of damage to what a system goes on from."""
    for cases in (checkpoint_cases, cache_cases, state_cases):
        yield from cases(place)


# --- full disks -------------------------------------------------------------------------------------------------------


# What a run writes, as the end of a name; where it is opened, or its folder made, the disk is full.
WRITES = {
    "run.json": r"/run\.json$", "eval.csv": r"/eval\.csv$", "metrics.jsonl": r"/metrics\.jsonl$",
    "predictions.jsonl": r"/predictions\.jsonl$", "a checkpoint's folder": r"/\.tmp-step-\d+-\d+$",
    "a checkpoint's weights": r"/\.tmp-step-\d+-\d+/(model|adapter_model)\.safetensors$",
    "a checkpoint's manifest": r"/\.tmp-step-\d+-\d+/manifest\.json$",
    "config.resolved.yaml": r"/\.tmp-config\.resolved\.yaml-\d+$", "curve.png": r"/\.tmp-curve\.png-\d+$",
    "report.html": r"/\.tmp-report\.html-\d+$", "the cache's record": r"/\.tmp-cache\.json-\d+$",
    "a shard of the cache": r"/\.tmp-shard-.*-\d+$", "a shard's lock": r"\.lock$",
    "a stage's beginning": r"/\.tmp-begun_at\.json-\d+$", "a stage's start": r"/\.tmp-start\.json-\d+$",
    "a stage's state": r"/stages/\w+/\.tmp-state-\d+$", "a stage's samples": r"/samples/\.tmp-\w+\.jsonl-\d+$",
}
WARNED = ("curve.png", "report.html")  # drawn at the end from what is saved: a warning is enough


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[str]:
    """Inside, `place` is a file system of its own; the value says how it is filled: tmpfs, or rlimit without one."""
    place.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=777", "tmpfs", str(place)]
    is_mounted = bool(shutil.which("mount")) and subprocess.run(words, capture_output=True).returncode == 0
    try:
        yield "tmpfs" if is_mounted else "rlimit"
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


def disk_cases(place: Place) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Each kind of write of a run, the first of its kind and a later one."""
    for name in WRITES:
        for index in (1, 3):
            yield f"{name}, write {index}", lambda name=name, index=index: full_disk(place, name, index)


def full_disk(place: Place, name: str, index: int) -> Case:
    """The disk is full from one write on; then there is room again, and the run goes on."""
    place.reference()
    shutil.rmtree(place.live, ignore_errors=True)
    with small_disk(place.live) as way:
        done = place.bench.run(place.argv, place.strike(
            kind="fill_disk", pattern=WRITES[name], index=index, folder=str(place.live), way=way))
        if not done.facts.get("file"):
            return {"moment": NEVER, "why": "" if done.status == 0 else done.last_line}
        why = said_full(done, name)
        for checkpoint in sorted((place.run_folder / "checkpoints").glob("step-*")):
            why = why or damage_of(checkpoint) or ""
        (place.live / FILLER).unlink(missing_ok=True)

        again = place.bench.run(place.argv, place.strike())
        if again.status != 0:
            why = why or f"exit status {again.status} when it goes on: {again.last_line}"
        why = why or "; ".join(place.differences())

    return {"moment": way, "why": why, "status": done.status, "cpu_s": round(done.cpu_s + again.cpu_s, 2)}


def said_full(done: Ended, name: str) -> str:
    """What is wrong with how a full disk was told; "" = nothing."""
    if "Traceback" in done.text:
        return f"a traceback: {done.last_line}"
    says = re.search(r"disk is full|No space left|File too large|are free there", done.text)
    if done.status == 0 and name in WARNED and "WARNING" in done.text and says:
        return ""
    if done.status not in (2, 3) or not says:
        return f"exit status {done.status}: {done.last_line}"

    return ""


def some(cases: list[Any], most: int, seed: int) -> list[Any]:
    """A few cases, drawn; in their order."""
    kept = sorted(random.Random(seed).sample(range(len(cases)), min(most, len(cases))))

    return [cases[index] for index in kept]
