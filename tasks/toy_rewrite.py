"""Depth probe: cancel equal neighbours, round after round, until there are none."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tasks.toy_base import MOST_TOKENS, StepsConfig, StepsDataset

ALPHABET = "ABDEF"  # no two of them, nor one twice, are one token of the embedded LLM


@dataclass
class ToyRewriteConfig(StepsConfig):
    """Words that take `steps` rounds; all are as long, whatever their steps.

    pairs: pairs of letters that cancel.
    kept: letters that are left.
    """

    pairs: int = 16
    kept: int = 3

    def validate(self) -> None:
        super().validate()
        assert self.kept >= 1, f"kept must be 1 or more, got {self.kept}"
        most = (MOST_TOKENS - len(">") - self.kept) // 2
        assert self.pairs <= most, f"pairs must be {most} or fewer beside {self.kept} kept letters, got {self.pairs}"
        assert self.max_steps <= self.pairs, (
            f"a round cancels a pair or more: {self.pairs} pairs take {self.pairs} steps at most, got max_steps "
            f"{self.max_steps}"
        )


@dataclass
class Nest:
    """A pair of equal letters and the pairs between them, in order."""

    depth: int
    inner: list[Nest] = field(default_factory=list)


class ToyRewriteDataset(StepsDataset):
    """`ABBDDFA...>`, answered with what is left.

    In one round, from left to right, each letter cancels with its right neighbour where the two are equal and neither
    is gone. Whatever the order, the same letters are left; pairs inside pairs must go first, so rounds are depths.
    """

    name = "toy_rewrite"

    def draw_steps(self, generator: random.Random, steps: int) -> tuple[str, str]:
        # Equal letters may meet before the pair between them was to go, so a word is tried and drawn anew.
        while True:
            kept = _letters_apart(self.config.kept, generator)
            word = self._word(kept, steps, generator)
            if rounds(word) == (steps, kept):
                return f"{word}>", kept

    def _word(self, kept: str, steps: int, generator: random.Random) -> str:
        """The kept letters with nests of depth `steps` or less between them."""
        # One nest as deep as it must be; the other pairs stand anywhere that is no deeper.
        root = Nest(0)
        open_nests = [root]
        for depth in range(1, steps + 1):
            nest = Nest(depth)
            open_nests[-1].inner.append(nest)
            open_nests.append(nest)
        del open_nests[-1]
        for _ in range(self.config.pairs - steps):
            outer = generator.choice(open_nests)
            nest = Nest(outer.depth + 1)
            outer.inner.insert(generator.randint(0, len(outer.inner)), nest)
            if nest.depth < steps:
                open_nests.append(nest)

        # The outermost nests fall into the gaps around the kept letters.
        gaps = sorted(generator.randint(0, len(kept)) for _ in root.inner)
        word = ""
        for place in range(len(kept) + 1):
            nests = [nest for nest, gap in zip(root.inner, gaps, strict=True) if gap == place]
            after = kept[place : place + 1]
            word += _spelt(nests, word[-1:], after, generator) + after
        return word


def _spelt(nests: list[Nest], before: str, after: str, generator: random.Random) -> str:
    """Nests side by side with letters unlike those next to them, so that nothing cancels early there."""
    text = ""
    for nest in nests:
        free = [letter for letter in ALPHABET if letter not in (before, after)]
        letter = generator.choice(free)
        text += letter + _spelt(nest.inner, letter, letter, generator) + letter
        before = letter
    return text


def _letters_apart(n: int, generator: random.Random) -> str:
    """`n` letters of which no two neighbours are equal."""
    text = ""
    while len(text) < n:
        letter = generator.choice(ALPHABET)
        if letter != text[-1:]:
            text += letter
    return text


def rounds(word: str) -> tuple[int, str]:
    """How many rounds cancel something, and what is left."""
    count = 0
    while True:
        left = one_round(word)
        if left == word:
            return count, word
        word = left
        count += 1


def one_round(word: str) -> str:
    """The word without the equal neighbours of now."""
    left = ""
    place = 0
    while place < len(word):
        if word[place : place + 1] == word[place + 1 : place + 2]:
            place += 2
            continue
        left += word[place]
        place += 1
    return left
