"""Rows of own data, and a plugin, for tests."""

from __future__ import annotations

import itertools
import json

PLUGIN = '''
from dataclasses import dataclass

@dataclass
class Config:
    top: int = 50
    seed: int | None = None
    size: int = 500

class Doubles:
    def __init__(self, config):
        self.config = config
    def __getitem__(self, index):
        number = ((self.config.seed or 0) + index) * 7919 % self.config.top
        return {"question": f"Twice {number}?", "answer": str(2 * number), "metadata": {}}
    def score_answer(self, answer, entry):
        return float(answer == entry["answer"])
'''


def sums(n: int) -> list[dict]:
    """`n` distinct sums, in a fixed order."""
    pairs = itertools.islice(itertools.product(range(40), repeat=2), n)
    return [{"question": f"{a} and {b}?", "answer": a + b, "id": a} for a, b in pairs]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
