"""script_tools: how a script ends when it is told to."""

from __future__ import annotations

import signal
import sys

from engine.files import staged
from script_tools import run_script


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
