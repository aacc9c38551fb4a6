"""soak_memory: figures from looks at a run, growth that is too much, lengths that cannot be, a short soak."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import soak_memory

WORDS = ["soak_memory.py", "--steps", "400", "--settled", "100"]


def looks(end):
    """A run that holds 100 bytes, and `end` from batch 300 on; 900 in its last evaluation."""
    return [(step, end if step > 300 else 100) for step in range(400)] + [(400, 900)]


@pytest.mark.parametrize("end, status", [(114, 0), (116, 1)])
def test_the_end_is_held_against_the_beginning_without_the_last_evaluation(end, status, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(soak_memory, "watched", lambda args: looks(end))
    monkeypatch.setattr(sys, "argv", [*WORDS, "--output", str(tmp_path / "soak.json")])
    assert soak_memory.main() == status
    figures = json.loads((tmp_path / "soak.json").read_text(encoding="utf-8"))
    assert figures["bytes"] == {"100": 100, "400": end} and figures["ratio"] == end / 100
    assert f"{end / 100:.3f} times as much" in capsys.readouterr().out


def test_batches_that_nobody_saw_are_told():
    with pytest.raises(ValueError, match="the batches before 100 were over between two looks"):
        soak_memory.most_until([(0, 5), (300, 5)], 100)


def test_batches_are_counted_from_whole_lines_alone(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert soak_memory.batches_in(metrics) == 0
    metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3', encoding="utf-8")
    assert soak_memory.batches_in(metrics) == 2


@pytest.mark.parametrize("words, line", [
    ("--steps 300", "--steps 300 must be at least --settled and 50 more, 350"), ("--settled 0", "must be at least 1"),
])
def test_lengths_that_cannot_be_are_one_line(words, line, capsys):
    with pytest.raises(SystemExit) as end:
        soak_memory.parse(words.split())
    assert end.value.code == 2 and line in capsys.readouterr().err


@pytest.mark.slow
def test_a_short_soak_stays_within_its_limit():
    args = soak_memory.parse(["--steps", "400", "--settled", "150"])
    assert soak_memory.figures_of(soak_memory.watched(args), args)["ratio"] <= soak_memory.MOST_GROWTH
