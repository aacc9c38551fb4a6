"""examples/bare_grids.py: tasks of Reasoning Gym whose questions are the grid alone."""

from __future__ import annotations

import json

import pytest
import reasoning_gym

from examples.bare_grids import without_introduction
from own_tasks.choice import tasks_with_own
from own_tasks.table import OwnDataConfig
from reasoning_gym_wrapper import Reserve
from tasks.plugins import load_plugin
from tasks.steps import steps_of
from test_architecture import ROOT

SETTINGS = {"rotten_oranges": {"min_n": 4, "max_n": 4}, "shortest_path": {"min_rows": 4, "max_rows": 4}}


@pytest.mark.parametrize("name", SETTINGS)
def test_items_are_those_of_the_task_without_what_its_questions_share(name):
    load_plugin(str(ROOT / "examples" / "bare_grids.py"))
    (task,) = tasks_with_own([f"{name}_grid"], json.dumps({f"{name}_grid": SETTINGS[name]}), OwnDataConfig())
    example = next(example for example in Reserve([task], 20).examples if steps_of(example.entry))

    # The question is the matrix, the verifier takes the gold answer and no other, the steps needed are the answer's.
    matrix = example.entry["metadata"]["matrix"]
    assert example.question.split() == [str(cell) for row in matrix for cell in row]
    assert example.verify(example.target).solved and not example.verify("99").solved
    moves = example.target.split()
    assert steps_of(example.entry) == (int(example.target) if moves[0].isdigit() else len(moves))

    # The introduction that is cut off is the same text in all of them.
    items = reasoning_gym.create_dataset(name, seed=1, size=20, **SETTINGS[name])
    introductions = {item["question"].removesuffix(without_introduction(item)["question"]) for item in items}
    assert len(introductions) == 1


def test_a_question_without_a_line_that_announces_the_grid_is_an_error():
    with pytest.raises(ValueError, match="no line that ends in a colon in '1 2'"):
        without_introduction({"question": "1 2"})
