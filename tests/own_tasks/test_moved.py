"""Runs on own data that lie elsewhere now, on rows that are too long, and on fewer rows than were asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import train
from tiny_rows import sums, write
from tiny_runs import error_lines, newest

pytestmark = pytest.mark.usefixtures("no_curve")  # conftest.py
OWN = ("--task", "none", "--verifier", "number", "--run_name", "mine")


@pytest.fixture
def data(tmp_path) -> Path:
    return Path(write(tmp_path / "mine.jsonl", sums(40)))


def test_the_same_bytes_under_another_name_go_on_as_the_same_task(call, data, tmp_path, capsys):
    mixed = ("--task", "toy_add", "--mix", "mine=3", "--max_steps", "2")
    assert call("--data", str(data), *OWN, *mixed)[0] == 0
    moved = tmp_path / "elsewhere" / "moved.jsonl"
    moved.parent.mkdir()
    data.rename(moved)
    words = ["--resume", str(tmp_path / "runs" / "mine"), "--data", str(moved), "--max_steps", "4"]
    assert train.main(words) == 0
    told = "".join(capsys.readouterr())
    assert "moved.jsonl has the bytes of the checkpoint's data: the task keeps the name mine" in told
    assert "begin anew" not in told and "has changed" not in told
    record = json.loads((newest(tmp_path / "runs" / "mine") / "own_data.json").read_text(encoding="utf-8"))["data"]
    assert record["task"] == "mine" and record["sources"][0]["path"] == str(moved)

    # Other rows are another task.
    write(moved, sums(41))
    assert train.main([*words, "--eval_only"]) == 2
    assert "--mix names mine, which is no task of this run" in error_lines(capsys.readouterr().err)[0]


def test_rows_that_are_too_long_are_named(call, data):
    long = {"question": "0 and " * 40 + "0?", "answer": 0}
    data.write_text(data.read_text(encoding="utf-8") + json.dumps(long) + "\n", encoding="utf-8")
    status, _, err = call("--data", str(data), *OWN, "--max_seq_len", "99")
    (line,) = error_lines(err)
    assert status == 2 and "1 of " in line and " examples are longer than --max_seq_len 99 tokens" in line
    assert "; mine.jsonl line 41): raise it" in line

    status, out, err = call("--data", str(data), *OWN, "--max_seq_len", "99", "--overlong", "drop", "--train_n", "50")
    assert status == 0 and "--max_seq_len 99 tokens and left out, among them mine.jsonl line 41" in out + err
    assert "WARNING: --train_n 50: mine has 37 rows to train on, and trains on all of them" in out + err
