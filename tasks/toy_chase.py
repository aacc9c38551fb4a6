"""Depth probe: follow pointers as many times as the question says, so that hops must be counted too."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tasks.toy_base import LETTERS, MOST_PAIRS, LettersConfig, StepsDataset, pairs_text

MAPS = ("cycle", "permutation", "function")
MOST_HOPS = 99  # two digits


@dataclass
class ToyChaseConfig(LettersConfig):
    """Each letter points at one; `steps` hops from the start.

    map: cycle = one cycle through all of them, so that no hop comes back early; permutation = any, with short cycles;
        function = each points anywhere.
    """

    map: str = "cycle"

    def validate(self) -> None:
        super().validate()
        assert self.map in MAPS, f"map must be {', '.join(MAPS[:-1])} or {MAPS[-1]}, got {self.map!r}"
        assert 2 <= self.nodes <= MOST_PAIRS, f"nodes must be from 2 to {MOST_PAIRS}, got {self.nodes}"
        assert self.max_steps <= MOST_HOPS, f"max_steps must be {MOST_HOPS} or fewer, got {self.max_steps}"
        assert self.map != "cycle" or self.max_steps < self.nodes, (
            f"a cycle of {self.nodes} nodes is back at its start after {self.nodes} steps, got max_steps "
            f"{self.max_steps}: lower it, or choose map permutation"
        )


class ToyChaseDataset(StepsDataset):
    """`A>C,B>F,...:S7>`, answered with the letter 7 hops from S."""

    name = "toy_chase"

    def draw_steps(self, generator: random.Random, steps: int) -> tuple[str, str]:
        letters = generator.sample(LETTERS[: self.config.letters], self.config.nodes)
        targets = self._targets(letters, generator)
        start = generator.choice(letters)

        node = start
        for _ in range(steps):
            node = targets[node]
        return f"{pairs_text(list(targets.items()), generator)}:{start}{steps}>", node

    def _targets(self, letters: list[str], generator: random.Random) -> dict[str, str]:
        """Where each letter points."""
        if self.config.map == "cycle":
            targets = letters[1:] + letters[:1]
        elif self.config.map == "permutation":
            targets = generator.sample(letters, len(letters))
        else:
            targets = generator.choices(letters, k=len(letters))
        return dict(zip(letters, targets, strict=True))
