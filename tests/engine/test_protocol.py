"""By which protocol an evaluation was made: kept with it, and what is read back never mixes two of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.figures import read_solved
from engine.logs import RunLog
from engine.page import other_protocols, readings, task_lines
from engine.protocol import key_of, measured_by_others, protocol_flags, read_protocols, typed
from engine.report import metric_row, prediction_line, stamped
from engine.run_records import read_run

OWN = {"arch": "addon", "answer_from": "text", "few_shot": 0, "eval_only": False, "seed": 3, "system_header": None}


def evaluate(folder: Path, flags: dict, second: float, solved: float, n: int) -> None:
    """Records an evaluation of step 3 as a call with `flags` does."""
    rows = [metric_row("sums", "solved", solved, n, interval=(0.1, 0.9), bare=0.25)]
    if flags["few_shot"]:
        rows.append(metric_row("sums", "bare_few_shot_strict", 0.5, n))
    lines = [prediction_line("sums", index, f"q{index}", f"at {second}", 1.0) for index in range(n)]
    with RunLog(folder, None, [], flags, alone=not flags["eval_only"]) as log:
        log.evaluation(3, stamped(rows, 3, second), stamped(lines, 3), {"model": 9})


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that measured itself, with few-shot answers of the bare LLM, as its flags say."""
    folder = tmp_path / "run"
    evaluate(folder, OWN | {"few_shot": 2}, 60.1234567, 0.5, 4)
    text = "model:\n  arch: addon\nevaluation:\n  few_shot: 2\n"
    (folder / "config.resolved.yaml").write_text(text, encoding="utf-8")
    return folder


def test_a_line_holds_the_protocol_and_belongs_to_the_rows_of_its_second(run):
    (protocol,) = read_protocols(run).values()
    assert protocol.flags == {"answer_from": "text", "few_shot": 2, "system_header": None}
    assert protocol.tokens == {"model": 9} and not protocol.alone
    records = read_run(run)
    assert {key_of(row) for row in records.rows} == set(read_protocols(run)) == {(3.0, 60.1235)}
    assert protocol.other_than(records.flags) == {} and measured_by_others(run) == set()


def test_another_protocol_is_named_and_nothing_of_two_evaluations_is_mixed(run):
    other = OWN | {"answer_from": "boxed", "system_header": "Hello you", "eval_only": True}
    evaluate(run, other, 70.0, 0.75, 3)
    records = read_run(run)
    assert other_protocols(records) == [("sums", "--system_header 'Hello you' --answer_from boxed --few_shot 0")]
    assert readings(records) == "boxed"
    assert [line.who for line in task_lines(records)] == ["bare LLM", "LLM + HRM"], "no few-shot line of before"
    assert [item.text for item in records.items] == ["at 70.0"] * 3
    points = read_solved(records.csv_path, records.run, measured_by_others(run))
    assert [row["value"] for row in points["sums"]] == [0.5]

    # More items by the run's own protocol are a point of its curve.
    evaluate(run, OWN | {"few_shot": 2, "eval_only": True}, 80.0, 0.6, 5)
    records = read_run(run)
    assert other_protocols(records) == [] and len(records.items) == 5
    assert [line.who for line in task_lines(records)][1] == "bare LLM, 2-shot"
    assert measured_by_others(run) == {(3.0, 70.0)}


def test_rewinding_drops_the_protocol_with_its_rows(run):
    with RunLog(run, None, [], OWN) as log:
        log.truncate_after(3)
        assert len(read_protocols(run)) == 1
        log.truncate_after(3, evaluate=True)
        assert read_protocols(run) == {} and read_run(run).rows == []


def test_a_run_without_such_lines_is_taken_as_its_flags_say(run):
    (run / "evaluations.jsonl").unlink()
    records = read_run(run)
    assert read_protocols(run) == {} and other_protocols(records) == [] and readings(records) == "text"


def test_flags_are_written_as_they_are_typed():
    assert typed({"verifier_strict": False, "system_header": None, "sentinel": "a\n b"}) == (
        "--verifier_strict 0 --system_header none --sentinel 'a b'"
    )
    assert protocol_flags({"arch": "hybrid", "answer_from": "text", "hrm_gate_scale": 0.0}) == {"hrm_gate_scale": 0.0}
