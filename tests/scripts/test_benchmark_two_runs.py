"""benchmark_two_runs: the ratio of its turns and the exit status, settings that cannot be, a short measurement."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import benchmark_two_runs as two


@pytest.mark.parametrize("each, status", [(1.9, 0), (1.7, 1)])
def test_the_batches_of_both_are_held_against_one_run_alone(each, status, monkeypatch, capsys):
    monkeypatch.setattr(two, "rates", lambda runs, args: [4.0] if runs == 1 else [each, each])
    monkeypatch.setattr(sys, "argv", ["benchmark_two_runs.py", "--rounds", "1"])
    assert two.main() == status
    assert f"{2 * each / 4:.2f} [" in capsys.readouterr().out


def test_a_run_that_gets_less_than_its_share_shows():
    figures = two.figures_of([([4.0], [3.0, 1.0])])
    assert figures["ratio"]["median"] == 1.0 and figures["share of the slower"]["median"] == 0.25


@pytest.mark.parametrize("words", ["--seconds 0", "--rounds 0"])
def test_settings_that_cannot_be_are_one_line(words, capsys):
    with pytest.raises(SystemExit) as end:
        two.parse(words.split())
    assert end.value.code == 2 and "--seconds must be above 0" in capsys.readouterr().err


def test_a_run_that_fails_is_named_with_its_last_words():
    with pytest.raises(ValueError, match="train.py ended: .*--d_h"):
        two.rates(1, two.parse(["--flags", "--d_h nothing"]))


@pytest.mark.slow
def test_two_runs_are_counted():
    both = two.rates(2, two.parse(["--seconds", "5", "--flags", "--d_h 16 --n_heads 2 --batch_size 4 --num_threads 1"]))
    assert len(both) == 2 and min(both) > 0
