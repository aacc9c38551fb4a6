"""report: rows, predictions, tables and closing words as every system writes them."""

from __future__ import annotations

import shlex
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from engine.report import (
    AnswerLine,
    Card,
    TaskLines,
    closing_words,
    format_table,
    metric_row,
    percent,
    prediction_line,
    stamped,
    text_table,
)
from engine.tables import EVAL_HEADER
from generate import build_parser


def test_a_stamped_row_has_every_column_of_the_csv():
    (row,) = stamped([metric_row("toy", "solved", 0.5, 8, interval=(0.2, 0.8), bare=0.1, segments_used=2)], 7, 1.5)
    assert set(row) == set(EVAL_HEADER)
    assert (row["step"], row["elapsed_s"], row["ci_low"], row["ci_high"]) == (7, 1.5, 0.2, 0.8)
    assert metric_row("toy", "loss", 1.0, 3)["ci_low"] is None


def test_a_prediction_says_which_item_it_answers():
    (line,) = stamped([prediction_line("toy", 3, "Q  1", "A", 1.0, bare_score=None)], 9)
    assert (line["step"], line["id"], line["task"], line["bare_score"]) == (9, "toy/00003", "toy", None)
    assert line["prompt_hash"] == prediction_line("toy", 0, "q 1", "", 0.0)["prompt_hash"]
    assert "elapsed_s" not in line


CELLS = st.lists(st.lists(st.text("abc", max_size=6), min_size=3, max_size=3), min_size=1, max_size=5)


@given(CELLS)
def test_columns_of_a_table_begin_where_their_heading_does(rows):
    lines = text_table(rows, "<><").split("\n")
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for line, row in zip(lines, rows, strict=True):
        line = line.ljust(sum(widths) + 4)
        assert line[: widths[0]].rstrip() == row[0]
        assert line[widths[0] + 2 : widths[0] + 2 + widths[1]] == row[1].rjust(widths[1])
        assert line[widths[0] + widths[1] + 4 :].rstrip() == row[2]


def test_least_widths_hold_where_cells_are_short():
    assert text_table([("a", "b"), ("c", "d")], "<>", (4, 3)) == "a       b\nc       d"


def test_shares_are_percents_with_their_interval():
    assert percent(0.412) == "41.2 %" and percent(0.5, (0.25, 0.75)) == "50.0 % [25.0, 75.0]"


def test_the_command_that_follows_survives_a_shell_and_stays_on_one_line():
    words = closing_words(Path("r/eval.csv"), Path("my runs/step-1"), None, "What's\n 1 + 1?")
    assert words.split("\n") == [
        "evaluation: r/eval.csv", "checkpoint: my runs/step-1",
        "next:       python generate.py --checkpoint 'my runs/step-1' --compare --prompt 'What'\"'\"'s 1 + 1?'"]
    assert closing_words(Path("e"), None, None, None) == "evaluation: e"
    for question in ("-5 + 3 = ?", "-5"):
        shown = closing_words(Path("e"), Path("c"), None, question).split("next:")[1]
        assert build_parser().parse_args(shlex.split(shown)[2:]).prompt == [question], "no flag, for all its minus"


def test_a_card_without_an_evaluation_has_no_table():
    assert Card("peft", ["hrm", "grpo"], "T", "; tasks x.", "Load it.").text(3) == (
        "---\nlibrary_name: peft\ntags: [hrm, grpo]\n---\n\n# T\n\nStep 3; tasks x.\nLoad it.\n")


BARE = AnswerLine("bare LLM", 256, 5, 18, 40)
OURS = AnswerLine("LLM + HRM", 256, 182, 182, 0)
TASKS = [TaskLines("chain_sum", [BARE, OURS], 0.64, "extracted"),
         TaskLines("toy", [AnswerLine("LLM + HRM", 8, 8, 8, 8)]),
         TaskLines("worse", [AnswerLine("bare LLM", 10, 5, 5, 0), AnswerLine("bare, 3-shot", 10, 4, 6, 2),
                             AnswerLine("LLM + HRM", 10, 6, 6, 0)], -0.0001, "3-shot extracted")]


def test_the_closing_table_is_fixed_width_text():
    lines = format_table(TASKS).split("\n")
    assert lines[0].split() == ["task", "n", "answers", "of", "strict", "extracted", "cut", "gain"]
    assert lines[1] == "chain_sum          256  bare LLM      2.0 % [0.8, 4.5]       7.0 % [4.5, 10.8]       40"
    ours = "71.1 % [65.3, 76.3]    71.1 % [65.3, 76.3]      0  +64.0 over extracted"
    assert lines[2] == " " * 24 + "LLM + HRM     " + ours
    assert lines[3].split() == ["toy", "8", "LLM", "+", "HRM", *["100.0", "%", "[67.6,", "100.0]"] * 2, "8", "-"]
    assert lines[5].split()[:2] == ["bare,", "3-shot"] and lines[6].endswith(" 0  +0.0 over 3-shot extracted")
    for line in lines[1:]:
        assert line[lines[0].index("strict") - 1] == line[lines[0].index("extracted") - 1] == " "


def test_chance_stands_once_beside_each_task():
    lines = format_table([TaskLines("sums", [BARE, OURS], 0.64, "strict", chance=0.051), TASKS[1]]).split("\n")
    assert lines[0].endswith("chance") and lines[1].endswith("5.1 %") and lines[2].endswith("over strict")
    assert lines[3].endswith("-")
