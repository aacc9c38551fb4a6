"""benchmark: two trees in turn, ratios within a repeat, a commit that git does not know."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import benchmark

SECONDS = {"start": 12.0, "step": 5.0, "cached": 2.0, "disk": 2.5, "fill": 3.0, "muon": 1.0}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Stands in for git and for the processes that measure: the trees that were measured, in order."""
    order = []

    def measured(tree, steps):
        order.append("now" if tree == benchmark.ROOT else "before")
        slower = 1.0 if tree == benchmark.ROOT else 2.0 + len(order) // 2
        return {name: slower * seconds for name, seconds in SECONDS.items()}

    monkeypatch.setattr(benchmark, "measured", measured)
    monkeypatch.setattr(benchmark, "unpacked", lambda commit, folder: "abc1234")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--output", str(tmp_path / "out" / "b.json"), "--repeats", "3"])
    return order


def test_both_trees_take_turns_and_ratios_are_of_one_repeat(fake, tmp_path, capsys):
    assert benchmark.main() == 0
    assert fake == ["before", "now", "now", "before", "before", "now"]
    figures = json.loads((tmp_path / "out" / "b.json").read_text(encoding="utf-8"))
    assert figures["against"] == "abc1234" and set(figures["measures"]) == set(benchmark.MEASURES)
    step = figures["measures"]["step"]
    assert step["now"]["median"] == 5.0 and step["times"] == {"median": 4.0, "low": 2.0, "high": 4.0}
    out = capsys.readouterr().out
    assert "abc1234" in out and "times as fast" in out and "bf16 instructions" in out


def test_a_commit_without_a_cache_on_disk_has_no_figure_of_it(fake, tmp_path, capsys, monkeypatch):
    whole = benchmark.measured

    def measured(tree, steps):
        seconds = whole(tree, steps)
        return seconds if tree == benchmark.ROOT else {name: s for name, s in seconds.items() if name != "disk"}

    monkeypatch.setattr(benchmark, "measured", measured)
    assert benchmark.main() == 0
    out = capsys.readouterr().out
    assert "from disk a step has 0.8 [0.8, 0.8] of its speed from RAM" in out
    figures = json.loads((tmp_path / "out" / "b.json").read_text(encoding="utf-8"))
    assert figures["measures"]["disk"]["before"] is None and figures["disk_of_ram"]["median"] == 0.8


def test_a_commit_that_git_does_not_know_is_told_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="--against nowhere is no commit of this repository"):
        benchmark.unpacked("nowhere", tmp_path)


def test_a_failed_measurement_is_told(tmp_path):
    with pytest.raises(ValueError, match="the measurement in .* failed: ModuleNotFoundError"):
        benchmark.measured(tmp_path, 1)


@pytest.mark.parametrize("flag", ["--repeats", "--steps"])
def test_numbers_are_at_least_one(flag):
    with pytest.raises(SystemExit):
        benchmark.parse([flag, "0"])
