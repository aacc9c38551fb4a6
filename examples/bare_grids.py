"""Two of Reasoning Gym's tasks without the introduction that all their questions share: the grid alone is the question.

    python train.py --plugin examples/bare_grids.py --task rotten_oranges_grid --task_config '{"min_n": 4, "max_n": 4}'
    python scripts/which_tasks_need_depth.py configs/depth/bare_grids.yaml --plugin examples/bare_grids.py

The introduction is four fifths of the tokens of a 5 x 5 grid's question, and the same for all items of a task. Items,
answers and verifiers are those of the tasks `rotten_oranges` and `shortest_path`, and so are their settings.
"""

from reasoning_gym.algorithmic.rotten_oranges import RottenOrangesConfig, RottenOrangesDataset
from reasoning_gym.graphs.shortest_path import ShortestPathConfig, ShortestPathDataset


def without_introduction(item: dict) -> dict:
    """The item, its question cut to what stands below the line that announces the grid."""
    introduction, colon, grid = item["question"].rpartition(":\n")
    if not colon:
        raise ValueError(f"no line that ends in a colon in {item['question']!r}")
    return item | {"question": grid}


class RottenOrangesGrid(RottenOrangesDataset):
    """The minutes until all oranges of a grid are rotten, -1 where some never are."""

    def __getitem__(self, index: int) -> dict:
        return without_introduction(super().__getitem__(index))


class ShortestPathGrid(ShortestPathDataset):
    """The moves of a shortest path from * to #, `infeasible` where there is none."""

    def __getitem__(self, index: int) -> dict:
        return without_introduction(super().__getitem__(index))


TASKS = {
    "rotten_oranges_grid": (RottenOrangesGrid, RottenOrangesConfig),
    "shortest_path_grid": (ShortestPathGrid, ShortestPathConfig),
}
