"""Two-number addition, the built-in task, with Reasoning Gym's interface."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any


@dataclass
class ToyAddConfig:
    """Two-number addition; the built-in task."""

    min_value: int = 0
    max_value: int = 99
    seed: int | None = None
    size: int = 500

    def validate(self) -> None:
        assert 0 <= self.min_value <= self.max_value, "need 0 <= min_value <= max_value"


class ToyAddDataset:
    """Built-in stand-in with Reasoning Gym's interface: `What is a + b?`."""

    def __init__(self, config: ToyAddConfig):
        self.config, self.seed, self.size = config, config.seed or 0, config.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = random.Random(self.seed + index)
        a, b = (draw.randint(self.config.min_value, self.config.max_value) for _ in range(2))
        metadata = {"source_dataset": "toy_add", "source_index": index, "a": a, "b": b}
        return {"question": f"What is {a} + {b}?", "answer": str(a + b), "metadata": metadata}

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        return float(answer is not None and answer.strip() == entry["answer"])
