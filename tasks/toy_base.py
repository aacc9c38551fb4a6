"""What the built-in tasks share: Reasoning Gym's interface, and one knob for the number of steps."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_TOKENS = 76  # characters of a question, one token each: with the chat template under 80 of the embedded LLM
# (nodes, letters) of a curriculum's first levels. With as many letters as nodes, a few thousand questions are all there
# are, and they are learnt by heart.
FEW = ((4, 6), (6, 8), (8, 10), (10, 12), (13, 15), (16, 18), (18, 22))
MOST_PAIRS = 18  # pairs `A>B,` of four tokens each, and up to five more for what is asked


class ToyDataset:
    """The items of a built-in task: `draw` makes one from a generator that depends on seed + index alone.

    A subclass sets `name` and writes `draw`.
    """

    name = ""

    def __init__(self, config: Any):
        self.config = config
        self.seed = config.seed or 0
        self.size = config.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        question, answer, facts = self.draw(random.Random(self.seed + index))
        metadata = {"source_dataset": self.name, "source_index": index, **facts}
        return {"question": question, "answer": answer, "metadata": metadata}

    def draw(self, generator: random.Random) -> tuple[str, str, dict[str, Any]]:
        """Question, answer, and what the metadata hold beside their source."""
        raise NotImplementedError

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        """1.0 for the answer itself, white space around it aside, else 0.0."""
        return float(answer is not None and answer.strip() == entry["answer"])


@dataclass
class StepsConfig:
    """The knob of every depth probe: how many steps an item needs, drawn uniformly from `min_steps` to `max_steps`."""

    min_steps: int = 1
    max_steps: int = 4
    seed: int | None = None
    size: int = 500

    def validate(self) -> None:
        """Raises AssertionError, one line for the user."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                is_whole = isinstance(value, int) and not isinstance(value, bool)
                assert is_whole, f"{field.name} must be a whole number, got {value!r}"
        assert 1 <= self.min_steps <= self.max_steps, (
            f"need 1 <= min_steps <= max_steps, got {self.min_steps} and {self.max_steps}"
        )

    def levels(self) -> list[dict[str, Any]]:
        """The fields that each level of a curriculum sets: one more step at each, up to `max_steps`."""
        return [{"max_steps": most} for most in range(self.min_steps, self.max_steps + 1)]

    def at(self, steps: int) -> dict[str, Any]:
        """The fields of items that need exactly so many steps."""
        return {"min_steps": steps, "max_steps": steps}

    def is_new(self, metadata: Mapping[str, Any]) -> bool:
        """Whether an item is of those that this level adds to the one below."""
        return metadata["steps"] == self.max_steps


@dataclass
class LettersConfig(StepsConfig):
    """A probe of pointers between letters. Its first levels have few nodes of few letters, at the fewest steps.

    nodes: letters that an item holds.
    letters: how many of the alphabet, from A on, they are drawn from.
    """

    nodes: int = MOST_PAIRS
    letters: int = len(LETTERS)

    def validate(self) -> None:
        super().validate()
        assert self.letters <= len(LETTERS), f"letters must be {len(LETTERS)} or fewer, got {self.letters}"
        assert self.nodes <= self.letters, f"nodes must be at most the {self.letters} letters, got {self.nodes}"

    def levels(self) -> list[dict[str, Any]]:
        """First few nodes of few letters, more of them at each level; then, with all of them, one more step at each.

        A model learns to find a letter among 8 within a few hundred batches. Among 26 it does not begin to.
        """
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        levels = []
        for nodes, letters in FEW:
            fields = {"nodes": nodes, "letters": letters, "max_steps": self.min_steps, **self.shrunk(nodes)}
            is_smaller = nodes <= self.nodes and letters < self.letters
            if is_smaller and is_legal(type(self)(**own | fields)):
                levels.append(fields)
        back = {name: own[name] for name in (levels[0] if levels else ())}
        return levels + [back | level for level in super().levels()]

    def shrunk(self, nodes: int) -> dict[str, Any]:
        """Further fields of a level of so many nodes."""
        return {}


def is_legal(config: StepsConfig) -> bool:
    """Whether a config passes its own checks."""
    try:
        config.validate()
    except AssertionError:
        return False
    return True


class StepsDataset(ToyDataset):
    """Items of a depth probe. A subclass writes `draw_steps`."""

    def draw(self, generator: random.Random) -> tuple[str, str, dict[str, Any]]:
        low = self.config.min_steps
        high = self.config.max_steps
        steps = generator.randint(low, high)

        # Items of other steps must differ in more than these, or levels evaluate variants of the same few items.
        own = random.Random(f"{generator.getrandbits(64)} {steps}")
        question, answer = self.draw_steps(own, steps)
        return question, answer, {"steps": steps, "difficulty": {"steps": (low, high)}}

    def draw_steps(self, generator: random.Random, steps: int) -> tuple[str, str]:
        """Question and answer of an item that needs so many steps."""
        raise NotImplementedError


def pairs_text(pairs: list[tuple[str, str]], generator: random.Random) -> str:
    """`A>B,C>D`: the pairs in random order."""
    shuffled = list(pairs)
    generator.shuffle(shuffled)
    return ",".join(f"{source}>{target}" for source, target in shuffled)
