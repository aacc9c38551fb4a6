"""script_tools: how a script ends when it is told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import export_model
from engine.files import staged
from script_tools import ScriptParser, run_script


def test_sigterm_ends_a_script_as_ctrl_c_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scripts/one.py"])
    before = signal.getsignal(signal.SIGTERM)

    def stopped(number):
        with staged(tmp_path, ["rows.jsonl"]) as (file,):
            file.write(b"half a row")
            signal.raise_signal(number)

    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        assert run_script(lambda number=number: stopped(number)) == status
        assert "one.py: interrupted; nothing was left" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("words", "told"), [
    ([], "the following arguments are required: run"),
    (["a", "b"], "unrecognized arguments: b"),
    (["a", "--limit", "many"], "argument --limit: invalid int value: 'many'"),
])
def test_a_mistake_is_one_line_without_the_usage(words, told, capsys):
    parser = ScriptParser("A script.")
    parser.add_argument("run")
    parser.add_argument("--limit", type=int)
    with pytest.raises(SystemExit) as left:
        parser.parse_args(words)
    assert left.value.code == 2
    assert capsys.readouterr().err == f"{parser.prog}: error: {told}\n"


def test_every_script_s_mistakes_are_told_by_the_shared_parser():
    scripts = Path(export_model.__file__).parent.glob("*.py")
    own = [path.name for path in scripts if "argparse.ArgumentParser(" in path.read_text(encoding="utf-8")]
    assert own == []


def test_an_export_removes_what_a_killed_one_left_and_nothing_else(tmp_path):
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True).stdout.strip()
    for name in (f".tmp-out-{dead}", f".tmp-out-{os.getpid()}", f".tmp-other-{dead}", "out"):
        (tmp_path / name).mkdir()
    export_model.remove_leftovers(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {f".tmp-out-{os.getpid()}", f".tmp-other-{dead}", "out"}
