"""tables: one file for several runs; each run's rows are its own, whole lines only, older files go on."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.logs import RunLog
from engine.tables import CSV_HEADER, append, append_rows, check_csv, open_table, rewind_rows

ROOT = Path(__file__).resolve().parents[2]
OLD_HEADER = "step,task,metric,value,n,ci_low,ci_high,bare,segments_used,elapsed_s"


def rows_of(path: Path) -> list[tuple[str, str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return [(row["run"].rpartition("-")[0], row["step"], row["value"]) for row in csv.DictReader(file)]


def row(step: int, value: float = 0.5) -> dict:
    return {"step": step, "task": "a", "metric": "solved", "value": value}


def record(folder: Path, table: Path, *steps: int, after: int | None = None, value: float = 0.5) -> None:
    """What a process of the run in `folder` leaves: it goes on after step `after` and evaluates `steps`."""
    with RunLog(folder, table, [], {}) as log:
        if after is not None:
            log.truncate_after(after)
        for step in steps:
            log.eval_rows([row(step, value)])


def test_resuming_one_run_keeps_the_rows_of_the_others(tmp_path):
    one, two, table = tmp_path / "one", tmp_path / "two", tmp_path / "all.csv"
    record(one, table, 2, 4, 6)
    record(two, table, 2, 4, 6)
    record(one, table, 4, 6, 8, after=2, value=0.75)
    record(two, table, 6, after=4, value=0.25)
    record(one, table, 8, after=6, value=0.75)
    assert sorted(rows_of(table)) == [
        ("one", "2", "0.5"), ("one", "4", "0.75"), ("one", "6", "0.75"), ("one", "8", "0.75"),
        ("two", "2", "0.5"), ("two", "4", "0.5"), ("two", "6", "0.25")]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4), st.integers(1, 4)), max_size=8))
def test_in_any_order_each_run_has_what_it_would_have_alone(tmp_path_factory, calls):
    folder = tmp_path_factory.mktemp("shared")
    expected: dict[str, list[str]] = {}
    for name, after, count in calls:
        steps = range(after + 1, after + 1 + count)
        record(folder / name, folder / "all.csv", *steps, after=after)
        expected[name] = [step for step in expected.get(name, []) if int(step) <= after] + [str(step) for step in steps]
    rows = rows_of(folder / "all.csv") if calls else []
    for name, steps in expected.items():
        assert [step for run, step, _ in rows if run == name] == steps


def test_two_runs_of_one_name_are_told_apart_and_a_moved_one_is_known(tmp_path):
    table = tmp_path / "all.csv"
    record(tmp_path / "x" / "mine", table, 2, 4)
    record(tmp_path / "y" / "mine", table, 2, 4)
    shutil.move(tmp_path / "x" / "mine", tmp_path / "z")
    record(tmp_path / "z", table, 4, after=2, value=0.75)
    assert sorted(rows_of(table)) == [("mine", "2", "0.5"), ("mine", "2", "0.5"), ("mine", "4", "0.5"),
                                      ("mine", "4", "0.75")]


def test_a_copied_run_goes_on_in_a_table_of_its_own(tmp_path):
    record(tmp_path / "one", None, 2, 4)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    record(tmp_path / "two", None, 4, 6, after=2, value=0.75)
    assert rows_of(tmp_path / "two" / "eval.csv") == [("two", "2", "0.5"), ("two", "4", "0.75"), ("two", "6", "0.75")]
    assert rows_of(tmp_path / "one" / "eval.csv") == [("one", "2", "0.5"), ("one", "4", "0.5")]


# --- older tables


def test_a_table_from_before_there_was_a_column_of_runs_goes_on(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "eval.csv").write_text(f"{OLD_HEADER}\n2,a,solved,0.5,,,,,,1\n4,\"a,b\",solved,0.5,,,,,,2\n",
                                     encoding="utf-8")
    record(folder, None, 4, 6, after=2)
    assert rows_of(folder / "eval.csv") == [("mine", "2", "0.5"), ("mine", "4", "0.5"), ("mine", "6", "0.5")]


def test_rows_of_an_older_shared_table_are_nobodys_and_stay(tmp_path):
    table = tmp_path / "all.csv"
    table.write_text(f"{OLD_HEADER}\n2,a,solved,0.5,,,,,,1\n9,a,solved,0.25,,,,,,2\n", encoding="utf-8")
    record(tmp_path / "mine", table, 4, after=2)
    assert rows_of(table) == [("", "2", "0.5"), ("", "9", "0.25"), ("mine", "4", "0.5")]
    with open(table, newline="", encoding="utf-8") as file:
        assert tuple(next(csv.reader(file))) == CSV_HEADER


@pytest.mark.parametrize("header", [
    "task,step,metric,value", "step,task,metric,value,n", OLD_HEADER + "\r", "\ufeff" + OLD_HEADER])
def test_columns_of_ours_in_any_order_are_a_table_of_ours(tmp_path, header):
    table = tmp_path / "all.csv"
    table.write_bytes(f"{header}\n".encode())
    check_csv(table)
    record(tmp_path / "mine", table, 4)
    assert rows_of(table) == [("mine", "4", "0.5")]


@pytest.mark.parametrize("header", [
    "step,task", "step,task,metric,value,value", "step,task,metric,value,mine", "", ","])
def test_other_columns_are_no_table_of_ours(tmp_path, header):
    table = tmp_path / "all.csv"
    table.write_text(header + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="give another --log_csv"):
        check_csv(table)


# --- several processes, crashes


def test_processes_that_append_and_rewind_at_once_tear_and_lose_nothing(tmp_path):
    code = ("import sys, pathlib; from engine import tables as t; path, run = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
            "t.open_table(path, run, False)\n"
            "for step in range(60):\n"
            "    t.append_rows(path, run, [{'step': step, 'task': 'x' * 3000, 'metric': 'm', 'value': 1.0}] * 2)\n"
            "    if step % 10 == 9: t.rewind_rows(path, run, step - 5)\n")
    children = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "all.csv"), run], cwd=ROOT)
                for run in ("one", "two", "three")]
    assert [child.wait() for child in children] == [0, 0, 0]
    with open(tmp_path / "all.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == CSV_HEADER and {len(cells) for cells in rows} == {len(CSV_HEADER)}
    kept = [str(step) for step in range(60) if step % 10 < 5 for _ in range(2)]
    for run in ("one", "two", "three"):
        assert [cells[0] for cells in rows[1:] if cells[-1] == run] == kept


def test_what_another_process_tore_is_cut_before_the_next_row(tmp_path):
    table = tmp_path / "all.csv"
    record(tmp_path / "one", table, 2)
    with RunLog(tmp_path / "two", table, [], {}) as log:
        with open(table, "ab") as file:
            file.write(b"4,a,sol")
        log.eval_rows([row(6)])
    assert rows_of(table) == [("one", "2", "0.5"), ("two", "6", "0.5")]


def test_a_table_that_somebody_deleted_begins_anew_with_its_header(tmp_path):
    table = tmp_path / "all.csv"
    with RunLog(tmp_path / "one", table, [], {}) as log:
        table.unlink()
        log.eval_rows([row(2)])
    assert rows_of(table) == [("one", "2", "0.5")]


def test_a_link_stays_a_link_and_permissions_stay(tmp_path):
    table, link = tmp_path / "all.csv", tmp_path / "link.csv"
    record(tmp_path / "one", table, 2, 4)
    os.chmod(table, 0o664)
    link.symlink_to(table)
    record(tmp_path / "one", link, after=2)
    assert link.is_symlink() and rows_of(table) == [("one", "2", "0.5")] and table.stat().st_mode & 0o777 == 0o664


def test_rewinding_writes_nothing_where_nothing_goes(tmp_path):
    table = tmp_path / "all.csv"
    open_table(table, "one", own=False)
    append_rows(table, "one", [row(2)])
    before = table.stat()
    rewind_rows(table, "one", 2)
    open_table(table, "one", own=False)
    assert (table.stat().st_ino, table.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    append(table, "", header="")
    rewind_rows(tmp_path / "none.csv", "one", 2)
    assert not (tmp_path / "none.csv").exists()
