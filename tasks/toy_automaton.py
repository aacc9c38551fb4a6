"""Depth probe: track the order of a few objects through a list of moves (the word problem of a symmetric group)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tasks.toy_base import LETTERS, MOST_TOKENS, StepsConfig, StepsDataset

# Adjacent letters of an order must not be one token: the embedded LLM's tokenizer knows CD, LC, SC and HE.
OBJECTS = "".join(letter for letter in LETTERS if letter not in "CH")


@dataclass
class ToyAutomatonConfig(StepsConfig):
    """`steps` moves of `objects` letters that stand in a row. All their orders can be reached: 120 for 5 objects."""

    objects: int = 5

    def validate(self) -> None:
        super().validate()
        assert 3 <= self.objects <= 9, f"objects must be from 3 to 9, got {self.objects}"
        most = MOST_TOKENS - self.objects - len(":>")
        assert self.max_steps <= most, f"max_steps must be {most} or fewer, got {self.max_steps}"


class ToyAutomatonDataset(StepsDataset):
    """`KABFE:20134>`, answered with the order after these moves.

    Move 0 takes the first letter to the end. Move i swaps the letters at places i and i + 1, counted from 1. No swap
    stands twice in a row, as the two would do nothing.
    """

    name = "toy_automaton"

    def draw_steps(self, generator: random.Random, steps: int) -> tuple[str, str]:
        start = generator.sample(OBJECTS, self.config.objects)
        row = list(start)
        moves: list[int] = []
        while len(moves) < steps:
            move = generator.randrange(self.config.objects)
            if move and moves[-1:] == [move]:
                continue
            moves.append(move)
            if move:
                row[move - 1], row[move] = row[move], row[move - 1]
            else:
                row.append(row.pop(0))

        return f"{''.join(start)}:{''.join(map(str, moves))}>", "".join(row)
