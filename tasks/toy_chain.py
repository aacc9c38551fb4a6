"""Depth probe: follow pointers from a start to the end of its chain."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from tasks.toy_base import LETTERS, MOST_PAIRS, LettersConfig, StepsDataset, is_legal, pairs_text

ENDS = ("none", "self")


@dataclass
class ToyChainConfig(LettersConfig):
    """Chains of pointers; the start lies `steps` pointers before the end of its own.

    chains: how many there are; a guess among their ends solves one item in so many.
    decoys: chains beside the start's that are as long at every number of steps. Without them its length says from
        three steps on which end is right (with 18 nodes in 6 chains); with N of them a guess by length is right in one
        item of N + 1.
    ends: self = an end points at itself, so that every hop is alike; none = an end points nowhere, one pair less for
        each chain, and the model must learn to stay there.
    """

    chains: int = 6
    decoys: int = 0
    ends: str = "self"

    @property
    def fewest(self) -> int:
        """Nodes that a chain needs to stand in the question at all."""
        return 1 if self.ends == "self" else 2

    def validate(self) -> None:
        super().validate()
        assert self.ends in ENDS, f"ends must be {' or '.join(ENDS)}, got {self.ends!r}"
        assert self.chains >= 1, f"chains must be 1 or more, got {self.chains}"
        assert 0 <= self.decoys < self.chains, f"decoys must be from 0 to {self.chains - 1}, got {self.decoys}"
        assert self.nodes >= self.fewest * self.chains, (
            f"{self.chains} chains with ends {self.ends} need {self.fewest * self.chains} nodes, got {self.nodes}"
        )

        # An end that points nowhere takes no pair.
        pairs = self.nodes if self.ends == "self" else self.nodes - self.chains
        assert pairs <= MOST_PAIRS, (
            f"{self.nodes} nodes in {self.chains} chains with ends {self.ends} are {pairs} pairs, and prompts take at "
            f"most {MOST_PAIRS}: lower nodes by {pairs - MOST_PAIRS}"
        )
        self._check_decoys()
        most = self.nodes - self.fewest * (self.chains - 1) - 1
        assert self.max_steps <= most, (
            f"{self.nodes} nodes in {self.chains} chains with ends {self.ends} leave room for {most} steps, got "
            f"max_steps {self.max_steps}"
        )

    def _check_decoys(self) -> None:
        """Raises AssertionError where the chains that must be as long as the start's do not fit."""
        needed = self.longest * (1 + self.decoys) + self.fewest * (self.chains - 1 - self.decoys)
        assert not self.decoys or needed <= self.nodes, (
            f"{self.decoys} decoys of {self.longest} nodes do not fit {self.nodes} nodes in {self.chains} chains: "
            "lower decoys or max_steps"
        )

    @property
    def longest(self) -> int:
        """Nodes of the start's chain and of each decoy: no other chain has more."""
        return max(self.max_steps + 1, -(-self.nodes // self.chains))

    def at(self, steps: int) -> dict[str, Any]:
        """As `StepsConfig.at`, with as many decoys as there is room for."""
        fields = super().at(steps) | {"decoys": self.decoys}
        while fields["decoys"] and not is_legal(replace(self, **fields)):
            fields["decoys"] -= 1
        return fields

    def shrunk(self, nodes: int) -> dict[str, Any]:
        """Chains of two nodes at least, one step, and decoys while they fit."""
        chains = min(self.chains, nodes // 2)
        decoys = min(self.decoys, chains - 1)
        while decoys and -(-nodes // chains) * (1 + decoys) + self.fewest * (chains - 1 - decoys) > nodes:
            decoys -= 1
        return {"chains": chains, "decoys": decoys}


class ToyChainDataset(StepsDataset):
    """`B>D,A>Q,...:S>`, answered with the letter where the chain of S ends.

    The start's chain has as many nodes as the others while `steps` allows that. With `decoys` it has the nodes that
    `max_steps` needs at every number of steps, and so have as many others.
    """

    name = "toy_chain"

    def draw_steps(self, generator: random.Random, steps: int) -> tuple[str, str]:
        letters = generator.sample(LETTERS[: self.config.letters], self.config.nodes)
        pairs = []
        own: list[str] = []
        for size in self._sizes(steps):
            chain = letters[:size]
            letters = letters[size:]
            own = own or chain  # the first is the start's
            pairs += list(zip(chain, chain[1:], strict=False))
            if self.config.ends == "self":
                pairs.append((chain[-1], chain[-1]))

        start = own[-1 - steps]
        return f"{pairs_text(pairs, generator)}:{start}>", own[-1]

    def _sizes(self, steps: int) -> list[int]:
        """Nodes of the start's chain, then of the others, which share the rest as equally as possible."""
        config = self.config
        own = max(steps + 1, config.nodes // config.chains)
        if config.decoys:
            own = config.longest
        alike = [own] * (1 + config.decoys)
        others = config.chains - len(alike)
        if not others:
            return alike
        share, more = divmod(config.nodes - sum(alike), others)
        return alike + [share + 1] * more + [share] * (others - more)
