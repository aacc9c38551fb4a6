"""The add-on's training batches: drawn from a stream of items, grouped by length, shared among processes."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

from batching import Batch, PromptFormat, places_of
from engine.batches import Padding, token_batches
from engine.stopping import drawn
from reasoning_gym_wrapper import Example

TOKEN_WINDOW = 16  # batches of `size` examples whose items are drawn together for token batches, or more


class TrainBatches:
    """Endless training batches of `size` examples per rank, grouped by length so that little is spent on padding.

    `window` batches are drawn together, sorted by prompt length, cut into batches and put in random order; every rank
    draws the same items and keeps its share. With `tokens` a batch has as many examples as `token_batches` puts into so
    many tokens, in place of `size`: then `parts` gives it.

    The position is a small JSON-able state, the same on every rank. Batches of another size, or of another number of
    ranks, go on from it with the items that were in no batch yet: none is left out, none comes twice.

    Raises (from `next`):
        ValueError: with `overlong="error"`, an example longer than the format's max_seq_len.
    """

    def __init__(
        self,
        stream: Any,
        prompt_format: PromptFormat,
        size: int,
        window: int = 1,
        seed: int = 0,
        overlong: str = "error",
        rank: int = 0,
        world: int = 1,
        tokens: int = 0,
    ):
        self.stream = stream
        self.format = prompt_format
        self.size = size
        self.window = max(window, TOKEN_WINDOW) if tokens else window
        self.tokens = tokens
        self.seed = seed
        self.overlong = overlong
        self.rank = rank
        self.world = world

        # The position: where the stream stood when the window was drawn, the window's number, the next batch in it.
        self._start = stream.state_dict()
        self._windows = -1
        self._place = 0
        self._batches: list[list[list[Example]]] = []  # each of one or more parts

        # A position in batches of another cut, whose last items begin the window at hand, or the next one.
        self._before: dict[str, Any] | None = None
        self._left: list[Example] = []
        self.padding = Padding()

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        (batch,) = self.parts()
        return batch

    def parts(self) -> list[Batch]:
        """The next batch, with `tokens` in one or more parts of like length, else in one."""
        if self._place >= len(self._batches):
            self._open()
        self._place += 1

        parts = [self.format.batch(part[self.rank :: self.world]) for part in self._batches[self._place - 1]]
        self.padding.add(sum(part.tokens for part in parts), sum(part.columns for part in parts))
        return parts

    @property
    def latest(self) -> list[Example]:
        """The items of the newest batch, of all ranks."""
        return [example for part in self._batches[self._place - 1] for example in part]

    def _open(self) -> None:
        """Draws the next window."""
        if not self._left:
            self._before = None
        self._start = self.stream.state_dict()
        self._windows += 1
        self._place = 0
        self._batches = []

        # What batches of another cut left over comes first, all of it in one window.
        per_batch = self.size * self.world
        examples = self._left
        self._left = []
        count = per_batch * max(self.window, -(-len(examples) // per_batch))
        while len(examples) < count:
            examples = examples + self._fitting(drawn(self.stream, count - len(examples)))

        # Batches of similar prompt length, in random order, so that lengths do not follow each other in training.
        if self.tokens:
            prompts = self.format.prompt_lengths(examples)
            whole = self.format.lengths(examples)
            targets = [length - prompt for length, prompt in zip(whole, prompts, strict=True)]
            cut = token_batches(prompts, targets, self.tokens, self.world)
            for batch in cut:
                self._batches.append([[examples[index] for index in part] for part in batch])
        elif self.window > 1:
            lengths = self.format.prompt_lengths(examples)
            examples = [examples[index] for index in sorted(range(len(examples)), key=lengths.__getitem__)]
        if not self.tokens:
            self._batches = [[examples[start : start + per_batch]] for start in range(0, len(examples), per_batch)]
        random.Random(f"{self.seed}/{self._windows}").shuffle(self._batches)

    def _fitting(self, drawn: list[Example]) -> list[Example]:
        """Those of the drawn examples that have at most max_seq_len tokens."""
        limit = self.format.max_seq_len
        lengths = self.format.lengths(drawn)
        if self.overlong == "error" and max(lengths) > limit:
            longest = drawn[lengths.index(max(lengths))]
            place = places_of([longest])
            raise ValueError(
                f"a training example of {max(lengths)} tokens{place and f' ({place})'} is longer than --max_seq_len "
                f"{limit}: raise it, or leave such items out with --overlong drop"
            )
        return [example for example, length in zip(drawn, lengths, strict=True) if length <= limit]

    @property
    def _cut(self) -> dict[str, int]:
        """What a window's batches depend on, beside the stream and the seed."""
        return {"size": self.size, "world": self.world, "window": self.window, "tokens": self.tokens}

    def state_dict(self) -> dict[str, Any]:
        """The position, JSON-able."""
        if self._left:  # loaded, and no window was drawn since
            assert self._before is not None
            return self._before
        state = {"stream": self._start, "windows": self._windows, "place": self._place, "cut": self._cut}
        if self._before:
            state["before"] = self._before
        if self.tokens:
            state["padding"] = asdict(self.padding)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position that `state_dict` returned."""
        self.padding = Padding(**state.get("padding", {}))
        cut = state.get("cut", self._cut)  # a position from before it was noted is one in batches as these
        if _kind(cut) == _kind(self._cut):
            self._go_to(state)
            return

        # The old batches are drawn once more; those that were not handed out are cut anew.
        self._left = self._left_at(state)
        self._before = state if self._left else None
        self._start = self.stream.state_dict()
        self._windows = state["windows"]
        self._place = 0
        self._batches = []

    def _left_at(self, state: dict[str, Any]) -> list[Example]:
        """The items of a position's window that were in no batch yet; the stream stands behind them."""
        cut = state["cut"]
        world = cut["world"]

        other = TrainBatches(
            self.stream, self.format, cut["size"], cut["window"], self.seed, self.overlong, 0, world, cut["tokens"]
        )
        other._go_to(state)

        return [example for batch in other._batches[other._place :] for part in batch for example in part]

    def _go_to(self, state: dict[str, Any]) -> None:
        """Goes to a position in batches as these."""
        self._before = state.get("before")
        self._left = []
        if self._before:
            self._left = self._left_at(self._before)
        else:
            self.stream.load_state_dict(state["stream"])
        self._start = state["stream"]
        self._windows = state["windows"]
        self._place = state["place"]

        # Draw the window again, also where it is used up: the stream must stand behind it.
        self._batches = []
        if self._windows >= 0:
            place = self._place
            self._windows -= 1
            self._open()
            self._place = place


def _kind(cut: dict[str, int]) -> tuple[int, ...]:
    """Equal for batches of the same items in the same order; token batches depend on the number of ranks itself."""
    world = cut["world"] if cut["tokens"] else 1
    return cut["size"] * cut["world"], cut["window"], cut["tokens"], world
