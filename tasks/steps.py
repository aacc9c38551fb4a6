"""How many steps an item needs, where its task says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Where the metadata of Reasoning Gym's tasks hold it: a number, or a list of one entry for each step.
KEYS = {
    "color_cube_rotation": "rotations",
    "game_of_life": "simulation_steps",
    "rotten_oranges": "solution",  # minutes until all are rotten, -1 where some never are
    "shortest_path": "solution",  # the moves, none where there is no path
    "string_manipulation": "states",  # the string as given, then after each rule
}


def steps_of(entry: Mapping[str, Any]) -> int | None:
    """Steps that the item `entry` needs, 1 or more (0 counts as 1); None where its task does not say.

    A grid on which nothing spreads to the goal does not say: only looking everywhere tells that. An item of the user's
    own file says it in a field `steps`.
    """
    metadata = entry.get("metadata", {})
    task = metadata.get("source_dataset", "")
    value = metadata.get(KEYS.get(task, "steps"), metadata.get("row", {}).get("steps"))
    if isinstance(value, list | tuple):
        value = len(value) - (task == "string_manipulation")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        return None
    if task == "shortest_path" and not value:
        return None
    return max(value, 1)
