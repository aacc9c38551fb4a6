"""tasks.steps: how many steps an item says that it needs."""

from __future__ import annotations

import itertools

import pytest

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
])
def test_what_is_no_number_of_steps_is_none(metadata, steps):
    assert steps_of({"metadata": metadata}) == steps
