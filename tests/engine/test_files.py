"""files: whole or not at all, one line for the user, JSON lines with their numbers."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.files import JsonLineError, WriteError, json_lines, staged, write_bytes_aside, write_text_aside

ROOT = Path(__file__).resolve().parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fails(call, *words: str) -> None:
    with pytest.raises(WriteError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and isinstance(caught.value, ValueError)
    for word in words:
        assert word in message, message


# --- writing


def test_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text_aside(path, "old é")
    assert path.read_text(encoding="utf-8") == "old é"
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    fails(lambda: write_text_aside(path, "new"), "Input/output error")
    assert path.read_text(encoding="utf-8") == "old é" and names(tmp_path) == ["a.txt"]


def test_a_file_in_the_way_is_one_line(tmp_path):
    (tmp_path / "run").write_text("", encoding="utf-8")
    fails(lambda: write_text_aside(tmp_path / "run" / "a.txt", "x"), "cannot write", "--save_dir")
    fails(lambda: write_bytes_aside(tmp_path / "run" / "a.txt", b"x", "--output"), "cannot write", "--output")


def test_a_full_disk_says_what_was_needed(tmp_path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    fails(lambda: write_bytes_aside(tmp_path / "a", bytes(2_000_000)), "disk is full", "2.000 MB needed", "MB free")
    assert names(tmp_path) == []


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "target").write_text("old", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text_aside(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text(encoding="utf-8") == "new"


def test_leftovers_of_dead_processes_are_removed_and_those_of_the_living_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".tmp-a.txt-{dead.pid}", ".tmp-a.txt-1", f".tmp-other-{dead.pid}"):
        (tmp_path / name).write_text("half", encoding="utf-8")
    write_text_aside(tmp_path / "a.txt", "whole")
    assert names(tmp_path) == sorted([".tmp-a.txt-1", f".tmp-other-{dead.pid}", "a.txt"])


def test_files_appear_together_the_seal_last_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "meta.json").write_text("old", encoding="utf-8")
    with pytest.raises(KeyError), staged(tmp_path, ["train.jsonl", "meta.json"]) as files:
        files[0].write(b"half")
        raise KeyError
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {"meta.json": "old"}
    replaced, real = [], os.replace

    def crash(source, target):
        if replaced:
            raise OSError("the machine stopped here")
        replaced.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="stopped"), staged(tmp_path, ["train.jsonl", "meta.json"]) as files:
        files[0].write(b"new")
        files[1].write(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]  # without its seal: nobody reads it


# --- reading


def test_json_lines_have_the_numbers_of_an_editor(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes("\ufeff{\"a\": \"x\u2028y\"}\n\n  \n[1]\r\n2".encode())
    assert list(json_lines(path)) == [(1, {"a": "x\u2028y"}), (4, [1]), (5, 2)]


@pytest.mark.parametrize("line", [b"{", b"\xff", b"[" * 100_000])
def test_a_damaged_line_is_named_or_skipped(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n" + line + b"\n3\n")
    with pytest.raises(JsonLineError, match="line 2 is not JSON") as caught:
        list(json_lines(path))
    assert caught.value.number == 2 and caught.value.__cause__ is not None
    assert list(json_lines(path, skip_damaged=True)) == [(1, 1), (3, 3)]


def test_a_missing_file_is_an_error_unless_a_run_may_not_have_written_it(tmp_path):
    with pytest.raises(FileNotFoundError):
        list(json_lines(tmp_path / "none"))
    assert list(json_lines(tmp_path / "none", skip_damaged=True)) == []


def test_importing_the_module_imports_nothing_heavy():
    code = "import sys, engine.files; print([m for m in ('torch', 'numpy', 'psutil') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
