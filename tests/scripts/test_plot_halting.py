"""plot_halting.py: what halting saves and costs, by the steps that an item needs."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
spec = importlib.util.spec_from_file_location("plot_halting", ROOT / "scripts" / "plot_halting.py")
script = importlib.util.module_from_spec(spec)
sys.modules["plot_halting"] = script
spec.loader.exec_module(script)

NAMES = ("task", "difficulty", "readout", "segments", "solved", "segments_used", "steps", "beyond_training",
         "confidence_error")


def write(path: Path, used: dict[int, float], halted: float = 0.9, whole: float = 1.0, segments: int = 8,
          readout: str = "on", error: object = "") -> Path:
    """A depth.csv with halting: `used` segments by steps; 2 steps are trained."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(NAMES)
        table.writerow(("toy_chain", "all", readout, segments, halted, 3, "", "", error))
        for steps, count in used.items():
            beyond = int(steps > 2)
            table.writerow(("toy_chain", f"steps {steps}", readout, segments, halted, count, steps, beyond, error))
            table.writerow(("toy_chain", f"steps {steps}", "last", segments, whole, segments, steps, beyond, error))
            table.writerow(("toy_chain", f"steps {steps}", "best_halt", segments, 0, 0, steps, beyond, error))
    return path


def test_savings_and_losses_are_means_over_seeds_and_steps(tmp_path, capsys):
    one = write(tmp_path / "one" / "depth" / "depth.csv", {1: 1, 2: 2, 3: 6})
    two = write(tmp_path / "two.csv", {1: 1, 2: 4, 3: 8}, halted=1.0)
    assert script.main([str(one.parent.parent), str(two), "--readout", "on", "--output",
                        str(tmp_path / "out" / "halting")]) == 0
    text = (tmp_path / "out" / "halting.md").read_text(encoding="utf-8")
    assert "| steps | 1 | 2 | 3+ |" in text and "| segments used | 1.0 | 3.0 | 7.0 |" in text
    assert "| solved with halting, % | 95 | 95 | 95 |" in text and "| solved with all 8, % | 100 | 100 | 100 |" in text
    assert "Over the trained steps: 75 % of 8 segments saved at -5.0 points." in text
    assert "Over all of these steps: 54 % of 8 segments saved at -5.0 points." in text
    assert (tmp_path / "out" / "halting.png").read_bytes().startswith(b"\x89PNG")
    assert text in capsys.readouterr().out


def test_stopping_what_has_settled_is_the_default_and_says_how_well_it_is_calibrated(tmp_path):
    one = write(tmp_path / "one.csv", {1: 2, 3: 6}, readout="settled", error=0.01)
    two = write(tmp_path / "two.csv", {1: 2, 3: 6}, readout="settled", error=0.03)
    assert script.main([str(one), str(two), "--output", str(tmp_path / "halting")]) == 0
    text = (tmp_path / "halting.md").read_text(encoding="utf-8")
    assert "| segments used | 2.0 | 6.0 |" in text
    assert text.endswith("Calibration error of the answers' own probability: 0.020.\n")


def test_a_file_of_several_tasks_needs_the_name_of_one(tmp_path):
    path = write(tmp_path / "depth.csv", {1: 2, 3: 6}, readout="settled", error=0.01)
    other = write(tmp_path / "other.csv", {1: 8, 3: 8}, readout="settled").read_text(encoding="utf-8")
    more = other.replace("toy_chain", "toy_chase").splitlines(keepends=True)[1:]
    path.write_text(path.read_text(encoding="utf-8") + "".join(more), encoding="utf-8")
    with pytest.raises(ValueError, match="has the tasks toy_chain, toy_chase: choose one by --task"):
        script.main([str(path)])
    assert script.main([str(tmp_path), "--task", "toy_chain", "--output", str(tmp_path / "halting")]) == 0
    assert "| segments used | 2.0 | 6.0 |" in (tmp_path / "halting.md").read_text(encoding="utf-8")


def test_files_without_halting_or_without_common_ground_are_refused(tmp_path):
    plain = tmp_path / "plain.csv"
    plain.write_text(",".join(NAMES) + "\ntoy_chain,steps 1,last,8,1,8,1,0,\n", encoding="utf-8")
    for readout, told in (("on", "train with --use_act 1"), ("settled", "--halt_settled X")):
        with pytest.raises(ValueError, match=f"has no rows by steps of the readout {readout}: .*{told}"):
            script.main([str(plain), "--readout", readout])
    lines = plain.read_text(encoding="utf-8").replace(",last,", ",settled,")
    plain.write_text(lines, encoding="utf-8")
    with pytest.raises(ValueError, match="has no rows by steps of the readout last"):
        script.main([str(plain)])
    one = write(tmp_path / "one.csv", {1: 1})
    with pytest.raises(ValueError, match="not every file was measured with 16 segments"):
        script.main([str(one), "--readout", "on", "--segments", "16"])
    other = write(tmp_path / "other.csv", {2: 1})
    with pytest.raises(ValueError, match="no steps in common"):
        script.main([str(one), str(other), "--readout", "on"])
    with pytest.raises(SystemExit) as ended:
        script.parse([str(one), str(one)])
    assert ended.value.code == 2
