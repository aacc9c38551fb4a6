"""scripts/audit_verifiers.py: what scorers accept, within a limit of time; rows that are kept, and compared with."""

from __future__ import annotations

import json
import os
from importlib.metadata import version

import pytest

import audit_report
import audit_task
import audit_verifiers as script
import reasoning_gym_wrapper as rg
from audit_probes import probes_of, says
from patience import HANG_S
from tasks.built_in import BUILT_IN
from tasks.toy_add import ToyAddConfig, ToyAddDataset
from verify.table import RULES, Rule

ITEMS = 4


def row_of(name: str, items: int = ITEMS, draws: int = 6, budget_s: float = 120.0) -> dict:
    return audit_task.audit(name, items, draws, budget_s)


class Odd(ToyAddDataset):
    """Sums whose scorer accepts any text that begins with the gold answer, and prints; one item holds a huge number."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        item["metadata"]["big"] = 2**80 if index == 1 else 1
        return item

    def score_answer(self, answer, entry):
        print("scoring")
        return float(answer.startswith(entry["answer"]))


@pytest.fixture
def odd(monkeypatch):
    monkeypatch.setattr(rg, "registry", lambda: {"odd": (Odd, ToyAddConfig)})


@pytest.fixture
def in_this_process(monkeypatch):
    """Measures in this process, which a registered task needs; the calls are listed."""
    calls = []

    def measured(name, items, draws, seconds, before=None):
        calls.append((name, items))
        return row_of(name, items, draws)

    monkeypatch.setattr(script, "measured", measured)
    monkeypatch.setattr(script, "registry", rg.registry)
    return calls


def test_what_a_scorer_accepts_is_found(odd):
    row = row_of("odd")
    accepted = audit_task.wrongly_accepted(row, 1)
    for probe in ("gold, a digit behind", "gold, then a wrong one (line)", "gold or a wrong one"):
        assert accepted[probe] == 1.0
    assert not {"not GOLD", "a wrong one, then gold", "constant 'yes'", "gold, sign flipped"} & set(accepted)
    assert row["probes"]["gold"][:3] == [ITEMS, ITEMS, ITEMS]
    assert row["prints"] and row["not_arrow"] == 1 and row["gold_none"] == 0 and not row["out_of_time"]
    assert (row["scored"], row["draws"]) == (ITEMS, 6) and row["reasoning_gym"] == version("reasoning-gym")


def test_known_faults_of_reasoning_gyms_scorers_are_found():
    assert audit_task.wrongly_accepted(row_of("coin_flip"), 1)["gold, first character"] == 1.0
    logic = row_of("propositional_logic")
    assert logic["probes"]["input: two of premises joined"][1] == ITEMS and logic["gold_none"] == ITEMS
    assert row_of("complex_arithmetic")["probes"]["constant 'nan'"][1] == ITEMS


def test_time_that_runs_out_leaves_a_row_that_says_so():
    row = row_of("chain_sum", items=10**6, budget_s=0.3)
    assert row["out_of_time"] and 0 < row["items"] < 10**6


class Hanging(ToyAddDataset):
    """Scores in one endless step, which no exception ends."""

    def score_answer(self, answer, entry):
        return sum(range(10**15))


class Broken(ToyAddDataset):
    def score_answer(self, answer, entry):
        os._exit(3)


def test_a_process_that_hangs_or_dies_is_ended_and_named(monkeypatch):
    tasks = {"hanging": (Hanging, ToyAddConfig), "broken": (Broken, ToyAddConfig)}
    monkeypatch.setattr(rg, "registry", lambda: tasks)
    monkeypatch.setattr(audit_task, "registry", lambda: tasks)
    monkeypatch.setattr(script, "GRACE_S", 0.2)
    for busy in (0.1, HANG_S):  # ended by the clock on the wall, and by its CPU time
        monkeypatch.setattr(script, "BUSY", busy)
        row = script.measured("hanging", 5, 5, 0.2)
        assert row["out_of_time"] and row["failure"] == "ended after 0.4 s inside one step of its code"
    row = script.measured("broken", 5, 5, 0.2)
    assert row["failure"] == "its process died"
    assert "not measured: its process died" in audit_report.page({"chain_sum": row | {"task": "chain_sum"}}, [])
    assert script.measured("nowhere", 5, 5, 0.2)["failure"].startswith("TaskError: unknown task 'nowhere'")


def test_rows_are_kept_and_a_second_run_measures_only_what_is_missing(in_this_process, tmp_path):
    rows, page = tmp_path / "deep" / "rows.jsonl", tmp_path / "tasks.md"
    argv = ["--items", "3", "--draws", "5", "--rows", str(rows), "--page", str(page)]
    assert script.main([*argv, "--tasks", "coin_flip"]) == 0
    assert script.main([*argv, "--tasks", "coin_flip,chain_sum"]) == 0
    assert in_this_process == [("coin_flip", 3), ("chain_sum", 3)]
    assert [json.loads(line)["task"] for line in rows.read_text(encoding="utf-8").splitlines()] == [
        "chain_sum", "coin_flip"]
    text = page.read_text(encoding="utf-8")
    assert f"reasoning_gym {version('reasoning-gym')}" in text
    assert "100 %" in next(line for line in text.splitlines() if line.startswith("| coin_flip |"))
    assert "codeio" in text.split("Not measured: ")[1]
    assert script.main([*argv, "--tasks", "coin_flip", "--again"]) == 0
    assert len(in_this_process) == 3


def test_other_strict_rules_measure_the_strict_verdict_alone(odd, monkeypatch, tmp_path):
    monkeypatch.setitem(RULES, "odd", Rule("digits alone", lambda answer, entry: answer.isdigit()))
    row = row_of("odd")
    assert audit_task.wrongly_accepted(row, 2) == {"gold, a digit behind": 1.0}
    monkeypatch.setitem(RULES, "odd", Rule("the gold", lambda answer, entry: answer == entry["answer"]))
    monkeypatch.setattr(audit_task, "_scored", lambda *given: pytest.fail("asked the scorer"))
    again = audit_task.audit_strictly(row, 60)
    assert audit_task.wrongly_accepted(again, 2) == {}
    assert audit_task.wrongly_accepted(again, 1) == audit_task.wrongly_accepted(row, 1)
    assert again["probes"]["gold"][:3] == [ITEMS, ITEMS, ITEMS] and again["chance"] < 1


def test_a_row_goes_through_the_process_of_its_task(odd, monkeypatch):
    monkeypatch.setattr(audit_task, "registry", rg.registry)
    row = script.measured("odd", ITEMS, 6, 60)
    assert row["scored"] == row["judged"] == ITEMS
    assert script.measured("odd", ITEMS, 6, 60, row) == row


def test_check_names_what_changed(in_this_process, tmp_path, capsys, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    argv = ["--rows", str(rows), "--page", str(tmp_path / "page.md"), "--tasks", "chain_sum,coin_flip"]
    assert script.main([*argv, "--items", "12", "--draws", "0"]) == 0
    assert script.main([*argv, "--check"]) == 0
    assert f"2 tasks are as {rows} says" in capsys.readouterr().out

    table = script.read_rows(rows)
    asked, accepted, solved, _ = table["coin_flip"]["first"]["gold, first character"]
    table["coin_flip"]["first"]["gold, first character"] = [asked, 0, 9 - solved, 0]
    table["chain_sum"]["first"]["gold"][2] = 9
    table["chain_sum"]["reasoning_gym"] = "0.0.1"
    script.write_rows(rows, table.values())
    assert script.main([*argv[:-1], "chain_sum,coin_flip,maze", "--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "maze: not in the table",
        f"reasoning_gym {version('reasoning-gym')} is installed, the table is of 0.0.1: run make audit",
        "chain_sum: right: gold: accepted by the scorer 10 times (table: 10), solved 10 times (table: 9), of 10",
        f"coin_flip: gold, first character: accepted by the scorer {accepted} times (table: 0), solved {solved} times "
        f"(table: {9 - solved}), of {asked}",
    ]
    monkeypatch.setattr(script, "version", lambda: "9.9")
    assert script.main([*argv, "--check"]) == 1
    assert "reasoning_gym 9.9 is installed" in capsys.readouterr().out


def test_a_table_that_is_not_there_cannot_be_compared_with(tmp_path):
    with pytest.raises(ValueError, match="has no rows to compare with: run without --check first"):
        script.main(["--check", "--rows", str(tmp_path / "none.jsonl")])


def test_programs_run_only_when_they_are_named():
    names = script.chosen_tasks(None)
    assert "codeio" not in names and "toy_add" not in names and len(names) > 100
    assert script.chosen_tasks("codeio, maze, toy_chain") == ["codeio", "maze", "toy_chain"]
    assert not set(names) & set(BUILT_IN)
    with pytest.raises(ValueError, match="unknown task 'chain_sun'"):
        script.chosen_tasks("chain_sun")


@pytest.mark.parametrize(("text", "gold", "same"), [("Yes", " yes ", True), ("7.0", "7", True), ("7", "8", False),
                                                    ("nan", "nan", True), ("not 7", "7", False), ("1e999", "x", False)])
def test_a_probe_that_says_the_gold_answer_is_no_wrong_one(text, gold, same):
    assert says(text, gold) is same


def test_probes_leave_out_what_is_right():
    example = next(rg.Task("toy_add").items(0))[1]
    probes = probes_of(example, example.target, example.target)
    assert probes["gold"] == example.target and "commonest gold" not in probes
    assert not any("then a wrong one" in probe for probe in probes)
    assert probes["input: the question"] == example.question




def test_the_committed_table_is_of_the_installed_reasoning_gym():
    rows = script.read_rows(script.ROWS)
    assert audit_report.changes(rows, {}, script.chosen_tasks(None), version("reasoning-gym")) == []
    assert f"reasoning_gym {version('reasoning-gym')} " in script.PAGE.read_text(encoding="utf-8")
