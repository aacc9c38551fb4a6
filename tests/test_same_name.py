"""Two processes with one --run_name: one of them refuses, and nothing of the other's is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.beginning import check_untouched, new_name
from engine.checkpoints import step_folder, write_checkpoint
from patience import HANG_S
from tiny_runs import ROOT, arguments, command, error_lines, newest, records

# The command, which waits for a line on stdin once it has loaded everything.
WAITS = """
import sys
import addon_run, train

go = addon_run.AddonRun.go

def waiting(self):
    print("loaded", file=sys.stderr, flush=True)
    sys.stdin.readline()
    return go(self)

addon_run.AddonRun.go = waiting
sys.exit(train.main(sys.argv[1:]))
"""


def waiting(words: list[str]) -> subprocess.Popen:
    """The command in a process of its own, which has loaded and waits."""
    process = subprocess.Popen([sys.executable, "-c", WAITS, *words], cwd=ROOT, encoding="utf-8",
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.stderr.readline() not in ("loaded\n", ""):
        pass
    return process


def everything_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_of_two_that_begin_in_the_same_second_one_refuses(tiny_host, tmp_path):
    words = arguments(tiny_host, tmp_path / "runs", "--run_name", "r", "--max_steps", "30")
    both = [command(*words), command(*words)]
    told = [process.communicate(timeout=HANG_S) for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]

    # The loser says why in a line, and the winner's run is as one alone leaves it.
    loser = [process.returncode for process in both].index(2)
    out, err = told[loser]
    line = err.splitlines()[-1]
    assert out == "" and line.startswith("train.py: error: ") and "by another process" in line
    assert len([line for line in err.splitlines() if "error" in line]) == 1
    assert newest(tmp_path / "runs" / "r").name == "step-00000030"
    steps = [row["step"] for row in records(tmp_path / "runs" / "r")["metrics"]]
    assert steps == list(range(1, 31))


def test_a_run_that_begins_and_ends_while_another_of_its_name_loads_is_not_overwritten(tiny_host, tmp_path):
    words = arguments(tiny_host, tmp_path / "runs", "--run_name", "r")
    late = waiting(words)
    first = command(*words)
    assert first.wait(timeout=HANG_S) == 0
    kept = everything_in(tmp_path / "runs")

    out, err = late.communicate("\n", timeout=HANG_S)
    (line,) = error_lines(err.splitlines()[-1])
    assert late.returncode == 2 and out == "" and "was written by another process while this one loaded" in line
    assert everything_in(tmp_path / "runs") == kept

    # As the line says: the same command goes on with what is there.
    again = command(*words, "--max_steps", "4")
    assert again.wait(timeout=HANG_S) == 0 and newest(tmp_path / "runs" / "r").name == "step-00000004"


@pytest.fixture
def run(tmp_path) -> Path:
    """A run whose checkpoint of step 2 was written last, after it went on from step 1; it has been at step 3."""
    folder = tmp_path / "runs" / "r"
    for step in (1, 3, 2):
        write_checkpoint(step_folder(folder, step), {}, {"a.json": "{}"})
    return folder


@pytest.mark.parametrize(("step", "resume", "run_name", "refused"), [
    (3, None, "r", False),
    (2, None, "r", True),
    (None, None, "r", True),
    (3, "{run}", None, False),
    (2, "{run}", None, True),
    (2, "auto", None, False),
    (3, "auto", None, True),
    (3, "auto", "r", False),
    (2, "auto", "r", True),
    (1, "{run}/checkpoints/step-00000001", None, False),
    (1, "{run}@best", None, False),
])
def test_a_call_goes_on_only_from_where_it_would_go_on_now(run, step, resume, run_name, refused):
    checkpoint = step_folder(run, step) if step else None
    typed = resume.format(run=run) if resume else None
    if not refused:
        check_untouched(run, checkpoint, typed, run_name)
        return
    with pytest.raises(ValueError, match="was written by another process"):
        check_untouched(run, checkpoint, typed, run_name)


def test_weights_of_another_run_begin_in_a_folder_without_checkpoints(run, tmp_path):
    other = step_folder(tmp_path / "runs" / "other", 9)
    write_checkpoint(other, {}, {"a.json": "{}"})
    with pytest.raises(ValueError, match="step-00000003"):
        check_untouched(run, other, str(other), "r")
    check_untouched(tmp_path / "runs" / "new", other, str(other), "new")


def test_runs_without_a_name_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path):
    names = []
    for _ in range(3):
        names.append(new_name(tmp_path, "toy"))
        (tmp_path / names[-1]).mkdir()
    assert len(set(names)) == 3
