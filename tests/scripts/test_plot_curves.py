"""scripts/plot_curves.py and figures.py: what is read of a run, and figures that are told apart without colour."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.figures import new_figure, save_figure, style
from engine.logs import RunLog

ROOT = Path(__file__).resolve().parent.parent.parent
spec = importlib.util.spec_from_file_location("plot_curves", ROOT / "scripts" / "plot_curves.py")
script = importlib.util.module_from_spec(spec)
sys.modules["plot_curves"] = script
spec.loader.exec_module(script)


def made_run(folder: Path, tasks: tuple[str, ...], rise: float) -> Path:
    """A run as `RunLog` leaves it."""
    with RunLog(folder, None, [], {}) as log:
        for step in range(1, 31):
            log.log(step, loss=2.0 - rise * step, answer_loss=1.0 - rise * step / 2)
            if step % 10 == 0:
                log.eval_rows([{"step": step, "task": task, "metric": metric, "value": rise * step, "n": 9,
                                "ci_low": rise * step / 2, "ci_high": min(2 * rise * step, 1), "bare": 0.03,
                                "segments_used": 2} for task in tasks for metric in ("solved", "mean_score")])
    return folder


def test_a_run_is_read_as_it_was_logged(tmp_path):
    run = made_run(tmp_path / "run", ("gcd", "lcm"), 0.01)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 31, "elapsed_s": 1, "loss": null}\n{"step": 32, "el')
    with open(run / "eval.csv", "a", encoding="utf-8") as file:
        file.write("40,gcd,solved\n")
    found = script.read_run(run, "mine")
    assert list(found.solved) == ["gcd", "lcm"]
    assert [(row["step"], row["value"]) for row in found.solved["gcd"]] == [(10, 0.1), (20, 0.2), (30, 0.3)]
    assert [row["value"] for row in found.loss] == pytest.approx([1.0 - 0.005 * step for step in range(1, 31)])


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=30), st.integers(1, 40))
def test_smoothing_is_the_mean_of_the_last_values(values, window):
    found = script.smoothed(values, window)
    for place, value in enumerate(found):
        part = [values[i] for i in range(len(values)) if place - window < i <= place]
        assert value == pytest.approx(sum(part) / len(part))


@pytest.mark.parametrize("x", ["step", "minutes"])
def test_runs_are_compared_in_png_and_svg(tmp_path, capsys, x):
    runs = [made_run(tmp_path / name, ("gcd",), rise) for name, rise in (("one", 0.01), ("two", 0.02))]
    output = tmp_path / "figures" / "compare.v1"
    assert script.main([*map(str, runs), "--output", str(output), "--x", x, "--labels", "first,second"]) == 0
    png, svg = (Path(line) for line in capsys.readouterr().out.split())
    assert (png.name, svg.name) == ("compare.v1.png", "compare.v1.svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text(encoding="utf-8")
    colours = set(re.findall(r"#[0-9a-fA-F]{6}", text))
    assert colours and all(len({c[1:3], c[3:5], c[5:7]}) == 1 for c in map(str.lower, colours)), "grey alone"
    assert "first" in text and "second" in text and "gcd, solved" in text
    assert not list(output.parent.glob(".tmp-*"))


def test_curves_differ_in_dash_marker_and_tone():
    looks = [style(index, 5) for index in range(5)]
    for key in ("linestyle", "marker", "color"):
        assert len({json.dumps(look[key]) for look in looks}) == 5, key
    assert all(0 <= float(look["color"]) <= 0.7 for look in looks), "dark enough for white paper"
    assert style(0, 1)["color"] == "0.0"


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path):
    figure, (axes,) = new_figure(1)
    axes.plot([1, 2], [1, 2])
    save_figure(figure, [tmp_path / "a.png"])
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(ValueError, match="not supported"):
        save_figure(figure, [tmp_path / "a.nonsense"])
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_every_folder_that_is_no_run_is_told_at_once(tmp_path, capsys, monkeypatch):
    good = made_run(tmp_path / "good", ("gcd",), 0.01)
    (tmp_path / "empty").mkdir()
    with RunLog(tmp_path / "young", None, [], {}):
        pass
    names = [str(tmp_path / name) for name in ("empty", "young")]
    monkeypatch.setattr(sys, "argv", ["plot_curves.py", str(good), *names, "--output", str(tmp_path / "out")])
    assert script.run_script(script.main) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "empty is no run: expected eval.csv or metrics.jsonl" in first and "young has recorded nothing yet" in second
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(SystemExit):
        script.main([str(good), "--labels", "a,b"])
