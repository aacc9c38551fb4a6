"""Two-number addition, the built-in task that stands in where Reasoning Gym is missing."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from tasks.toy_base import ToyDataset


@dataclass
class ToyAddConfig:
    """Two-number addition; the built-in task."""

    min_value: int = 0
    max_value: int = 99
    seed: int | None = None
    size: int = 500

    def validate(self) -> None:
        assert 0 <= self.min_value <= self.max_value, "need 0 <= min_value <= max_value"


class ToyAddDataset(ToyDataset):
    """`What is a + b?`"""

    name = "toy_add"

    def draw(self, generator: random.Random) -> tuple[str, str, dict[str, Any]]:
        a = generator.randint(self.config.min_value, self.config.max_value)
        b = generator.randint(self.config.min_value, self.config.max_value)
        return f"What is {a} + {b}?", str(a + b), {"a": a, "b": b}
