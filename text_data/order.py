"""An endless random order: epochs joined end to end, each shuffled anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class EpochOrder:
    """The numbers 0 to length - 1 in endless epochs, each in an order that is a function of `seed` and the epoch alone.

    Any stretch can be asked for, so that a resumed run goes on where it was. One epoch's order is in memory: 4 bytes a
    number. Not safe to use from several threads.
    """

    def __init__(self, length: int, seed: Sequence[int]):
        self.length = length
        self.seed = tuple(seed)
        self._epoch = -1
        self._order = np.zeros(0, np.uint32)

    def stretch(self, start: int, count: int) -> np.ndarray:
        """(count,) uint32: what stands at the places `start` to `start + count` of all epochs joined end to end."""
        parts = [np.zeros(0, np.uint32)]
        missing = count
        while missing > 0:
            # A stretch may begin in one epoch and end in the next, or in a later one.
            epoch, place = divmod(start + count - missing, self.length)
            if epoch != self._epoch:
                order = np.arange(self.length, dtype=np.uint32)
                np.random.default_rng([*self.seed, epoch]).shuffle(order)
                self._order = order
                self._epoch = epoch

            part = self._order[place : place + missing]
            parts.append(part)
            missing -= len(part)
        return np.concatenate(parts)
