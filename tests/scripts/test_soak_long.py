"""soak_long: what counts as growth, too few looks, lengths that cannot be, both ways to start the run, a short soak."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import soak_long
from soak_long import Look, Stretch

TWO = (Stretch(1, "kill"), Stretch(2, "stop"))


def looks(**last):
    """Two starts of 40 looks each that hold the same throughout, but for `last` in the last eight of the second."""
    flat = [Look(start, float(40 * start + look), look, 1, 1000, 10, 4, 500, look, 0)
            for start in range(2) for look in range(40)]
    return [*flat[:72], *(replace(look, **last) for look in flat[72:])]


def test_a_run_that_holds_the_same_throughout_has_not_grown():
    figures = soak_long.figures_of(looks(), TWO)
    assert figures["grown"] == [] and [row["memory"] for row in figures["stretches"]] == [[1000, 1000]] * 2
    assert figures["stretches"][1]["processes"] == 2 and figures["batches"] == 39


@pytest.mark.parametrize("last, grown", [
    ({"memory": 1151}, ["memory of start 2"]), ({"memory": 1149}, []), ({"handles": 11}, ["handles of start 2"]),
    ({"threads": 5}, ["threads of start 2"]), ({"checkpoints": 600}, ["checkpoints"]),
    ({"temporary": 1}, ["temporary"]),
])
def test_each_thing_that_grows_is_named(last, grown):
    assert soak_long.figures_of(looks(**last), TWO)["grown"] == grown


def test_a_start_that_was_hardly_seen_is_refused():
    with pytest.raises(ValueError, match="start 1 has 19 looks: choose more --minutes, or a smaller --every"):
        soak_long.figures_of(looks()[:19], TWO)


def test_two_processes_share_the_batch_of_one(tmp_path):
    args = soak_long.parse(["--output", str(tmp_path), "--batch_size", "6"])
    one, two = soak_long.command(args, 1), soak_long.command(args, 2)
    assert one[one.index("--batch_size") + 1] == "6" and two[two.index("--batch_size") + 1] == "3"
    assert "torch.distributed.run" not in one and two[two.index("--nproc_per_node") + 1] == "2"


@pytest.mark.parametrize("words, line", [
    ("--minutes 0", "must be above 0"), ("--eval_n 0", "must be at least 1"),
    ("--batch_size 5", "--batch_size 5 must be even"),
])
def test_settings_that_cannot_be_are_one_line(words, line, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        soak_long.parse([*words.split(), "--output", str(tmp_path)])
    assert end.value.code == 2 and line in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_refused(capsys, tmp_path):
    (tmp_path / soak_long.RUN).mkdir()
    with pytest.raises(SystemExit):
        soak_long.parse(["--output", str(tmp_path)])
    assert "holds a run already: remove it, or name another folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_six_starts_is_watched_to_its_end(tmp_path):
    words = f"--minutes 6 --every 1 --eval_every 20 --eval_n 8 --batch_size 8 --output {tmp_path}"
    args = soak_long.parse(words.split())
    figures = soak_long.figures_of(soak_long.watch(args))
    assert [row["processes"] for row in figures["stretches"]] == [1, 1, 1, 2, 2, 2]
    assert figures["batches"] > 0 and soak_long.evaluations(tmp_path) > 0
