"""ownership: an id that lasts, also where a folder moves or is copied; one process at a time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.checkpoints import step_folder, write_checkpoint
from engine.ownership import RECORD, check_free, claim, known_id, taken

ROOT = Path(__file__).resolve().parents[2]


def id_of(folder: Path) -> str:
    claimed = claim(folder)
    claimed.release()
    return claimed.run


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "my  run, one"
    folder.mkdir()
    return folder


def test_a_run_keeps_its_id_and_another_of_its_name_has_another(run, tmp_path):
    first = id_of(run)
    assert first.startswith("my run, one-") and first == id_of(run) == known_id(run)
    other = tmp_path / "elsewhere" / run.name
    other.mkdir(parents=True)
    assert known_id(other) == "" and id_of(other) != first


def test_a_folder_that_moves_is_the_same_run(run, tmp_path):
    first = id_of(run)
    moved = run.rename(tmp_path / "moved")
    assert id_of(moved) == first
    assert id_of(moved.rename(run)) == first


def test_a_copied_folder_is_another_run_and_the_first_stays_what_it_was(run, tmp_path):
    first = id_of(run)
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    claimed = claim(copy)
    claimed.release()
    assert claimed.before == first != claimed.run and id_of(copy) == claimed.run and id_of(run) == first


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"run": 3}', "\x00\x00", None])
def test_a_lost_or_damaged_record_is_taken_from_the_newest_checkpoint(run, damage):
    claimed = claim(run)
    claimed.release()
    for step in (1, 2):
        write_checkpoint(step_folder(run, step), {}, {RECORD: claimed.document()})
    if damage is None:
        (run / RECORD).unlink()
    else:
        (run / RECORD).write_text(damage, encoding="utf-8")
    assert id_of(run) == claimed.run and json.loads((run / RECORD).read_text(encoding="utf-8"))["run"] == claimed.run


def test_a_checkpoint_from_before_there_were_ids_gives_a_new_one(run):
    write_checkpoint(step_folder(run, 1), {}, {"a.json": "{}"})
    assert id_of(run) == id_of(run)


def test_a_second_writer_is_refused_until_the_first_ends(run):
    first = claim(run)
    for attempt in (claim, check_free):
        with pytest.raises(ValueError, match="another process") as caught:
            attempt(run)
        assert str(caught.value) == taken(run)
    assert claim(run, alone=False).run == first.run, "an evaluation beside the training knows whose it is"
    first.release()
    check_free(run)
    claim(run).release()


def test_a_process_that_is_killed_lets_go(run):
    code = ("import sys, pathlib; from engine.ownership import claim; kept = claim(pathlib.Path(sys.argv[1]))\n"
            "print('has it', flush=True); sys.stdin.read()")
    child = subprocess.Popen([sys.executable, "-c", code, str(run)], cwd=ROOT, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == "has it\n"
    with pytest.raises(ValueError, match="another process"):
        claim(run)
    child.kill()
    child.wait()
    claim(run).release()
