"""files: whole or not at all, one line for the user, JSON lines with their numbers."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.files import (
    JsonLineError,
    WriteError,
    json_lines,
    named_paths,
    parse_json,
    read_json,
    read_text,
    staged,
    write_bytes_aside,
    write_text_aside,
)

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


# Half of a surrogate pair is no character: no UTF-8 file holds it, and tokenizers raise on it.
HALVES = [rb'{"a": "\ud83d"}', rb'{"\uDFFF": 1}', rb'["\ud83dx"]', rb'["\ud83d\u0041"]', rb'["\\\ud83d"]']
BROKEN = [b"{", b"\xff", b"[" * 100_000, b'{"a": ' * 5000 + b"1" + b"}" * 5000, b"1" * 5000, b'"\0"', b'"\xed\xa0\x80"']


@pytest.mark.parametrize("line", [*BROKEN, *HALVES])
def test_json_that_no_program_can_use_is_refused_in_one_line_that_names_the_place(tmp_path, line):
    path = tmp_path / "a.json"
    path.write_bytes(b"\n" + line)
    with pytest.raises(ValueError) as error:
        read_json(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    if line in HALVES:
        assert "a.json line 2" in str(error.value) and "lone surrogate" in str(error.value)
    path.write_bytes(b"1\n" + line + b"\n3\n")
    with pytest.raises(JsonLineError, match="a.json, line 2 is not JSON") as caught:
        list(json_lines(path))
    assert caught.value.number == 2 and caught.value.reason and "\n" not in str(caught.value)


def test_whole_pairs_and_escaped_backslashes_are_text():
    assert parse_json(rb'["\ud83d\ude00", "\\ud83d", "\u0000"]') == ["\U0001f600", "\\ud83d", "\0"]


def test_data_that_people_wrote_hold_no_nul_and_no_name_twice(tmp_path):
    for text, told in ((r'["a", "\u0000"]', "holds \\u0000, a NUL"), ('{"a": 1, "a": 2}', "holds 'a' twice")):
        with pytest.raises(ValueError) as error:
            parse_json(text, strict=True)
        assert told in str(error.value)
        (tmp_path / "a.jsonl").write_text(f"1\n{text}\n", encoding="utf-8")
        with pytest.raises(JsonLineError, match="line 2"):
            list(json_lines(tmp_path / "a.jsonl", strict=True))
    assert parse_json(r'["\\u0000"]', strict=True) == ["\\u0000"]


def test_a_record_that_a_model_filled_with_half_a_pair_is_still_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(rb'{"a": "\ud83d"}')
    assert list(json_lines(path, skip_damaged=True)) == [(1, {"a": "\ud83d"})]


@pytest.mark.parametrize(("content", "reason"), [
    (b"a\nb\xe9", "line 2: unexpected end of data"), (b"a\n\nb\0", "line 3 holds a NUL"),
    ("a\n".encode("utf-16"), "line 1: invalid start byte")])
def test_a_file_that_is_no_text_is_named_with_its_line(tmp_path, content, reason):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_text(tmp_path / "a.txt")
    assert str(tmp_path / "a.txt") in str(error.value) and reason in str(error.value)
    for missing in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=f"{missing} cannot be read: "):
            read_text(missing)


def test_text_is_read_whatever_its_byte_order_mark_and_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffä\r\nb\rc\u2028".encode())
    assert read_text(tmp_path / "a.txt") == "ä\nb\nc\u2028"


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


# --- paths on the command line


def test_a_path_may_hold_a_comma(tmp_path):
    (tmp_path / "a,b").mkdir()
    odd = tmp_path / "a,b" / "x, y=1,.txt"
    odd.write_text("", encoding="utf-8")
    plain = tmp_path / "plain.txt"
    plain.write_text("", encoding="utf-8")
    expected = [("perplexity", str(odd)), ("synthetic", ""), ("gsm8k", str(plain))]
    escaped = str(odd).replace(",", "\\,")
    assert named_paths(f"perplexity={odd}, synthetic ,gsm8k={plain}") == expected
    assert named_paths(f"perplexity={escaped},synthetic,gsm8k={plain}") == expected
    assert named_paths(f"gsm8k={plain},perplexity={odd}") == [expected[2], expected[0]]


@pytest.mark.parametrize(("text", "entries"), [
    ("a=x,b", [("a", "x"), ("b", "")]), ("", [("", "")]), ("a=,b=y=z", [("a", ""), ("b", "y=z")]),
    (",a", [("", ""), ("a", "")]), ("=x", [("", "x")]), (r"a=x\,y", [("a", "x,y")]), (r"a=\,", [("a", ",")]),
    (r"a=C:\x,b", [("a", r"C:\x"), ("b", "")])])
def test_a_comma_parts_entries_where_no_file_says_otherwise(text, entries):
    assert named_paths(text) == entries
