"""benchmark_decoding: ratios of one turn, trees in turn, answers that differ, numbers that cannot be."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import benchmark_decoding


@pytest.mark.parametrize("other, status", [("a", 0), ("b", 1)])
def test_trees_take_turns_and_their_answers_are_compared(other, status, monkeypatch, tmp_path, capsys):
    order = []

    def measured(tree, args):
        now = tree == benchmark_decoding.ROOT
        order.append("now" if now else "before")
        pairs = {"decoding, batch 64": [(1.0, 1.0 if now else 2.0)], "evaluation, batch 64": [(2.0, 3.0)]}
        return {"pairs": pairs, "dtype": "torch.float32", "precision": "none", "answers": "a" if now else other}

    monkeypatch.setattr(benchmark_decoding, "measured", measured)
    monkeypatch.setattr(benchmark_decoding, "unpacked", lambda commit, folder: "abc1234")
    output = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["benchmark_decoding.py", "--against", "v1", "--output", str(output)])
    assert benchmark_decoding.main() == status
    assert order == ["before", "now", "now", "before"]
    ratios = json.loads(output.read_text(encoding="utf-8"))["ratios"]
    assert ratios["abc1234"]["decoding, batch 64"]["median"] == 0.5 and ratios["now"]["decoding, batch 64"]["low"] == 1
    assert ratios["now"]["evaluation, batch 64"]["high"] == 1.5
    assert ("DIFFERENT" in capsys.readouterr().out) == bool(status)


@pytest.mark.parametrize("words", ["--tokens 0", "--batches 64,x", "--batches 0", "--host nowhere"])
def test_numbers_that_cannot_be_are_one_line(words, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark_decoding.parse(words.split())
    assert end.value.code == 2 and words.split()[0] in capsys.readouterr().err


@pytest.mark.slow
def test_this_code_is_measured():
    args = benchmark_decoding.parse("--batches 4 --tokens 2 --items 8 --repeats 1".split())
    measure = benchmark_decoding.measured(benchmark_decoding.ROOT, args)
    assert set(measure["pairs"]) == {"decoding, batch 4", "evaluation, batch 4"} and len(measure["answers"]) == 16
