"""What follows a batch whose loss or gradient is no number: the run stops, or leaves the batch out and goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_IN_A_ROW = 10  # batches without a number after which the weights, and not a batch, are at fault
SKIP = "skip"


@dataclass(frozen=True)
class NonFiniteConfig:
    """What to do with such a batch; the field is the flag of its name.

    on_nonfinite: stop (the run ends before the step) or skip (the batch's step is left out).
    """

    on_nonfinite: str = "stop"


class LeftOut:
    """Counts the batches that are left out. A checkpoint keeps the count (`document`).

    Every process sees the same loss and the same gradients, since both are exchanged first, and so counts alike.
    """

    def __init__(self, on_nonfinite: str = "stop"):
        self.skips = on_nonfinite == SKIP
        self.count = 0  # in the whole run
        self.row = 0  # one after the other, up to now

    def another(self) -> bool:
        """Counts a batch without a number. True: it is left out; False: the run ends here."""
        if not self.skips:
            return False
        self.row += 1
        if self.row >= MOST_IN_A_ROW:
            return False
        self.count += 1
        return True

    def good(self) -> None:
        """After a batch with numbers: counting in a row begins anew."""
        self.row = 0

    @property
    def metrics(self) -> dict[str, float]:
        """What a line of metrics.jsonl says of it; nothing where the run would stop."""
        return {"batches_left_out": self.count} if self.skips else {}

    def reason(self) -> str:
        """Why the run ends, behind what was found; "" where the first such batch ends it."""
        if not self.row:
            return ""
        return f", the {self.row}th batch in a row without a number (--on_nonfinite skip)"

    def closing(self) -> str:
        """One line for the end of the run, its newline included; "" where no batch was left out."""
        if not self.count:
            return ""
        batches = "batch was" if self.count == 1 else "batches were"
        return f"{self.count} {batches} left out: loss or gradient was no number (--on_nonfinite skip)\n"

    def document(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able."""
        return {"count": self.count, "row": self.row}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Goes on from what `document` gave; an older checkpoint has nothing."""
        self.count = saved.get("count", 0)
        self.row = saved.get("row", 0)
