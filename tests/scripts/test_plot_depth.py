"""plot_depth.py: solved against steps of several arms, from small depth.csv files made by hand."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

import plot_depth
from depth_arms import beyond_from
from depth_report import COLUMNS
from engine.intervals import mean_interval, wilson
from script_tools import csv_text, run_script


def made(path: Path, rates: dict[int, list[float]], trained: int = 2, task: str = "toy_chain", n: int = 10) -> Path:
    """A depth.csv as depth_curve.py writes it: segments -> share solved at 1, 2, ... steps; None leaves a row out."""
    rows = []
    for segments, shares in rates.items():
        own = {"task": task, "segments": segments, "n": n, "seconds": float(len(str(path)))}
        rows.append(own | {"difficulty": "all", "readout": "last", "solved": 0.99})
        for steps, share in enumerate(shares, start=1):
            if share is not None:
                place = {"difficulty": f"steps {steps}", "steps": steps, "beyond_training": int(steps > trained)}
                rows.append(own | place | {"readout": "last", "solved": share})
                rows.append(own | place | {"readout": "on", "solved": 0.98})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(csv_text(COLUMNS, rows), encoding="utf-8")
    return path


@pytest.fixture
def arms(tmp_path) -> list[str]:
    """HRM with three seeds at 1 and 4 segments, LoRA with one; trained on two steps."""
    for seed, last in enumerate((0.8, 0.9, 1.0)):
        made(tmp_path / f"hrm-{seed}" / "depth" / "depth.csv", {1: [0.9, 0.1 * seed, 0.2], 4: [1.0, 1.0, last]})
    made(tmp_path / "lora-0" / "depth" / "depth.csv", {0: [0.7, 0.2, 0.1]})
    return [f"HRM={tmp_path}/hrm-*/depth/depth.csv", f"LoRA={tmp_path}/lora-*"]


def drawn(tmp_path, words) -> list[dict[str, str]]:
    """The rows of OUTPUT.csv."""
    assert plot_depth.main([*words, "--output", str(tmp_path / "out" / "chain.v1")]) == 0
    with open(tmp_path / "out" / "chain.v1.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def refused(monkeypatch, capsys, words, *parts: str) -> None:
    """Exit status 2, one line that holds `parts`, nothing written."""
    monkeypatch.setattr(sys, "argv", ["plot_depth.py"])
    output = Path(words[0].partition("=")[2] or ".").parent / "refused" / "x"
    try:
        status = run_script(lambda: plot_depth.main([*words, "--output", str(output)]))
    except SystemExit as ended:
        status = ended.code
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert status == 2 and len(errors) == 1 and not output.parent.exists()
    assert all(part in errors[0] for part in parts), errors


def test_an_arm_of_several_seeds_has_their_mean_and_its_t_interval(arms, tmp_path):
    rows = drawn(tmp_path, arms)
    assert [(row["arm"], row["segments"], row["steps"]) for row in rows] == [
        *(("HRM", segments, steps) for segments in "14" for steps in "123"), *(("LoRA", "0", steps) for steps in "123")]
    (row,) = [row for row in rows if (row["segments"], row["steps"]) == ("4", "3")]
    expected = mean_interval([0.8, 0.9, 1.0])
    assert (row["seeds"], row["n"], row["interval"]) == ("3", "30", "t over seeds")
    assert float(row["solved"]) == pytest.approx(0.9)
    assert float(row["ci_low"]) == pytest.approx(expected.low, abs=1e-5)
    assert float(row["ci_high"]) == pytest.approx(expected.high, abs=1e-5)
    assert [row["beyond_training"] for row in rows] == ["0", "0", "1"] * 3


def test_one_seed_has_the_wilson_interval_over_its_items_and_is_marked(arms, tmp_path, capsys):
    rows = drawn(tmp_path, arms)
    low, high = wilson(7, 10)
    row = next(row for row in rows if row["arm"] == "LoRA")
    assert (row["seeds"], row["interval"]) == ("1", "Wilson over items")
    assert (float(row["ci_low"]), float(row["ci_high"])) == pytest.approx((low, high), abs=1e-5)
    assert "| LoRA | none | 1* |" in capsys.readouterr().out


def test_the_table_has_a_row_for_each_arm_and_segments_and_a_column_for_each_number_of_steps(arms, tmp_path, capsys):
    drawn(tmp_path, arms)
    table = (tmp_path / "out" / "chain.v1.md").read_text(encoding="utf-8")
    heading, _, one, four, lora, *_ = table.splitlines()
    assert heading == "| arm | segments | seeds | 1 | 2 | 3+ |"
    assert one.startswith("| HRM | 1 | 3 | 90.0<br><sub>90 to 90</sub> | 10.0<br><sub>0 to 35</sub> |")
    assert four.startswith("| HRM | 4 | 3 | 100.0<br>") and four.endswith("| 90.0<br><sub>65 to 100</sub> |")
    assert lora.count("|") == heading.count("|") and table in capsys.readouterr().out


def test_the_rows_that_were_counted_are_kept_as_they_were_read(arms, tmp_path):
    drawn(tmp_path, arms)
    with open(tmp_path / "out" / "chain.v1_rows.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["arm", "file", *COLUMNS] and len(rows) == 3 * 6 + 3
    assert {row["readout"] for row in rows} == {"last"} and all(row["steps"] for row in rows)
    assert [rows[0]["file"], rows[-1]["file"]] == ["hrm-0/depth/depth.csv", "lora-0/depth/depth.csv"]


def test_the_figure_is_written_and_shows_every_line(arms, tmp_path, monkeypatch):
    made(tmp_path / "old-0" / "depth" / "depth.csv", {1: [0.6, 0.2, 0.1], 4: [0.5, 0.2, 0.1]})
    figures = []
    draw = plot_depth.draw
    monkeypatch.setattr(plot_depth, "draw", lambda *words: figures.append(draw(*words)) or figures[-1])
    drawn(tmp_path, [*arms, f"published={tmp_path}/old-*", "--chance", "0.25"])
    content = (tmp_path / "out" / "chain.v1.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000
    (axes,) = figures[0].axes
    names = {text.get_text() for text in axes.texts}
    assert names == {"HRM, 1 segment", "HRM, 4 segments", "LoRA *", "published, 4 segments *", "not trained on",
                     "chance, 25 %"}
    looks = [(line.get_linestyle(), line.get_marker()) for line in axes.lines if line.get_marker() != "None"]
    assert len(looks) == 4 and len(set(looks)) == 3, "the first arm has one look, each other its own"


def test_what_not_all_seeds_measured_is_left_out_and_told(arms, tmp_path, capsys):
    made(tmp_path / "hrm-3" / "depth" / "depth.csv", {4: [1.0, 0.9, None, 0.5]})
    rows = drawn(tmp_path, arms)
    found = [(row["segments"], row["steps"], row["seeds"]) for row in rows if row["arm"] == "HRM"]
    assert found == [("4", "1", "4"), ("4", "2", "4")]
    assert "NOTE: HRM: 5 pairs of segments and steps are left out" in capsys.readouterr().err


def test_steps_that_one_run_was_not_trained_on_are_told_and_not_shaded(arms, tmp_path, capsys):
    made(tmp_path / "lora-1" / "depth" / "depth.csv", {0: [0.6, 0.1, 0.1]}, trained=1)
    rows = drawn(tmp_path, arms)
    assert [row["beyond_training"] for row in rows if row["arm"] == "LoRA"] == ["0", "0", "1"]
    assert "NOTE: LoRA: not every run was trained on steps 2, as others were" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("beyond", "start"), [({1: 0, 2: 0, 3: 1}, 2.5), ({2: 0, 8: 1, 9: 1}, 5.0), ({1: 0, 2: 0}, None), ({3: 1}, 2.5)]
)
def test_the_shade_begins_after_the_last_step_that_was_trained(beyond, start):
    assert beyond_from([{"steps": steps, "beyond_training": value} for steps, value in beyond.items()]) == start


@pytest.mark.parametrize(
    ("heights", "places"),
    [
        ([50.0], [50.0]),
        ([10.0, 90.0, 50.0], [10.0, 90.0, 50.0]),
        ([50.0, 50.0], [47.0, 53.0]),
        ([100.0, 99.0], [100.0, 94.0]),
        ([0.0, 1.0, 2.0], [0.0, 6.0, 12.0]),
        ([50.0] * 26, [4.0 * place for place in range(26)]),
    ],
)
def test_labels_stand_apart_and_near_their_lines(heights, places):
    assert plot_depth.spread(heights, 6.0, 100.0) == pytest.approx(places)


def test_arms_and_files_that_cannot_be_compared_are_refused(tmp_path, monkeypatch, capsys):
    one = made(tmp_path / "one.csv", {1: [0.5, 0.4]})
    later = made(tmp_path / "later.csv", {1: [None, None, 0.4]})
    other = made(tmp_path / "other.csv", {1: [0.5, 0.4]}, task="toy_chase")
    copy = tmp_path / "copy.csv"
    copy.write_bytes(one.read_bytes())
    both = tmp_path / "both.csv"
    both.write_text(one.read_text() + "".join(other.read_text().splitlines(keepends=True)[1:]))
    for words, *parts in (
        ([f"A={tmp_path}/none*"], f"A={tmp_path}/none*: there is no such file"),
        ([f"A={one}", f"B={later}"], "the arms A, B have no steps in common", "--steps"),
        ([f"A={one}", f"A={later}"], "the 2 files of A have no steps in common"),
        ([f"A={one}", f"B={one}"], f"B={one}", "is given twice"),
        ([f"A={one}", f"B={copy}"], f"{copy} and {one} hold the same rows"),
        ([f"A={one}", f"B={other}"], f"{other} is of toy_chase, {one} of toy_chain"),
        ([f"A={both}"], f"{both} holds several tasks (toy_chain, toy_chase): choose one with --task"),
        ([f"A={both}", "--task=gcd"], f"{both} has no rows of gcd by steps, only of toy_chain, toy_chase"),
        ([f"={one}"], "is no arm: expected NAME=GLOB"),
        ([f"A={one}", "--chance=17"], "--chance 17.0 is not legal: expected a share from 0 to 1"),
    ):
        refused(monkeypatch, capsys, words, *parts)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",steps,", ",hops,", "lacks the column steps"),
        ("steps 1,last,1,10,0.5", "steps 1,last,1,10,half", "solved is 'half' in a row of 'steps 1'"),
        ("steps 1,last,1,10,0.5", "steps 1,last,1,10,1.5", "expected a number from 0 to 1"),
        ("steps 1,last,1,10,0.5", "steps 1,last,1,0,0.5", "expected a number of at least 1"),
        ("steps 1,last,1,10,0.5", "steps 1,last,1,10,nan", "solved is 'nan'"),
        ("steps 1,last,1,10,0.5", "steps 1,last,1,10,,0.5", "has other cells than the heading"),
        (",last,", ",on,", "has no rows by steps"),
        ("2,0\n", "1,0\n", "has two rows of 1 segments and 1 steps"),
        ("toy", "\0toy", "is no plain text"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(old, new, message, tmp_path, monkeypatch, capsys):
    path = made(tmp_path / "depth.csv", {1: [0.5, 0.4]})
    assert old in path.read_text(encoding="utf-8")
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    refused(monkeypatch, capsys, [f"A={path}"], message, str(path))


def test_a_folder_without_its_table_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    refused(monkeypatch, capsys, [f"A={tmp_path}/run"], "depth.csv cannot be read: No such file")


def test_files_of_several_tasks_are_drawn_one_task_at_a_time(tmp_path):
    one = made(tmp_path / "one.csv", {1: [0.5, 0.4]})
    other = made(tmp_path / "other.csv", {1: [0.3, 0.2]}, task="toy_chase")
    one.write_text(one.read_text() + "".join(other.read_text().splitlines(keepends=True)[1:]))
    rows = drawn(tmp_path, [f"A={one}", "--task", "toy_chase"])
    assert [row["solved"] for row in rows] == ["0.3", "0.2"]
