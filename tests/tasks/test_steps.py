"""tasks.steps: how many steps an item says that it needs."""

from __future__ import annotations

import itertools
import json

import pytest

from batching import hardest
from own_tasks.choice import steps_problems
from own_tasks.table import OwnDataConfig
from reasoning_gym_wrapper import Task
from tasks.steps import steps_of


@pytest.mark.parametrize(("name", "config", "allowed"), [
    ("toy_chain", {"min_steps": 2, "max_steps": 3}, {2, 3}),
    ("color_cube_rotation", {"min_rotations": 2, "max_rotations": 2}, {2}),
    ("game_of_life", {"grid_size_x": 4, "grid_size_y": 4, "filled_cells_weights": 0.3, "simulation_steps": 3}, {3}),
])
def test_tasks_say_their_steps(name, config, allowed):
    task = Task(name, config)
    assert {steps_of(example.entry) for _, example in itertools.islice(task.items(0), 6)} == allowed


@pytest.mark.parametrize(("metadata", "steps"), [
    ({}, None), ({"steps": "3"}, None), ({"steps": True}, None), ({"steps": 0}, 1), ({"steps": 4}, 4),
    ({"source_dataset": "string_manipulation", "states": ["a", "ab", "b"]}, 2),
    ({"source_dataset": "rotten_oranges", "solution": 3}, 3), ({"source_dataset": "rotten_oranges", "solution": 0}, 1),
    ({"source_dataset": "shortest_path", "solution": ["up", "left"]}, 2),
    # Where nothing reaches the goal, no number of steps is said.
    ({"source_dataset": "rotten_oranges", "solution": -1}, None),
    ({"source_dataset": "shortest_path", "solution": []}, None),
])
def test_what_is_no_number_of_steps_is_none(metadata, steps):
    assert steps_of({"metadata": metadata}) == steps


def test_a_batch_takes_its_steps_from_the_items_that_say_them():
    items = Task("rotten_oranges", {"min_n": 3, "max_n": 3}).items(0)
    examples = [example for _, example in itertools.islice(items, 40)]
    unsolvable = [example for example in examples if example.target == "-1"]
    assert 0 < len(unsolvable) < 40
    assert hardest(examples) == max(int(example.target) for example in examples)
    assert hardest(unsolvable) == 0


def test_a_task_that_starts_with_an_item_without_steps_still_says_them():
    # Half of these grids never rot, the first one among them.
    settings = {"min_n": 3, "max_n": 3}
    config = json.dumps({"rotten_oranges": settings})
    first = [example for _, example in itertools.islice(Task("rotten_oranges", settings).items(0), 20)]
    assert steps_of(first[0].entry) is None and any(steps_of(example.entry) for example in first)
    assert steps_problems(["rotten_oranges"], config, OwnDataConfig()) == []
    assert steps_problems(["chain_sum"], "{}", OwnDataConfig())
