"""benchmark_cost: what it measures and prints on a tiny LLM, sizes that cannot be."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import benchmark_cost


def test_each_kind_of_work_is_shown_beside_what_is_expected_of_it(monkeypatch, capsys):
    words = "--width 64 --layers 1 --vocabulary 2048 --d_h 16 --batch_size 2 --repeats 1".split()
    monkeypatch.setattr(sys, "argv", ["benchmark_cost.py", *words])
    assert benchmark_cost.main() == 0
    out = capsys.readouterr().out
    assert out.startswith("2 texts of ")
    took = dict(re.findall(r"(\w+) +[\d.]+ GFLOP  expected [\d.]+ s  took ([\d.]+) s", out))
    assert took.keys() == {"encode", "cached", "whole"} and all(float(seconds) > 0 for seconds in took.values())


@pytest.mark.parametrize("words", ["--width 100", "--vocabulary 9", "--repeats 0"])
def test_sizes_that_cannot_be_are_one_line(words, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark_cost.parse(words.split())
    assert end.value.code == 2 and "--width must be a multiple of 64" in capsys.readouterr().err
