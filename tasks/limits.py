"""How long a task's own code may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TimeLimits:
    """Seconds of wall-clock time that one call of a task's own code may take, 0 = no limit; each is a flag.

    draw_timeout_s: making an item; one that takes longer is passed over.
    score_timeout_s: scoring an answer; one that takes longer is wrong.
    """

    draw_timeout_s: float = 60.0
    score_timeout_s: float = 10.0


USUAL = TimeLimits()  # where nobody set others
